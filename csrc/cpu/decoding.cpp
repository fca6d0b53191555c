// The decoding family on a CPU: the table of its kernels. What they mean: mmkern/reference/decoding.py.

#include "sample_tokens.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace {

void sample_tokens(const Call& call) {
  with_storage(call[0].dtype, [&](auto storage) { sampling::run<typename decltype(storage)::type>(call); });
}

const KernelEntry kEntries[] = {
    // The letters: a seed and its offset, the columns of a row of filters.
    {"sample_tokens",
     "V positive, P is 2, F is 6; logits: *V, int64 samples seed: *P, acc samples filters: *F, "
     "opt int64 samples history: *H, opt int64 samples allowed: *A, acc log_probs: *, int64 tokens: *",
     sample_tokens},
};

}  // namespace

KernelTable decoding_kernels() { return {kEntries, int(sizeof(kEntries) / sizeof(kEntries[0]))}; }

}  // namespace MMKERN_ISA
}  // namespace mmkern
