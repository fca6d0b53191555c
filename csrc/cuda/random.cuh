// Random numbers by position: mmkern/reference/philox.py.
#pragma once

#include "device.cuh"

#include "../philox.h"
#include "lanes.cuh"

namespace mmkern {
inline namespace device {

// Two normal numbers from two words, by the transform of Box and Muller.
MMKERN_FN void two_normals(unsigned a, unsigned b, float& cosine, float& sine) {
  const float u = fma(float(a), 0x1p-32f, 0x1p-32f);
  const float radius = sqrtf(-2 * logf(u));
  sincospif(float(b >> 8) * 0x1p-23f, &sine, &cosine);
  sine *= radius;
  cosine *= radius;
}

struct Normals {
  const i64* seed;  // the key and the offset

  // Of a lane's columns of a row that begins with number `first`.
  MMKERN_FN void draw(float (&v)[kColumns], const Columns& columns, i64 first) const {
    if (!columns.vectors) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) v[k] = columns.has(k) ? one(first + columns.column(k)) : 0;
      return;
    }
#pragma unroll
    for (int k = 0; k < kColumns; k += 4) {  // rows begin at a multiple of 4
      const PhiloxWords drawn = words(first + columns.column(k));
      two_normals(drawn.word[0], drawn.word[1], v[k], v[k + 1]);
      two_normals(drawn.word[2], drawn.word[3], v[k + 2], v[k + 3]);
    }
  }

 private:
  MMKERN_FN PhiloxWords words(i64 i) const { return philox(seed[0], seed[1] + i / 4); }

  MMKERN_FN float one(i64 i) const {
    const PhiloxWords drawn = words(i);
    const unsigned (&words)[4] = drawn.word;
    float cosine, sine;
    two_normals(i & 2 ? words[2] : words[0], i & 2 ? words[3] : words[1], cosine, sine);
    return i & 1 ? sine : cosine;
  }
};

}  // namespace device
}  // namespace mmkern
