// CUDA's names for g++: what a .cuh needs to compile as plain C++. Included before everything else (-include shim.h).
//
// Only the intrinsics that mmkern uses. Inline PTX has its host bodies in ptx.h.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "block.h"

#define MMKERN_CUDA_ON_HOST 1

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define MMKERN_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(cuda_on_host::machine().dynamic_shared())

#define threadIdx (cuda_on_host::machine().running->index)
#define blockIdx (cuda_on_host::machine().block_index)
#define blockDim (cuda_on_host::machine().launch.block)
#define gridDim (cuda_on_host::machine().launch.grid)

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

namespace cuda_on_host {

using Lanes = std::vector<Thread*>;

inline void barrier(const char* op, Site site) {
  machine().meet<char, char>({Meeting::block, op, 0, 0, 1, site}, 0, [](Lanes&) {});
}

// An int for all from everybody's predicate: count of the true ones.
inline int count_in(Meeting::Scope scope, const char* op, unsigned mask, int predicate, Site site) {
  return machine().meet<int, int>({scope, op, mask, 0, sizeof(int), site}, predicate, [](Lanes& who) {
    int count = 0;
    for (Thread* t : who) count += *static_cast<const int*>(t->in) != 0;
    for (Thread* t : who) *static_cast<int*>(t->out) = count;
  });
}

template <class T>
struct Shuffled {
  T value;
  int source;  // lane
};

// Every lane names the lane that it reads. Reading a lane outside the mask is undefined on a device: an error here.
template <class T>
T shuffle(const char* op, unsigned mask, T value, int source, int width, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  const Shuffled<T> in{value, source};
  if (!(mask >> source & 1)) machine().fail(std::string(op) + " reads a lane outside its mask", site);
  return machine().meet<Shuffled<T>, T>({Meeting::warp, op, mask, width, sizeof(T), site}, in, [](Lanes& who) {
    const Shuffled<T>* lanes[32] = {};
    for (Thread* t : who) lanes[t->lane()] = static_cast<const Shuffled<T>*>(t->in);
    for (Thread* t : who) *static_cast<T*>(t->out) = lanes[lanes[t->lane()]->source]->value;
  });
}

inline int lane() { return int(machine().running->lane()); }

}  // namespace cuda_on_host

#define MMKERN_SITE cuda_on_host::Site site = cuda_on_host::Site::here()

inline void __syncthreads(MMKERN_SITE) { cuda_on_host::barrier("__syncthreads", site); }

inline int __syncthreads_count(int predicate, MMKERN_SITE) {
  return cuda_on_host::count_in(cuda_on_host::Meeting::block, "__syncthreads_count", 0, predicate, site);
}
inline int __syncthreads_or(int predicate, MMKERN_SITE) {
  return cuda_on_host::count_in(cuda_on_host::Meeting::block, "__syncthreads_or", 0, predicate, site) > 0;
}
inline int __syncthreads_and(int predicate, MMKERN_SITE) {
  return cuda_on_host::count_in(cuda_on_host::Meeting::block, "__syncthreads_and", 0, !predicate, site) == 0;
}

inline void __syncwarp(unsigned mask = ~0u, MMKERN_SITE) {
  cuda_on_host::count_in(cuda_on_host::Meeting::warp, "__syncwarp", mask, 0, site);
}
inline int __any_sync(unsigned mask, int predicate, MMKERN_SITE) {
  return cuda_on_host::count_in(cuda_on_host::Meeting::warp, "__any_sync", mask, predicate, site) > 0;
}
inline int __all_sync(unsigned mask, int predicate, MMKERN_SITE) {
  return cuda_on_host::count_in(cuda_on_host::Meeting::warp, "__all_sync", mask, !predicate, site) == 0;
}
inline unsigned __ballot_sync(unsigned mask, int predicate, MMKERN_SITE) {
  using namespace cuda_on_host;
  return machine().meet<int, unsigned>({Meeting::warp, "__ballot_sync", mask, 0, 4, site}, predicate, [](Lanes& who) {
    unsigned votes = 0;
    for (Thread* t : who) votes |= unsigned(*static_cast<const int*>(t->in) != 0) << t->lane();
    for (Thread* t : who) *static_cast<unsigned*>(t->out) = votes;
  });
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, MMKERN_SITE) {
  const int lane = cuda_on_host::lane(), first = lane / width * width;
  return cuda_on_host::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, MMKERN_SITE) {
  const int lane = cuda_on_host::lane(), source = lane ^ lanes, end = lane / width * width + width;
  return cuda_on_host::shuffle("__shfl_xor_sync", mask, value, source < end ? source : lane, width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, MMKERN_SITE) {
  const int lane = cuda_on_host::lane(), source = lane + int(by), end = lane / width * width + width;
  return cuda_on_host::shuffle("__shfl_down_sync", mask, value, source < end ? source : lane, width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, MMKERN_SITE) {
  const int lane = cuda_on_host::lane(), source = lane - int(by), first = lane / width * width;
  return cuda_on_host::shuffle("__shfl_up_sync", mask, value, source >= first ? source : lane, width, site);
}

// Threads run one at a time.
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long x) {
  const unsigned long long before = *to;
  *to += x;
  return before;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline void sincospif(float x, float* sine, float* cosine) {
  *sine = float(sin(M_PI * x));
  *cosine = float(cos(M_PI * x));
}
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline long long __double_as_longlong(double x) {
  long long bits;
  memcpy(&bits, &x, 8);
  return bits;
}

#include "ptx.h"
