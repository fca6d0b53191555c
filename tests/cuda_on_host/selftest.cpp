// Kernels that try the harness itself: each right, and with bugs of the kinds that it is there to catch.
#include "../../csrc/cuda/device.cuh"

#include "export.h"

using namespace mmkern;

struct Args {
  const float* in;
  float* out;
  const void* a;  // 16-bit numbers
  const void* b;
};

enum class Bug {
  none,
  lost_barrier,
  early_exit,
  missing_lane,
  divergent_barrier,
  wrong_wait,
  no_wait,
  stale_shared,
  lane_outside
};

// out[i] = in[n - 1 - i] + its neighbour, through shared memory.
template <Bug bug>
__global__ void reverse(const Args a) {
  MMKERN_DYNAMIC_SHARED(float, shared);
  const int i = int(threadIdx.x), n = int(blockDim.x);
  if (bug == Bug::early_exit && i == 5) return;
  shared[n - 1 - i] = a.in[i];
  if (bug == Bug::divergent_barrier && i % 2) {
    __syncthreads();
  } else if (bug != Bug::lost_barrier) {
    __syncthreads();
  }
  a.out[i] = shared[i] + shared[(i + 1) % n];
}

// The sum of each warp, in all its lanes.
template <Bug bug>
__global__ void warp_sum(const Args a) {
  const unsigned mask = bug == Bug::missing_lane ? 0x7fffffffu : kAllLanes;
  float x = a.in[threadIdx.x];
  for (int step = 1; step < kWarp; step *= 2) {
    if (bug == Bug::early_exit && threadIdx.x == 3) return;
    x += __shfl_xor_sync(mask, x, step);
  }
  if (bug == Bug::lane_outside && threadIdx.x < 16) x += __shfl_sync(0xffffu, x, 20);
  a.out[threadIdx.x] = x;
}

// Two stages by cp.async, 16 bytes a thread: out = first + second.
template <Bug bug>
__global__ void pipeline(const Args a) {
  __shared__ float4 stages[2][64];
  const int i = int(threadIdx.x), n = int(blockDim.x);
  for (int s = 0; s < 2; ++s) {
    ptx::cp_async16(&stages[s][i], a.in + 4 * (s * n + i), true);
    ptx::cp_async_commit();
  }
  if (bug == Bug::no_wait) {
    ptx::cp_async_wait<0>();
    a.out[i] = 0;
    ptx::cp_async16(&stages[0][i], a.in, true);
    return;
  }
  ptx::cp_async_wait<1>();
  __syncthreads();
  const float first = stages[0][n - 1 - i].x;
  ptx::cp_async_wait<bug == Bug::wrong_wait ? 1 : 0>();
  __syncthreads();
  a.out[i] = first + stages[1][n - 1 - i].y;
  ptx::cp_async_wait<0>();
}

// Reads a shared variable that only the first block has written.
template <Bug bug>
__global__ void shared_once(const Args a) {
  __shared__ float value;
  if (bug == Bug::none || blockIdx.x == 0) value = 1;
  __syncthreads();
  if (threadIdx.x == 0) a.out[blockIdx.x] = value;
}

// out[16 x 8] = A[16 x 16] B[16 x 8] by one warp; A row-major, B row-major and transposed on its way.
template <Bug bug, bool bf16>
__global__ void matrix_product(const Args a) {
  __shared__ uint4 a_tile[16][2], b_tile[16][1];
  const int lane = int(threadIdx.x);
  a_tile[lane / 2][lane % 2] = static_cast<const uint4*>(a.a)[lane];
  if (lane < 16) b_tile[lane][0] = static_cast<const uint4*>(a.b)[lane];
  __syncwarp();
  if (bug == Bug::early_exit && lane == 31) return;
  unsigned fragment_a[4], fragment_b[4];
  ptx::ldmatrix(fragment_a, &a_tile[lane % 16][lane / 16]);
  ptx::ldmatrix_transposed(fragment_b, &b_tile[lane % 16][0]);
  const unsigned b[2] = {fragment_b[0], fragment_b[1]};
  float c[4] = {};
  if (bf16) {
    ptx::mma_bf16(c, fragment_a, b);
  } else {
    ptx::mma_half(c, fragment_a, b);
  }
  float* out = a.out + lane / 4 * 8 + lane % 4 * 2;
  out[0] = c[0], out[1] = c[1], out[64] = c[2], out[65] = c[3];
}

// What votes and shuffles return, one number a lane and question.
__global__ void intrinsics(const Args a) {
  const int lane = int(threadIdx.x);
  float* out = a.out + lane;
  out[0] = float(__ballot_sync(kAllLanes, lane % 3 == 0) & 0xffffu);
  out[32] = float(__any_sync(kAllLanes, lane == 7) + 2 * __all_sync(kAllLanes, lane < 31));
  out[64] = float(__shfl_up_sync(kAllLanes, lane, 3));
  out[96] = float(__shfl_down_sync(kAllLanes, lane, 3, 8));
  out[128] = float(__shfl_sync(kAllLanes, lane, lane + 1, 4));
  out[160] =
      float(__syncthreads_count(lane < 5) + 100 * __syncthreads_or(lane == 31) + 200 * __syncthreads_and(lane == 31));
}

// out = in rounded to 16 bits and back.
template <Dtype dtype>
__global__ void round_trip(const Args a) {
  const int i = int(threadIdx.x);
  unsigned short bits[1];
  store_one(bits, 0, a.in[i], dtype);
  a.out[i] = load_one(bits, 0, dtype);
}

// Writes one past the end of its dynamic shared memory.
__global__ void out_of_bounds(const Args) {
  MMKERN_DYNAMIC_SHARED(float, shared);
  shared[threadIdx.x + 1] = 0;
}

#define KERNELS(KERNEL)                                                                                                \
  KERNEL(reverse<Bug::none>)                                                                                           \
  KERNEL(reverse<Bug::lost_barrier>)                                                                                   \
  KERNEL(reverse<Bug::early_exit>)                                                                                     \
  KERNEL(reverse<Bug::divergent_barrier>)                                                                              \
  KERNEL(warp_sum<Bug::none>)                                                                                          \
  KERNEL(warp_sum<Bug::missing_lane>)                                                                                  \
  KERNEL(warp_sum<Bug::early_exit>)                                                                                    \
  KERNEL(warp_sum<Bug::lane_outside>)                                                                                  \
  KERNEL(pipeline<Bug::none>)                                                                                          \
  KERNEL(pipeline<Bug::wrong_wait>)                                                                                    \
  KERNEL(pipeline<Bug::no_wait>)                                                                                       \
  KERNEL(shared_once<Bug::none>)                                                                                       \
  KERNEL(shared_once<Bug::stale_shared>)                                                                               \
  KERNEL(matrix_product<Bug::none, true>)                                                                              \
  KERNEL(matrix_product<Bug::none, false>)                                                                             \
  KERNEL(matrix_product<Bug::early_exit, true>)                                                                        \
  KERNEL(intrinsics)                                                                                                   \
  KERNEL(round_trip<kBfloat16>)                                                                                        \
  KERNEL(round_trip<kFloat16>)                                                                                         \
  KERNEL(out_of_bounds)

EXPORT_KERNELS(KERNELS)
