// Philox4x32-10 (Salmon et al. 2011): four random words by position. Key and counter are (low, high).
#pragma once

#include <stdint.h>

#ifndef MMKERN_FN
#define MMKERN_FN inline __attribute__((always_inline))
#endif

namespace mmkern {

struct Philox {
  uint32_t words[4];

  MMKERN_FN Philox(uint64_t seed, uint64_t counter) : words{uint32_t(counter), uint32_t(counter >> 32), 0, 0} {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t(words[0]) * 0xD2511F53u, c = uint64_t(words[2]) * 0xCD9E8D57u;
      words[0] = uint32_t(c >> 32) ^ words[1] ^ k0;
      words[2] = uint32_t(a >> 32) ^ words[3] ^ k1;
      words[1] = uint32_t(c);
      words[3] = uint32_t(a);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }

  // The least word that stands for a uniform number of at least `probability`, 2^32 where there is none; of a word the
  // upper 24 bits count.
  static uint64_t threshold(double probability) {
    const double steps = probability * 16777216.0;
    const uint64_t whole = uint64_t(steps);
    return (whole + (double(whole) < steps)) << 8;
  }
};

}  // namespace mmkern
