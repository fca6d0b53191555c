// Denoising steps and the loss that their model is trained by on a CPU, and the table of their kernels. What they mean:
// mmkern/reference/diffusion.py.

#include "denoise_step.h"
#include "denoising_loss.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace {

// The letters: two numbers an output, one, the columns of a row of coefficients, two limits, a seed and its offset.
#define MMKERN_STEP                                                                                                    \
  "W is 10, R is 1, C is 19, L is 2, P is 2; "                                                                         \
  "strided x: *D, opt own strided output0: *D, opt own strided output1: *D, opt own strided output2: *D, "             \
  "opt own strided output3: *D, opt own strided output4: *D, opt acc broadcast mask: *D, "                             \
  "opt strided history0: *D, opt strided history1: *D, opt strided history2: *D, opt strided history3: *D, "           \
  "opt strided noise: *D, opt int64 seed: P, opt acc broadcast keep: *D, opt strided known: *D, "                      \
  "opt strided known_noise: *D, opt acc samples weights: *W, opt acc samples rescale: *R, "                            \
  "acc samples coefficients: *C, opt acc samples limits: *L, strided next: *D"

const KernelEntry kEntries[] = {
    {"denoise_step", MMKERN_STEP, denoise::step},
    {"multistep", MMKERN_STEP ", strided x0: *D", denoise::step},
    {"corrected_step", MMKERN_STEP ", strided x0: *D, strided corrected: *D", denoise::step},
    {"masked_squared_error", "strided pred: *D, own strided target: *D, opt acc broadcast mask: *D, acc samples out: *",
     denoising_loss::error},
    {"masked_squared_error_backward",
     "acc samples grad: *, strided pred: *D, own strided target: *D, opt acc broadcast mask: *D, "
     "opt strided grad_pred: *D, opt own strided grad_target: *D",
     denoising_loss::error_backward},
};

#undef MMKERN_STEP

}  // namespace

KernelTable diffusion_kernels() { return {kEntries, int(sizeof(kEntries) / sizeof(kEntries[0]))}; }

}  // namespace MMKERN_ISA
}  // namespace mmkern
