// Activations with a modulation or a gate on a CPU, and the table of their kernels. What they mean:
// mmkern/reference/modulation.py.

#include "affine_activation.h"
#include "gated_activation.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace {

const KernelEntry kEntries[] = {
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
};

}  // namespace

KernelTable activation_kernels() { return {kEntries, int(sizeof(kEntries) / sizeof(kEntries[0]))}; }

}  // namespace MMKERN_ISA
}  // namespace mmkern
