// y = hidden * act(gate) for rows [hidden, gate], and its gradient: gated_activation of mmkern/reference/gated.py.
#pragma once

#include "elementwise.h"

#include "../activations.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace gated_activation {

// The two halves of the rows of a tensor.
inline void split(const View& rows, View& hidden, View& gate) {
  hidden = gate = rows;
  if (!rows) return;
  const int last = rows.rank - 1;
  const int64_t half = rows.sizes[last] / 2;
  hidden.sizes[last] = gate.sizes[last] = half;
  gate.data = static_cast<char*>(rows.data) + half * bytes_of(rows.dtype);
}

constexpr int kAhead = 2048;  // bytes: beside an activation, few loads are begun ahead by themselves

enum { kHidden, kGate, kGrad, kToHidden, kToGate, kCount };  // tensors; forward writes to the first of the last two

// Scalar: for (i < n) to[i] = hidden[i] * act(gate[i]);  or both gradients of that, from grad
template <class T, bool kBackward>
void run(const Call& call, int code, int threads) {
  using E = Elements<T>;
  if (count(call[kHidden], call[kHidden].rank) == 0) return;
  Call merged = call;
  merge_axes(merged, kHidden);
  const Pieces pieces(merged[kHidden]);
  const bool stream = streams(bytes_of(merged), merged[kToHidden], merged[kToGate]);
  activation::with(code, [&](auto act) {
    pieces.for_each(
        threads, [&](int64_t row) { return E(merged, kHidden, row, kCount); },
        [&](const E& elements, int64_t piece) {
          elements.for_each_stretch(pieces.begin(piece), pieces.end(piece), [&](typename E::Stretch s) {
            const T *const hidden = elements.read(kHidden, s), *const gate = elements.read(kGate, s);
            const T* const grad = kBackward ? elements.read(kGrad, s) : nullptr;
            T *const to_hidden = elements.place(kToHidden, s), *const to_gate = elements.place(kToGate, s);
            elements.each_to(kToHidden, to_hidden, s.n, stream, [=](auto at) __attribute__((always_inline)) {
              const auto h = at.template fetch<kAhead>(hidden);
              const auto point = act.at(at.template fetch<kAhead>(gate));
              if (!kBackward) return at.store(to_hidden, h * point.value);
              const auto g = at.template fetch<kAhead>(grad);
              at.store(to_hidden, g * point.value);
              at.store(to_gate, g * h * point.slope);
            });
            elements.finish(kToHidden, s, to_hidden, stream);
            elements.finish(kToGate, s, to_gate, stream);
          });
        });
  });
}

template <class T>
void dispatch(const Call& call, bool backward, int code, int threads) {
  backward ? run<T, true>(call, code, threads) : run<T, false>(call, code, threads);
}

// Tensors: x, out; with a gradient before them, that of x in the place of out. Scalar: the activation.
inline void from(const Call& given, bool backward) {
  Call call;
  split(given[backward], call.tensors[kHidden], call.tensors[kGate]);
  if (backward) {
    call.tensors[kGrad] = given[0];
    split(given[2], call.tensors[kToHidden], call.tensors[kToGate]);
  } else {
    call.tensors[kToHidden] = given[1];
  }
  const int code = int(given.scalars[0]);
  given[0].dtype == Dtype::float64 ? dispatch<double>(call, backward, code, given.threads)
                                   : dispatch<float>(call, backward, code, given.threads);
}

inline void forward(const Call& call) { from(call, false); }
inline void backward(const Call& call) { from(call, true); }

}  // namespace gated_activation
}  // namespace MMKERN_ISA
}  // namespace mmkern
