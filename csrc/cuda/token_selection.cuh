// Which tokens of a row of logits are kept, by a block of threads. It walks over the row a stretch at a time,
// neighbouring tokens in one thread.
//
// Where the kept ones end is found digit by digit, by histograms of masses in shared memory. A weight's mass is a whole
// number, so that the sum does not hang on the order in which threads add to it.
#pragma once

#include "race.cuh"

namespace mmkern {
inline namespace device {
namespace sampling {

constexpr int kThreads = kScanThreads, kWarps = kScanWarps;
constexpr int kEach = 8;  // tokens of a stretch that a thread has
constexpr int kStretch = kThreads * kEach;
constexpr int kDigits = 256;

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

// The largest logit, of equal ones the first; false where there is none, or one is NaN or infinite.
MMKERN_FN bool find_top(const LogitRow& row, Leader& top) {
  top = {-infinity(), row.size};
  int odd = 0;
  for (int first = int(threadIdx.x) * kEach; first < row.size; first += kStretch) {
    float z[kEach];
    row.load(z, first);
    for (int k = 0; k < kEach; ++k) {
      odd |= !(z[k] < infinity());
      top.take(z[k], first + k);
    }
  }
  top = leader_of_block<kThreads>(top);
  return !__syncthreads_or(odd) && top.value > -infinity();
}

// Of tokens from `first` on, those with a weight race.
MMKERN_FN void race(const float (&w)[kEach], int first, u64 key, u64 counter, Leader& best) {
  bool any = false;
  for (int k = 0; k < kEach; ++k) any = any || w[k] > 0;
  if (!any) return;
  for (int four = 0; four < kEach; four += 4) {
    const PhiloxWords drawn = philox(key, counter + u64(first + four) / 4);
    for (int k = 0; k < 4; ++k)
      if (w[four + k] > 0) best.take(w[four + k] / -log1pf(-uniform_of(drawn.word[k])), first + four + k);
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

}  // namespace sampling
}  // namespace device
}  // namespace mmkern
