// A token of each row of logits on CUDA: sample_tokens of mmkern/reference/decoding.py. A block has a row, and walks
// over it a stretch at a time, neighbouring tokens in one thread.
//
// Where the kept ones end is found digit by digit, by histograms of masses in shared memory. A weight's mass is a whole
// number, so that the sum does not hang on the order in which threads add to it.
#pragma once

#include "random.cuh"

namespace mmkern {
inline namespace device {
namespace sampling {

using u64 = unsigned long long;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kEach = 8;  // tokens of a stretch that a thread has
constexpr int kStretch = kThreads * kEach;
constexpr int kDigits = 256;

namespace filter {
enum { kTopK, kTemperature, kTopP, kMinP, kTypicalP };  // Filter of mmkern/reference/decoding.py
}

// ---- What a block adds up
// --------------------------------------------------------------------------------------------

// The sum of what the threads before this one have; `total` becomes that of all. All threads call it.
MMKERN_FN u64 scan_block(u64 x, u64& total) {
  __shared__ u64 of_warps[kWarps];
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  u64 up_to_here = x;
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const u64 before = __shfl_up_sync(kAllLanes, up_to_here, lanes);
    if (lane >= lanes) up_to_here += before;
  }
  if (lane == kWarp - 1) of_warps[warp] = up_to_here;
  __syncthreads();
  u64 before = up_to_here - x;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += of_warps[w];
    total += of_warps[w];
  }
  __syncthreads();
  return before;
}

MMKERN_FN u64 sum_of_block(u64 x) {
  u64 total;
  scan_block(x, total);
  return total;
}

// The largest number, and of equal ones the first place.
struct Leader {
  float value;
  int place;

  MMKERN_FN void take(float other, int at) {
    if (other > value || (other == value && at < place)) value = other, place = at;
  }
};
MMKERN_FN Leader leader_of_block(Leader mine) {
  __shared__ Leader of_warps[kWarps];
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const float value = __shfl_xor_sync(kAllLanes, mine.value, lanes);
    const int place = __shfl_xor_sync(kAllLanes, mine.place, lanes);
    mine.take(value, place);
  }
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = mine;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) mine.take(of_warps[w].value, of_warps[w].place);
  __syncthreads();
  return mine;
}

// ---- A row
// -----------------------------------------------------------------------------------------------------------

struct LogitRow {
  const void* logits;
  const u64* allowed;  // words of 64 tokens, or null
  int size;
  Dtype dtype;
  bool vectors;

  // Of tokens from `first` on, a multiple of kEach; -inf of those that are not allowed, or none.
  MMKERN_FN void load(float (&z)[kEach], int first) const {
    if (vectors && first + kEach <= size) {
      if (dtype == kFloat32) {
        load_four(z, static_cast<const float*>(logits) + first);
        load_four(z + 4, static_cast<const float*>(logits) + first + 4);
      } else {
        load_eight(z, static_cast<const unsigned short*>(logits) + first, dtype);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kEach; ++k) z[k] = first + k < size ? load_one(logits, first + k, dtype) : -infinity();
    }
    if (!allowed) return;
    const u64 bits = first < size ? allowed[first / 64] >> (first % 64) : 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      if (!(bits >> k & 1)) z[k] = -infinity();
  }
};

// In the order of the logits; both zeros have one key.
MMKERN_FN u64 key_of(float logit) {
  const unsigned bits = __float_as_uint(logit + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

constexpr double kUnit = 17592186044416.0;  // 2^44: a row of 2^18 weights of 1 has a sum

struct Scale {
  float top, inverse;

  MMKERN_FN float weight(float logit) const { return expf((logit - top) * inverse); }
};
MMKERN_FN u64 mass_of(float weight) { return u64(double(weight) * kUnit); }

// What is kept: larger keys, and of this one the first so many, if their weight is that large.
struct Kept {
  u64 key, ties;
  float least;
};

// f(first, logits, weights) of all stretches, weights 0 of what is not kept.
template <class F>
MMKERN_FN void for_each_stretch(const LogitRow& row, const Scale& scale, const Kept& kept, F f) {
  u64 seen = 0;  // with that key
  for (int begin = 0; begin < row.size; begin += kStretch) {
    const int first = begin + int(threadIdx.x) * kEach;
    float z[kEach], w[kEach];
    row.load(z, first);
    u64 ties = 0, total;
#pragma unroll
    for (int k = 0; k < kEach; ++k) ties += key_of(z[k]) == kept.key;
    u64 rank = seen + scan_block(ties, total);
    seen += total;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const u64 key = key_of(z[k]);
      w[k] = scale.weight(z[k]);
      if (key < kept.key || (key == kept.key && rank++ >= kept.ties) || !(w[k] >= kept.least)) w[k] = 0;
    }
    f(first, z, w);
  }
}

// ---- Where the kept ones end
// -----------------------------------------------------------------------------------------

struct Found {
  u64 key, above, here;  // masses: of larger keys, of this one
};

// The digit at which masses, from the largest digit on, come to `least`; `above` grows by those of larger digits.
MMKERN_FN int digit_of(const u64* masses, double least, u64& above) {
  __shared__ int digit;
  __shared__ u64 larger;
  constexpr int kBins = kDigits / kWarp;  // of a lane; lane 0 has the largest
  if (threadIdx.x < kWarp) {
    const int lane = int(threadIdx.x), last = kDigits - 1 - lane * kBins;
    u64 own = 0;
    for (int k = 0; k < kBins; ++k) own += masses[last - k];
    u64 up_to_here = own;
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      const u64 before = __shfl_up_sync(kAllLanes, up_to_here, lanes);
      if (lane >= lanes) up_to_here += before;
    }
    const unsigned reached = __ballot_sync(kAllLanes, double(above + up_to_here) >= least);
    if (lane == (reached ? __ffs(int(reached)) - 1 : kWarp - 1)) {
      u64 before = above + up_to_here - own;
      int k = 0;
      for (; k < kBins - 1 && double(before + masses[last - k]) < least; ++k) before += masses[last - k];
      digit = last - k;
      larger = before;
    }
  }
  __syncthreads();
  const int found = digit;
  above = larger;
  __syncthreads();
  return found;
}

// The largest key of which, with all above it, the mass is `least`. each(f) calls f(key, mass) for a thread's numbers.
template <int kLevels, class Each>
MMKERN_FN Found find_boundary(double least, Each each) {
  __shared__ u64 masses[kDigits];
  Found found{0, 0, 0};
  for (int level = kLevels - 1; level >= 0; --level) {
    for (int i = int(threadIdx.x); i < kDigits; i += kThreads) masses[i] = 0;
    __syncthreads();
    each([&](u64 key, u64 mass) {
      const bool is_near = level == kLevels - 1 || key >> (8 * level + 8) == found.key;
      if (mass && is_near) atomicAdd(&masses[key >> (8 * level) & (kDigits - 1)], mass);
    });
    __syncthreads();
    const int digit = digit_of(masses, least, found.above);
    found.key = found.key << 8 | u64(digit);
    found.here = masses[digit];
    __syncthreads();
  }
  return found;
}

// How many of equal numbers with this mass in all come to `least`: one at least.
MMKERN_FN u64 ties_of(const Found& found, double least, u64 mass_of_one) {
  if (!mass_of_one) return found.here;
  const u64 ties = u64(ceil((least - double(found.above)) / double(mass_of_one)));
  return ties > 1 ? ties : 1;
}

MMKERN_FN float logit_of(u64 key) {
  const unsigned bits = unsigned(key);
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

MMKERN_FN void keep_count(const LogitRow& row, double count, Kept& kept) {
  const Found found = find_boundary<4>(count, [&](auto f) {
    for (int first = int(threadIdx.x) * kEach; first < row.size; first += kStretch) {
      float z[kEach];
      row.load(z, first);
      for (int k = 0; k < kEach; ++k) f(key_of(z[k]), u64(z[k] > -infinity()));
    }
  });
  kept.key = found.key;
  kept.ties = ties_of(found, count, 1);
}

MMKERN_FN u64 mass_of_kept(const LogitRow& row, const Scale& scale, const Kept& kept) {
  u64 mass = 0;
  for_each_stretch(row, scale, kept, [&](int, const float (&)[kEach], const float (&w)[kEach]) {
    for (int k = 0; k < kEach; ++k) mass += mass_of(w[k]);
  });
  return sum_of_block(mass);
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

// ---- The kernel
// ------------------------------------------------------------------------------------------------------

MMKERN_FN float uniform_of(unsigned word) {
  const float v = fmaf(float(word), 0x1p-32f, 0x1p-33f);
  return v < 1 - 0x1p-24f ? v : 1 - 0x1p-24f;
}

}  // namespace sampling

// Laid out alike in mmkern/backends/cuda_decoding.py.
struct SampleTokensArgs {
  const void* logits;  // [rows, size]
  i64 logits_stride;
  const sampling::u64* seeds;  // key, and the first counter; a stride of 0 where the rows share one
  i64 seeds_stride;
  i64 counters;  // from row to row
  const float* filters;
  i64 filters_stride;
  const sampling::u64* allowed;
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

  Leader top{-infinity(), a.size};
  int odd = 0;
  for (int first = int(threadIdx.x) * kEach; first < a.size; first += kStretch) {
    float z[kEach];
    row.load(z, first);
    for (int k = 0; k < kEach; ++k) {
      odd |= !(z[k] < infinity());
      top.take(z[k], first + k);
    }
  }
  top = leader_of_block(top);
  if (__syncthreads_or(odd) || top.value == -infinity()) {
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
    bool any = false;
    for (int k = 0; k < kEach; ++k) {
      mass += mass_of(w[k]);
      any = any || w[k] > 0;
    }
    if (!any) return;
    for (int four = 0; four < kEach; four += 4) {
      const PhiloxWords drawn = philox(seed[0], seed[1] + u64(b * a.counters) + u64(first + four) / 4);
      for (int k = 0; k < 4; ++k)
        if (w[four + k] > 0) best.take(w[four + k] / -log1pf(-uniform_of(drawn.word[k])), first + four + k);
    }
  });
  best = leader_of_block(best);
  mass = sum_of_block(mass);
  if (threadIdx.x != 0) return;
  const int chosen = temperature == 0 ? top.place : best.place;
  const float logit = load_one(logits, chosen, a.dtype);
  a.log_probs[b] = (logit - scale.top) * scale.inverse - float(log(double(mass) / kUnit));
  a.tokens[b] = chosen;
}

}  // namespace device
}  // namespace mmkern
