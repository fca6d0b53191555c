// Group norm with its modulation on a CPU, and the table of its kernels. What they mean:
// mmkern/reference/modulation.py.

#include "group_norm.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace {

#define MMKERN_OF_CHANNELS                                                                                             \
  "opt acc strided weight: GD, opt acc strided bias: GD, opt acc strided scale: BGD, opt acc strided shift: BGD, "     \
  "nonnegative eps, number activation"

const KernelEntry kEntries[] = {
    {"group_norm_act", "strided x: BGDS, " MMKERN_OF_CHANNELS ", strided out: BGDS", group_norm::forward},
    {"group_norm_act_backward",
     "strided grad: BGDS, strided x: BGDS, " MMKERN_OF_CHANNELS
     ", opt strided grad_x: BGDS, opt acc strided grad_weight: GD, opt acc strided grad_bias: GD, "
     "opt acc strided grad_scale: BGD, opt acc strided grad_shift: BGD",
     group_norm::backward},
};

#undef MMKERN_OF_CHANNELS

}  // namespace

KernelTable group_norm_kernels() { return {kEntries, int(sizeof(kEntries) / sizeof(kEntries[0]))}; }

}  // namespace MMKERN_ISA
}  // namespace mmkern
