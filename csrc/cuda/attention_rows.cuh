// The row-wise companions of attention on CUDA, and the list of their kernels; see hyperbolic.cuh. What they mean:
// mmkern/reference/attention_rows.py; how the gradients follow: csrc/cpu/merge_attention.h and csrc/cpu/rotary.h.
//
// A group of lanes shares a row. Inputs and outputs lie as they like: a stride for each of batch, head and place.
#pragma once

#include "device.cuh"

#include "grid_rows.cuh"
#include "lanes.cuh"

namespace mmkern {
inline namespace device {

// ---- Merging ----

// Laid out alike in mmkern/backends/cuda_attention_rows.py.
struct MergePartsArgs {
  GridSizes sizes;
  GridRows out, lse, other, other_lse;
  GridRows grad, grad_lse;                          // backward
  GridRows out_to, lse_to, other_to, other_lse_to;  // the first two: what is merged; backward: the gradients
};

struct PartWeights {
  float a, b, lse;
  bool has_a, has_b;

  MMKERN_FN PartWeights(float a_lse, float b_lse) : has_a(a_lse != -infinity()), has_b(b_lse != -infinity()) {
    const float larger = fmaxf(a_lse, b_lse), top = larger == -infinity() ? 0 : larger;
    const float of_a = expf(a_lse - top), of_b = expf(b_lse - top), total = of_a + of_b;
    const float inverse = total == 0 ? 0 : 1 / total;
    a = of_a * inverse;
    b = of_b * inverse;
    // One of the two is 1, so that their product is the other.
    lse = total == 0 ? -infinity() : top + log1pf(of_a * of_b);
  }
};

__global__ void __launch_bounds__(kMaxLanes, 1) merge_parts(const MergePartsArgs a) {
  const GridSizes& n = a.sizes;
  Columns columns{0, 0, int(threadIdx.x) % n.lanes, n.lanes, n.vectors, n.dtype};
  for_each_row(n, [&](GridPlace at) {
    if (!at.active) return;
    columns.cols = n.cols;
    const PartWeights weights(at.number(a.lse), at.number(a.other_lse));
    for (columns.first = 0; columns.first < n.cols; columns.first += columns.chunk()) {
      float x[kColumns] = {}, y[kColumns] = {};
      if (weights.has_a) columns.load(x, a.out.data, at.in(a.out));
      if (weights.has_b) columns.load(y, a.other.data, at.in(a.other));
#pragma unroll
      for (int k = 0; k < kColumns; ++k) x[k] = fma(weights.a, x[k], weights.b * y[k]);
      columns.store(x, a.out_to.data, at.in(a.out_to));
    }
    if (columns.lane == 0) at.set_number(a.lse_to, weights.lse);
  });
}

__global__ void __launch_bounds__(kMaxLanes, 1) merge_parts_backward(const MergePartsArgs a) {
  const GridSizes& n = a.sizes;
  Columns columns{0, 0, int(threadIdx.x) % n.lanes, n.lanes, n.vectors, n.dtype};
  for_each_row(n, [&](GridPlace at) {
    columns.cols = at.active ? n.cols : 0;
    const PartWeights weights(at.number(a.lse), at.number(a.other_lse));
    const bool has_both = weights.has_a && weights.has_b;
    float gain[1] = {0};  // g.(a - b)
    for (columns.first = 0; columns.first < n.cols; columns.first += columns.chunk()) {
      float g[kColumns], x[kColumns], y[kColumns];
      columns.load(g, a.grad.data, at.in(a.grad));
      if (has_both) {
        columns.load(x, a.out.data, at.in(a.out));
        columns.load(y, a.other.data, at.in(a.other));
#pragma unroll
        for (int k = 0; k < kColumns; ++k) gain[0] = fma(g[k], x[k] - y[k], gain[0]);
      }
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        x[k] = weights.has_a ? weights.a * g[k] : 0;
        y[k] = weights.has_b ? weights.b * g[k] : 0;
      }
      if (a.out_to.data) columns.store(x, a.out_to.data, at.in(a.out_to));
      if (a.other_to.data) columns.store(y, a.other_to.data, at.in(a.other_to));
    }
    sum_over_group(gain, n.lanes);
    if (!at.active || columns.lane != 0) return;
    const float from_lse = at.number(a.grad_lse);
    at.set_number(a.lse_to, weights.has_a ? weights.a * fma(weights.b, gain[0], from_lse) : 0);
    at.set_number(a.other_lse_to, weights.has_b ? weights.b * fma(-weights.a, gain[0], from_lse) : 0);
  });
}

// ---- Rotary embeddings ----

constexpr int kPairs = 8;          // of a row, in a lane's registers
constexpr int kRotaryLanes = 256;  // at most, that share a row: with more, a lane's registers do not hold its pairs

// Laid out alike in mmkern/backends/cuda_attention_rows.py.
struct RotaryArgs {
  GridSizes sizes;
  GridRows x, cos, sin, grad, to;
  const float* weight;  // [cols], or null
  float* partials;      // of the weight's gradient, [warps or wider groups, cols], or null
  int pairs, normalize, interleaved;
  float eps;
};

// The pairs of a lane: those that turn, then the channels that pass, as pairs with the angle 0. kVectors: its eight are
// neighbours, read and written 16 bytes at a time.
template <bool kVectors>
struct LanePairs {
  const RotaryArgs& a;
  int lane;
  int cols;  // 0 for a row that is not there

  MMKERN_FN int pair(int k) const { return kVectors ? lane * kPairs + k : k * a.sizes.lanes + lane; }
  // Whether its members lie half a rotation apart, and not side by side.
  MMKERN_FN bool apart(int p) const { return !a.interleaved && p < a.pairs; }
  MMKERN_FN int first(int p) const { return apart(p) ? p : 2 * p; }
  MMKERN_FN int second(int p) const { return apart(p) ? p + a.pairs : 2 * p + 1; }

  static MMKERN_FN void load_block(float* to, const char* row, int channel, Dtype dtype) {
    if (dtype == kFloat32) {
      load_four(to, row + channel * 4);
      load_four(to + 4, row + channel * 4 + 16);
    } else {
      load_eight(to, row + channel * 2, dtype);
    }
  }
  static MMKERN_FN void store_block(const float* v, char* row, int channel, Dtype dtype) {
    if (dtype == kFloat32) {
      float4* const to = reinterpret_cast<float4*>(row + channel * 4);
      to[0] = float4{v[0], v[1], v[2], v[3]};
      to[1] = float4{v[4], v[5], v[6], v[7]};
    } else {
      *reinterpret_cast<uint4*>(row + channel * 2) = uint4{narrow(v[0], v[1], dtype), narrow(v[2], v[3], dtype),
                                                           narrow(v[4], v[5], dtype), narrow(v[6], v[7], dtype)};
    }
  }

  MMKERN_FN void load(float (&x)[kPairs], float (&y)[kPairs], const void* base, i64 row_offset, Dtype dtype) const {
    const char* row = static_cast<const char*>(base) + row_offset * bytes_of(dtype);
#pragma unroll
    for (int k = 0; k < kPairs; ++k) x[k] = y[k] = 0;
    if constexpr (!kVectors) {
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        const int p = pair(k);
        if (first(p) < cols) x[k] = load_one(row, first(p), dtype);
        if (second(p) < cols) y[k] = load_one(row, second(p), dtype);
      }
      return;
    }
    const int p = pair(0);
    if (2 * p >= cols) return;
    if (apart(p)) {
      load_block(x, row, p, dtype);
      load_block(y, row, p + a.pairs, dtype);
      return;
    }
    float both[2 * kPairs];
    load_block(both, row, 2 * p, dtype);
    load_block(both + 8, row, 2 * p + 8, dtype);
#pragma unroll
    for (int k = 0; k < kPairs; ++k) x[k] = both[2 * k], y[k] = both[2 * k + 1];
  }

  MMKERN_FN void store(const float (&x)[kPairs], const float (&y)[kPairs], void* base, i64 row_offset,
                       Dtype dtype) const {
    char* row = static_cast<char*>(base) + row_offset * bytes_of(dtype);
    if constexpr (!kVectors) {
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        const int p = pair(k);
        if (first(p) < cols) store_one(row, first(p), x[k], dtype);
        if (second(p) < cols) store_one(row, second(p), y[k], dtype);
      }
      return;
    }
    const int p = pair(0);
    if (2 * p >= cols) return;
    if (apart(p)) {
      store_block(x, row, p, dtype);
      store_block(y, row, p + a.pairs, dtype);
      return;
    }
    float both[2 * kPairs];
#pragma unroll
    for (int k = 0; k < kPairs; ++k) both[2 * k] = x[k], both[2 * k + 1] = y[k];
    store_block(both, row, 2 * p, dtype);
    store_block(both + 8, row, 2 * p + 8, dtype);
  }

  MMKERN_FN void load_angles(float (&c)[kPairs], float (&s)[kPairs], const GridPlace& at) const {
    const float* cos = static_cast<const float*>(a.cos.data) + at.in(a.cos);
    const float* sin = static_cast<const float*>(a.sin.data) + at.in(a.sin);
#pragma unroll
    for (int k = 0; k < kPairs; ++k) c[k] = 1, s[k] = 0;
    if (cols == 0) return;
    if constexpr (kVectors) {
      const int p = pair(0);
      if (p >= a.pairs) return;
      load_block(c, reinterpret_cast<const char*>(cos), p, kFloat32);
      load_block(s, reinterpret_cast<const char*>(sin), p, kFloat32);
    } else {
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        const int p = pair(k);
        if (p < a.pairs) c[k] = cos[p], s[k] = sin[p];
      }
    }
  }

  MMKERN_FN void multiply_by_weight(float (&x)[kPairs], float (&y)[kPairs]) const {
    if (!a.weight) return;
    float u[kPairs], v[kPairs];
    load(u, v, a.weight, 0, kFloat32);
#pragma unroll
    for (int k = 0; k < kPairs; ++k) x[k] *= u[k], y[k] *= v[k];
  }
};

MMKERN_FN float dot_of_pairs(const float (&x)[kPairs], const float (&y)[kPairs], const float (&u)[kPairs],
                             const float (&v)[kPairs]) {
  float sums[2] = {0, 0};
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    sums[0] = fma(x[k], u[k], sums[0]);
    sums[1] = fma(y[k], v[k], sums[1]);
  }
  return sums[0] + sums[1];
}

// x / sqrt(mean(x^2) + eps), where the call normalizes; returns the factor. All threads of the block call it.
MMKERN_FN float normalize_pairs(const RotaryArgs& a, float (&x)[kPairs], float (&y)[kPairs]) {
  if (!a.normalize) return 1;
  float squares[1] = {dot_of_pairs(x, y, x, y)};
  sum_over_group(squares, a.sizes.lanes);
  const float scale = 1 / sqrt(squares[0] / float(a.sizes.cols) + a.eps);
#pragma unroll
  for (int k = 0; k < kPairs; ++k) x[k] *= scale, y[k] *= scale;
  return scale;
}

template <bool kVectors>
__global__ void __launch_bounds__(kRotaryLanes, 1) rotary(const RotaryArgs a) {
  const GridSizes& n = a.sizes;
  LanePairs<kVectors> lane{a, int(threadIdx.x) % n.lanes, 0};
  for_each_row(n, [&](GridPlace at) {
    lane.cols = at.active ? n.cols : 0;
    float x[kPairs], y[kPairs], c[kPairs], s[kPairs];
    lane.load(x, y, a.x.data, at.in(a.x), n.dtype);
    normalize_pairs(a, x, y);
    lane.multiply_by_weight(x, y);
    lane.load_angles(c, s, at);
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const float turned = fma(x[k], c[k], -(y[k] * s[k]));
      y[k] = fma(x[k], s[k], y[k] * c[k]);
      x[k] = turned;
    }
    lane.store(x, y, a.to.data, at.in(a.to), n.dtype);
  });
}

template <bool kVectors>
__global__ void __launch_bounds__(kRotaryLanes, 1) rotary_backward(const RotaryArgs a) {
  const GridSizes& n = a.sizes;
  LanePairs<kVectors> lane{a, int(threadIdx.x) % n.lanes, 0};
  float x_sums[kPairs] = {}, y_sums[kPairs] = {};
  for_each_row(n, [&](GridPlace at) {
    lane.cols = at.active ? n.cols : 0;
    float g[kPairs], h[kPairs], x[kPairs], y[kPairs];
    {
      float c[kPairs], s[kPairs];
      lane.load(g, h, a.grad.data, at.in(a.grad), n.dtype);
      lane.load_angles(c, s, at);
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        const float turned = fma(g[k], c[k], h[k] * s[k]);
        h[k] = fma(h[k], c[k], -(g[k] * s[k]));
        g[k] = turned;
      }
    }
    float scale = 1;
    if (a.normalize || a.partials) {
      lane.load(x, y, a.x.data, at.in(a.x), n.dtype);
      scale = normalize_pairs(a, x, y);
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        x_sums[k] = fma(g[k], x[k], x_sums[k]);
        y_sums[k] = fma(h[k], y[k], y_sums[k]);
      }
    }
    if (!a.to.data) return;
    lane.multiply_by_weight(g, h);
    if (a.normalize) {
      float along[1] = {dot_of_pairs(g, h, x, y)};
      sum_over_group(along, n.lanes);
      const float mean = along[0] / float(n.cols);
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        g[k] = scale * fma(-x[k], mean, g[k]);
        h[k] = scale * fma(-y[k], mean, h[k]);
      }
    }
    lane.store(g, h, a.to.data, at.in(a.to), n.dtype);
  });
  if (!a.partials) return;
  add_groups_of_warp(x_sums, n.lanes);
  add_groups_of_warp(y_sums, n.lanes);
  const WarpSums to(n.lanes);
  if (!to.writes) return;
  lane.cols = n.cols;
  lane.store(x_sums, y_sums, a.partials, to.row * n.cols, kFloat32);
}

}  // namespace device
}  // namespace mmkern

#define MMKERN_ATTENTION_ROWS_KERNELS(KERNEL)                                                                          \
  KERNEL(merge_parts)                                                                                                  \
  KERNEL(merge_parts_backward)                                                                                         \
  KERNEL(rotary<false>)                                                                                                \
  KERNEL(rotary<true>)                                                                                                 \
  KERNEL(rotary_backward<false>)                                                                                       \
  KERNEL(rotary_backward<true>)
