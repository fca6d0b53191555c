// Layer and RMS norm with their modulation on a CPU, and the table of their kernels. What they mean:
// mmkern/reference/modulation.py.

#include "adaptive_norm.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace {

#define MMKERN_MODULATORS                                                                                              \
  "opt acc weight: D, opt acc bias: D, opt acc shared scale: *D, "                                                     \
  "opt acc shared shift: *D, opt acc shared frame_scale: *1, nonnegative eps, number centered"
#define MMKERN_GRADIENTS                                                                                               \
  "opt acc grad_weight: D, opt acc grad_bias: D, opt acc shared grad_scale: *D, "                                      \
  "opt acc shared grad_shift: *D, opt acc shared grad_frame_scale: *1"
#define MMKERN_RESIDUAL "strided x: *D, strided residual: *D, opt acc shared gate: *D, "

const KernelEntry kEntries[] = {
    {"ada_layer_norm", "strided x: *D, " MMKERN_MODULATORS ", strided out: *D", adaptive_norm::forward<false>},
    {"ada_layer_norm_backward",
     "strided grad: *D, strided x: *D, " MMKERN_MODULATORS ", opt strided grad_x: *D, " MMKERN_GRADIENTS,
     adaptive_norm::backward<false>},
    {"residual_ada_layer_norm", MMKERN_RESIDUAL MMKERN_MODULATORS ", strided out: *D, strided sum: *D",
     adaptive_norm::forward<true>},
    {"residual_ada_layer_norm_backward",
     "strided grad: *D, strided grad_sum: *D, " MMKERN_RESIDUAL MMKERN_MODULATORS
     ", opt strided grad_x: *D, opt strided grad_residual: *D, opt acc shared grad_gate: *D, " MMKERN_GRADIENTS,
     adaptive_norm::backward<true>},
};

#undef MMKERN_MODULATORS
#undef MMKERN_GRADIENTS
#undef MMKERN_RESIDUAL

}  // namespace

KernelTable adaptive_norm_kernels() { return {kEntries, int(sizeof(kEntries) / sizeof(kEntries[0]))}; }

}  // namespace MMKERN_ISA
}  // namespace mmkern
