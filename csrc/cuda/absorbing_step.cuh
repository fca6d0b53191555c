// A step of absorbing-state diffusion on CUDA: absorbing_step of mmkern/reference/absorbing.py. A block has a row, and
// reads it once where a stretch has room for it; of a row that is not masked it reads nothing.
#pragma once

#include "grid_rows.cuh"
#include "race.cuh"

namespace mmkern {
inline namespace device {
namespace absorbing {

constexpr int kThreads = 128;
constexpr int kEach = 8;  // tokens of a stretch that a thread has; neighbours are those of neighbouring threads
constexpr int kStretch = kThreads * kEach;

// A row of each branch, and how much it counts.
struct Branches {
  const void* data;
  i64 first, to_next;    // where the row of a branch begins
  const float* weights;  // null: there is one branch
  int count, size;
  Dtype dtype;

  // Of N tokens, kThreads apart; -inf where that is so in any branch, or there is no token.
  template <int N>
  MMKERN_FN void load(float (&z)[N], int token) const {
    if (dtype == kFloat32) return load_as<kFloat32>(z, token);
    if (dtype == kBfloat16) return load_as<kBfloat16>(z, token);
    load_as<kFloat16>(z, token);
  }

 private:
  // The type is known when the kernel is compiled, so that loads follow each other without a question in between.
  template <Dtype kDtype, int N>
  MMKERN_FN void load_as(float (&z)[N], int token) const {
    load_branch<kDtype>(z, first, token);
    if (!weights) return;
    float least[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      least[i] = z[i] < infinity() ? z[i] : infinity();
      z[i] *= weights[0];
    }
    for (int k = 1; k < count; ++k) {
      float score[N];
      load_branch<kDtype>(score, first + k * to_next, token);
      const float weight = weights[k];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        z[i] = fmaf(score[i], weight, z[i]);
        least[i] = score[i] < least[i] ? score[i] : least[i];
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (least[i] == -infinity()) z[i] = -infinity();
  }
  template <Dtype kDtype, int N>
  MMKERN_FN void load_branch(float (&z)[N], i64 begin, int token) const {
#pragma unroll
    for (int i = 0; i < N; ++i)
      z[i] = token + i * kThreads < size ? load_one(data, begin + token + i * kThreads, kDtype) : -infinity();
  }
};

// The words of a row: word i is of counter first + i / 4.
struct RandomRow {
  u64 key, first;

  MMKERN_FN float uniform(int i) const { return uniform_at(key, first, i); }
  // Those of a stretch, which begins at a multiple of 4. All threads call it.
  MMKERN_FN void fill(float* v, int begin) const {
    __syncthreads();  // what was there has been read
    for (int i = int(threadIdx.x) * 4; i < kStretch; i += kThreads * 4) {
      const PhiloxWords drawn = philox(key, first + u64(begin + i) / 4);
#pragma unroll
      for (int k = 0; k < 4; ++k) v[i + k] = uniform_of(drawn.word[k]);
    }
    __syncthreads();
  }
};

}  // namespace absorbing

// Laid out alike in mmkern/backends/cuda_absorbing.py.
struct AbsorbingStepArgs {
  GridRows log_scores;  // of the first branch
  i64 to_next;          // branch
  const i64* tokens;
  const u64* seed;  // key, and the first counter
  i64 counters;     // of a row
  i64 of_sample;    // rows
  const float* rates;
  i64 rates_stride;  // 0 where all samples share one
  const float* weights;
  i64 weights_stride;
  float* log_probs;
  i64* out;
  int branches, size, heads, length;
  Dtype dtype;
  int unused;
};

__global__ void __launch_bounds__(absorbing::kThreads, 1) absorbing_step(const AbsorbingStepArgs a) {
  using namespace absorbing;
  __shared__ float v[kStretch];
  const i64 r = blockIdx.x;
  const i64 token = a.tokens[r];
  if (token != a.size) {
    if (threadIdx.x == 0) a.out[r] = token, a.log_probs[r] = 0;
    return;
  }
  const i64 sample = r / a.of_sample, of_head = r / a.length;
  const i64 place = of_head / a.heads * a.log_scores.strides[0] + of_head % a.heads * a.log_scores.strides[1] +
                    r % a.length * a.log_scores.strides[2];
  const float* const weights = a.weights ? a.weights + sample * a.weights_stride : nullptr;
  const Branches row{a.log_scores.data, place, a.to_next, weights, a.branches, a.size, a.dtype};
  const RandomRow random{a.seed[0], a.seed[1] + u64(r * a.counters)};
  const float rate = a.rates[sample * a.rates_stride];

  float z[kEach];
  Leader top{-infinity(), a.size};
  int is_bad = !(rate >= 0);
  for (int begin = 0; begin < a.size; begin += kStretch) {
    row.load(z, begin + int(threadIdx.x));
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      is_bad |= !(z[k] < infinity());
      top.take(z[k], 0);
    }
  }
  top = leader_of_block<kThreads>(top);
  is_bad |= top.value == -infinity() && rate == infinity();
  if (__syncthreads_or(is_bad)) {
    if (threadIdx.x == 0) a.out[r] = -1, a.log_probs[r] = __uint_as_float(0x7fc00000u);
    return;
  }

  const float largest = top.value == -infinity() ? 0 : top.value;
  float mass = 0;
  Leader best{-1, a.size};
  for (int begin = 0; begin < a.size; begin += kStretch) {
    if (a.size > kStretch) row.load(z, begin + int(threadIdx.x));
    random.fill(v, begin);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int i = k * kThreads + int(threadIdx.x);
      const float weight = expf(z[k] - largest);
      mass += weight;
      if (weight > 0) best.take(weight / -log1pf(-v[i]), begin + i);
    }
  }
  mass = sum_over_block(mass);
  best = leader_of_block<kThreads>(best);
  if (threadIdx.x != 0) return;
  // In units of the largest score: what there is room for. What the tokens leave of it, MASK has.
  const double room = exp(-double(largest) - log(double(rate))), left = room > mass ? room - mass : 0;
  best.take(float(left) / -log1pf(-random.uniform(a.size)), a.size);
  const bool stays = best.place == a.size;
  float chosen[1];
  row.load(chosen, best.place);
  const double log_p = stays ? log1p(-mass / room) : double(chosen[0]) - largest - log(room > mass ? room : mass);
  a.log_probs[r] = float(log_p);
  a.out[r] = best.place;
}

}  // namespace device
}  // namespace mmkern
