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

  MMKERN_FN bool has(int i, int j) const { return row + i < x.rows && col + j < y.rows; }
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

// ---- What a tile leaves of each of its rows and of its columns ------------------------------------------------------

struct PlainSum {
  float total;

  static MMKERN_FN PlainSum none() { return {0}; }
  // Of what the lanes of a warp bring.
  static MMKERN_FN PlainSum of_warp(float x) {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
    return {x};
  }
  MMKERN_FN void add(float x) { total += x; }
  MMKERN_FN void add(PlainSum other) { total += other.total; }
  MMKERN_FN float get() const { return total; }
};

// Of exponentials, below the largest exponent; that of nothing is -inf.
struct LogSum {
  float top, total;

  static MMKERN_FN LogSum none() { return {-infinity(), 0}; }
  static MMKERN_FN LogSum of_warp(float x) {
    float top = x;
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, lanes));
    return {top, PlainSum::of_warp(expf(x - base(top))).total};
  }
  MMKERN_FN void add(float x) { add(LogSum{x, 1}); }
  MMKERN_FN void add(LogSum other) {
    const float high = fmaxf(top, other.top), below = base(high);
    total = fma(total, expf(top - below), other.total * expf(other.top - below));
    top = high;
  }
  MMKERN_FN float get() const { return base(top) + logf(total); }

 private:
  // Infinite where nothing was added, or +inf: no base, as in logsumexp.
  static MMKERN_FN float base(float top) { return fabsf(top) < infinity() ? top : 0; }
};

template <class Sum>
struct SumsShared {
  Sum rows[2][kTile];  // from the two warps that visit a row
  Sum cols[2][kTile];  // from the two threads that visit a column
};

// Made before the tile loop, whose barriers part it from the visits.
template <class Sum>
struct TileSums {
  SumsShared<Sum>& shared;
  Sum of_col;

  MMKERN_FN explicit TileSums(SumsShared<Sum>& shared) : shared(shared), of_col(Sum::none()) {
    if (threadIdx.x < kTile) shared.rows[0][threadIdx.x] = shared.rows[1][threadIdx.x] = Sum::none();
  }
  // All threads call it at each of their visits.
  MMKERN_FN void add(Visited at, float to_row, float to_col) {
    const int thread = int(threadIdx.x);
    const Sum of_row = Sum::of_warp(to_row);
    if (thread % kWarp == 0) shared.rows[thread / kWarp % 2][at.row()].add(of_row);
    of_col.add(to_col);
  }
  // To the block's place in row_parts [tiles of Y, N] and col_parts [tiles of X, M].
  MMKERN_FN void store(const ScoreTile& tile, float* row_parts, float* col_parts) {
    const int side = int(threadIdx.x) / kTile, k = int(threadIdx.x) % kTile;
    shared.cols[side][k] = of_col;
    __syncthreads();
    Sum(&parts)[2][kTile] = side == 0 ? shared.rows : shared.cols;
    Sum all = parts[0][k];
    all.add(parts[1][k]);
    const i64 row = tile.row + k, col = tile.col + k;
    if (side == 0) {
      if (row < tile.x.rows) row_parts[i64(blockIdx.x) * tile.x.rows + row] = all.get();
    } else {
      if (col < tile.y.rows) col_parts[i64(blockIdx.y) * tile.y.rows + col] = all.get();
    }
  }
};

}  // namespace device
}  // namespace mmkern
