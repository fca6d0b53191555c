// What differs between machines: fma, square root, tests and folds of one register, and loads and stores with
// conversion. Part of simd.h; Vec is built on these.
#pragma once

namespace mmkern {
inline namespace MMKERN_ISA {

using NativeFloat = native_t<float, kLanes<float>>;
using NativeDouble = native_t<double, kLanes<double>>;
using NativeInt = native_t<int32_t, kLanes<float>>;
using NativeLong = native_t<int64_t, kLanes<double>>;
using NativeWide = native_t<uint64_t, kLanes<double>>;
using NativeBits = native_t<uint32_t, kLanes<float>>;
using NativeShort = native_t<uint16_t, kLanes<float>>;

// The maskz forms, all lanes kept, are here since GCC 12 warns of an uninitialised operand in the plain ones.
#if defined(MMKERN_AVX512)

MMKERN_FN NativeFloat fma_lanes(NativeFloat a, NativeFloat b, NativeFloat c) { return _mm512_fmadd_ps(a, b, c); }
MMKERN_FN NativeDouble fma_lanes(NativeDouble a, NativeDouble b, NativeDouble c) { return _mm512_fmadd_pd(a, b, c); }
MMKERN_FN NativeFloat sqrt_lanes(NativeFloat a) { return _mm512_maskz_sqrt_ps(0xffff, a); }
MMKERN_FN NativeDouble sqrt_lanes(NativeDouble a) { return _mm512_maskz_sqrt_pd(0xff, a); }
MMKERN_FN NativeFloat max_lanes(NativeFloat a, NativeFloat b) { return _mm512_maskz_max_ps(0xffff, a, b); }
MMKERN_FN NativeDouble max_lanes(NativeDouble a, NativeDouble b) { return _mm512_maskz_max_pd(0xff, a, b); }
MMKERN_FN NativeFloat min_lanes(NativeFloat a, NativeFloat b) { return _mm512_maskz_min_ps(0xffff, a, b); }
MMKERN_FN NativeDouble min_lanes(NativeDouble a, NativeDouble b) { return _mm512_maskz_min_pd(0xff, a, b); }
// a.x * b.x + a.y * b.y + c of pairs (x, y) of bf16 in each lane. Not an intrinsic: the level has machines without it.
MMKERN_FN NativeFloat dot_pairs_lanes(NativeFloat a, NativeFloat b, NativeFloat c) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
}
MMKERN_FN uint32_t lane_bits(NativeInt m) { return uint32_t(_mm512_movepi32_mask((__m512i)m)); }
MMKERN_FN uint32_t lane_bits(NativeLong m) { return uint32_t(_mm512_movepi64_mask((__m512i)m)); }
MMKERN_FN NativeWide multiply_low_words(NativeWide a, NativeWide b) {
  return (NativeWide)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
}
MMKERN_FN int compress_lanes(NativeFloat v, NativeInt m, float* to) {
  const uint32_t taken = lane_bits(m);
  _mm512_storeu_ps(
      to, _mm512_maskz_compress_ps(__mmask16(taken), v));  // to memory, some machines compress a lane at a time
  return __builtin_popcount(taken);
}
MMKERN_FN int compress_lanes(NativeDouble v, NativeLong m, double* to) {
  const uint32_t taken = lane_bits(m);
  _mm512_storeu_pd(to, _mm512_maskz_compress_pd(__mmask8(taken), v));
  return __builtin_popcount(taken);
}

#elif defined(MMKERN_AVX2)

MMKERN_FN NativeFloat fma_lanes(NativeFloat a, NativeFloat b, NativeFloat c) { return _mm256_fmadd_ps(a, b, c); }
MMKERN_FN NativeDouble fma_lanes(NativeDouble a, NativeDouble b, NativeDouble c) { return _mm256_fmadd_pd(a, b, c); }
MMKERN_FN NativeFloat sqrt_lanes(NativeFloat a) { return _mm256_sqrt_ps(a); }
MMKERN_FN NativeDouble sqrt_lanes(NativeDouble a) { return _mm256_sqrt_pd(a); }
MMKERN_FN NativeFloat max_lanes(NativeFloat a, NativeFloat b) { return _mm256_max_ps(a, b); }
MMKERN_FN NativeDouble max_lanes(NativeDouble a, NativeDouble b) { return _mm256_max_pd(a, b); }
MMKERN_FN NativeFloat min_lanes(NativeFloat a, NativeFloat b) { return _mm256_min_ps(a, b); }
MMKERN_FN NativeDouble min_lanes(NativeDouble a, NativeDouble b) { return _mm256_min_pd(a, b); }
MMKERN_FN uint32_t lane_bits(NativeInt m) { return uint32_t(_mm256_movemask_ps((__m256)m)); }
MMKERN_FN uint32_t lane_bits(NativeLong m) { return uint32_t(_mm256_movemask_pd((__m256d)m)); }
MMKERN_FN NativeWide multiply_low_words(NativeWide a, NativeWide b) {
  return (NativeWide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}

#elif defined(__x86_64__)

MMKERN_FN NativeFloat fma_lanes(NativeFloat a, NativeFloat b, NativeFloat c) { return a * b + c; }
MMKERN_FN NativeDouble fma_lanes(NativeDouble a, NativeDouble b, NativeDouble c) { return a * b + c; }
MMKERN_FN NativeFloat sqrt_lanes(NativeFloat a) { return _mm_sqrt_ps(a); }
MMKERN_FN NativeDouble sqrt_lanes(NativeDouble a) { return _mm_sqrt_pd(a); }
MMKERN_FN NativeFloat max_lanes(NativeFloat a, NativeFloat b) { return _mm_max_ps(a, b); }
MMKERN_FN NativeDouble max_lanes(NativeDouble a, NativeDouble b) { return _mm_max_pd(a, b); }
MMKERN_FN NativeFloat min_lanes(NativeFloat a, NativeFloat b) { return _mm_min_ps(a, b); }
MMKERN_FN NativeDouble min_lanes(NativeDouble a, NativeDouble b) { return _mm_min_pd(a, b); }
MMKERN_FN uint32_t lane_bits(NativeInt m) { return uint32_t(_mm_movemask_ps((__m128)m)); }
MMKERN_FN uint32_t lane_bits(NativeLong m) { return uint32_t(_mm_movemask_pd((__m128d)m)); }
MMKERN_FN NativeWide multiply_low_words(NativeWide a, NativeWide b) {
  return (NativeWide)_mm_mul_epu32((__m128i)a, (__m128i)b);
}

#elif defined(__aarch64__)

MMKERN_FN NativeFloat fma_lanes(NativeFloat a, NativeFloat b, NativeFloat c) {
  return (NativeFloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
MMKERN_FN NativeDouble fma_lanes(NativeDouble a, NativeDouble b, NativeDouble c) {
  return (NativeDouble)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
MMKERN_FN NativeFloat sqrt_lanes(NativeFloat a) { return (NativeFloat)vsqrtq_f32((float32x4_t)a); }
MMKERN_FN NativeDouble sqrt_lanes(NativeDouble a) { return (NativeDouble)vsqrtq_f64((float64x2_t)a); }
// Of a NaN vmaxq would make a NaN.
template <class Native>
MMKERN_FN Native max_lanes(Native a, Native b) {
  return a > b ? a : b;
}
template <class Native>
MMKERN_FN Native min_lanes(Native a, Native b) {
  return a < b ? a : b;
}
MMKERN_FN bool any_lane(NativeInt m) { return vmaxvq_u32((uint32x4_t)m) != 0; }
MMKERN_FN bool any_lane(NativeLong m) { return vmaxvq_u32((uint32x4_t)m) != 0; }
MMKERN_FN NativeWide multiply_low_words(NativeWide a, NativeWide b) {
  return (NativeWide)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
}

#else
#error "simd.h knows x86-64 and aarch64"
#endif

#if defined(__aarch64__)
template <class Mask>
MMKERN_FN uint32_t lane_bits(Mask m) {
  uint32_t bits = 0;
  for (int i = 0; i < int(sizeof(m) / sizeof(m[0])); ++i) bits |= uint32_t(m[i] & 1) << i;
  return bits;
}
#else
template <class Mask>
MMKERN_FN bool any_lane(Mask m) {
  return lane_bits(m) != 0;
}
#endif

#if !defined(MMKERN_AVX512)
template <class Native, class Mask, class T>
MMKERN_FN int compress_lanes(Native v, Mask m, T* to) {
  int n = 0;
  for (int i = 0; i < kLanes<T>; ++i) {
    to[n] = v[i];
    n += int(m[i] & 1);
  }
  return n;
}
#endif

// op over the lanes of one register, halves first
template <class Op>
MMKERN_FN float fold(native_t<float, 4> v, Op op) {
  v = op(v, __builtin_shufflevector(v, v, 2, 3, 2, 3));
  v = op(v, __builtin_shufflevector(v, v, 1, 1, 1, 1));
  return v[0];
}
template <class Op>
MMKERN_FN double fold(native_t<double, 2> v, Op op) {
  return op(v[0], v[1]);
}
#if defined(MMKERN_AVX2) || defined(MMKERN_AVX512)
template <class Op>
MMKERN_FN float fold(native_t<float, 8> v, Op op) {
  return fold(op(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7)), op);
}
template <class Op>
MMKERN_FN double fold(native_t<double, 4> v, Op op) {
  return fold(op(__builtin_shufflevector(v, v, 0, 1), __builtin_shufflevector(v, v, 2, 3)), op);
}
#endif
#if defined(MMKERN_AVX512)
template <class Op>
MMKERN_FN float fold(native_t<float, 16> v, Op op) {
  return fold(op(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)),
              op);
}
template <class Op>
MMKERN_FN double fold(native_t<double, 8> v, Op op) {
  return fold(op(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7)), op);
}
#endif

// Conversions between float lanes and the 16-bit types. Values to narrow fit in 16 bits.

#if defined(MMKERN_AVX512)
MMKERN_FN NativeBits widen(NativeShort v) { return (NativeBits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v); }
MMKERN_FN NativeShort narrow(NativeBits v) { return (NativeShort)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v); }
#elif defined(MMKERN_AVX2)
MMKERN_FN NativeBits widen(NativeShort v) { return (NativeBits)_mm256_cvtepu16_epi32((__m128i)v); }
MMKERN_FN NativeShort narrow(NativeBits v) {
  const __m256i halves = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (NativeShort)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08));
}
#else
MMKERN_FN NativeBits widen(NativeShort v) { return __builtin_convertvector(v, NativeBits); }
MMKERN_FN NativeShort narrow(NativeBits v) { return __builtin_convertvector(v, NativeShort); }
#endif

MMKERN_FN NativeFloat to_float(NativeShort v, bf16) { return (NativeFloat)(widen(v) << 16); }

MMKERN_FN NativeShort from_float(NativeFloat v, bf16) {
  const NativeBits u = (NativeBits)v;
  const NativeBits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const NativeBits quiet_nan = (u >> 16) | 0x40;
  return narrow(v == v ? rounded : quiet_nan);
}

#if defined(MMKERN_AVX512)

MMKERN_FN NativeFloat to_float(NativeShort v, half) { return _mm512_maskz_cvtph_ps(0xffff, (__m256i)v); }
MMKERN_FN NativeShort from_float(NativeFloat v, half) {
  return (NativeShort)_mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT);
}

#elif defined(MMKERN_AVX2)

MMKERN_FN NativeFloat to_float(NativeShort v, half) { return _mm256_cvtph_ps((__m128i)v); }
MMKERN_FN NativeShort from_float(NativeFloat v, half) {
  return (NativeShort)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
}

#elif defined(__aarch64__)

MMKERN_FN NativeFloat to_float(NativeShort v, half) { return (NativeFloat)vcvt_f32_f16((float16x4_t)v); }
MMKERN_FN NativeShort from_float(NativeFloat v, half) { return (NativeShort)vcvt_f16_f32((float32x4_t)v); }

#else

// Exponent and mantissa moved into a float's place are the value times 2^-112, also where it is subnormal.
MMKERN_FN NativeFloat to_float(NativeShort v, half) {
  const NativeBits u = widen(v);
  const NativeBits magnitude = u & 0x7fff;
  const NativeBits scaled = (NativeBits)((NativeFloat)(magnitude << 13) * 0x1p112f);
  const NativeBits inf_or_nan = (magnitude << 13) | 0x7f800000;
  return (NativeFloat)(((u & 0x8000) << 16) | (magnitude >= 0x7c00 ? inf_or_nan : scaled));
}

MMKERN_FN NativeShort from_float(NativeFloat v, half) {
  const NativeBits u = (NativeBits)v;
  const NativeBits magnitude = u & 0x7fffffff;
  const NativeBits normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // In the binade of 0.5 a float's last place is half's smallest subnormal, so the addition rounds as wanted.
  const NativeBits subnormal = (NativeBits)((NativeFloat)magnitude + 0.5f) - 0x3f000000;
  const NativeBits quiet_nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  NativeBits h = magnitude < 0x38800000 ? subnormal : normal;  // 2^-14
  h = magnitude >= 0x477ff000 ? NativeBits{} + 0x7c00 : h;     // 65520 and above round to inf
  h = magnitude > 0x7f800000 ? quiet_nan : h;
  return narrow(h | ((u >> 16) & 0x8000));
}

#endif

// Scalar: for (i < n) to[i] = from[i];  with n < 2 * Half, in pieces of the bits of n
template <int Half, class S>
MMKERN_FN void copy_few(S* to, const S* from, int n) {
  if (n & Half) {
    __builtin_memcpy(to, from, Half * sizeof(S));
    to += Half;
    from += Half;
  }
  if constexpr (Half > 1) copy_few<Half / 2>(to, from, n);
}

// Whole registers.
template <class T, int N>
MMKERN_FN void load_native(native_t<T, N>& v, const void* p) {
  v = *static_cast<const typename NativeOf<T, N>::unaligned*>(p);
}
template <class T, int N>
MMKERN_FN void store_native(native_t<T, N> v, void* p) {
  *static_cast<typename NativeOf<T, N>::unaligned*>(p) = v;
}

// Past the caches, where the machine can: p must be a multiple of the register's size. store_fence() ends such stores.
template <bool kStream, class T, int N>
MMKERN_FN void store_native(native_t<T, N> v, void* p) {
#if defined(__x86_64__)
  if constexpr (kStream) {
#if defined(MMKERN_AVX512)
    if constexpr (sizeof(v) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#endif
#if defined(MMKERN_AVX512) || defined(MMKERN_AVX2)
    if constexpr (sizeof(v) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
    if constexpr (sizeof(v) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
  }
#endif
  store_native<T, N>(v, p);
}
MMKERN_FN void store_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

MMKERN_FN void load_lanes(NativeFloat& v, const float* p) { load_native<float, kLanes<float>>(v, p); }
MMKERN_FN void load_lanes(NativeDouble& v, const double* p) { load_native<double, kLanes<double>>(v, p); }
MMKERN_FN void load_lanes(NativeLong& v, const int64_t* p) { load_native<int64_t, kLanes<int64_t>>(v, p); }
template <class S>
MMKERN_FN void load_lanes(NativeFloat& v, const S* p) {
  NativeShort raw;
  load_native<uint16_t, kLanes<float>>(raw, p);
  v = to_float(raw, S{});
}

template <bool kStream>
MMKERN_FN void store_lanes(NativeFloat v, float* p) {
  store_native<kStream, float, kLanes<float>>(v, p);
}
template <bool kStream>
MMKERN_FN void store_lanes(NativeDouble v, double* p) {
  store_native<kStream, double, kLanes<double>>(v, p);
}
template <bool kStream, class S>
MMKERN_FN void store_lanes(NativeFloat v, S* p) {
  store_native<kStream, uint16_t, kLanes<float>>(from_float(v, S{}), p);
}

// The first n lanes, 0 <= n <= lanes.
#if defined(MMKERN_AVX512)

MMKERN_FN uint32_t first_lanes(int n) { return (1u << n) - 1; }

MMKERN_FN void load_lanes(NativeFloat& v, const float* p, int n) {
  v = _mm512_maskz_loadu_ps(__mmask16(first_lanes(n)), p);
}
MMKERN_FN void load_lanes(NativeDouble& v, const double* p, int n) {
  v = _mm512_maskz_loadu_pd(__mmask8(first_lanes(n)), p);
}
template <class S>
MMKERN_FN void load_lanes(NativeFloat& v, const S* p, int n) {
  v = to_float((NativeShort)_mm256_maskz_loadu_epi16(__mmask16(first_lanes(n)), p), S{});
}
MMKERN_FN void store_lanes(NativeFloat v, float* p, int n) { _mm512_mask_storeu_ps(p, __mmask16(first_lanes(n)), v); }
MMKERN_FN void store_lanes(NativeDouble v, double* p, int n) { _mm512_mask_storeu_pd(p, __mmask8(first_lanes(n)), v); }
template <class S>
MMKERN_FN void store_lanes(NativeFloat v, S* p, int n) {
  _mm256_mask_storeu_epi16(p, __mmask16(first_lanes(n)), (__m256i)from_float(v, S{}));
}

#else

template <class T, int N, class S>
MMKERN_FN void load_few(native_t<T, N>& v, const S* p, int n) {
  if (n == N) return load_native<T, N>(v, p);
  alignas(sizeof(v)) S few[N] = {};
  copy_few<N / 2>(few, p, n);
  load_native<T, N>(v, few);
}
template <class T, int N, class S>
MMKERN_FN void store_few(native_t<T, N> v, S* p, int n) {
  if (n == N) return store_native<T, N>(v, p);
  alignas(sizeof(v)) S few[N];
  store_native<T, N>(v, few);
  copy_few<N / 2>(p, few, n);
}

#if defined(MMKERN_AVX2)
MMKERN_FN void load_lanes(NativeFloat& v, const float* p, int n) {
  const NativeInt index = {0, 1, 2, 3, 4, 5, 6, 7};
  v = _mm256_maskload_ps(p, (__m256i)(index < n));
}
MMKERN_FN void load_lanes(NativeDouble& v, const double* p, int n) {
  const NativeLong index = {0, 1, 2, 3};
  v = _mm256_maskload_pd(p, (__m256i)(index < int64_t(n)));
}
#else
MMKERN_FN void load_lanes(NativeFloat& v, const float* p, int n) { load_few<float, kLanes<float>>(v, p, n); }
MMKERN_FN void load_lanes(NativeDouble& v, const double* p, int n) { load_few<double, kLanes<double>>(v, p, n); }
#endif
template <class S>
MMKERN_FN void load_lanes(NativeFloat& v, const S* p, int n) {
  NativeShort raw;
  load_few<uint16_t, kLanes<float>>(raw, p, n);
  v = to_float(raw, S{});
}
MMKERN_FN void store_lanes(NativeFloat v, float* p, int n) { store_few<float, kLanes<float>>(v, p, n); }
MMKERN_FN void store_lanes(NativeDouble v, double* p, int n) { store_few<double, kLanes<double>>(v, p, n); }
template <class S>
MMKERN_FN void store_lanes(NativeFloat v, S* p, int n) {
  store_few<uint16_t, kLanes<float>>(from_float(v, S{}), p, n);
}

#endif

}  // namespace MMKERN_ISA
}  // namespace mmkern
