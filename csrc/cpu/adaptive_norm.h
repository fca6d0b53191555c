// Norms of the rows of [..., C] with their modulation: r = residual + gate x, or x;  n = (r - mean) / sqrt(var + eps);
// y = f ((n w + b) (1 + s) + h). Without a mean it is the root-mean-square norm.
//
// Backward, with u = f y' and n' = u (1 + s) w:
//   r' = its own gradient + (n' - mean(n') - n mean(n' n)) / sqrt(var + eps);  residual' = r';  x' = gate r'
//   h' = sum u;  s' = sum u (n w + b);  b' = sum u (1 + s);  w' = sum u (1 + s) n;  gate' = sum r' x;
//   f' = sum y' ((n w + b) (1 + s) + h)
// each over the rows that share the number. Where rows share s and h, the first four are made of the sums of u and u n.
#pragma once

#include "grid_rows.h"
#include "row_runs.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace adaptive_norm {

// What modulates the rows of x: some axes of x it has once, the innermost of them, and neighbouring rows share it.
struct Modulator : View {
  int64_t shared_rows = 1;

  Modulator() = default;
  Modulator(const View& view, const View& x) : View(view) {
    bool inner = true;
    for (int axis = x.rank - 2; view && axis >= 0; --axis) {
      inner = inner && sizes[axis] == 1;
      if (inner) shared_rows *= x.sizes[axis];
      if (sizes[axis] == 1) strides[axis] = 0;
      sizes[axis] = x.sizes[axis];
    }
  }
};

template <class T>
struct Problem {
  View x, residual;
  Modulator gate, scale, shift, frame_scale;
  const T *weight, *bias;  // [C]
  int leading;
  int64_t rows, cols;
  T eps;
  bool centered;

  // Tensors: x, [residual, gate,] weight, bias, scale, shift, frame_scale, from `at` on. Scalars: eps, centered.
  Problem(const Call& call, int at, bool has_residual) : x(call[at]) {
    const View* next = &call[at + 1];
    if (has_residual) {
      residual = *next++;
      gate = Modulator(*next++, x);
    }
    weight = static_cast<const T*>((next++)->data);
    bias = static_cast<const T*>((next++)->data);
    Modulator* const others[] = {&scale, &shift, &frame_scale};
    for (Modulator* each : others) *each = Modulator(*next++, x);
    leading = x.rank - 1;
    rows = count(x, leading);
    cols = x.sizes[leading];
    eps = T(call.scalars[0]);
    centered = call.scalars[1] != 0;
  }
};

// y = f (n by + plus) with by = w (1 + s), plus = b (1 + s) + h: kept as long as rows share s and h.
template <class T>
class Modulation {
 public:
  Modulation(const Problem<T>& p, int64_t row)
      : cols_(p.cols),
        numbers_(4 * p.cols),
        weight_(p.weight),
        bias_(p.bias),
        scale_(p.scale, p.leading, row),
        shift_(p.shift, p.leading, row),
        frame_scale_(p.frame_scale, p.leading, row) {
    for (int64_t i = 0; i < cols_; ++i) {
      numbers_.data[2 * cols_ + i] = 0;
      numbers_.data[3 * cols_ + i] = 1;
    }
    form();
  }

  const T* by() const { return numbers_.data; }
  const T* plus() const { return numbers_.data + cols_; }
  const T* weight() const { return weight_ ? weight_ : ones(); }
  const T* bias() const { return bias_ ? bias_ : zeros(); }
  const T* scale() const { return *scale_ ? *scale_ : zeros(); }
  T frame_scale() const { return *frame_scale_ ? **frame_scale_ : T(1); }

  void operator++() {
    const T *const scale_before = *scale_, *const shift_before = *shift_;
    ++scale_;
    ++shift_;
    ++frame_scale_;
    if (*scale_ != scale_before || *shift_ != shift_before) form();
  }

 private:
  const T* zeros() const { return numbers_.data + 2 * cols_; }
  const T* ones() const { return numbers_.data + 3 * cols_; }
  void form() {
    const T *w = weight(), *b = bias(), *s = scale(), *h = *shift_ ? *shift_ : zeros();
    T* const by = numbers_.data;
    for_each_vec<T>(cols_, [&](auto at) {
      const Vec<T> factor = at.load(s) + Vec<T>(T(1));
      at.store(by, at.load(w) * factor);
      at.store(by + cols_, fma(at.load(b), factor, at.load(h)));
    });
  }

  const int64_t cols_;
  Scratch<T> numbers_;
  const T *const weight_, *const bias_;
  GridRows<const T> scale_, shift_, frame_scale_;
};

// r of each row in turn.
template <class S>
class Inputs {
  using T = accumulate_t<S>;

 public:
  Inputs(const Problem<T>& p, int64_t row)
      : x_(p.x, p.leading, row), residual_(p.residual, p.leading, row), gate_(p.gate, p.leading, row) {}

  const S* x() const { return *x_; }
  const T* gate() const { return *gate_; }
  // f(r), where r(at) is that of this row.
  template <class F>
  MMKERN_FN auto with(F f) const {
    const S *x = *x_, *residual = *residual_;
    const T* gate = *gate_;
    if (!residual) return f([=](auto at) __attribute__((always_inline)) { return at.load(x); });
    if (!gate) return f([=](auto at) __attribute__((always_inline)) { return at.load(x) + at.load(residual); });
    return f([=](auto at) __attribute__((always_inline)) { return fma(at.load(gate), at.load(x), at.load(residual)); });
  }
  void operator++() {
    ++x_;
    ++residual_;
    ++gate_;
  }

 private:
  GridRows<const S> x_, residual_;
  GridRows<const T> gate_;
};

// n = (r - mean) scale
template <class T>
struct Moments {
  Vec<T> mean, scale;

  // Scalar: two passes, of which `total` is the first's; for (i < cols) sum += (r[i] - mean) * (r[i] - mean);
  // meanwhile(at) is called on the way.
  template <class R, class F>
  MMKERN_FN Moments(const Problem<T>& p, const R* r, T total, F meanwhile)
      : mean(p.centered ? total / T(p.cols) : T(0)) {
    const Vec<T> centre = mean;
    const auto squares = reduce_row<T, 1>(p.cols, [=](auto at, Vec<T>* acc) {
      meanwhile(at);
      const Vec<T> d = at.only(at.load(r) - centre);
      acc[0] = fma(d, d, acc[0]);
    });
    scale = Vec<T>(T(1)) / sqrt(Vec<T>(squares.total(0) / T(p.cols) + p.eps));
  }
};

// Tensors: the problem's, out, and with a residual r. While a row is written, the next one is read: its loads fill the
// time of the stores. Its r takes the place of this row's in one buffer: with modulation and what comes from memory,
// two would leave no room in the first cache.
template <class S, bool kHasResidual>
void forward_rows(const Call& call) {
  using T = accumulate_t<S>;
  constexpr int kParts = RowSums<T, 1>::kParts, kAtOnce = kHasResidual ? kParts : 2 * kParts;
  const Problem<T> p(call, 0, kHasResidual);
  const View &out_view = call[kHasResidual ? 8 : 6], sum_view = kHasResidual ? call[9] : View{};
  const bool stream = streams(bytes_of(call), out_view, sum_view);
  parallel_rows(p.rows, 6 * p.cols, call.threads, [&](int64_t begin, int64_t end) {
    Modulation<T> m(p, begin);
    Inputs<S> inputs(p, begin);
    const Scratch<T> buffer(kHasResidual ? p.cols : 0);
    GridRows<S> out(out_view, p.leading, begin), sum(sum_view, p.leading, begin);
    const auto put = [kept = buffer.data](auto at, Vec<T> r, S* to) __attribute__((always_inline)) {
      if constexpr (kHasResidual) {
        at.keep(kept, r);
        at.store(to, r);
      }
    };
    T total = inputs.with([&, to = *sum](auto r) __attribute__((always_inline)) {
      return reduce_row<T, 1>(p.cols,
                              [=](auto at, Vec<T>* acc) {
                                const Vec<T> v = r(at);
                                acc[0] += v;
                                put(at, v, to);
                              })
          .total(0);
    });
    for (int64_t row = begin; row < end; ++row, ++m, ++out) {
      const S* const x = inputs.x();
      ++inputs;
      ++sum;
      const auto write = [&](const auto* from, auto meanwhile) __attribute__((always_inline)) {
        const Moments<T> of(p, from, total, meanwhile);
        const Vec<T> f(m.frame_scale());
        const T *by = m.by(), *plus = m.plus();
        S *const to = *out, *const next = *sum;
        const auto result = [=](auto at) __attribute__((always_inline)) {
          return f * fma((at.load(from) - of.mean) * of.scale, at.load(by), at.load(plus));
        };
        if (row + 1 == end) return for_each_vec<T>(p.cols, stream, [=](auto at) { at.store(to, result(at)); });
        inputs.with([&](auto r) __attribute__((always_inline)) {
          total = write_and_reduce_row<T, 1, kAtOnce>(p.cols, stream, to,
                                                      [=](auto at, Vec<T>* acc) __attribute__((always_inline)) {
                                                        const Vec<T> v = r(at), y = result(at);
                                                        acc[0] += v;
                                                        put(at, v, next);
                                                        return y;
                                                      })
                      .total(0);
        });
      };
      // Of one tensor the next row is asked for ahead; of two, the hardware does better by itself.
      if constexpr (kHasResidual)
        write(static_cast<const T*>(buffer.data), [](auto) {});
      else
        write(x, [next = inputs.x()](auto at) { at.prefetch(next); });
    }
    store_fence();
  });
}

// Where gradients go; null where they are not wanted.
struct Gradients {
  View x, residual, gate, weight, bias, scale, shift, frame_scale;

  Gradients(const Call& call, int at, bool has_residual) : x(call[at]) {
    const View* next = &call[at + 1];
    if (has_residual) {
      residual = *next++;
      gate = *next++;
    }
    View* const others[] = {&weight, &bias, &scale, &shift, &frame_scale};
    for (View* each : others) *each = *next++;
  }
};

// Tensors: grad, [that of r,] the problem's, the gradients.
template <class S>
class Backward {
  using T = accumulate_t<S>;

 public:
  Backward(const Call& call, bool has_residual)
      : p_(call, 1 + has_residual, has_residual),
        grad_(call[0]),
        sum_grad_(has_residual ? call[1] : View{}),
        to_(call, has_residual ? 10 : 7, has_residual),
        modulated_rows_(shared_rows()),
        of_each_row_((p_.scale || p_.shift) && modulated_rows_ == 1),
        gate_rows_(p_.gate ? p_.gate.shared_rows : p_.rows),
        blocks_(p_.rows, run()),
        sums_(wants_sums() ? 2 * blocks_.count() * p_.cols : 0),
        gate_sums_(wants_gate_sums() ? blocks_.count() * p_.cols : 0),
        frame_sums_(to_.frame_scale ? p_.rows : 0),
        stream_(to_.x && streams(bytes_of(call), to_.x, to_.residual)) {}

  void run_with(int threads) {
    if (p_.rows == 0) return fill_with_zeros();
    parallel_rows(blocks_.count(), 12 * p_.cols * blocks_.most_rows(), threads, [&](int64_t begin, int64_t end) {
      const Scratch<T> row(p_.cols);
      const Scratch<S> spare(p_.cols);
      for (int64_t block = begin; block < end; ++block) add_block(block, row.data, spare.data);
      store_fence();
    });
    add_up_modulation();
    if (wants_gate_sums()) {
      blocks_.for_each_run(gate_rows_, gate_sums_.data, p_.cols, [&](int64_t run, const double* sums) {
        for (int64_t i = 0; i < p_.cols; ++i) of_row(to_.gate, run)[i] = T(sums[i]);
      });
    }
    if (to_.frame_scale) {
      const int64_t n = p_.frame_scale.shared_rows;
      for (int64_t i = 0; i < p_.rows / n; ++i) {
        double sum = 0;
        for (int64_t r = 0; r < n; ++r) sum += frame_sums_.data[i * n + r];
        static_cast<T*>(to_.frame_scale.data)[i] = T(sum);
      }
    }
  }

 private:
  // Of scale and shift, which come in one shape.
  int64_t shared_rows() const {
    if (!p_.scale && !p_.shift) return p_.rows;
    return p_.scale.shared_rows > p_.shift.shared_rows ? p_.scale.shared_rows : p_.shift.shared_rows;
  }
  bool wants_affine() const { return to_.weight || to_.bias; }
  bool wants_sums() const { return wants_affine() || (!of_each_row_ && (to_.scale || to_.shift)); }
  bool wants_gate_sums() const { return to_.gate && gate_rows_ > 1; }
  int64_t run() const {
    int64_t n = p_.rows > 0 ? p_.rows : 1;
    if (!of_each_row_ && modulated_rows_ > 0 && modulated_rows_ < n) n = modulated_rows_;
    return gate_rows_ > 1 && gate_rows_ < n ? gate_rows_ : n;
  }

  // Row `row` of a gradient that has one for each.
  T* of_row(const View& gradient, int64_t row) const {
    return gradient ? static_cast<T*>(gradient.data) + row * p_.cols : nullptr;
  }

  // One row of the backward, and where what it adds goes: null where it is not wanted.
  struct Row {
    const T* r;
    Moments<T> of;
    const Modulation<T>& m;
    const S *grad, *next_grad, *sum_grad, *x;
    const T* gate;
    T *sums, *scale_to, *shift_to, *gate_to, *frame_to;
    S *x_to, *residual_to;
  };

  void add_block(int64_t block, T* buffer, S* spare) const {
    const int64_t first = blocks_.first(block), last = blocks_.last(block);
    T* const sums = wants_sums() ? zeros(sums_.data + 2 * block * p_.cols, 2 * p_.cols) : nullptr;
    T* const gate_sums = wants_gate_sums() ? zeros(gate_sums_.data + block * p_.cols, p_.cols) : nullptr;
    Modulation<T> m(p_, first);
    Inputs<S> inputs(p_, first);
    GridRows<const S> grad(grad_, p_.leading, first), sum_grad(sum_grad_, p_.leading, first);
    GridRows<S> x_to(to_.x, p_.leading, first), residual_to(to_.residual, p_.leading, first);
    T* const kept = std::is_same_v<S, T> && !p_.residual ? nullptr : buffer;
    T total = inputs.with([=](auto form) {
      return reduce_row<T, 1>(p_.cols,
                              [=](auto at, Vec<T>* acc) {
                                const Vec<T> r = form(at);
                                acc[0] += r;
                                if (kept) at.keep(kept, r);
                              })
          .total(0);
    });
    for (int64_t i = first; i < last; ++i, ++m, ++sum_grad, ++x_to, ++residual_to) {
      const S* const grad_of_row = *grad;
      ++grad;
      const T* r = kept;
      if constexpr (std::is_same_v<S, T>)
        if (!kept) r = inputs.x();
      T* const gate_to = gate_sums ? gate_sums : zeros(of_row(to_.gate, i), p_.cols);
      const Row row{r,
                    Moments<T>(p_, r, total, [](auto) {}),
                    m,
                    grad_of_row,
                    *grad,
                    *sum_grad,
                    inputs.x(),
                    inputs.gate(),
                    sums,
                    of_row(to_.scale, i),
                    of_row(to_.shift, i),
                    gate_to,
                    to_.frame_scale ? frame_sums_.data + i : nullptr,
                    *x_to ? *x_to : spare,
                    *residual_to};
      if (i + 1 < last) ++inputs;
      total = of_each_row_ ? differentiate<true>(row, inputs, kept) : differentiate<false>(row, inputs, kept);
    }
  }

  // Meanwhile the next row is read, which fills the time of the stores, and its gradient asked for: the sum of its r
  // comes back, r is kept where this row's was. After the last row that is the same row once more.
  template <bool kOfEachRow>
  T differentiate(const Row& row, const Inputs<S>& next, T* kept) const {
    const T *by = row.m.by(), *r = row.r;
    const S *const grad = row.grad, *const next_grad = row.next_grad;
    const Vec<T> mean = row.of.mean, scale = row.of.scale, f(row.m.frame_scale());
    const auto normal = [=](auto at) { return at.only((at.load(r) - mean) * scale); };
    enum { kSlope, kAlong, kSums };
    const auto totals = reduce_row<T, kSums>(p_.cols, [=](auto at, Vec<T>* acc) {
      const Vec<T> slope = f * at.load(grad) * at.load(by);
      acc[kSlope] += slope;
      acc[kAlong] = fma(slope, normal(at), acc[kAlong]);
    });
    if (kOfEachRow) add_columns(row, f, normal);
    if (row.frame_to) {
      const T* const plus = row.m.plus();
      *row.frame_to = reduce_row<T, 1>(p_.cols, [=](auto at, Vec<T>* acc) {
                        acc[0] = fma(at.load(grad), fma(normal(at), at.load(by), at.load(plus)), acc[0]);
                      }).total(0);
    }
    const T n = T(p_.cols);
    const Vec<T> centre(p_.centered ? totals.total(kSlope) / n : T(0)), along(totals.total(kAlong) / n);
    const S *sum_grad = row.sum_grad, *x = row.x;
    S* const residual_to = row.residual_to;
    const T* const gate = row.gate;
    T *const gate_to = row.gate_to, *const sums = kOfEachRow ? nullptr : row.sums;
    const int64_t cols = p_.cols;
    return next.with([=, this](auto form) __attribute__((always_inline)) {
      return write_and_reduce_row<T, 1, RowSums<T, 1>::kParts>(
                 cols, stream_, row.x_to,
                 [=](auto at, Vec<T>* acc) __attribute__((always_inline)) {
                   at.prefetch(next_grad);
                   const Vec<T> u = f * at.load(grad), normed = normal(at), after = form(at);
                   Vec<T> slope = scale * (u * at.load(by) - centre - normed * along);
                   acc[0] += after;
                   if (kept) at.keep(kept, after);
                   if (sums) {
                     at.keep(sums, at.load(sums) + u);
                     at.keep(sums + cols, fma(u, normed, at.load(sums + cols)));
                   }
                   if (sum_grad) slope += at.load(sum_grad);
                   if (gate_to) at.keep(gate_to, fma(slope, at.load(x), at.load(gate_to)));
                   if (residual_to) at.store(residual_to, slope);
                   return gate ? at.load(gate) * slope : slope;
                 })
          .total(0);
    });
  }

  // Of scale and shift that each row has of its own.
  template <class F>
  void add_columns(const Row& row, Vec<T> f, F normal) const {
    const T *weight = row.m.weight(), *bias = row.m.bias(), *scale = row.m.scale();
    T *const sums = row.sums, *const scale_to = row.scale_to, *const shift_to = row.shift_to;
    const S* const grad = row.grad;
    const int64_t cols = p_.cols;
    if (!sums && !scale_to && !shift_to) return;
    for_each_vec<T>(cols, [=](auto at) {
      Vec<T> u = f * at.load(grad);
      const Vec<T> n = normal(at);
      if (shift_to) at.store(shift_to, u);
      if (scale_to) at.store(scale_to, u * fma(n, at.load(weight), at.load(bias)));
      if (!sums) return;
      u *= Vec<T>(T(1)) + at.load(scale);
      at.keep(sums, at.load(sums) + u);
      at.keep(sums + cols, fma(u, n, at.load(sums + cols)));
    });
  }

  void add_up_modulation() const {
    if (!wants_sums()) return;
    const int64_t cols = p_.cols, rows = of_each_row_ ? p_.rows : modulated_rows_;
    Scratch<double> affine(2 * cols);
    for (int64_t i = 0; i < 2 * cols; ++i) affine.data[i] = 0;
    blocks_.for_each_run(rows, sums_.data, 2 * cols, [&](int64_t run, const double* sums) {
      const Modulation<T> m(p_, run * rows);
      T* const scale_to = of_each_row_ ? nullptr : of_row(to_.scale, run);
      T* const shift_to = of_each_row_ ? nullptr : of_row(to_.shift, run);
      for (int64_t i = 0; i < cols; ++i) {
        const double u = sums[i], un = sums[cols + i], factor = of_each_row_ ? 1 : 1 + double(m.scale()[i]);
        if (shift_to) shift_to[i] = T(u);
        if (scale_to) scale_to[i] = T(m.weight()[i] * un + m.bias()[i] * u);
        affine.data[i] += factor * u;
        affine.data[cols + i] += factor * un;
      }
    });
    for (int64_t i = 0; i < cols; ++i) {
      if (to_.bias) static_cast<T*>(to_.bias.data)[i] = T(affine.data[i]);
      if (to_.weight) static_cast<T*>(to_.weight.data)[i] = T(affine.data[cols + i]);
    }
  }

  static T* zeros(T* to, int64_t n) {
    for (int64_t i = 0; to && i < n; ++i) to[i] = 0;
    return to;
  }
  void fill_with_zeros() const {
    const View* const sums[] = {&to_.gate, &to_.weight, &to_.bias, &to_.scale, &to_.shift, &to_.frame_scale};
    for (const View* each : sums)
      if (*each) zeros(static_cast<T*>(each->data), count(*each, each->rank));
  }

  const Problem<T> p_;
  const View grad_, sum_grad_;
  const Gradients to_;
  const int64_t modulated_rows_;
  const bool of_each_row_;
  const int64_t gate_rows_;
  const Blocks blocks_;
  const Scratch<T> sums_, gate_sums_, frame_sums_;
  const bool stream_;
};

template <bool kHasResidual>
void forward(const Call& call) {
  with_storage(call[0].dtype, [&](auto s) { forward_rows<typename decltype(s)::type, kHasResidual>(call); });
}
template <bool kHasResidual>
void backward(const Call& call) {
  with_storage(call[0].dtype,
               [&](auto s) { Backward<typename decltype(s)::type>(call, kHasResidual).run_with(call.threads); });
}

}  // namespace adaptive_norm
}  // namespace MMKERN_ISA
}  // namespace mmkern
