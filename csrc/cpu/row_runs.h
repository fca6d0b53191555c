// Sums over runs of neighbouring rows, in blocks of them: the same bits for any number of threads.
#pragma once

#include "row_ops.h"

namespace mmkern {
inline namespace MMKERN_ISA {

// Blocks of rows whose sums are one piece, none across the end of a run of rows that share what they are summed for.
struct Blocks {
  static constexpr int64_t kRows = 64;

  int64_t rows, run, per_run;

  Blocks(int64_t all, int64_t run_rows) : rows(all), run(run_rows), per_run((run_rows + kRows - 1) / kRows) {}
  int64_t count() const { return of(rows); }
  int64_t of(int64_t whole_runs) const { return whole_runs / run * per_run; }
  int64_t most_rows() const { return run < kRows ? run : kRows; }
  int64_t first(int64_t block) const { return block / per_run * run + block % per_run * kRows; }
  int64_t last(int64_t block) const {
    const int64_t end = (block / per_run + 1) * run, full = first(block) + kRows;
    return full < end ? full : end;
  }

  // f(i, its sums) for each `each` rows, whole runs: those of its blocks, `width` numbers each, in their order.
  template <class T, class F>
  void for_each_run(int64_t each, const T* sums, int64_t width, F f) const {
    Scratch<double> total(width);
    const int64_t n = of(each);
    for (int64_t i = 0; i < rows / each; ++i) {
      for (int64_t k = 0; k < width; ++k) total.data[k] = 0;
      for (int64_t block = i * n; block < (i + 1) * n; ++block)
        for (int64_t k = 0; k < width; ++k) total.data[k] += sums[block * width + k];
      f(i, total.data);
    }
  }
};

}  // namespace MMKERN_ISA
}  // namespace mmkern
