// The retrieval family on a CPU: what its metrics make of a score, and the table of its kernels. What they mean:
// mmkern/reference/retrieval.py.

#include "pairwise.h"
#include "topk.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace {

using pairwise::differences;
using pairwise::Facts;
using pairwise::RowFacts;

// Scores themselves, with a bias and a soft-cap where there is one.
template <class T>
struct Logits {
  static constexpr bool kNanFirst = true;
  const T* const bias;
  const T softcap;

  auto keys(int64_t) const {
    return [this, cap = Vec<T>(softcap), inverse = Vec<T>(T(1) / softcap)](Vec<T> s, int64_t j, int lanes) {
      if (bias) s += Vec<T>::load(bias + j, lanes);
      return softcap > 0 ? cap * tanh(s * inverse) : s;
    };
  }
  T rank(int64_t, int64_t, T key) const { return key; }
  T bar(T rank) const { return rank; }
  T value(T rank) const { return rank; }
};

// A row's factor is 1 / |row|.
template <class T>
struct InverseLength {
  Vec<T> factor(Vec<T> xx) const { return Vec<T>(T(1)) / max(Vec<T>(T(1e-12)), sqrt(xx)); }
};

template <class T>
struct Cosines {
  static constexpr bool kNanFirst = true;
  const RowFacts<T> of_x, of_y;

  template <class S>
  Cosines(const Rows<const S>& x, const Rows<const S>& y) : of_x(InverseLength<T>{}, x), of_y(InverseLength<T>{}, y) {}

  auto keys(int64_t i) const {
    return [this, by = of_x.broadcast(i).factor](Vec<T> s, int64_t j, int) { return s * (by * of_y.load(j).factor); };
  }
  T rank(int64_t, int64_t, T key) const { return key; }
  T bar(T rank) const { return rank; }
  T value(T rank) const { return rank; }
};

// |x - y|; its square is the excess.
template <class T>
struct L2 {
  explicit L2(T) {}
  Vec<T> factor(Vec<T> xx) const { return xx; }
  Vec<T> terms(Facts<Vec<T>> x, Facts<Vec<T>> y) const { return x.square + y.square; }
  Vec<T> score(Vec<T> s) const { return s + s; }
  T excess(T distance) const { return distance * distance; }
  T distance(const DifferenceSums<Vec<T>>& p) const { return sqrt(p.dd)[0]; }
};

// acosh(1 + excess) / sqrt(c)
template <class T>
struct Lorentz : pairwise::LorentzDistance<T> {
  using pairwise::LorentzDistance<T>::LorentzDistance;
  Vec<T> terms(Facts<Vec<T>> x, Facts<Vec<T>> y) const { return pairwise::lifted_product<T>(x, y); }
  Vec<T> score(Vec<T> s) const { return this->c * s; }
  T excess(T distance) const {
    const Vec<T> half = sinh(Vec<T>(T(0.5) * distance) * sqrt(this->c));
    return (half * half)[0] * T(2);
  }
  T distance(const DifferenceSums<Vec<T>>& p) const { return this->near_value(p)[0]; }
};

// A distance grows with its excess, terms - score, of which rounding hides up to a share of the terms. A key is the
// least that the excess can be; a pair that passes is taken from the differences of its coordinates. Signs are turned.
template <template <class> class Of, class T, class S>
struct Distances {
  static constexpr bool kNanFirst = false;
  const Of<T> geometry;
  const Rows<const S>&x, &y;
  const RowFacts<T> of_x, of_y;
  const T kept;  // of the terms, at least

  Distances(const Of<T>& g, const Rows<const S>& x_rows, const Rows<const S>& y_rows)
      : geometry(g), x(x_rows), y(y_rows), of_x(g, x), of_y(g, y), kept(T(1) - lost_share(x.cols)) {}

  auto keys(int64_t i) const {
    return [this, at_x = of_x.broadcast(i), share = Vec<T>(kept)](Vec<T> s, int64_t j, int) {
      return geometry.score(s) - share * geometry.terms(at_x, of_y.load(j));
    };
  }
  T rank(int64_t i, int64_t j, T) const {
    return -geometry.distance(differences<T>(x, i, y, j, of_x.broadcast(i).square[0], of_y.broadcast(j).square[0]));
  }
  T bar(T rank) const { return -geometry.excess(-rank); }
  T value(T rank) const { return -rank; }

 private:
  // Twice what n roundings in a row lose of a score and of its terms.
  static T lost_share(int64_t n) {
    constexpr T kEpsilon = sizeof(T) == sizeof(double) ? T(0x1p-52) : T(0x1p-23);
    return T(n + 8) * (kEpsilon + kEpsilon);
  }
};

template <class S>
accumulate_t<S> sum_of(const Rows<const S>&);
// What products of such rows are summed in.
template <class X>
using sum_t = decltype(sum_of(*static_cast<std::remove_reference_t<X>*>(nullptr)));

// Where the last tensors of a call put results.
template <class T>
topk::Results<T> results_of(const Call& call, int at) {
  return {call[at].sizes[1], static_cast<T*>(call[at].data), static_cast<int64_t*>(call[at + 1].data)};
}

// f(x, y) of the first two tensors, in their storage type.
template <class F>
void with_rows(const Call& call, F f) {
  with_storage(call[0].dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    f(rows<const S>(call[0]), rows<const S>(call[1]));
  });
}

// Tensors: h, the weight, its bias, values, indices, log-sum-exps.
void linear(const Call& call) {
  with_rows(call, [&](const auto& h, const auto& weight) {
    using T = sum_t<decltype(h)>;
    const Logits<T> metric{static_cast<const T*>(call[2].data), T(call.scalars[1])};
    T* const logs = call.scalars[2] != 0 ? static_cast<T*>(call[5].data) : nullptr;
    topk::TopK<T, Logits<T>>(metric, results_of<T>(call, 3), logs, call.threads).of_all(h, weight);
  });
}

// The others' tensors: x, y, values, indices.
template <class T, class Metric, class X>
void select(const Call& call, const Metric& metric, const X& x, const X& y) {
  topk::TopK<T, Metric>(metric, results_of<T>(call, 2), nullptr, call.threads).of_all(x, y);
}

void dot(const Call& call) {
  with_rows(call, [&](const auto& x, const auto& y) {
    using T = sum_t<decltype(x)>;
    select<T>(call, Logits<T>{nullptr, T(0)}, x, y);
  });
}

void cosine(const Call& call) {
  with_rows(call, [&](const auto& x, const auto& y) {
    using T = sum_t<decltype(x)>;
    select<T>(call, Cosines<T>(x, y), x, y);
  });
}

template <template <class> class Geometry>
void distance(const Call& call) {
  with_rows(call, [&](const auto& x, const auto& y) {
    using T = sum_t<decltype(x)>;
    select<T>(call, Distances(Geometry<T>(T(call.scalars[0])), x, y), x, y);
  });
}

#define MMKERN_BEST "acc values: NK, int64 indices: NK"

const KernelEntry kEntries[] = {
    {"pairwise_topk", "x: ND, y: MD, number k, " MMKERN_BEST, dot},
    {"cosine_pairwise_topk", "x: ND, y: MD, number k, " MMKERN_BEST, cosine},
    {"l2_pairwise_topk", "x: ND, y: MD, number k, " MMKERN_BEST, distance<L2>},
    {"lorentz_pairwise_topk", "x: ND, y: MD, positive curvature, number k, " MMKERN_BEST, distance<Lorentz>},
    {"linear_topk",
     "h: ND, weight: VD, opt acc flat linear_bias: V, number k, number softcap, number sums_logs, " MMKERN_BEST
     ", acc flat log_sums: L",
     linear},
};

#undef MMKERN_BEST

}  // namespace

KernelTable retrieval_kernels() { return {kEntries, int(sizeof(kEntries) / sizeof(kEntries[0]))}; }

}  // namespace MMKERN_ISA
}  // namespace mmkern
