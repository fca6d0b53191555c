// Included before everything else (-include): the AVX-512 level of simd.h on a CPU that has only AVX2.
//
// The intrinsics that simd_native.h uses are replaced by loops with their documented meaning; the compiler lowers the
// 64-byte vectors themselves. So the level's widths, masks, folds and register tiles run where no AVX-512 is.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1

namespace emulated {

#define EMULATED static inline __attribute__((always_inline))

typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

template <class V, class F>
EMULATED V each(F f) {
  V v;
  for (unsigned i = 0; i < sizeof(v) / sizeof(v[0]); ++i) v[i] = f(i);
  return v;
}

template <class V, class T>
EMULATED V load(uint32_t mask, const T* p) {
  return each<V>([=](int i) { return mask >> i & 1 ? p[i] : T(0); });
}
template <class V, class T>
EMULATED void store(T* p, uint32_t mask, V v) {
  for (unsigned i = 0; i < sizeof(v) / sizeof(v[0]); ++i)
    if (mask >> i & 1) p[i] = v[i];
}
template <class V>
EMULATED uint32_t signs(V v) {
  uint32_t mask = 0;
  for (unsigned i = 0; i < sizeof(v) / sizeof(v[0]); ++i) mask |= uint32_t(v[i] < 0) << i;
  return mask;
}

EMULATED __m512 fma_ps(__m512 a, __m512 b, __m512 c) {
  return each<__m512>([=](int i) { return __builtin_fmaf(a[i], b[i], c[i]); });
}
EMULATED __m512d fma_pd(__m512d a, __m512d b, __m512d c) {
  return each<__m512d>([=](int i) { return __builtin_fma(a[i], b[i], c[i]); });
}
EMULATED __m512 sqrt_ps(uint32_t mask, __m512 a) {
  return each<__m512>([=](int i) { return mask >> i & 1 ? __builtin_sqrtf(a[i]) : 0; });
}
EMULATED __m512d sqrt_pd(uint32_t mask, __m512d a) {
  return each<__m512d>([=](int i) { return mask >> i & 1 ? __builtin_sqrt(a[i]) : 0; });
}
// The second where either is NaN, and of two zeros.
template <class V>
EMULATED V max_lanes(uint32_t mask, V a, V b) {
  return each<V>([=](int i) { return mask >> i & 1 ? a[i] > b[i] ? a[i] : b[i] : 0; });
}
template <class V>
EMULATED V min_lanes(uint32_t mask, V a, V b) {
  return each<V>([=](int i) { return mask >> i & 1 ? a[i] < b[i] ? a[i] : b[i] : 0; });
}
EMULATED __m512i widen(uint32_t mask, __m256i a) {
  return (__m512i)each<Words>([=](int i) { return mask >> i & 1 ? ((Halves)a)[i] : 0; });
}
EMULATED __m256i narrow(uint32_t mask, __m512i a) {
  return (__m256i)each<Halves>([=](int i) { return mask >> i & 1 ? ((Words)a)[i] : 0; });
}
EMULATED __m512 from_half(uint32_t mask, __m256i a) {
  return each<__m512>([=](int i) { return mask >> i & 1 ? _cvtsh_ss(((Halves)a)[i]) : 0; });
}
EMULATED __m256i to_half(uint32_t mask, __m512 a) {
  return (__m256i)each<Halves>([=](int i) { return mask >> i & 1 ? _cvtss_sh(a[i], _MM_FROUND_TO_NEAREST_INT) : 0; });
}

}  // namespace emulated

#define _mm512_fmadd_ps emulated::fma_ps
#define _mm512_fmadd_pd emulated::fma_pd
#define _mm512_maskz_sqrt_ps emulated::sqrt_ps
#define _mm512_maskz_sqrt_pd emulated::sqrt_pd
#define _mm512_maskz_max_ps emulated::max_lanes
#define _mm512_maskz_max_pd emulated::max_lanes
#define _mm512_maskz_min_ps emulated::min_lanes
#define _mm512_maskz_min_pd emulated::min_lanes
#define _mm512_movepi32_mask(v) emulated::signs((NativeInt)(v))
#define _mm512_movepi64_mask(v) emulated::signs((NativeLong)(v))
#define _mm512_maskz_cvtepu16_epi32 emulated::widen
#define _mm512_maskz_cvtepi32_epi16 emulated::narrow
#define _mm512_maskz_cvtph_ps emulated::from_half
#define _mm512_maskz_cvtps_ph(mask, v, rounding) emulated::to_half(mask, v)
#define _mm512_maskz_loadu_ps(mask, p) emulated::load<__m512>(mask, p)
#define _mm512_maskz_loadu_pd(mask, p) emulated::load<__m512d>(mask, p)
#define _mm256_maskz_loadu_epi16(mask, p) (__m256i)(emulated::load<emulated::Halves>(mask, (const uint16_t*)(p)))
#define _mm512_mask_storeu_ps(p, mask, v) emulated::store(p, mask, v)
#define _mm512_mask_storeu_pd(p, mask, v) emulated::store(p, mask, v)
#define _mm256_mask_storeu_epi16(p, mask, v) emulated::store((uint16_t*)(p), mask, (emulated::Halves)(v))
