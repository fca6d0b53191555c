// The vocabulary family on a CPU: the table of its kernels. What they mean: mmkern/reference/vocabulary.py.

#include "vocabulary_loss.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace {

template <void (*kFloat)(const Call&), void (*kDouble)(const Call&), int kLead>
void run(const Call& call) {
  call[kLead].dtype == Dtype::float64 ? kDouble(call) : kFloat(call);
}

#define MMKERN_TENSORS                                                                                                 \
  "input: ND, linear_weight: VD, opt linear_bias: V, opt acc weight: V, int64 flat target: N, nonnegative softcap, "
#define MMKERN_LOGITS MMKERN_TENSORS "positive inverse_temperature, number ignore_index, number sums_logits, "
#define MMKERN_ROWS "acc flat others: N, acc flat positive: N, acc flat totals: N"

const KernelEntry kEntries[] = {
    {"linear_logsumexp", MMKERN_LOGITS MMKERN_ROWS, run<vocabulary::forward<float>, vocabulary::forward<double>, 0>},
    {"linear_logsumexp_backward",
     "acc flat grad_others: N, acc flat grad_positive: N, acc flat grad_totals: N, " MMKERN_LOGITS MMKERN_ROWS
     ", opt grad_input: ND, opt grad_linear_weight: VD, opt grad_linear_bias: V",
     run<vocabulary::backward<float>, vocabulary::backward<double>, 3>},
    {"linear_cross_entropy",
     MMKERN_TENSORS
     "number ignore_index, number label_smoothing, number z_loss, number mean, acc loss:, grad_input: ND, "
     "grad_linear_weight: VD, acc grad_linear_bias: B",
     run<vocabulary::loss_with_gradients<float>, vocabulary::loss_with_gradients<double>, 0>},
};

#undef MMKERN_ROWS
#undef MMKERN_LOGITS
#undef MMKERN_TENSORS

}  // namespace

KernelTable vocabulary_kernels() { return {kEntries, int(sizeof(kEntries) / sizeof(kEntries[0]))}; }

}  // namespace MMKERN_ISA
}  // namespace mmkern
