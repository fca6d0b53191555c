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

enum { kHidden, kGate, kGrad, kToHidden, kToGate };  // tensors; forward writes to the first of the last two

// Scalar: for (i < n) to[i] = hidden[i] * act(gate[i]);  or both gradients of that, from grad
template <class T, bool kBackward>
void run(const Call& call, int code, int threads) {
  using E = Elements<T>;
  if (count(call[kHidden], call[kHidden].rank) == 0) return;
  const Call merged = with_fewest_axes(call, kHidden);
  const Pieces pieces(merged[kHidden]);
  const bool stream = streams(without_gaps(merged[kToHidden]));
  activation::with(code, [&](auto act) {
    pieces.for_each(
        threads, [&](int64_t row) { return E(merged, kHidden, row); },
        [&](const E& elements, int64_t piece) {
          const auto write = [&](auto streams) {
            constexpr bool kStream = decltype(streams)::value;
            E::each(pieces.begin(piece), pieces.end(piece), [&](typename E::Place at) __attribute__((always_inline)) {
              const auto hidden = elements.fetch(kHidden, at);
              const auto gate = act.at(elements.fetch(kGate, at));
              if (!kBackward) return elements.template store<kStream>(kToHidden, at, hidden * gate.value);
              const auto grad = elements.fetch(kGrad, at);
              elements.template store<kStream>(kToHidden, at, grad * gate.value);
              elements.template store<kStream>(kToGate, at, grad * hidden * gate.slope);
            });
          };
          stream ? write(Flag<true>{}) : write(Flag<false>{});
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
