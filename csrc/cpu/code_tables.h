// Rows of tables that codes name, and sums of rows over what has one code: codes_embedding and code_sums of
// mmkern/reference/quantization.py.
//
// A sum over rows of one code is taken in the order of the rows, by one thread, in double: codes are sorted first, by
// counting, so that each sum is written once.
#pragma once

#include "row_ops.h"
#include "score_tiles.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace tables {

// The rows that have each of K codes, in their order, for every level; codes below 0 or from K on are none.
class RowsOfCodes {
 public:
  RowsOfCodes(const Rows<const int64_t>& codes, int64_t count, int threads)
      : count_(count), starts_(codes.cols * (count + 1)), rows_(codes.cols * codes.rows), of_level_(codes.rows) {
    parallel_rows(codes.cols, 4 * codes.rows + count, threads, [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) sort(codes, q);
    });
  }

  // f(row) for those with code k of level q.
  template <class F>
  void for_each(int64_t q, int64_t k, F f) const {
    const int64_t* const starts = starts_.data + q * (count_ + 1);
    for (int64_t at = starts[k]; at < starts[k + 1]; ++at) f(rows_.data[q * of_level_ + at]);
  }
  int64_t size(int64_t q, int64_t k) const {
    const int64_t* const starts = starts_.data + q * (count_ + 1);
    return starts[k + 1] - starts[k];
  }

 private:
  bool is_code(int64_t code) const { return code >= 0 && code < count_; }

  void sort(const Rows<const int64_t>& codes, int64_t q) const {
    int64_t* const starts = starts_.data + q * (count_ + 1);
    int64_t* const rows = rows_.data + q * of_level_;
    for (int64_t k = 0; k <= count_; ++k) starts[k] = 0;
    for (int64_t i = 0; i < codes.rows; ++i)
      if (is_code(codes[i][q])) ++starts[codes[i][q] + 1];
    for (int64_t k = 0; k < count_; ++k) starts[k + 1] += starts[k];
    for (int64_t i = 0; i < codes.rows; ++i)
      if (is_code(codes[i][q])) rows[starts[codes[i][q]]++] = i;
    for (int64_t k = count_; k > 0; --k) starts[k] = starts[k - 1];  // each had moved to the end of its rows
    starts[0] = 0;
  }

  const int64_t count_;
  const Scratch<int64_t> starts_, rows_;
  const int64_t of_level_;
};

// Scalar: for (row of code k of level q) for (d < D) to[q * K + k][d] += x[row][d];  then times `share`
template <class S, class R>
void add_up(const Rows<const S>& x, const RowsOfCodes& rows, int64_t count, double share, const Rows<R>& to,
            int threads) {
  using T = accumulate_t<S>;
  using Wide = decltype(in_double(Vec<T>()));
  constexpr int W = Vec<T>::size, kAtOnce = 4;
  const int64_t work = x.cols * (1 + x.rows / (count > 0 ? count : 1));
  parallel_rows(to.rows, work, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      int64_t d = 0;
      for (; d + kAtOnce * W <= x.cols; d += kAtOnce * W) {
        Wide sums[kAtOnce];
        for (Wide& sum : sums) sum = Wide(0.0);
        rows.for_each(r / count, r % count, [&](int64_t i) {
          for (int v = 0; v < kAtOnce; ++v) sums[v] += in_double(Vec<T>::load(x[i] + d + v * W));
        });
        for (int v = 0; v < kAtOnce; ++v) rounded(sums[v] * Wide(share)).store(to[r] + d + v * W);
      }
      for (; d < x.cols; d += W) {
        const int n = int(smaller(W, x.cols - d));
        Wide sum(0.0);
        rows.for_each(r / count, r % count, [&](int64_t i) { sum += in_double(Vec<T>::load(x[i] + d, n)); });
        rounded(sum * Wide(share)).store(to[r] + d, n);
      }
    }
  });
}

// Tensors: tables, codes, the result; number: whether the sum over the levels is divided by how many these are.
template <class S>
void embed(const Call& call) {
  using T = accumulate_t<S>;
  const Rows<const S> all = rows<const S>(call[0]);
  const Rows<const int64_t> codes = rows<const int64_t>(call[1]);
  const Rows<S> out = rows<S>(call[2]);
  const int64_t levels = codes.cols, count = call[0].sizes[1];
  const Vec<T> divisor(call.scalars[0] != 0 ? T(levels) : T(1));
  parallel_rows(codes.rows, levels * all.cols, call.threads, [&](int64_t begin, int64_t end) {
    const Scratch<const S*> named(levels);
    for (int64_t i = begin; i < end; ++i) {
      int64_t n = 0;
      for (int64_t q = 0; q < levels; ++q) {
        const int64_t code = codes[i][q];
        if (code >= 0 && code < count) named.data[n++] = all[q * count + code];
      }
      for_each_vec<T>(out.cols, [&](auto at) {
        Vec<T> sum(T(0));
        for (int64_t q = 0; q < n; ++q) sum += at.load(named.data[q]);
        at.store(out[i], sum / divisor);
      });
    }
  });
}

// Tensors: the gradient of the result, tables, codes, the gradient of the tables.
template <class S>
void embed_backward(const Call& call) {
  const int64_t count = call[1].sizes[1];
  const Rows<const int64_t> codes = rows<const int64_t>(call[2]);
  const RowsOfCodes sorted(codes, count, call.threads);
  add_up(rows<const S>(call[0]), sorted, count, call.scalars[0] != 0 ? 1 / double(codes.cols) : 1.0, rows<S>(call[3]),
         call.threads);
}

// Tensors: x, codes, sums, counts.
template <class S>
void sum(const Call& call) {
  const Rows<accumulate_t<S>> sums = rows<accumulate_t<S>>(call[2]);
  const RowScalars<const int64_t> of_rows = row_scalars<const int64_t>(call[1]);
  const Rows<const S> x = rows<const S>(call[0]);
  const Rows<const int64_t> codes{of_rows.data, x.rows, 1, of_rows.stride};
  const RowsOfCodes sorted(codes, sums.rows, call.threads);
  add_up(x, sorted, sums.rows, 1.0, sums, call.threads);
  int64_t* const counts = static_cast<int64_t*>(call[3].data);
  for (int64_t k = 0; k < sums.rows; ++k) counts[k] = sorted.size(0, k);
}

}  // namespace tables
}  // namespace MMKERN_ISA
}  // namespace mmkern
