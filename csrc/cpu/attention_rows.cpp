// The row-wise companions of attention on a CPU. What they mean: mmkern/reference/attention_rows.py.

#include "grid_rows.h"
#include "row_ops.h"
#include "score_tiles.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace {

template <class S>
S* begin_of(const View& view) {
  return static_cast<S*>(view.data);
}

// ---- Merging ----

// What each part of a row counts, and the log of the sum of both. A part that saw no key has lse −∞.
template <class T>
struct Shares {
  T first, other, lse;

  Shares(T a, T b) {
    const T none = -T(__builtin_inf()), top = a > b ? a : b;
    if (top == none) {
      first = other = 0;
      lse = none;
      return;
    }
    const T x = exp(Vec<T>(a - top))[0], y = exp(Vec<T>(b - top))[0], total = x + y;
    first = x / total;
    other = y / total;
    lse = top + log(Vec<T>(total))[0];
  }
};

// Tensors: out, lse, other, other_lse; merged, merged_lse.
template <class S>
void merge(const Call& call) {
  using T = accumulate_t<S>;
  const View* const views[] = {&call[0], &call[1], &call[2], &call[3], &call[4], &call[5]};
  const GridRows<6> rows(views, call[1].rank);
  const int64_t D = call[0].sizes[call[0].rank - 1];
  parallel_rows(rows.count(), D + 64, call.threads, [&](int64_t begin, int64_t end) {
    rows.visit(begin, end, [&](int64_t, const int64_t* at) {
      const Shares<T> share(begin_of<T>(call[1])[at[1]], begin_of<T>(call[3])[at[3]]);
      const S* const a = begin_of<S>(call[0]) + at[0];
      const S* const b = begin_of<S>(call[2]) + at[2];
      S* const to = begin_of<S>(call[4]) + at[4];
      const Vec<T> x(share.first), y(share.other);
      begin_of<T>(call[5])[at[5]] = share.lse;
      // What has no share is not read: it may be anything where its row saw no key.
      for_each_vec<T>(D, [&](auto i) {
        const Vec<T> kept = share.first == 0 ? Vec<T>(T(0)) : x * i.load(a);
        i.store(to, share.other == 0 ? kept : fma(y, i.load(b), kept));
      });
    });
  });
}

// Tensors: grad, grad_lse; those of merge but for the last two; the gradients of those.
template <class S>
void merge_backward(const Call& call) {
  using T = accumulate_t<S>;
  const View* const views[] = {&call[0], &call[1], &call[2], &call[3], &call[4],
                               &call[5], &call[6], &call[7], &call[8], &call[9]};
  const GridRows<10> rows(views, call[1].rank);
  const int64_t D = call[0].sizes[call[0].rank - 1];
  const auto scaled = [&](const View& view, int64_t at, const S* grad, T share) {
    if (!view) return;
    S* const to = begin_of<S>(view) + at;
    const Vec<T> by(share);
    for_each_vec<T>(D, [&](auto i) { i.store(to, by * i.load(grad)); });
  };
  parallel_rows(rows.count(), 2 * D + 64, call.threads, [&](int64_t begin, int64_t end) {
    rows.visit(begin, end, [&](int64_t, const int64_t* at) {
      const Shares<T> share(begin_of<T>(call[3])[at[3]], begin_of<T>(call[5])[at[5]]);
      const S* const grad = begin_of<S>(call[0]) + at[0];
      scaled(call[6], at[6], grad, share.first);
      scaled(call[8], at[8], grad, share.other);
      if (!call[7] && !call[9]) return;
      T of_both = 0;  // d out / d lse · grad, but for its sign
      if (share.first != 0 && share.other != 0) {
        const S* const a = begin_of<S>(call[2]) + at[2];
        const S* const b = begin_of<S>(call[4]) + at[4];
        reduce_row<T, 1>(D, &of_both, 1,
                         [&](auto i, Vec<T>* sum) { sum[0] = fma(i.load(grad), i.load(a) - i.load(b), sum[0]); });
        of_both *= share.first * share.other;
      }
      const T grad_lse = begin_of<T>(call[1])[at[1]];
      if (call[7]) begin_of<T>(call[7])[at[7]] = share.first == 0 ? T(0) : fma(share.first, grad_lse, of_both);
      if (call[9]) begin_of<T>(call[9])[at[9]] = share.other == 0 ? T(0) : fma(share.other, grad_lse, -of_both);
    });
  });
}

// ---- Rotary embeddings ----

inline thread_local ThreadBuffer row_buffer, gradient_buffer;

// The first 2·pairs channels of a row: pairs (i, i + pairs), or (2i, 2i + 1) where they are interleaved.
struct Pairs {
  int64_t channels, pairs;
  bool interleaved;

  // Channels as T, the first and the second ones of all pairs together.
  template <class S, class T>
  void split(const S* row, T* to) const {
    if (!interleaved) return for_each_vec<T>(channels, [&](auto i) { i.store(to, i.load(row)); });
    for (int64_t i = 0; i < pairs; ++i) {
      to[i] = T(element(row, 2 * i));
      to[pairs + i] = T(element(row, 2 * i + 1));
    }
    copy<T>(row + 2 * pairs, to + 2 * pairs);
  }
  template <class S, class T>
  void join(const T* from, S* row) const {
    if (!interleaved) return for_each_vec<T>(channels, [&](auto i) { i.store(row, i.load(from)); });
    for (int64_t i = 0; i < pairs; ++i) {
      set_element(row, 2 * i, from[i]);
      set_element(row, 2 * i + 1, from[pairs + i]);
    }
    copy<T>(from + 2 * pairs, row + 2 * pairs);
  }
  // By the angle of each pair, or back by it.
  template <class T>
  void rotate(T* row, const T* cos, const T* sin, bool back) const {
    T* const second = row + pairs;
    for_each_vec<T>(pairs, [&](auto i) {
      const Vec<T> a = i.load(row), b = i.load(second), c = i.load(cos), s = back ? -i.load(sin) : i.load(sin);
      i.store(row, fma(a, c, -(b * s)));
      i.store(second, fma(a, s, b * c));
    });
  }

 private:
  template <class T, class From, class To>
  void copy(const From* from, To* to) const {
    for_each_vec<T>(channels - 2 * pairs, [&](auto i) { i.store(to, i.load(from)); });
  }
};

// Tensors: x, weight, cos, sin from `at` on in the call. Scalars: eps, normalize, interleaved.
template <class T>
struct Rotary {
  Pairs pairs;
  bool normalizes;
  double eps;
  T* weight;  // in the order of split rows; null: ones

  Rotary(const Call& call, int at)
      : pairs{call[at].sizes[call[at].rank - 1], call[at + 2].sizes[call[at + 2].rank - 1], call.scalars[2] != 0},
        normalizes(call.scalars[1] != 0),
        eps(call.scalars[0]),
        weight(call[at + 1] ? static_cast<T*>(malloc(size_t(pairs.channels + 1) * sizeof(T))) : nullptr) {
    if (weight) pairs.split(begin_of<T>(call[at + 1]), weight);
  }
  Rotary(const Rotary&) = delete;
  Rotary& operator=(const Rotary&) = delete;
  ~Rotary() { free(weight); }

  // One over the root of the mean square.
  T inverse_root(const T* row) const {
    if (!normalizes || pairs.channels == 0) return 1;
    return T(1 / __builtin_sqrt(double(squared_norm<T>(row, pairs.channels)) / double(pairs.channels) + eps));
  }
};

// Tensors: x, weight, cos, sin, out.
template <class S>
void rotary(const Call& call) {
  using T = accumulate_t<S>;
  const View* const views[] = {&call[0], &call[2], &call[3], &call[4]};
  const GridRows<4> rows(views, call[0].rank - 1);
  const Rotary<T> problem(call, 0);
  const Pairs& pairs = problem.pairs;
  parallel_rows(rows.count(), 2 * pairs.channels, call.threads, [&](int64_t begin, int64_t end) {
    T* const row = row_buffer.reserve<T>(pairs.channels + 1);
    rows.visit(begin, end, [&](int64_t, const int64_t* at) {
      pairs.split(begin_of<S>(call[0]) + at[0], row);
      const Vec<T> inverse(problem.inverse_root(row));
      if (problem.weight)
        for_each_vec<T>(pairs.channels, [&](auto i) { i.store(row, i.load(row) * inverse * i.load(problem.weight)); });
      else if (problem.normalizes)
        for_each_vec<T>(pairs.channels, [&](auto i) { i.store(row, i.load(row) * inverse); });
      pairs.rotate(row, begin_of<T>(call[2]) + at[1], begin_of<T>(call[3]) + at[2], false);
      pairs.join(row, begin_of<S>(call[4]) + at[3]);
    });
  });
}

// Rows whose gradients of the weight are added up one after another.
constexpr int64_t kSummedRows = 64;

// Tensors: grad, x, weight, cos, sin, grad_x, grad_weight.
template <class S>
void rotary_backward(const Call& call) {
  using T = accumulate_t<S>;
  const View* const views[] = {&call[1], &call[0], &call[3], &call[4], &call[5]};
  const GridRows<5> rows(views, call[1].rank - 1);
  const Rotary<T> problem(call, 1);
  const Pairs& pairs = problem.pairs;
  const int64_t D = pairs.channels, blocks = blocks_of(rows.count(), kSummedRows);
  const Scratch<T> partials(call[6] ? blocks * D + 1 : 1);
  const bool reads_x = problem.normalizes || call[6];
  parallel_rows(blocks, 4 * D * kSummedRows, call.threads, [&](int64_t first, int64_t last) {
    T* const x = row_buffer.reserve<T>(D + 1);
    T* const g = gradient_buffer.reserve<T>(D + 1);
    for (int64_t block = first; block < last; ++block) {
      T* const sums = partials.data + (call[6] ? block * D : 0);
      if (call[6]) for_each_vec<T>(D, [&](auto i) { i.store(sums, Vec<T>(T(0))); });
      const int64_t end = smaller((block + 1) * kSummedRows, rows.count());
      rows.visit(block * kSummedRows, end, [&](int64_t, const int64_t* at) {
        pairs.split(begin_of<S>(call[0]) + at[1], g);
        pairs.rotate(g, begin_of<T>(call[3]) + at[2], begin_of<T>(call[4]) + at[3], true);
        if (reads_x) {
          pairs.split(begin_of<S>(call[1]) + at[0], x);
          const Vec<T> inverse(problem.inverse_root(x));
          if (problem.normalizes) for_each_vec<T>(D, [&](auto i) { i.store(x, i.load(x) * inverse); });
          if (call[6]) for_each_vec<T>(D, [&](auto i) { i.store(sums, fma(i.load(g), i.load(x), i.load(sums))); });
          if (problem.weight) for_each_vec<T>(D, [&](auto i) { i.store(g, i.load(g) * i.load(problem.weight)); });
          if (problem.normalizes) {
            T along = 0;  // Σ g x: the part of the gradient that only makes the row longer
            reduce_row<T, 1>(D, &along, 1, [&](auto i, Vec<T>* sum) { sum[0] = fma(i.load(g), i.load(x), sum[0]); });
            const Vec<T> mean(along / T(D));
            for_each_vec<T>(D, [&](auto i) { i.store(g, inverse * (i.load(g) - mean * i.load(x))); });
          }
        } else if (problem.weight) {
          for_each_vec<T>(D, [&](auto i) { i.store(g, i.load(g) * i.load(problem.weight)); });
        }
        if (call[5]) pairs.join(g, begin_of<S>(call[5]) + at[4]);
      });
    }
  });
  if (!call[6]) return;
  Scratch<T> total(D + 1);
  for (int64_t i = 0; i < D; ++i) {
    double sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += partials.data[block * D + i];
    total.data[i] = T(sum);
  }
  pairs.join(total.data, begin_of<T>(call[6]));
}

#define MMKERN_PARTS "strided out: *D, acc lse: *, strided other: *D, acc other_lse: *"
#define MMKERN_ROWS                                                                                                    \
  "strided x: *D, opt acc weight: D, acc strided cos: *P, acc strided sin: *P, nonnegative eps, number normalize, "    \
  "number interleaved"
#define MMKERN_BY_STORAGE(function)                                                                                    \
  [](const Call& call) { with_storage(call[0].dtype, [&](auto s) { function<typename decltype(s)::type>(call); }); }

const KernelEntry kEntries[] = {
    {"merge_attention", MMKERN_PARTS ", strided merged: *D, acc merged_lse: *", MMKERN_BY_STORAGE(merge)},
    {"merge_attention_backward",
     "strided grad: *D, acc grad_merged_lse: *, " MMKERN_PARTS
     ", opt strided grad_out: *D, opt acc grad_lse: *, opt strided grad_other: *D, opt acc grad_other_lse: *",
     MMKERN_BY_STORAGE(merge_backward)},
    {"rotary_embedding", MMKERN_ROWS ", strided out: *D", MMKERN_BY_STORAGE(rotary)},
    {"rotary_embedding_backward", "strided grad: *D, " MMKERN_ROWS ", opt strided grad_x: *D, opt acc grad_weight: D",
     MMKERN_BY_STORAGE(rotary_backward)},
};

#undef MMKERN_PARTS
#undef MMKERN_ROWS
#undef MMKERN_BY_STORAGE

}  // namespace

KernelTable attention_rows_kernels() { return {kEntries, int(sizeof(kEntries) / sizeof(kEntries[0]))}; }

}  // namespace MMKERN_ISA
}  // namespace mmkern
