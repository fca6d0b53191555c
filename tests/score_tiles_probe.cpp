// What tests/test_score_tiles.py calls: the tile loop with an epilogue that stores S, or theta, or the blocks it saw.
#include "score_tiles.h"

using namespace mmkern;

template <class T, class X, class Y>
static void store_scores(X x, Y y, T* out, int threads) {
  score_tiles<T>(x, y, threads, [=](int64_t i0, int64_t j0, int rows, int cols, T* tile, int64_t ld) {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < cols; c += Vec<T>::size)
        Vec<T>::load(tile + r * ld + c).store(out + (i0 + r) * y.rows + j0 + c, cols - c);
  });
}

template <class T, class S>
static void scores(const S* x, int64_t x_stride, const S* y, int64_t y_stride, T* out, int64_t N, int64_t M, int64_t D,
                   int threads) {
  store_scores(Rows<const S>{x, N, D, x_stride}, Rows<const S>{y, M, D, y_stride}, out, threads);
}

// x is [D, N] in memory, y [D, M]
extern "C" void scores_of_columns(const float* x, int64_t x_stride, const float* y, int64_t y_stride, float* out,
                                  int64_t N, int64_t M, int64_t D, int threads) {
  store_scores(Columns(Rows<const float>{x, D, N, x_stride}), Columns(Rows<const float>{y, D, M, y_stride}), out,
               threads);
}

extern "C" void scores_float(const float* x, int64_t x_stride, const float* y, int64_t y_stride, float* out, int64_t N,
                             int64_t M, int64_t D, int threads) {
  scores(x, x_stride, y, y_stride, out, N, M, D, threads);
}
extern "C" void scores_double(const double* x, int64_t x_stride, const double* y, int64_t y_stride, double* out,
                              int64_t N, int64_t M, int64_t D, int threads) {
  scores(x, x_stride, y, y_stride, out, N, M, D, threads);
}
extern "C" void scores_bf16(const bf16* x, int64_t x_stride, const bf16* y, int64_t y_stride, float* out, int64_t N,
                            int64_t M, int64_t D, int threads) {
  scores(x, x_stride, y, y_stride, out, N, M, D, threads);
}
extern "C" void scores_half(const half* x, int64_t x_stride, const half* y, int64_t y_stride, float* out, int64_t N,
                            int64_t M, int64_t D, int threads) {
  scores(x, x_stride, y, y_stride, out, N, M, D, threads);
}

// theta = acosh(a_i b_j - s), the hyperbolic distance, for timing an epilogue
extern "C" void theta(const float* x, const float* y, const float* a, const float* b, float* out, int64_t N, int64_t M,
                      int64_t D, int threads) {
  score_tiles<float>(Rows<const float>{x, N, D, D}, Rows<const float>{y, M, D, D}, threads,
                     [=](int64_t i0, int64_t j0, int rows, int cols, float* tile, int64_t ld) {
                       using V = Vec<float, 2>;
                       for (int r = 0; r < rows; ++r) {
                         const V time = a[i0 + r];
                         for (int c = 0; c < cols; c += V::size) {
                           const V t = fma(time, V::load(b + j0 + c, cols - c), -V::load(tile + r * ld + c)) - 1.0f;
                           log1p(t + sqrt(t * (t + 2.0f))).store(out + (i0 + r) * M + j0 + c, cols - c);
                         }
                       }
                     });
}

// order[i][j] = 1 + how many elements of row i came before, in blocks; each visit adds 2^20.
extern "C" void visits(const float* x, int64_t N, int64_t M, int64_t D, int threads, int64_t* order, int64_t* largest) {
  struct Done {
    int64_t* of_row;
    ~Done() { free(of_row); }
  } done{static_cast<int64_t*>(calloc(size_t(N), sizeof(int64_t)))};
  score_tiles<float>(Rows<const float>{x, N, D, D}, Rows<const float>{x, M, D, 0}, threads,
                     [=, &done](int64_t i0, int64_t j0, int rows, int cols, float*, int64_t) {
                       for (int r = 0; r < rows; ++r)
                         for (int c = 0; c < cols; ++c)
                           order[(i0 + r) * M + j0 + c] += (int64_t(1) << 20) + ++done.of_row[i0 + r];
                       if (i0 == 0 && j0 == 0) {
                         largest[0] = rows;
                         largest[1] = cols;
                       }
                     });
}
