// Philox4x32-10 (Salmon et al. 2011): four random words by position, bit-equal with mmkern/reference/philox.py. The
// includer supplies MMKERN_FN and MMKERN_ISA, for a CPU or for CUDA.
#pragma once

namespace mmkern {
inline namespace MMKERN_ISA {

struct PhiloxWords {
  unsigned word[4];
};

// Key and counter are (low, high) words.
MMKERN_FN PhiloxWords philox(unsigned long long seed, unsigned long long counter) {
  unsigned key0 = unsigned(seed), key1 = unsigned(seed >> 32);
  unsigned a = unsigned(counter), b = unsigned(counter >> 32), c = 0, d = 0;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const unsigned long long first = a * 0xD2511F53ull, second = c * 0xCD9E8D57ull;
    a = unsigned(second >> 32) ^ b ^ key0;
    c = unsigned(first >> 32) ^ d ^ key1;
    b = unsigned(second);
    d = unsigned(first);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

}  // namespace MMKERN_ISA
}  // namespace mmkern
