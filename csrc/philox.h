// Philox4x32-10 (Salmon et al. 2011): four random words by position, bit-equal with mmkern/reference/philox.py. The
// includer supplies MMKERN_FN and MMKERN_ISA, for a CPU or for CUDA.
#pragma once

namespace mmkern {
inline namespace MMKERN_ISA {

struct PhiloxWords {
  unsigned word[4];
};

constexpr int kPhiloxRounds = 10;
constexpr unsigned long long kPhiloxFirst = 0xD2511F53, kPhiloxSecond = 0xCD9E8D57;

// Key and counter are (low, high) words.
struct PhiloxKey {
  unsigned low, high;

  MMKERN_FN explicit PhiloxKey(unsigned long long seed) : low(unsigned(seed)), high(unsigned(seed >> 32)) {}
  MMKERN_FN void next() {
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
};

MMKERN_FN void philox_round(PhiloxKey key, unsigned& a, unsigned& b, unsigned& c, unsigned& d) {
  const unsigned long long first = a * kPhiloxFirst, second = c * kPhiloxSecond;
  a = unsigned(second >> 32) ^ b ^ key.low;
  c = unsigned(first >> 32) ^ d ^ key.high;
  b = unsigned(second);
  d = unsigned(first);
}

MMKERN_FN PhiloxWords philox(unsigned long long seed, unsigned long long counter) {
  PhiloxKey key(seed);
  unsigned a = unsigned(counter), b = unsigned(counter >> 32), c = 0, d = 0;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round, key.next()) philox_round(key, a, b, c, d);
  return {{a, b, c, d}};
}

}  // namespace MMKERN_ISA
}  // namespace mmkern
