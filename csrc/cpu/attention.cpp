// The attention family on a CPU: the table of its kernels. What they mean: mmkern/reference/attention.py.

#include "attention_backward.h"
#include "attention_decode.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace {

#define MMKERN_PROBLEM                                                                                                 \
  "strided q: bhld, strided k: bgsd, strided v: bgse, opt bool strided key_mask: bs, opt bool broadcast attn_mask: "   \
  "bhls, opt broadcast attn_bias: bhls, opt broadcast bias: bhls, opt int64 prefix_lengths: b, opt int64 seed: t, "    \
  "number scale, nonnegative softcap, number left, number right, number alignment, nonnegative dropout_p"

template <template <class> class Body>
void by_accumulation(const Call& call) {
  call[0].dtype == Dtype::float64 ? Body<double>::run(call) : Body<float>::run(call);
}
template <class T>
struct Forward {
  static void run(const Call& call) { attention::forward<T>(call); }
};
template <class T>
struct Backward {
  static void run(const Call& call) { attention::backward<T>(call); }
};

const KernelEntry kEntries[] = {
    {"cross_attention", MMKERN_PROBLEM ", strided out: bhle, acc lse: bhl", by_accumulation<Forward>},
    {"cross_attention_backward",
     "strided grad: bhle, acc grad_lse: bhl, " MMKERN_PROBLEM
     ", strided out: bhle, acc lse: bhl, opt strided grad_q: bhld, opt strided grad_k: bgsd, opt strided grad_v: bgse, "
     "opt acc broadcast grad_attn_bias: bhls, opt acc broadcast grad_bias: bhls",
     by_accumulation<Backward>},
};

#undef MMKERN_PROBLEM

}  // namespace

KernelTable attention_kernels() { return {kEntries, int(sizeof(kEntries) / sizeof(kEntries[0]))}; }

}  // namespace MMKERN_ISA
}  // namespace mmkern
