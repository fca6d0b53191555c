// Norms and their modulation on a CPU, and the table of their kernels. What they mean: mmkern/reference/modulation.py.

#include "adaptive_norm.h"
#include "affine_activation.h"
#include "gated_activation.h"
#include "group_norm.h"

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
#define MMKERN_OF_CHANNELS                                                                                             \
  "opt acc strided weight: GD, opt acc strided bias: GD, opt acc strided scale: BGD, opt acc strided shift: BGD, "     \
  "nonnegative eps, number activation"

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
    {"affine_activation",
     "strided x: *D, opt own broadcast scale: *D, opt own broadcast shift: *D, number offset, number activation, "
     "strided y: *D",
     affine_activation::forward},
    {"affine_activation_backward",
     "strided grad: *D, strided x: *D, opt own broadcast scale: *D, opt own broadcast shift: *D, number offset, "
     "number activation, opt strided grad_x: *D, opt acc broadcast grad_scale: *D, opt acc broadcast grad_shift: *D",
     affine_activation::backward},
    {"gated_activation", "h half of d; strided x: *d, number activation, strided y: *h", gated_activation::forward},
    {"gated_activation_backward", "h half of d; strided grad: *h, strided x: *d, number activation, strided grad_x: *d",
     gated_activation::backward},
    {"group_norm_act", "strided x: BGDS, " MMKERN_OF_CHANNELS ", strided out: BGDS", group_norm::forward},
    {"group_norm_act_backward",
     "strided grad: BGDS, strided x: BGDS, " MMKERN_OF_CHANNELS
     ", opt strided grad_x: BGDS, opt acc strided grad_weight: GD, opt acc strided grad_bias: GD, "
     "opt acc strided grad_scale: BGD, opt acc strided grad_shift: BGD",
     group_norm::backward},
};

#undef MMKERN_MODULATORS
#undef MMKERN_GRADIENTS
#undef MMKERN_RESIDUAL
#undef MMKERN_OF_CHANNELS

}  // namespace

KernelTable modulation_kernels() { return {kEntries, int(sizeof(kEntries) / sizeof(kEntries[0]))}; }

}  // namespace MMKERN_ISA
}  // namespace mmkern
