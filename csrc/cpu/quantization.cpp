// The quantization family on a CPU: the table of its kernels. What they mean: mmkern/reference/quantization.py.

#include "code_tables.h"
#include "nearest_code.h"
#include "residual_quantize.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace {

// Tensors: x, the codebook, distances, codes.
template <template <class> class Metric>
void nearest_code(const Call& call) {
  with_storage(call[0].dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    using T = accumulate_t<S>;
    const Rows<const S> x = rows<const S>(call[0]);
    if (x.rows == 0) return;
    const Metric<S> metric(rows<const S>(call[1]), call.threads);
    nearest::Finder<Metric<S>, S>(metric, x, static_cast<T*>(call[2].data), static_cast<int64_t*>(call[3].data),
                                  call.threads)
        .run();
  });
}

void residual_quantize(const Call& call) {
  with_storage(call[0].dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    if (call.scalars[0] != 0)
      residual::Quantizer<nearest::Cosine, S>(call).run();
    else
      residual::Quantizer<nearest::L2, S>(call).run();
  });
}

#define MMKERN_OF_STORAGE(name, run)                                                                                   \
  void name(const Call& call) {                                                                                        \
    with_storage(call[0].dtype, [&](auto storage) { tables::run<typename decltype(storage)::type>(call); });           \
  }
MMKERN_OF_STORAGE(codes_embedding, embed)
MMKERN_OF_STORAGE(codes_embedding_backward, embed_backward)
MMKERN_OF_STORAGE(code_sums, sum)
#undef MMKERN_OF_STORAGE

#define MMKERN_NEAREST "K positive; x: *D, codebook: KD, acc distances: *, int64 codes: *"

const KernelEntry kEntries[] = {
    {"nearest_code", MMKERN_NEAREST, nearest_code<nearest::L2>},
    {"cosine_nearest_code", MMKERN_NEAREST, nearest_code<nearest::Cosine>},
    // The letters: levels, codes of each, the width of a code, that of a row.
    {"residual_quantize",
     "Q positive, K positive; x: *D, codebooks: QKC, opt in_weight: QCD, opt in_bias: QC, opt out_weight: QDC, "
     "opt out_bias: QD, number normalize, reconstruction: *D, acc flat commitment_loss: Q, acc flat codebook_loss: Q, "
     "int64 codes: *Q",
     residual_quantize},
    {"codes_embedding", "Q positive; tables: QKD, int64 codes: *Q, number averages, out: *D", codes_embedding},
    {"codes_embedding_backward",
     "Q positive; grad: *D, tables: QKD, int64 codes: *Q, number averages, grad_tables: QKD", codes_embedding_backward},
    {"code_sums", "x: *D, int64 codes: *, number count, acc sums: KD, int64 flat counts: K", code_sums},
};

#undef MMKERN_NEAREST

}  // namespace

KernelTable quantization_kernels() { return {kEntries, int(sizeof(kEntries) / sizeof(kEntries[0]))}; }

}  // namespace MMKERN_ISA
}  // namespace mmkern
