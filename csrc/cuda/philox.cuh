// Philox4x32-10: random numbers by position, bit-equal with mmkern/reference/philox.py.
#pragma once

#include "device.cuh"

namespace mmkern {
inline namespace device {

struct PhiloxWords {
  unsigned word[4];
};

MMKERN_FN PhiloxWords philox(i64 seed, i64 counter) {
  using u64 = unsigned long long;
  unsigned key0 = unsigned(seed), key1 = unsigned(u64(seed) >> 32);
  unsigned a = unsigned(counter), b = unsigned(u64(counter) >> 32), c = 0, d = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u64 first = u64(a) * 0xD2511F53u, second = u64(c) * 0xCD9E8D57u;
    a = unsigned(second >> 32) ^ b ^ key0;
    c = unsigned(first >> 32) ^ d ^ key1;
    b = unsigned(second);
    d = unsigned(first);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

}  // namespace device
}  // namespace mmkern
