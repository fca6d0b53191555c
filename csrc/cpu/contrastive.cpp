// The contrastive family on a CPU: the table of its kernels. What they mean: mmkern/reference/contrastive.py.

#include "pairwise_logsumexp.h"
#include "sigmoid_loss.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace {

#define MMKERN_SCORES                                                                                                  \
  "number logit_scale, opt bool positive_mask: NM, number positive_diagonal, number keeps_products, "
#define MMKERN_LOG_SUMS                                                                                                \
  "acc flat rows: N, acc flat cols: M, acc flat positive_rows: N, acc flat positive_cols: M, acc products: PQ"
#define MMKERN_GRADIENTS                                                                                               \
  "acc flat grad_rows: N, acc flat grad_cols: M, acc flat grad_positive_rows: N, acc flat grad_positive_cols: M, "

// `curvature` and `curvature_to`: of a geometry that has one.
#define MMKERN_LOGSUMEXP(name, Geometry, curved, curvature, curvature_to)                                              \
  {name, "x: ND, y: MD, " curvature MMKERN_SCORES MMKERN_LOG_SUMS, contrastive::run<contrastive::Geometry, curved>}, { \
    name "_backward",                                                                                                  \
        MMKERN_GRADIENTS "x: ND, y: MD, " curvature MMKERN_SCORES MMKERN_LOG_SUMS                                      \
                         ", opt grad_x: ND, opt grad_y: MD, " curvature_to "opt acc grad_logit_scale:",                \
        contrastive::run_backward<contrastive::Geometry, curved>                                                       \
  }

const KernelEntry kEntries[] = {
    MMKERN_LOGSUMEXP("pairwise_logsumexp", Dot, false, "", ""),
    MMKERN_LOGSUMEXP("lorentz_pairwise_logsumexp", Lorentz, true, "positive curvature, ", "opt acc grad_curvature:, "),
    {"sigmoid_loss",
     "x: ND, y: MD, number logit_scale, number logit_bias, number positive_diagonal, number makes_gradients, acc "
     "loss:, "
     "acc grad_x: PD, acc grad_y: QD, acc grad_logit_scale:, acc grad_logit_bias:",
     contrastive::run_sigmoid_loss},
};

#undef MMKERN_LOGSUMEXP
#undef MMKERN_GRADIENTS
#undef MMKERN_LOG_SUMS
#undef MMKERN_SCORES

}  // namespace

KernelTable contrastive_kernels() { return {kEntries, int(sizeof(kEntries) / sizeof(kEntries[0]))}; }

}  // namespace MMKERN_ISA
}  // namespace mmkern
