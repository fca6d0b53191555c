// What every kernel starts from. One text for nvcc, NVRTC and g++ (the host harness), so: no std header, integers of
// our own, and the few float functions that the shared scalar maths expects.
#pragma once

#define MMKERN_FN __device__ __forceinline__
#define MMKERN_ISA device

#if !defined(MMKERN_CUDA_ON_HOST)
#define MMKERN_DYNAMIC_SHARED(type, name)                                                                              \
  extern __shared__ float4 mmkern_dynamic_shared_bytes[];                                                              \
  type* name = reinterpret_cast<type*>(mmkern_dynamic_shared_bytes)
#endif

#include "ptx.cuh"

namespace mmkern {
inline namespace device {

using i64 = long long;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

MMKERN_FN bool all(bool mask) { return mask; }
MMKERN_FN float select(bool mask, float a, float b) { return mask ? a : b; }
MMKERN_FN float min(float a, float b) { return a < b ? a : b; }
MMKERN_FN float fma(float a, float b, float c) { return fmaf(a, b, c); }
MMKERN_FN float sqrt(float x) { return sqrtf(x); }
MMKERN_FN float exp_flushed(float x) { return expf(x); }
// 2 ulp of the division, whose code for subnormals would spill registers; 0 where it is below 2^-126.
MMKERN_FN float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }
MMKERN_FN float normal_cdf(float x) { return fmaf(0.5f, erff(x * 0.70710678f), 0.5f); }
MMKERN_FN float sinh(float x) { return sinhf(x); }
MMKERN_FN float cosh(float x) { return coshf(x); }
MMKERN_FN float tanh(float x) { return tanhf(x); }
MMKERN_FN float asinh(float x) { return asinhf(x); }
MMKERN_FN float atanh(float x) { return atanhf(x); }
MMKERN_FN float atan2(float y, float x) { return atan2f(y, x); }

MMKERN_FN float infinity() { return __uint_as_float(0x7f800000u); }

// Codes as in csrc/call.h. Kernels compute in float32; the storage type is known at run time, since loads and stores
// are all that differ.
enum Dtype : int { kFloat32 = 0, kBfloat16 = 2, kFloat16 = 3 };

MMKERN_FN i64 bytes_of(Dtype dtype) { return dtype == kFloat32 ? 4 : 2; }

MMKERN_FN float widen(unsigned short bits, Dtype dtype) {
  return dtype == kBfloat16 ? __uint_as_float(unsigned(bits) << 16) : ptx::half_to_float(bits);
}

// Two floats as 16-bit numbers, the first in the low half.
MMKERN_FN unsigned narrow(float first, float second, Dtype dtype) {
  return dtype == kBfloat16 ? ptx::float_to_bf162(first, second) : ptx::float_to_half2(first, second);
}

MMKERN_FN float load_one(const void* base, i64 i, Dtype dtype) {
  if (dtype == kFloat32) return static_cast<const float*>(base)[i];
  return widen(static_cast<const unsigned short*>(base)[i], dtype);
}

MMKERN_FN void store_one(void* base, i64 i, float value, Dtype dtype) {
  if (dtype == kFloat32) {
    static_cast<float*>(base)[i] = value;
  } else {
    static_cast<unsigned short*>(base)[i] = static_cast<unsigned short>(narrow(value, 0.0f, dtype));
  }
}

// Eight neighbours in 16-byte accesses. The address is a multiple of 16.
MMKERN_FN void load_eight(float* to, const void* from, Dtype dtype) {
  const uint4 raw = *static_cast<const uint4*>(from);
  const unsigned bits[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    to[2 * k] = widen(static_cast<unsigned short>(bits[k]), dtype);
    to[2 * k + 1] = widen(static_cast<unsigned short>(bits[k] >> 16), dtype);
  }
}

MMKERN_FN void load_four(float* to, const void* from) {
  const float4 raw = *static_cast<const float4*>(from);
  to[0] = raw.x, to[1] = raw.y, to[2] = raw.z, to[3] = raw.w;
}

// A number that may live in device memory, so that nobody has to wait for it.
struct Scalar {
  const float* pointer;  // null: value
  float value;

  MMKERN_FN float get() const { return pointer ? *pointer : value; }
};

// The sum over a block of at most 512 threads, in an order that depends on nothing but the block. All threads call it
// and all get the sum.
MMKERN_FN float sum_over_block(float x) {
  __shared__ float warp_sums[16];
  const int thread = int(threadIdx.x), warps = int(blockDim.x) / kWarp;
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  if (thread % kWarp == 0) warp_sums[thread / kWarp] = x;
  __syncthreads();
  x = 0;
  for (int w = 0; w < warps; ++w) x += warp_sums[w];
  __syncthreads();
  return x;
}

}  // namespace device
}  // namespace mmkern
