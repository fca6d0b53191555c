// The race that draws one of many, by a block of threads: who has the largest weight / E, E an exponential number of
// each.
#pragma once

#include "block_scan.cuh"
#include "random.cuh"

namespace mmkern {
inline namespace device {

// v = (w + 1/2) 2^-32 of a word, below 1; E is -log(1 - v).
MMKERN_FN float uniform_of(unsigned word) {
  const float v = fmaf(float(word), 0x1p-32f, 0x1p-33f);
  return v < 1 - 0x1p-24f ? v : 1 - 0x1p-24f;
}

// Of word i of those from a counter on.
MMKERN_FN float uniform_at(u64 key, u64 counter, i64 i) {
  const PhiloxWords drawn = philox(key, counter + u64(i / 4));
  const unsigned (&words)[4] = drawn.word;  // to ask for number i % 4 of them would move them to memory
  return uniform_of(i & 2 ? (i & 1 ? words[3] : words[2]) : (i & 1 ? words[1] : words[0]));
}

}  // namespace device
}  // namespace mmkern
