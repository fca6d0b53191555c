// Loops over the rows of [..., D] tensors: reading a Call, walking a row in vectors, one lane a row for scalar maths.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "../call.h"
#include "../dual.h"
#include "parallel.h"
#include "rows.h"
#include "simd.h"

namespace mmkern {
inline namespace MMKERN_ISA {

template <class T, int R>
struct ScalarOf<Vec<T, R>> {
  using type = T;
};

template <class S>
struct Storage {
  using type = S;
};

// f(Storage<S>{}) for the storage type S of `dtype`.
template <class F>
inline void with_storage(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32: return f(Storage<float>{});
    case Dtype::float64: return f(Storage<double>{});
    case Dtype::bfloat16: return f(Storage<bf16>{});
    case Dtype::float16: return f(Storage<half>{});
    default: return;  // the bindings let no other dtype through
  }
}

// The stride of `leading` axes seen as one; the dispatcher sends only tensors whose leading axes collapse.
inline int64_t collapsed_stride(const View& view, int leading, int64_t otherwise) {
  for (int axis = leading - 1; axis >= 0; --axis) {
    if (view.sizes[axis] > 1) return view.strides[axis];
  }
  return otherwise;
}

inline int64_t count(const View& view, int leading) {
  int64_t n = 1;
  for (int axis = 0; axis < leading; ++axis) n *= view.sizes[axis];
  return n;
}

// [..., D] as rows of length D.
template <class S>
inline Rows<S> rows(const View& view) {
  const int last = view.rank - 1;
  const int64_t cols = view.sizes[last];
  return {static_cast<S*>(view.data), count(view, last), cols, collapsed_stride(view, last, cols)};
}

// [...], one number a row.
template <class S>
struct RowScalars {
  S* data;
  int64_t stride;

  S get(int64_t row, S otherwise) const { return data ? data[row * stride] : otherwise; }
  void set(int64_t row, S value) const {
    if (data) data[row * stride] = value;
  }
};

// One element in double, for the rare row that needs it.
template <class S>
inline double element(const S* row, int64_t i) {
  return Vec<accumulate_t<S>>::load(row + i, 1)[0];
}
template <class S>
inline void set_element(S* row, int64_t i, double value) {
  using T = accumulate_t<S>;
  Vec<T>(T(value)).store(row + i, 1);
}

template <class S>
inline RowScalars<S> row_scalars(const View& view) {
  return {static_cast<S*>(view.data), view ? collapsed_stride(view, view.rank, 1) : 0};
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// f(Count<n>{}) for 1 <= n <= kMost.
template <int kMost, class F>
MMKERN_FN void with_count(int n, F f) {
  if (n == kMost) return f(Count<kMost>{});
  if constexpr (kMost > 1) with_count<kMost - 1>(n, f);
}

template <class T>
Vec<T> lane_indices() {
  Vec<T> v(T(0));
  for (int i = 0; i < Vec<T>::size; ++i) v.set(i, T(i));
  return v;
}

// A place in a row: a whole vector, or the last lanes.
template <class T, bool kStream = false>
struct At {
  int64_t i;

  template <class S>
  MMKERN_FN Vec<T> load(const S* row) const {
    return Vec<T>::load(row + i);
  }
  template <class S>
  MMKERN_FN void prefetch(const S* row) const {
    __builtin_prefetch(row + i);
  }
  // A store waits for its line as a load does, but the hardware fetches less far ahead of stores: so ask for the line
  // some stores ahead. Past the end of the row that is the next row, or a line that nobody reads; it cannot fault.
  template <class S>
  MMKERN_FN void store(S* row, Vec<T> v) const {
    constexpr uintptr_t kAhead = 512;
    if (!kStream) __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(row + i) + kAhead), 1);
    v.template store<kStream>(row + i);
  }
  // For what is read again at once.
  MMKERN_FN void keep(T* row, Vec<T> v) const { v.store(row + i); }
  // Zeros in the lanes past the end.
  MMKERN_FN Vec<T> only(Vec<T> v) const { return v; }
};

template <class T>
struct AtTail {
  int64_t i;
  int n;

  template <class S>
  MMKERN_FN Vec<T> load(const S* row) const {
    return Vec<T>::load(row + i, n);
  }
  template <class S>
  MMKERN_FN void prefetch(const S* row) const {
    __builtin_prefetch(row + i);
  }
  template <class S>
  MMKERN_FN void store(S* row, Vec<T> v) const {
    v.store(row + i, n);
  }
  MMKERN_FN void keep(T* row, Vec<T> v) const { v.store(row + i, n); }
  MMKERN_FN Vec<T> only(Vec<T> v) const {
    T kept[Vec<T>::size];
    v.store(kept, n);
    return Vec<T>::load(kept, n);
  }
};

template <class T, bool kStream = false, class F>
MMKERN_FN void for_each_vec(int64_t n, F f) {
  constexpr int W = Vec<T>::size;
  int64_t i = 0;
  for (; i + W <= n; i += W) f(At<T, kStream>{i});
  if (i < n) f(AtTail<T>{i, int(n - i)});
}
template <class T, class F>
MMKERN_FN void for_each_vec(int64_t n, bool stream, F f) {
  stream ? for_each_vec<T, true>(n, f) : for_each_vec<T>(n, f);
}

// The last cache that this core shares, as Linux says it; glibc's sysconf gives that of the whole socket. Tests say
// themselves how large it is.
inline int64_t last_cache_bytes() {
  static const int64_t bytes = [] {
    if (const char* given = getenv("MMKERN_LAST_CACHE_BYTES")) return int64_t(atoll(given));
    unsigned kilobytes = 0;
    if (FILE* file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
      if (fscanf(file, "%uK", &kilobytes) != 1) kilobytes = 0;
      fclose(file);
    }
    const int64_t most = int64_t(32) << 20;  // of a larger one, other cores have their share
    const int64_t shared = int64_t(kilobytes) << 10;
    return shared && shared < most ? shared : most;
  }();
  return bytes;
}

// Of each number once.
inline int64_t bytes_of(const View& view) {
  int64_t bytes = view ? bytes_of(view.dtype) : 0;
  for (int axis = 0; axis < view.rank; ++axis) bytes *= view.strides[axis] != 0 ? view.sizes[axis] : 1;
  return bytes;
}
inline int64_t bytes_of(const Call& call) {
  int64_t bytes = 0;
  for (const View& view : call.tensors) bytes += bytes_of(view);
  return bytes;
}

constexpr int64_t kLine = 64;  // bytes that caches and memory exchange at once

// Whether each row of it does.
inline bool begins_at_lines(const View& view) {
  int64_t places = int64_t(reinterpret_cast<uintptr_t>(view.data));
  for (int axis = 0; axis < view.rank - 1; ++axis) {
    if (view.sizes[axis] > 1) places |= view.strides[axis] * bytes_of(view.dtype);
  }
  return places % kLine == 0;
}

// Whether to store the results of a call, which moves so many bytes, past the caches: where that does not fit the last
// one, nobody finds a result there later, and a line that is not read before it is written saves a third of a copy's
// traffic.
template <class... Results>
inline bool streams(int64_t bytes, const Results&... results) {
  return bytes >= last_cache_bytes() && (begins_at_lines(results) && ...);
}

// K sums over a row, in as many independent accumulators as hide the latency of fma.
template <class T, int K>
struct RowSums {
  static constexpr int kParts = K == 1 ? 4 : 2;
  Vec<T> parts[kParts][K];

  MMKERN_FN RowSums() {
    for (int u = 0; u < kParts; ++u)
      for (int k = 0; k < K; ++k) parts[u][k] = Vec<T>(T(0));
  }
  MMKERN_FN T total(int k) const {
    Vec<T> total = parts[0][k];
    for (int u = 1; u < kParts; ++u) total += parts[u][k];
    return sum(total);
  }
};

// Scalar: for (i < n) for (k < K) sums[k] += term_k(i);
// term(at, acc) adds a vector of each of the K terms to acc. Lanes past the end load as 0 and must add 0.
template <class T, int K, class F>
MMKERN_FN RowSums<T, K> reduce_row(int64_t n, F term) {
  using Sums = RowSums<T, K>;
  constexpr int W = Vec<T>::size, U = Sums::kParts;
  Sums sums;
  int64_t i = 0;
  for (; i + U * W <= n; i += U * W)
    for (int u = 0; u < U; ++u) term(At<T>{i + u * W}, sums.parts[u]);
  for (; i + W <= n; i += W) term(At<T>{i}, sums.parts[0]);
  if (i < n) term(AtTail<T>{i, int(n - i)}, sums.parts[0]);
  return sums;
}

// Scalar: for (i < n) { to[i] = value(i); for (k < K) sums[k] += term_k(i); }, value(at, acc) doing both.
// Several vectors are loaded before the first is stored: a load waits for an earlier store to the same place in another
// page, and rows of two tensors often lie a few lines apart there. Where `value` stores as well, fewer are better.
template <class T, int K, int kAtOnce, bool kStream, class S, class F>
MMKERN_FN RowSums<T, K> write_and_reduce_row(int64_t n, S* to, F value) {
  using Sums = RowSums<T, K>;
  constexpr int W = Vec<T>::size, U = Sums::kParts;
  Sums sums;
  const auto write = [&](auto place, auto count) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
    Vec<T> values[kCount];
    for (int u = 0; u < kCount; ++u) values[u] = value(At<T, kStream>{place + u * W}, sums.parts[u % U]);
    for (int u = 0; u < kCount; ++u) At<T, kStream>{place + u * W}.store(to, values[u]);
  };
  int64_t i = 0;
  for (; i + kAtOnce * W <= n; i += kAtOnce * W) write(i, Count<kAtOnce>{});
  if (kAtOnce > U)
    for (; i + U * W <= n; i += U * W) write(i, Count<U>{});
  for (; i + W <= n; i += W) write(i, Count<1>{});
  if (i < n) {
    const AtTail<T> tail{i, int(n - i)};
    tail.store(to, value(tail, sums.parts[0]));
  }
  return sums;
}
template <class T, int K, int kAtOnce = 2 * RowSums<T, K>::kParts, class S, class F>
MMKERN_FN RowSums<T, K> write_and_reduce_row(int64_t n, bool stream, S* to, F value) {
  return stream ? write_and_reduce_row<T, K, kAtOnce, true>(n, to, value)
                : write_and_reduce_row<T, K, kAtOnce, false>(n, to, value);
}

template <class T, class S>
MMKERN_FN T squared_norm(const S* row, int64_t cols) {
  const auto sums = reduce_row<T, 1>(cols, [&](auto at, Vec<T>* acc) {
    const Vec<T> v = at.load(row);
    acc[0] = fma(v, v, acc[0]);
  });
  return sums.total(0);
}

// Memory that a kernel needs while it runs. It begins at a line: vectors then lie in one.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n)
      : data(static_cast<T*>(aligned_alloc(kLine, (n * sizeof(T) + kLine - 1) / kLine * kLine))) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(data); }
  T* const data;
};

// K numbers for each of as many rows as a vector has lanes: filled a row at a time, computed on a vector at a time.
template <class T, int K>
struct Lanes {
  static constexpr int rows = Vec<T>::size;
  alignas(64) T v[K * rows] = {};

  MMKERN_FN Vec<T> get(int k) const { return Vec<T>::load(v + k * rows); }
  MMKERN_FN void put(int k, Vec<T> x) { x.store(v + k * rows); }
  template <int N>
  MMKERN_FN void set(int row, const RowSums<T, N>& sums) {
    for (int k = 0; k < N; ++k) at(k, row) = sums.total(k);
  }
  MMKERN_FN T& at(int k, int row) { return v[k * rows + row]; }
  MMKERN_FN T at(int k, int row) const { return v[k * rows + row]; }
};

// A block of at most Vec<T>::size rows: one lane a row.
struct RowBlock {
  int64_t first;
  int n;
};

// f(block, count) for each thread: its blocks are block(0) to block(count - 1).
template <class T, class F>
inline void for_each_run_of_blocks(int64_t rows, int64_t work_per_row, int threads, F f) {
  constexpr int R = Vec<T>::size;
  parallel_rows((rows + R - 1) / R, work_per_row * R, threads, [&](int64_t begin, int64_t end) {
    const auto block = [=](int64_t i) {
      const int64_t first = (begin + i) * R;
      return RowBlock{first, int(rows - first < R ? rows - first : R)};
    };
    f(block, end - begin);
    store_fence();
  });
}

// f(first, n) for every block.
template <class T, class F>
inline void for_each_row_block(int64_t rows, int64_t work_per_row, int threads, F f) {
  for_each_run_of_blocks<T>(rows, work_per_row, threads, [&](auto block, int64_t count) {
    for (int64_t i = 0; i < count; ++i) f(block(i).first, block(i).n);
  });
}

// One number a row, added up in the order of the rows: the same bits whatever the number of threads.
template <class T>
class RowPartials {
 public:
  RowPartials(const View& total, int64_t rows)
      : total_(static_cast<T*>(total.data)), rows_(rows), values_(total_ ? allocate(rows + 1) : nullptr) {}
  RowPartials(const RowPartials&) = delete;
  RowPartials& operator=(const RowPartials&) = delete;
  ~RowPartials() {
    if (!values_) return;
    double sum = 0;
    for (int64_t i = 0; i < rows_; ++i) sum += values_[i];
    *total_ = T(sum);
    free(values_);
  }

  void set(int64_t row, T value) {
    if (values_) values_[row] = value;
  }

 private:
  static T* allocate(int64_t rows) { return static_cast<T*>(malloc(size_t(rows) * sizeof(T))); }

  T* total_;
  int64_t rows_;
  T* values_;
};

}  // namespace MMKERN_ISA
}  // namespace mmkern
