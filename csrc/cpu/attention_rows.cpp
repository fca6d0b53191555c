// The row-wise companions of attention on a CPU, and the table of their kernels. What they mean:
// mmkern/reference/attention_rows.py.

#include "rotary.h"

#include "merge_attention.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace {

#define MMKERN_PARTS "strided out: *D, acc strided lse: *, strided other: *D, acc strided other_lse: *"
#define MMKERN_ROTARY                                                                                                  \
  "strided x: *D, opt acc weight: D, acc strided cos: *R, acc strided sin: *R, nonnegative eps, number normalize, "    \
  "number interleaved"

const KernelEntry kEntries[] = {
    {"merge_attention", MMKERN_PARTS ", strided merged: *D, acc strided merged_lse: *", merge::forward},
    {"merge_attention_backward",
     "strided grad: *D, acc strided grad_lse: *, " MMKERN_PARTS
     ", opt strided grad_out: *D, opt acc strided grad_out_lse: *, opt strided grad_other: *D, "
     "opt acc strided grad_other_lse: *",
     merge::backward},
    {"rotary_embedding", MMKERN_ROTARY ", strided out: *D", rotary::forward},
    {"rotary_embedding_backward", "strided grad: *D, " MMKERN_ROTARY ", opt strided grad_x: *D, opt acc grad_weight: D",
     rotary::backward},
};

#undef MMKERN_PARTS
#undef MMKERN_ROTARY

}  // namespace

KernelTable attention_rows_kernels() { return {kEntries, int(sizeof(kEntries) / sizeof(kEntries[0]))}; }

}  // namespace MMKERN_ISA
}  // namespace mmkern
