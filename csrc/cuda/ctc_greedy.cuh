// CTC on CUDA: the likeliest label of each frame, a warp a frame; and what is left of a path without repeats and
// blanks, a block a row. What they mean: mmkern/reference/ctc.py.
#pragma once

#include "block_scan.cuh"
#include "lanes.cuh"

namespace mmkern {
inline namespace device {

// Laid out alike in mmkern/backends/cuda_ctc.py.
struct BestLabelsArgs {
  const void* log_probs;  // [rows, width, labels]
  i64 row_stride, frame_stride;
  i64* path;          // [rows, width]
  float* best;        // the number of that label; NaN where one is NaN or +inf
  i64 frames, width;  // of all rows, of one
  int labels;
  Dtype dtype;
  int vectors, unused;
};

__global__ void __launch_bounds__(kScanThreads) best_labels(const BestLabelsArgs a) {
  const int lane = int(threadIdx.x) % kWarp;
  const i64 frame = i64(blockIdx.x) * kScanWarps + int(threadIdx.x) / kWarp;
  if (frame >= a.frames) return;
  const i64 offset = frame / a.width * a.row_stride + frame % a.width * a.frame_stride;
  Leader leader{-infinity(), a.labels};
  bool is_odd = false;
  for (int first = 0; first < a.labels; first += kWarp * kColumns) {
    const Columns columns{first, a.labels, lane, kWarp, a.vectors, a.dtype};
    float v[kColumns];
    columns.load(v, a.log_probs, offset);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      if (!columns.has(k)) continue;
      is_odd |= !(v[k] < infinity());
      leader.take(v[k], columns.column(k));
    }
  }
  leader = leader_of_warp(leader);
  is_odd = __any_sync(kAllLanes, is_odd);
  if (lane != 0) return;
  a.path[frame] = leader.place;
  a.best[frame] = is_odd ? infinity() - infinity() : leader.value;
}

struct CollapseArgs {
  const i64* path;  // [rows, width]
  i64 path_stride;
  const float* best;   // [rows, width]
  const i64* lengths;  // or null
  float* scores;       // the sum of best, or null: there is none
  i64 *tokens, *counts, *times;
  i64 blank, width;
};

__global__ void __launch_bounds__(kScanThreads) collapse_repeats(const CollapseArgs a) {
  const i64 row = blockIdx.x, first = row * a.width;
  const i64* const path = a.path + row * a.path_stride;
  i64 frames = a.lengths ? a.lengths[row] : a.width;
  frames = frames < 0 ? 0 : frames < a.width ? frames : a.width;
  if (a.scores) {
    float score = 0;
    for (i64 t = threadIdx.x; t < frames; t += kScanThreads) score += a.best[first + t];
    score = sum_over_block(score);
    if (threadIdx.x == 0) a.scores[row] = score;
    if (score != score) frames = 0;
  }
  u64 count = 0;
  for (i64 begin = 0; begin < frames; begin += kScanThreads) {
    const i64 t = begin + threadIdx.x;
    const i64 here = t < frames ? path[t] : a.blank;
    const bool is_kept = t < frames && here != a.blank && (t == 0 || here != path[t - 1]);
    u64 total;
    const u64 place = count + scan_block(is_kept, total);
    if (is_kept) a.tokens[first + place] = here, a.times[first + place] = t;
    count += total;
  }
  if (threadIdx.x == 0) a.counts[row] = i64(count);
  for (i64 t = i64(count) + threadIdx.x; t < a.width; t += kScanThreads) a.tokens[first + t] = a.times[first + t] = -1;
}

}  // namespace device
}  // namespace mmkern
