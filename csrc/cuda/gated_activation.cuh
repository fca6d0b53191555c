// y = hidden * act(gate) for rows [hidden, gate] on CUDA, and its gradient: gated_activation of
// mmkern/reference/gated.py. A group of lanes takes a piece of both halves.
#pragma once

#include "pieces.cuh"

#include "../activations.h"

namespace mmkern {
inline namespace device {

// Both laid out alike in mmkern/backends/cuda_gated.py.
struct GatedActivationArgs {
  PieceSizes n;  // of a half
  GridRows hidden, gate, out;
  int activation;
};

struct GatedActivationBackwardArgs {
  PieceSizes n;
  GridRows grad, hidden, gate, hidden_to, gate_to;
  int activation;
};

template <class Access>
__global__ void __launch_bounds__(kPieceThreads) gated_activation(const GatedActivationArgs a) {
  const Piece<Access> piece(a.n, group_of_grid(a.n.sizes));
  float hidden[kColumns], gate[kColumns];
  piece.load(hidden, a.hidden);
  piece.load(gate, a.gate);
  activation::with(a.activation, [&](auto act) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) hidden[k] *= act.at(gate[k]).value;
  });
  piece.store(hidden, a.out);
}

template <class Access>
__global__ void __launch_bounds__(kPieceThreads) gated_activation_backward(const GatedActivationBackwardArgs a) {
  const Piece<Access> piece(a.n, group_of_grid(a.n.sizes));
  float hidden[kColumns], gate[kColumns], grad[kColumns];
  piece.load(hidden, a.hidden);
  piece.load(gate, a.gate);
  piece.load(grad, a.grad);
  activation::with(a.activation, [&](auto act) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const auto point = act.at(gate[k]);
      gate[k] = grad[k] * hidden[k] * point.slope;
      hidden[k] = grad[k] * point.value;
    }
  });
  piece.store(hidden, a.hidden_to);
  piece.store(gate, a.gate_to);
}

}  // namespace device
}  // namespace mmkern
