// The contrastive family on a CPU: the table of its kernels. What they mean: mmkern/reference/contrastive.py.

#include "pairwise_logsumexp.h"
#include "sigmoid_loss.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace {

#define MMKERN_LOG_SUMS "acc flat rows: N, acc flat cols: M, acc flat positive_rows: N, acc flat positive_cols: M, "
#define MMKERN_LOG_SUM_GRADIENTS                                                                                       \
  "acc flat grad_rows: N, acc flat grad_cols: M, acc flat grad_positive_rows: N, acc flat grad_positive_cols: M, "
#define MMKERN_SUMS "acc flat sum_rows: N, acc flat sum_cols: M, "
#define MMKERN_SUM_GRADIENTS "acc flat grad_sum_rows: N, acc flat grad_sum_cols: M, "
#define MMKERN_COUNTS "acc flat count_rows: N, acc flat count_cols: M, "

// `pairs`: what the choice of pairs takes; `sums` and `counts` are there if it has them, as `curvature` and
// `curvature_to` are of a geometry that has one.
#define MMKERN_LOGSUMEXP(name, Geometry, curved, curvature, curvature_to, Pairs, pairs, sums, grad_sums, counts)       \
  {name,                                                                                                               \
   "x: ND, y: MD, " curvature "number logit_scale, " pairs                                                             \
   "number positive_diagonal, number keeps_products, " MMKERN_LOG_SUMS sums counts "acc products: PQ",                 \
   contrastive::run<contrastive::Geometry, curved, contrastive::Pairs>},                                               \
  {                                                                                                                    \
    name "_backward",                                                                                                  \
        MMKERN_LOG_SUM_GRADIENTS grad_sums                                                                             \
        "x: ND, y: MD, " curvature "number logit_scale, " pairs                                                        \
        "number positive_diagonal, number keeps_products, " MMKERN_LOG_SUMS sums counts                                \
        "acc products: PQ, "                                                                                           \
        "opt grad_x: ND, opt grad_y: MD, " curvature_to "opt acc grad_logit_scale:",                                   \
        contrastive::run_backward<contrastive::Geometry, curved, contrastive::Pairs>                                   \
  }
#define MMKERN_DOT Dot, false, "", ""
#define MMKERN_LORENTZ Lorentz, true, "positive curvature, ", "opt acc grad_curvature:, "
#define MMKERN_MASKED Masked, "opt bool positive_mask: NM, ", "", "", ""
#define MMKERN_LABELLED                                                                                                \
  Labelled, "int64 x_labels: NW, int64 y_labels: MW, number first_words, ", MMKERN_SUMS, MMKERN_SUM_GRADIENTS,         \
      MMKERN_COUNTS
#define MMKERN_RETAINED                                                                                                \
  Retained, "bool flat x_forgotten: N, bool flat y_forgotten: M, ", MMKERN_SUMS, MMKERN_SUM_GRADIENTS, ""
#define MMKERN_ENTRIES(...) MMKERN_LOGSUMEXP(__VA_ARGS__)

const KernelEntry kEntries[] = {
    MMKERN_ENTRIES("pairwise_logsumexp", MMKERN_DOT, MMKERN_MASKED),
    MMKERN_ENTRIES("lorentz_pairwise_logsumexp", MMKERN_LORENTZ, MMKERN_MASKED),
    MMKERN_ENTRIES("labelled_pairwise_logsumexp", MMKERN_DOT, MMKERN_LABELLED),
    MMKERN_ENTRIES("retained_pairwise_logsumexp", MMKERN_DOT, MMKERN_RETAINED),
    MMKERN_ENTRIES("lorentz_retained_pairwise_logsumexp", MMKERN_LORENTZ, MMKERN_RETAINED),
    {"sigmoid_loss",
     "x: ND, y: MD, number logit_scale, number logit_bias, number factor, number positive_diagonal, "
     "number makes_gradients, acc loss:, acc grad_x: PD, acc grad_y: QD, acc grad_logit_scale:, acc grad_logit_bias:",
     contrastive::run_sigmoid_loss},
};

#undef MMKERN_ENTRIES
#undef MMKERN_RETAINED
#undef MMKERN_LABELLED
#undef MMKERN_MASKED
#undef MMKERN_LORENTZ
#undef MMKERN_DOT
#undef MMKERN_LOGSUMEXP
#undef MMKERN_COUNTS
#undef MMKERN_SUM_GRADIENTS
#undef MMKERN_SUMS
#undef MMKERN_LOG_SUM_GRADIENTS
#undef MMKERN_LOG_SUMS

}  // namespace

KernelTable contrastive_kernels() { return {kEntries, int(sizeof(kEntries) / sizeof(kEntries[0]))}; }

}  // namespace MMKERN_ISA
}  // namespace mmkern
