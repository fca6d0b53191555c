// The tile loop: a block of 128 threads forms sums over the columns of 64 rows of X against 64 rows of Y, in float32,
// then hands them to whoever visits the tile. No score is written to memory on the way.
//
// In the loop a thread owns 4 x 8 pairs. For the visit the sums are laid out in shared memory, and threads walk along
// the rows of the tile, so that what a visitor reads and writes in memory is coalesced.
#pragma once

#include "device.cuh"

namespace mmkern {
inline namespace device {

constexpr int kTile = 64;  // rows of X, and of Y
constexpr int kTileThreads = 128;
constexpr int kDepth = 16;  // columns at a time
constexpr int kSpan = 8;    // neighbours that a thread loads at a time
constexpr int kThreadRows = 4, kThreadCols = 8;
constexpr int kVisits = kTile * kTile / kTileThreads;  // pairs that a thread visits

// A row-major matrix, columns dense.
struct Matrix {
  const void* data;
  i64 rows, cols, stride;  // stride between rows, in elements
  Dtype dtype;
  int vectors;  // rows begin and end at multiples of 16 bytes

  // Zeros past the end.
  MMKERN_FN void load(float (&v)[kSpan], i64 row, i64 col) const {
#pragma unroll
    for (int k = 0; k < kSpan; ++k) v[k] = 0;
    if (row >= rows) return;
    const char* from = static_cast<const char*>(data) + (row * stride + col) * bytes_of(dtype);
    if (!vectors) {
#pragma unroll
      for (int k = 0; k < kSpan; ++k)
        if (col + k < cols) v[k] = load_one(from, k, dtype);
    } else if (dtype == kFloat32) {
#pragma unroll
      for (int k = 0; k < kSpan; k += 4)
        if (col + k < cols) load_four(v + k, from + 4 * k);
    } else if (col < cols) {
      load_eight(v, from, dtype);
    }
  }

  MMKERN_FN float load_one_at(i64 row, i64 col) const {
    return row < rows && col < cols ? load_one(data, row * stride + col, dtype) : 0;
  }
};

// A thread's place in the loop: rows row() .. +3, and columns col(0 .. 7).
struct Place {
  int thread;
  MMKERN_FN int row() const { return thread / 8 * kThreadRows; }
  MMKERN_FN int col(int j) const { return j / 4 * (kTile / 2) + thread % 8 * 4 + j % 4; }
};

// One slice of the two operands of a tile, kDepth deep; `second` is loaded along its own columns in a product.
struct Slice {
  float first[kDepth][kTile];
  float second[kDepth][kTile];

  MMKERN_FN void read(int depth, Place at, float (&x)[kThreadRows], float (&y)[kThreadCols]) const {
    load_four(x, &first[depth][at.row()]);
    load_four(y, &second[depth][at.col(0)]);
    load_four(y + 4, &second[depth][at.col(4)]);
  }
};

MMKERN_FN void put_four(float* to, const float* v) { *reinterpret_cast<float4*>(to) = float4{v[0], v[1], v[2], v[3]}; }

// Runs a loop over slices, the next one on its way from memory while this one is worked on. Stage has load(depth),
// which fetches into registers, and put(slice), which writes to shared memory; step(slice) does the work.
template <class Stage, class Step>
MMKERN_FN void for_each_slice(Slice (&slices)[2], i64 depth, Stage& stage, Step step) {
  int now = 0;
  stage.load(0);
  stage.put(slices[0]);
  __syncthreads();
  for (i64 k = 0; k < depth; k += kDepth) {
    const bool more = k + kDepth < depth;
    if (more) stage.load(k + kDepth);
    step(slices[now]);
    now = 1 - now;
    if (more) stage.put(slices[now]);
    __syncthreads();
  }
}

struct Dots {
  static constexpr int count = 1;
  static MMKERN_FN void add(float x, float y, float (&s)[count]) { s[0] = fma(x, y, s[0]); }
};

// x.d and |d|^2 with d = y - x: exact where x and y are near.
struct Differences {
  static constexpr int count = 2;
  static MMKERN_FN void add(float x, float y, float (&s)[count]) {
    const float d = y - x;
    s[0] = fma(x, d, s[0]);
    s[1] = fma(d, d, s[1]);
  }
};

struct ScoreShared {
  union {
    Slice slices[2];
    float sums[2][kTile][kTile];
  };
  float parts[2][2][kTile];  // |x|^2 and |y|^2 of the tile's rows, from two halves of the threads
};

// Brings 64 rows of X and of Y, transposed: lanes hold different rows, so that writes meet no bank twice.
struct ScoreStage {
  const Matrix &x, &y;
  i64 x_row, y_row;
  int depth;  // of this thread within the slice
  float xs[kSpan], ys[kSpan];
  float xx = 0, yy = 0;  // of this thread's columns

  MMKERN_FN void load(i64 k) {
    x.load(xs, x_row, k + depth);
    y.load(ys, y_row, k + depth);
  }
  MMKERN_FN void put(Slice& to) {
    const int row = int(threadIdx.x) % kTile;
    float x_part = 0, y_part = 0;  // a long sum is a sum of parts: less rounding
#pragma unroll
    for (int k = 0; k < kSpan; ++k) {
      to.first[depth + k][row] = xs[k];
      to.second[depth + k][row] = ys[k];
      x_part = fma(xs[k], xs[k], x_part);
      y_part = fma(ys[k], ys[k], y_part);
    }
    xx += x_part;
    yy += y_part;
  }
};

struct ScoreTile {
  Matrix x, y;
  i64 row, col;  // of the tile
  ScoreShared& shared;

  MMKERN_FN float xx(int i) const { return shared.parts[0][0][i] + shared.parts[0][1][i]; }
  MMKERN_FN float yy(int j) const { return shared.parts[1][0][j] + shared.parts[1][1][j]; }

  // Leaves Term's sums of all pairs, and the squared norms, in shared memory.
  template <class Term>
  MMKERN_FN void accumulate() const {
    const int thread = int(threadIdx.x), member = thread % kTile, half = thread / kTile;
    const Place at{thread};
    ScoreStage stage{x, y, row + member, col + member, half * kSpan, {}, {}};
    float sums[kThreadRows][kThreadCols][Term::count] = {};
    for_each_slice(shared.slices, x.cols, stage, [&](const Slice& slice) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        float xs[kThreadRows], ys[kThreadCols];
        slice.read(d, at, xs, ys);
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
          for (int j = 0; j < kThreadCols; ++j) Term::add(xs[i], ys[j], sums[i][j]);
      }
    });
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < kThreadCols; j += 4)
#pragma unroll
        for (int n = 0; n < Term::count; ++n) {
          const float four[4] = {sums[i][j][n], sums[i][j + 1][n], sums[i][j + 2][n], sums[i][j + 3][n]};
          put_four(&shared.sums[n][at.row() + i][at.col(j)], four);
        }
    shared.parts[0][half][member] = stage.xx;
    shared.parts[1][half][member] = stage.yy;
    __syncthreads();
  }
};

// A thread's n-th pair in a visit. A warp's pairs lie in one row, side by side.
struct Visited {
  int n;
  MMKERN_FN int row() const { return n * (kTileThreads / kTile) + int(threadIdx.x) / kTile; }
  MMKERN_FN int col() const { return int(threadIdx.x) % kTile; }
};

}  // namespace device
}  // namespace mmkern
