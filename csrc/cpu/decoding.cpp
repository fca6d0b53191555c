// The decoding family on a CPU: the table of its kernels. What they mean: mmkern/reference/decoding.py, absorbing.py,
// masked_decode.py, probabilities.py, ctc.py, ctc_align.py,
// ctc_beam.py, edit_distance.py.

#include "absorbing_loss.h"
#include "absorbing_step.h"
#include "ctc_align.h"
#include "ctc_beam.h"
#include "edit_distance.h"
#include "masked_decode.h"
#include "probabilities.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace {

void sample_tokens(const Call& call) {
  with_storage(call[0].dtype, [&](auto storage) { sampling::run<typename decltype(storage)::type>(call); });
}
void token_log_prob(const Call& call) {
  with_storage(call[0].dtype,
               [&](auto storage) { probabilities::run_log_prob<typename decltype(storage)::type>(call); });
}
void token_log_prob_backward(const Call& call) {
  with_storage(call[1].dtype,
               [&](auto storage) { probabilities::run_log_prob_backward<typename decltype(storage)::type>(call); });
}
void renormalize(const Call& call) {
  with_storage(call[0].dtype,
               [&](auto storage) { probabilities::run_renormalize<typename decltype(storage)::type>(call); });
}
void masked_decode_step(const Call& call) {
  with_storage(call[0].dtype, [&](auto storage) { masked_decode::Step<typename decltype(storage)::type>(call).run(); });
}
void absorbing_step(const Call& call) {
  with_storage(call[0].dtype, [&](auto storage) { absorbing::step<typename decltype(storage)::type>(call); });
}
void absorbing_score_entropy(const Call& call) {
  with_storage(call[0].dtype, [&](auto storage) { absorbing::entropy<typename decltype(storage)::type>(call); });
}
void absorbing_score_entropy_backward(const Call& call) {
  with_storage(call[1].dtype,
               [&](auto storage) { absorbing::entropy_backward<typename decltype(storage)::type>(call); });
}
void absorbing_score_loss(const Call& call) {
  with_storage(call[0].dtype,
               [&](auto storage) { absorbing::loss_with_gradient<typename decltype(storage)::type>(call); });
}

void ctc_greedy_decode(const Call& call) {
  with_storage(call[0].dtype, [&](auto storage) { ctc::run_greedy<typename decltype(storage)::type>(call); });
}

void ctc_beam_decode(const Call& call) {
  with_storage(call[0].dtype, [&](auto storage) { ctc::run_beam<typename decltype(storage)::type>(call); });
}

void ctc_forced_align(const Call& call) {
  with_storage(call[0].dtype, [&](auto storage) { ctc::run_align<typename decltype(storage)::type>(call); });
}

#define MMKERN_COLLAPSED "int64 tokens_out: *T, int64 lengths_out: *, int64 times: *T"

const KernelEntry kEntries[] = {
    // The letters: a seed and its offset, the columns of a row of filters.
    {"sample_tokens",
     "V positive, P is 2, F is 6; logits: *V, int64 samples seed: *P, acc samples filters: *F, "
     "opt int64 samples history: *H, opt int64 samples allowed: *A, acc log_probs: *, int64 tokens: *",
     sample_tokens},
    {"token_log_prob", "V positive; logits: *V, int64 tokens: *, acc log_probs: *, acc largest: *, acc log_sums: *",
     token_log_prob},
    {"token_log_prob_backward",
     "V positive; acc grad: *, logits: *V, int64 tokens: *, acc log_probs: *, acc largest: *, acc log_sums: *, "
     "opt grad_logits: *V",
     token_log_prob_backward},
    {"renormalize", "V positive, P is 2; probs: *V, acc samples filters: *P, out: *V", renormalize},
    {"masked_decode_step",
     "V positive, P is 2, C is 3; strided logits: *V, int64 tokens: *, bool masked: *, int64 seed: P, "
     "acc samples settings: *C, int64 samples counts: *, acc log_probs: *, int64 tokens_out: *, int64 stays: *",
     masked_decode_step},
    {"collapse_repeats", "int64 tokens: *T, opt int64 lengths: *, number blank, " MMKERN_COLLAPSED, ctc::run_collapse},
    {"ctc_greedy_decode",
     "V positive; strided log_probs: *TV, opt int64 lengths: *, number blank, acc scores: *, " MMKERN_COLLAPSED,
     ctc_greedy_decode},
    {"ctc_beam_decode",
     "V positive; strided log_probs: *TV, opt int64 lengths: *, number beam, number blank, number nbest, "
     "number prune_log_prob, acc scores: *N, int64 tokens: *NT, int64 lengths_out: *N, int64 times: *NT",
     ctc_beam_decode},
    {"ctc_forced_align",
     "V positive; strided log_probs: *TV, int64 targets: *S, opt int64 lengths: *, opt int64 target_lengths: *, "
     "number blank, acc scores: *T, int64 labels: *T, int64 places: *T",
     ctc_forced_align},
    {"edit_distance", "int64 a: *N, int64 b: *M, opt int64 a_lengths: *, opt int64 b_lengths: *, int64 counts: *C",
     edits::run},
    // Branches, of tokens and MASK.
    {"absorbing_step",
     "K positive, V positive, P is 2; strided log_scores: *KV, int64 tokens: *, int64 seed: P, acc samples rates: *, "
     "opt acc samples weights: *K, acc log_probs: *, int64 out: *",
     absorbing_step},
    {"absorbing_score_entropy",
     "V positive; strided log_scores: *V, int64 targets: *, bool masked: *, acc samples sigma: *, acc out: *",
     absorbing_score_entropy},
    {"absorbing_score_entropy_backward",
     "V positive; acc grad: *, strided log_scores: *V, int64 targets: *, bool masked: *, acc samples sigma: *, "
     "opt strided grad_log_scores: *V",
     absorbing_score_entropy_backward},
    {"absorbing_score_loss",
     "V positive; strided log_scores: *V, int64 targets: *, bool masked: *, acc samples sigma: *, acc samples weights: "
     "*, acc loss:, strided gradient: *V",
     absorbing_score_loss},
};

#undef MMKERN_COLLAPSED

}  // namespace

KernelTable decoding_kernels() { return {kEntries, int(sizeof(kEntries) / sizeof(kEntries[0]))}; }

}  // namespace MMKERN_ISA
}  // namespace mmkern
