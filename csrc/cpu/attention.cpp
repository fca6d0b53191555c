// The attention family on a CPU: the table of its kernels. What they mean: mmkern/reference/attention.py.

#include "attention_varlen.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace {

#define MMKERN_RELATIONS "h multiple of g, d positive; "

#define MMKERN_PROBLEM                                                                                                 \
  "strided q: bhld, strided k: bgsd, strided v: bgse, opt bool strided key_mask: bs, opt bool broadcast attn_mask: "   \
  "bhls, opt broadcast attn_bias: bhls, opt broadcast bias: bhls, opt int64 prefix_lengths: b, opt int64 seed: t, "    \
  "number scale, nonnegative softcap, number left, number right, number alignment, nonnegative dropout_p"

#define MMKERN_PACKED                                                                                                  \
  "strided q: thd, strided k: sgd, strided v: sge, int64 cu_seqlens_q: n, int64 cu_seqlens_k: n, "                     \
  "opt int64 prefix_lengths: b, opt int64 seed: w, number max_seqlen_q, number max_seqlen_k, number scale, "           \
  "nonnegative softcap, "                                                                                              \
  "number left, number right, number alignment, nonnegative dropout_p"

// The axes of heads and keys are those of the source alone.
#define MMKERN_SOURCE(i, opt, heads, keys)                                                                             \
  opt "strided k" #i ": b" heads keys "d, " opt "strided v" #i ": b" heads keys                                        \
      "e, "                                                                                                            \
      "opt broadcast gate" #i ": bhl1, opt bool strided key_mask" #i ": b" keys                                        \
      ", "                                                                                                             \
      "opt broadcast bias" #i ": bhl" keys ", "

#define MMKERN_BY_ACCUMULATION(function)                                                                               \
  [](const Call& call) {                                                                                               \
    call[0].dtype == Dtype::float64 ? attention::function<double>(call) : attention::function<float>(call);            \
  }

const KernelEntry kEntries[] = {
    {"cross_attention", MMKERN_RELATIONS MMKERN_PROBLEM ", strided out: bhle, acc lse: bhl",
     MMKERN_BY_ACCUMULATION(forward)},
    {"cross_attention_backward",
     MMKERN_RELATIONS
     "strided grad: bhle, acc grad_lse: bhl, " MMKERN_PROBLEM
     ", strided out: bhle, acc lse: bhl, opt strided grad_q: bhld, opt strided grad_k: bgsd, opt strided grad_v: bgse, "
     "opt acc broadcast grad_attn_bias: bhls, opt acc broadcast grad_bias: bhls",
     MMKERN_BY_ACCUMULATION(backward)},
    {"multi_source_attention",
     "h multiple of g, h multiple of i, h multiple of m, h multiple of u, d positive; strided q: bhld, " MMKERN_SOURCE(
         0, "", "g", "s") MMKERN_SOURCE(1, "opt ", "i", "j") MMKERN_SOURCE(2, "opt ", "m", "n")
         MMKERN_SOURCE(3, "opt ", "u", "w") "opt int64 seed: t, number scale, nonnegative softcap, number joint, "
                                            "nonnegative dropout_p, strided out: bhle",
     MMKERN_BY_ACCUMULATION(forward_sources)},
    {"cross_attention_varlen", MMKERN_RELATIONS MMKERN_PACKED ", strided out: the, acc lse: ht",
     MMKERN_BY_ACCUMULATION(forward_varlen)},
    {"cross_attention_varlen_backward",
     MMKERN_RELATIONS
     "strided grad: the, acc grad_lse: ht, " MMKERN_PACKED
     ", strided out: the, acc lse: ht, opt strided grad_q: thd, opt strided grad_k: sgd, opt strided grad_v: sge",
     MMKERN_BY_ACCUMULATION(backward_varlen)},
};

#undef MMKERN_RELATIONS
#undef MMKERN_PROBLEM
#undef MMKERN_PACKED
#undef MMKERN_SOURCE
#undef MMKERN_BY_ACCUMULATION

}  // namespace

KernelTable attention_kernels() { return {kEntries, int(sizeof(kEntries) / sizeof(kEntries[0]))}; }

}  // namespace MMKERN_ISA
}  // namespace mmkern
