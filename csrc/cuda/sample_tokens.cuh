// A token of each row of logits on CUDA: sample_tokens of mmkern/reference/decoding.py. A block has a row.
#pragma once

#include "token_selection.cuh"

namespace mmkern {
inline namespace device {
namespace sampling {

namespace filter {
enum { kTopK, kTemperature, kTopP, kMinP, kTypicalP };  // Filter of mmkern/reference/decoding.py
}

MMKERN_FN void keep_mass(const LogitRow& row, const Scale& scale, float share, Kept& kept) {
  const double least = double(share) * double(mass_of_kept(row, scale, kept));
  const Found found = find_boundary<4>(least > 1 ? least : 1, [&](auto f) {
    for_each_stretch(row, scale, kept, [&](int, const float (&z)[kEach], const float (&w)[kEach]) {
      for (int k = 0; k < kEach; ++k) f(key_of(z[k]), mass_of(w[k]));
    });
  });
  const u64 ties = ties_of(found, least, mass_of(scale.weight(logit_of(found.key))));
  kept.ties = found.key == kept.key && kept.ties < ties ? kept.ties : ties;
  kept.key = found.key;
}

// Those whose surprise is nearest to the entropy; as large keys as they are near.
struct Typical {
  double log_total, entropy, least;
  u64 key, before;

  MMKERN_FN double surprise(const Scale& scale, float logit) const {
    return log_total - (double(logit) - double(scale.top)) * double(scale.inverse);
  }
  MMKERN_FN u64 key_of(const Scale& scale, float logit) const {
    return ~u64(__double_as_longlong(fabs(surprise(scale, logit) - entropy)));
  }
};

MMKERN_FN Typical find_typical(const LogitRow& row, const Scale& scale, const Kept& kept, float share, u64 mass) {
  __shared__ double of_warps[kWarps];
  Typical typical{log(double(mass) / kUnit), 0, 0, 0, 0};
  double surprise = 0;
  for_each_stretch(row, scale, kept, [&](int, const float (&z)[kEach], const float (&w)[kEach]) {
    for (int k = 0; k < kEach; ++k)
      if (w[k] > 0) surprise += double(w[k]) * typical.surprise(scale, z[k]);
  });
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) surprise += __shfl_xor_sync(kAllLanes, surprise, lanes);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = surprise;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) typical.entropy += of_warps[w] / (double(mass) / kUnit);
  __syncthreads();
  typical.least = double(share) * double(mass) > 1 ? double(share) * double(mass) : 1;
  const Found found = find_boundary<8>(typical.least, [&](auto f) {
    for_each_stretch(row, scale, kept, [&](int, const float (&z)[kEach], const float (&w)[kEach]) {
      for (int k = 0; k < kEach; ++k)
        if (w[k] > 0) f(typical.key_of(scale, z[k]), mass_of(w[k]));
    });
  });
  typical.key = found.key;
  typical.before = found.above;
  return typical;
}

}  // namespace sampling

// ---- The kernel
// ------------------------------------------------------------------------------------------------------

// Laid out alike in mmkern/backends/cuda_decoding.py.
struct SampleTokensArgs {
  const void* logits;  // [rows, size]
  i64 logits_stride;
  const u64* seeds;  // key, and the first counter; a stride of 0 where the rows share one
  i64 seeds_stride;
  i64 counters;  // from row to row
  const float* filters;
  i64 filters_stride;
  const u64* allowed;
  i64 allowed_stride;
  float* log_probs;
  i64* tokens;
  int size;
  Dtype dtype;
  int vectors, unused;
};

__global__ void __launch_bounds__(sampling::kThreads) sample_tokens(const SampleTokensArgs a) {
  using namespace sampling;
  const i64 b = blockIdx.x;
  const void* const logits = static_cast<const char*>(a.logits) + b * a.logits_stride * bytes_of(a.dtype);
  const LogitRow row{logits, a.allowed ? a.allowed + b * a.allowed_stride : nullptr, a.size, a.dtype, a.vectors != 0};
  const float* const filters = a.filters + b * a.filters_stride;
  const float temperature = filters[filter::kTemperature];

  Leader top;
  if (!find_top(row, top)) {
    if (threadIdx.x == 0) a.log_probs[b] = __uint_as_float(0x7fc00000u), a.tokens[b] = -1;
    return;
  }

  const Scale scale{top.value, temperature == 0 ? 1 : 1 / temperature};
  Kept kept{0, ~u64(0), 0};
  if (filters[filter::kTopK] < float(a.size)) keep_count(row, double(filters[filter::kTopK]), kept);
  if (filters[filter::kTopP] < 1) keep_mass(row, scale, filters[filter::kTopP], kept);
  kept.least = filters[filter::kMinP];
  const bool is_typical = filters[filter::kTypicalP] < 1;
  Typical typical{};
  if (is_typical) {
    const u64 mass = mass_of_kept(row, scale, kept);
    typical = find_typical(row, scale, kept, filters[filter::kTypicalP], mass);
  }

  const u64* const seed = a.seeds + b * a.seeds_stride;
  Leader best{-1, a.size};
  u64 mass = 0, tied = typical.before;
  for_each_stretch(row, scale, kept, [&](int first, const float (&z)[kEach], float (&w)[kEach]) {
    if (is_typical) {
      u64 own = 0, total;
      for (int k = 0; k < kEach; ++k)
        if (w[k] > 0 && typical.key_of(scale, z[k]) == typical.key) own += mass_of(w[k]);
      u64 earlier = tied + scan_block(own, total);
      tied += total;
      for (int k = 0; k < kEach; ++k) {
        if (!(w[k] > 0)) continue;
        const u64 key = typical.key_of(scale, z[k]), mine = mass_of(w[k]);
        const bool is_kept = key > typical.key || (key == typical.key && double(earlier) < typical.least);
        if (key == typical.key) earlier += mine;
        if (!is_kept) w[k] = 0;
      }
    }
    for (int k = 0; k < kEach; ++k) mass += mass_of(w[k]);
    race(w, first, seed[0], seed[1] + u64(b * a.counters), best);
  });
  best = leader_of_block<kThreads>(best);
  mass = sum_of_block(mass);
  if (threadIdx.x != 0) return;
  const int chosen = temperature == 0 ? top.place : best.place;
  const float logit = load_one(logits, chosen, a.dtype);
  a.log_probs[b] = (logit - scale.top) * scale.inverse - float(log(double(mass) / kUnit));
  a.tokens[b] = chosen;
}

}  // namespace device
}  // namespace mmkern
