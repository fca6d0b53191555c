// The tile loop S = X Y^T, the core of every op that compares all rows with all rows. A cache block of S is handed to
// an epilogue as soon as it is complete, and overwritten by the next: S never reaches memory.
//
// Y is packed in panels of [depth][cols] slivers, X in blocks of rows; 16-bit types become float on the way. A register
// tile of rows x cols sums over a depth of at most 192 at a time. Then the partial sums meet in the cache block, which
// costs 1 % and keeps the rounding error at that of a blocked sgemm (a single chain of 512 terms has twice that).
//
// What bounds it: on a core with 256-bit registers the register tile needs 12 fma instructions for 8 loads, so it runs
// at the rate of the fma units: 97 % of their peak from L1, 96 % in place, 41 to 42.5 GFLOP/s where MKL's sgemm reaches
// 41 to 42 (2048 x 2048 x 512, one thread). An epilogue log1p(t + sqrt(t (t + 2))) costs another 6 %. With 512-bit
// registers the tile reaches the peak as well, and the product 96 % of MKL's 130 GFLOP/s. Block sizes matter little: 48
// to 192 rows, 128 to 512 columns and depths of 192 or 256 are within 1 %, a depth of 64 costs 6 %; with 512-bit
// registers a panel of half the second cache gains 2 % over a whole one, 8 % over two. Prefetching is no gain. Packing
// Y by scalar stores costs 2.4 ns an element, by transposing in registers 1.0.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "parallel.h"
#include "rows.h"
#include "simd.h"

namespace mmkern {
inline namespace MMKERN_ISA {

template <class T>
struct TileShape {
#if defined(MMKERN_AVX512) || defined(__aarch64__)
  static constexpr int rows = 12;  // 24 of 32 registers hold sums
#else
  static constexpr int rows = 6;  // 12 of 16 registers hold sums
#endif
  static constexpr int row_step = rows / 3;  // the last tile has a multiple of these
  static constexpr int cols = 2 * Vec<T>::size;
  static constexpr int depth = 192;
  // A cache block. Few rows, so that short inputs still make a block for every thread.
  static constexpr int block_rows = 48;
  static constexpr int block_cols = 256;
  // Of its rows in memory, in an odd number of cache lines: a column of the block then lies in all sets of a cache.
  static constexpr int block_stride = block_cols + 64 / int(sizeof(T));
  static constexpr int64_t panel_bytes = int64_t(1) << 19;  // of packed Y, at least block_cols columns
};

// Memory of one thread, kept for its next call.
class ThreadBuffer {
 public:
  ThreadBuffer() = default;
  ThreadBuffer(const ThreadBuffer&) = delete;
  ThreadBuffer& operator=(const ThreadBuffer&) = delete;
  ~ThreadBuffer() { free(data_); }

  // n elements, aligned to a page; what was there is lost
  template <class T>
  T* reserve(int64_t n) {
    const size_t bytes = size_t(n) * sizeof(T);
    if (bytes > bytes_) {
      free(data_);
      if (posix_memalign(&data_, 4096, bytes) != 0) abort();
      bytes_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

inline thread_local ThreadBuffer packed_columns, packed_rows, cache_block;

MMKERN_FN int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MMKERN_FN int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
MMKERN_FN int64_t up_to(int64_t multiple, int64_t n) { return blocks_of(n, multiple) * multiple; }

// A place for sums: to[i * ld + j] = sum, or += sum.
template <class T>
struct Into {
  T* to;
  int64_t ld;
  bool adds;

  MMKERN_FN void operator()(int64_t i, int64_t j, Vec<T> sum) const {
    T* const at = to + i * ld + j;
    (adds ? sum + Vec<T>::load(at) : sum).store(at);
  }
};

// Whether a sink takes the sums of a row of a register tile at once, and not a vector at a time.
template <class Sink>
inline constexpr bool takes_rows = false;

// Scalar: for (i < rows) for (j < kVecs * W) into(i0 + i, j0 + j, Σ_k x[i][k] * y[k][j]), k in [0, depth)
// x[i][k] lies at i * kRow + k * kDepth, y[k][j] at k * y_stride + j.
template <class T, int rows, int kVecs, int kRow, int kDepth, class Sink>
MMKERN_FN void register_tile(const T* x, const T* y, int64_t y_stride, int64_t depth, int64_t i0, int64_t j0,
                             const Sink& into) {
  constexpr int W = Vec<T>::size;
  Vec<T> acc[rows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < kVecs; ++v) acc[i][v] = Vec<T>(T(0));
  for (int64_t k = 0; k < depth; ++k, x += kDepth, y += y_stride) {
    Vec<T> yk[kVecs];
    for (int v = 0; v < kVecs; ++v) yk[v] = Vec<T>::load(y + v * W);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const Vec<T> xi(x[i * kRow]);
      for (int v = 0; v < kVecs; ++v) acc[i][v] = fma(xi, yk[v], acc[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    if constexpr (takes_rows<Sink>)
      into(i0 + i, j0, acc[i]);
    else
      for (int v = 0; v < kVecs; ++v) into(i0 + i, j0 + v * W, acc[i][v]);
  }
}

// Such tiles from column j on, one below the other.
template <class T, int kVecs, int kRow, int kDepth, class Sink>
MMKERN_FN void column_of_tiles(const T* x, const T* y, int64_t y_stride, int64_t rows, int64_t depth, int64_t j,
                               const Sink& into) {
  constexpr int R = TileShape<T>::rows, kStep = TileShape<T>::row_step;
  int64_t i = 0;
  for (; i + R - kStep < rows; i += R)
    register_tile<T, R, kVecs, kRow, kDepth>(x + i * kRow, y, y_stride, depth, i, j, into);
  if (i + kStep < rows)
    register_tile<T, 2 * kStep, kVecs, kRow, kDepth>(x + i * kRow, y, y_stride, depth, i, j, into);
  else if (i < rows)
    register_tile<T, kStep, kVecs, kRow, kDepth>(x + i * kRow, y, y_stride, depth, i, j, into);
}

// All columns of such tiles: `rows` is rounded up to a whole row_step, `cols` to whole vectors. y(j) is column j of y.
template <class T, int kRow, int kDepth, class Y, class Sink>
MMKERN_FN void register_tiles(const T* x, Y y, int64_t y_stride, int64_t rows, int64_t cols, int64_t depth,
                              const Sink& into) {
  constexpr int W = Vec<T>::size;
  int64_t j = 0;
  for (; j + W < cols; j += 2 * W) column_of_tiles<T, 2, kRow, kDepth>(x, y(j), y_stride, rows, depth, j, into);
  if (j < cols) column_of_tiles<T, 1, kRow, kDepth>(x, y(j), y_stride, rows, depth, j, into);
}

// The transpose of a whole or partial block of m: v[c] holds lane r of rows [r0, r0 + W) at column c0 + c, 0 outside m.
template <class T, class S>
MMKERN_FN void load_transposed(const Rows<const S>& m, int64_t r0, int64_t c0, Vec<T> (&v)[Vec<T>::size]) {
  constexpr int W = Vec<T>::size;
  const int n = int(smaller(m.cols - c0, W));
  if (r0 + W <= m.rows && n == W) return load_transposed<T>(m[r0] + c0, m.stride, v);
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) {
    v[r] = Vec<T>(T(0));
    if (r0 + r < m.rows) v[r] = n == W ? Vec<T>::load(m[r0 + r] + c0) : Vec<T>::load(m[r0 + r] + c0, n);
  }
  transpose(v);
}

// Scalar: for (k < D) for (j < W) packed[k][j] = y[j0 + j][k];  rows from y.rows on count as 0
template <class T, class S>
MMKERN_FN void pack_columns(const Rows<const S>& y, int64_t j0, T* packed) {
  constexpr int C = TileShape<T>::cols, W = Vec<T>::size;
  constexpr int64_t kLine = 64 / sizeof(S);
  const int64_t stride = y.stride;
  const S* const ahead = y[j0 + W];
  for (int64_t k = 0; k < y.cols; k += W) {
    if (k % kLine == 0)
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) __builtin_prefetch(ahead + r * stride + k);
    Vec<T> v[W];
    load_transposed(y, j0, k, v);
#pragma GCC unroll 16
    for (int l = 0; l < W; ++l)
      if (k + l < y.cols) v[l].store(packed + (k + l) * C);
  }
}
template <class T, class S>
MMKERN_FN void pack_columns(const Columns<const S>& y, int64_t j0, T* packed) {
  constexpr int C = TileShape<T>::cols, W = Vec<T>::size;
  const int n = int(smaller(y.rows - j0, W));
  for (int64_t k = 0; k < y.cols; ++k) {
    const S* from = y.data + k * y.stride + j0;
    (n == W ? Vec<T>::load(from) : n > 0 ? Vec<T>::load(from, n) : Vec<T>(T(0))).store(packed + k * C);
  }
}

// D terms in equal parts of at most TileShape<T>::depth.
template <class T>
MMKERN_FN int64_t depth_of(int64_t D) {
  constexpr int W = Vec<T>::size;
  static_assert(TileShape<T>::depth % W == 0);
  if (D == 0) return W;
  return up_to(W, blocks_of(D, blocks_of(D, TileShape<T>::depth)));
}

// Scalar: for (i < rows) for (k in [k0, k1)) packed[i][k - k0] = x[i0 + i][k];  rows from x.rows on count as 0
template <class T, class S>
MMKERN_FN void pack_part(const Rows<const S>& x, int64_t i0, int64_t rows, int64_t k0, int64_t k1, T* packed) {
  constexpr int W = Vec<T>::size;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t n = i0 + i < x.rows ? k1 : k0;
    for (int64_t k = k0; k < k1; k += W) {
      const Vec<T> v = k + W <= n ? Vec<T>::load(x[i0 + i] + k) : Vec<T>::load(x[i0 + i] + k, int(n - k));
      v.store(packed + i * TileShape<T>::depth + k - k0);
    }
  }
}
template <class T, class S>
MMKERN_FN void pack_part(const Columns<const S>& x, int64_t i0, int64_t rows, int64_t k0, int64_t k1, T* packed) {
  constexpr int W = Vec<T>::size;
  const Rows<const S> stored{x.data, k1, x.rows, x.stride};
  for (int64_t i = 0; i < rows; i += W) {
    for (int64_t k = k0; k < k1; k += W) {
      Vec<T> v[W];
      load_transposed(stored, k, i0 + i, v);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l)
        if (i + l < rows) v[l].store(packed + (i + l) * TileShape<T>::depth + k - k0);
    }
  }
}

// packed[k / depth][i][k % depth] = x[i0 + i][k]
template <class T, class X>
MMKERN_FN void pack_rows(const X& x, int64_t i0, int64_t rows, T* packed) {
  const int64_t depth = depth_of<T>(x.cols);
  for (int64_t k = 0; k < x.cols; k += depth, packed += rows * TileShape<T>::depth)
    pack_part(x, i0, rows, k, smaller(k + depth, x.cols), packed);
}

// Lines that are asked for from memory while a product runs, some for each vector that it stores.
struct Ahead {
  const char *next = nullptr, *end = nullptr;
  int64_t lines = 0;  // at a time

  // A part of them, for a product that stores so many vectors.
  Ahead part(int64_t index, int64_t parts, int64_t stores) const {
    const int64_t bytes = blocks_of(blocks_of(end - next, parts), 64) * 64;
    return {next + index * bytes, next + (index + 1) * bytes < end ? next + (index + 1) * bytes : end,
            blocks_of(bytes, 64 * (stores > 0 ? stores : 1))};
  }
  MMKERN_FN void step() {
    for (int64_t l = 0; l < lines && next < end; ++l, next += 64) __builtin_prefetch(next);
  }
};

template <class Sink>
struct WithAhead {
  const Sink& into;
  Ahead& ahead;

  template <class V>
  MMKERN_FN void operator()(int64_t i, int64_t j, V sum) const {
    into(i, j, sum);
    ahead.step();
  }
};

// The block of S at rows [i0, ...) of packed X and the cols columns of packed Y. Compiled once for all epilogues.
template <class T>
__attribute__((noinline)) void fill_block(const T* xs, int64_t rows, const T* ys, int64_t cols, int64_t D, T* block,
                                          int64_t ld = TileShape<T>::block_stride, Ahead ahead = {}) {
  using Shape = TileShape<T>;
  const int64_t depth = depth_of<T>(D);
  for (int64_t i = 0; D == 0 && i < rows * ld; ++i) block[i] = 0;
  for (int64_t k = 0; k < D; k += depth, xs += rows * Shape::depth)
    register_tiles<T, Shape::depth, 1>(
        xs, [&](int64_t j) { return ys + j * D + k * Shape::cols; }, Shape::cols, rows, cols, smaller(depth, D - k),
        WithAhead<Into<T>>{{block, ld, k != 0}, ahead});
}

// Rows [i0, i0 + rows) of X and columns [j0, j0 + cols) of S, packed: what pack_rows and pack_columns leave.
template <class T>
struct PackedBlock {
  int64_t i0, rows, padded_rows;
  const T* xs;
  int64_t j0, cols;
  const T* ys;
};

// Calls f(block) for blocks that cover S: panels of columns in their order, and block_rows rows at a time. The blocks
// of one i0 come one at a time; those of different i0 may run on different threads. f must not call packed_blocks.
template <class T, class X, class Y, class F>
inline void packed_blocks(X x, Y y, int threads, F&& f) {
  using Shape = TileShape<T>;
  const int64_t D = x.cols;
  const int64_t fma_per_operation = Vec<T>::size;
  if (!is_parallel(x.rows * y.rows * D / fma_per_operation, threads)) threads = 1;
  const int64_t block_bytes = (D > 0 ? D : 1) * Shape::block_cols * int64_t(sizeof(T));
  const int64_t slivers = smaller(blocks_of(y.rows, Shape::cols),
                                  (1 + Shape::panel_bytes / block_bytes) * (Shape::block_cols / Shape::cols));
  const int64_t panel_cols = slivers * Shape::cols;
  T* const ys = packed_columns.reserve<T>(panel_cols * D);
  for (int64_t panel = 0; panel < y.rows; panel += panel_cols) {
    const int64_t cols = smaller(panel_cols, y.rows - panel);
    parallel_rows(blocks_of(cols, Shape::cols), Shape::cols * D, threads, [&](int64_t begin, int64_t end) {
      for (int64_t half = 2 * begin; half < 2 * end; ++half) {
        constexpr int W = Vec<T>::size;
        pack_columns(y, panel + half * W, ys + half / 2 * Shape::cols * D + half % 2 * W);
      }
    });
    parallel_blocks(blocks_of(x.rows, Shape::block_rows), threads, [&](int64_t b) {
      const int64_t i0 = b * Shape::block_rows, rows = smaller(Shape::block_rows, x.rows - i0);
      const int64_t padded_rows = up_to(Shape::row_step, rows);
      T* const xs = packed_rows.reserve<T>(padded_rows * up_to(Shape::depth, D));
      pack_rows(x, i0, padded_rows, xs);
      f(PackedBlock<T>{i0, rows, padded_rows, xs, panel, cols, ys});
    });
  }
}

// Calls epilogue(i0, j0, rows, cols, tile, ld) for blocks that cover S, where tile[r * ld + c] is the inner product of
// x[i0 + r] and y[j0 + c] in T.
//
// Blocks are at most TileShape<T>::block_rows x block_cols and start at multiples of these. The blocks of one i0 come
// in the order of j0, one at a time; those of different i0 may run on different threads. The tile is the epilogue's to
// overwrite. Its rows are aligned to a vector, and the lanes from cols to the next whole vector can be read and written
// (they hold products with a row of zeros). The epilogue must not call score_tiles.
//
// X and Y are Rows<const S>, or Columns<const S> where the transpose is what lies in memory.
template <class T, class X, class Y, class Epilogue>
inline void score_tiles(X x, Y y, int threads, Epilogue&& epilogue) {
  using Shape = TileShape<T>;
  const int64_t D = x.cols;
  packed_blocks<T>(x, y, threads, [&](const PackedBlock<T>& b) {
    T* const block = cache_block.reserve<T>(Shape::block_rows * Shape::block_stride);
    for (int64_t j = 0; j < b.cols; j += Shape::block_cols) {
      const int64_t width = smaller(Shape::block_cols, b.cols - j);
      fill_block(b.xs, b.padded_rows, b.ys + j * D, width, D, block);
      epilogue(b.i0, b.j0 + j, int(b.rows), int(width), block, int64_t(Shape::block_stride));
    }
    store_fence();
  });
}

}  // namespace MMKERN_ISA
}  // namespace mmkern
