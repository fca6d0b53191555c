// A step of masked iterative decoding on CUDA: masked_decode_step of mmkern/reference/masked_decode.py. First a block
// has a row, of which it reads nothing unless it is masked; then a sample, whose positions of most doubt it finds as
// the largest logits are found.
#pragma once

#include "grid_rows.cuh"
#include "token_selection.cuh"

namespace mmkern {
inline namespace device {

namespace masked_decode {

namespace setting {
enum { kTopK, kTemperature, kNoise };  // Setting of mmkern/reference/masked_decode.py
}

constexpr float kMostDoubt = 3.4028234664e38f;  // of all numbers

}  // namespace masked_decode

// Laid out alike in mmkern/backends/cuda_masked_decode.py.
struct DrawMaskedArgs {
  GridRows logits;
  const i64* tokens;
  const bool* masked;
  const u64* seed;  // key, and the first counter
  i64 counters;     // of a row
  i64 rows, of_sample;
  const float* settings;
  i64 settings_stride;  // 0 where all samples share one
  float* log_probs;
  i64* out;
  i64* stays;
  float* doubts;  // -inf where nothing is
  int size, heads, length;
  Dtype dtype;
  int vectors, unused;
};

__global__ void __launch_bounds__(sampling::kThreads, 1) draw_masked(const DrawMaskedArgs a) {
  using namespace sampling;
  using namespace masked_decode;
  const i64 r = blockIdx.x;
  if (!a.masked[r]) {
    if (threadIdx.x == 0) a.out[r] = a.tokens[r], a.log_probs[r] = 0, a.stays[r] = 0, a.doubts[r] = -infinity();
    return;
  }
  const i64 of_head = r / a.length;
  const i64 place = of_head / a.heads * a.logits.strides[0] + of_head % a.heads * a.logits.strides[1] +
                    r % a.length * a.logits.strides[2];
  const void* const logits = static_cast<const char*>(a.logits.data) + place * bytes_of(a.dtype);
  const LogitRow row{logits, nullptr, a.size, a.dtype, a.vectors != 0};
  const float* const settings = a.settings + r / a.of_sample * a.settings_stride;
  Leader top;
  if (!find_top(row, top)) {
    if (threadIdx.x == 0)
      a.out[r] = -1, a.log_probs[r] = __uint_as_float(0x7fc00000u), a.stays[r] = 0, a.doubts[r] = kMostDoubt;
    return;
  }
  Kept kept{0, ~u64(0), 0};
  if (settings[setting::kTopK] < float(a.size)) keep_count(row, double(settings[setting::kTopK]), kept);
  const u64 mass = mass_of_kept(row, Scale{top.value, 1}, kept);
  int chosen = top.place;
  const float temperature = settings[setting::kTemperature];
  if (temperature > 0) {
    Leader best{-1, a.size};
    for_each_stretch(row, Scale{top.value, 1 / temperature}, kept,
                     [&](int first, const float (&)[kEach], const float (&w)[kEach]) {
                       race(w, first, a.seed[0], a.seed[1] + u64(r * a.counters), best);
                     });
    chosen = leader_of_block<kThreads>(best).place;
  }
  if (threadIdx.x != 0) return;
  const float log_p = load_one(logits, chosen, a.dtype) - top.value - float(log(double(mass) / kUnit));
  float score = expf(log_p);
  if (settings[setting::kNoise] > 0) {
    const float v = uniform_at(a.seed[0], a.seed[1] + u64(a.rows * a.counters), r);
    score -= settings[setting::kNoise] * logf(-log1pf(-v));
  }
  a.out[r] = chosen;
  a.log_probs[r] = log_p;
  a.stays[r] = 0;
  a.doubts[r] = -score;
}

struct MaskAgainArgs {
  const float* doubts;  // [samples, positions]
  const i64* tokens;
  const i64* counts;
  i64 counts_stride;  // 0 where all samples share one
  i64* out;
  i64* stays;
  int positions, unused;
};

__global__ void __launch_bounds__(sampling::kThreads) mask_again(const MaskAgainArgs a) {
  using namespace sampling;
  const i64 first_of = i64(blockIdx.x) * a.positions, count = a.counts[blockIdx.x * a.counts_stride];
  if (count <= 0) return;
  const LogitRow row{a.doubts + first_of, nullptr, a.positions, kFloat32, false};
  Kept kept{0, ~u64(0), 0};
  keep_count(row, double(count), kept);
  // All doubts weigh 1, but for that of a position where nothing was drawn.
  for_each_stretch(row, Scale{0, 0}, kept, [&](int first, const float (&)[kEach], const float (&w)[kEach]) {
    for (int k = 0; k < kEach; ++k) {
      if (!(w[k] > 0)) continue;
      a.out[first_of + first + k] = a.tokens[first_of + first + k];
      a.stays[first_of + first + k] = 1;
    }
  });
}

}  // namespace device
}  // namespace mmkern
