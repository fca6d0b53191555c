// Group norm with its modulation, then an activation, on CUDA: group_norm_act of mmkern/reference/group_norm.py. How
// the gradients follow: csrc/cpu/group_norm.h. A block takes a group of a sample; what the backward's sums add up to:
// mmkern/backends/cuda_group_norm.py.
#pragma once

#include "pieces.cuh"

#include "../activations.h"

namespace mmkern {
inline namespace device {

constexpr int kGroupThreads = 512;

// ---- Problem; laid out alike in mmkern/backends/cuda_group_norm.py ----

struct GroupNormProblem {
  PieceSizes n;  // of rows that are channels
  GridRows x;
  const float *weight, *bias;  // [groups, channels]; null for ones and zeros, as those of the next line
  const float *scale, *shift;  // [samples, groups, channels]
  int groups, channels;        // of a sample; of a group
  float eps;
  int activation;
};

// ---- A group of a sample ----

// y = act(n times + plus) in a channel.
struct ChannelAffine {
  float times, plus;

  MMKERN_FN ChannelAffine(const GroupNormProblem& p, int channel) {
    const i64 block = blockIdx.x, of_group = block % p.groups * p.channels + channel,
              own = block * p.channels + channel;
    const float factor = p.scale ? 1 + p.scale[own] : 1;
    times = p.weight ? p.weight[of_group] * factor : factor;
    plus = fma(p.bias ? p.bias[of_group] : 0, factor, p.shift ? p.shift[own] : 0);
  }
};

// n = (x - mean - rest) scale, of which the rest is what the rounding of the mean left. A lane holds kHeld pieces of
// the group in registers. Where that is 0, the group is larger: each pass over it reads it again from a cache.
template <class Access, int kHeld>
struct NormGroup {
  static constexpr int kSlots = kHeld > 0 ? kHeld : 1;

  const GroupNormProblem& p;
  const GridPlace first;                 // its first channel
  float centred[kSlots][kColumns] = {};  // x - mean; 0 outside
  float mean, rest, scale;

  MMKERN_FN explicit NormGroup(const GroupNormProblem& problem)
      : p(problem), first(p.n.sizes, i64(blockIdx.x) * p.channels, p.n.sizes.rows) {
    measure();
  }

  MMKERN_FN float size() const { return float(p.channels) * float(p.n.sizes.cols); }

  // f(piece, channel, slot), by all threads together, for every piece that this thread's lanes take.
  template <class F>
  MMKERN_FN void for_each_piece(F f) const {
    const int lanes = p.n.sizes.lanes, mine = int(threadIdx.x) / lanes, taken = int(blockDim.x) / lanes;
    const int pieces = p.channels * int(p.n.pieces);
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int slot = 0; slot < kHeld; ++slot)
        if (slot * taken < pieces) take(slot * taken + mine, slot, f);
    } else {
      for (int base = 0; base < pieces; base += taken) take(base + mine, 0, f);
    }
  }

  // Where a piece is not held, it comes back.
  MMKERN_FN void bring(const Piece<Access>& piece, int slot) {
    if constexpr (kHeld == 0) {
      piece.load(centred[0], p.x);
      centre(piece, 0);
    }
  }

  MMKERN_FN float normal(int slot, int k) const { return (centred[slot][k] - rest) * scale; }

 private:
  template <class F>
  MMKERN_FN void take(int i, int slot, F f) const {
    const int channel = i / int(p.n.pieces);
    GridPlace at = first;
    at.active = channel < p.channels;
    if (at.active) at.row += channel, at.place += channel;
    f(Piece<Access>(p.n, at, i - channel * int(p.n.pieces)), channel, slot);
  }

  MMKERN_FN void centre(const Piece<Access>& piece, int slot) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) centred[slot][k] = piece.columns.has(k) ? centred[slot][k] - mean : 0;
  }

  MMKERN_FN void measure() {
    float total = 0, left = 0, squares = 0;
    for_each_piece([&](const Piece<Access>& piece, int, int slot) {
      piece.load(centred[slot], p.x);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) total += centred[slot][k];
    });
    mean = sum_over_block(total) / size();
    for_each_piece([&](const Piece<Access>& piece, int, int slot) {
      if constexpr (kHeld == 0) piece.load(centred[0], p.x);
      centre(piece, slot);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        left += centred[slot][k];
        squares = fma(centred[slot][k], centred[slot][k], squares);
      }
    });
    rest = sum_over_block(left) / size();
    const float variance = sum_over_block(squares) / size() - rest * rest;
    scale = 1 / sqrt((variance < 0 ? 0 : variance) + p.eps);
  }
};

// ---- Forward ----

struct GroupNormArgs {
  GroupNormProblem problem;
  GridRows out;
};

template <class Access, int kHeld>
__global__ void __launch_bounds__(kGroupThreads, 1) group_norm_act(const GroupNormArgs a) {
  const GroupNormProblem& p = a.problem;
  NormGroup<Access, kHeld> group(p);
  group.for_each_piece([&](const Piece<Access>& piece, int channel, int slot) {
    if (!piece.at.active) return;
    group.bring(piece, slot);
    const ChannelAffine affine(p, channel);
    float y[kColumns];
    activation::with(p.activation, [&](auto act) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) y[k] = act.at(fma(group.normal(slot, k), affine.times, affine.plus)).value;
    });
    piece.store(y, a.out);
  });
}

// ---- Backward ----

struct GroupNormBackwardArgs {
  GroupNormProblem problem;
  GridRows grad, x_to;  // the latter null where it is not wanted
  float* sums;          // [rows, pieces, 2]: of u and of u n
};

// A piece's u = y' act'(n times + plus), and u times.
template <class Access, int kHeld>
struct Slopes {
  float u[kColumns], times_u[kColumns];

  MMKERN_FN Slopes(NormGroup<Access, kHeld>& group, const Piece<Access>& piece, int channel, int slot,
                   const GridRows& grad) {
    const ChannelAffine affine(group.p, channel);
    group.bring(piece, slot);
    piece.load(u, grad);
    activation::with(group.p.activation, [&](auto act) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) u[k] *= act.at(fma(group.normal(slot, k), affine.times, affine.plus)).slope;
    });
#pragma unroll
    for (int k = 0; k < kColumns; ++k) times_u[k] = u[k] * affine.times;
  }
};

template <class Access, int kHeld>
__global__ void __launch_bounds__(kGroupThreads, 1) group_norm_act_backward(const GroupNormBackwardArgs a) {
  const GroupNormProblem& p = a.problem;
  NormGroup<Access, kHeld> group(p);
  float held[group.kSlots][kColumns], means[2] = {};  // u times; the means of that and of that n
  group.for_each_piece([&](const Piece<Access>& piece, int channel, int slot) {
    float sums[2] = {};
    if (piece.at.active) {
      const Slopes<Access, kHeld> slopes(group, piece, channel, slot, a.grad);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        held[slot][k] = slopes.times_u[k];
        if (!piece.columns.has(k)) continue;
        const float n = group.normal(slot, k);
        sums[0] += slopes.u[k];
        sums[1] = fma(slopes.u[k], n, sums[1]);
        means[0] += held[slot][k];
        means[1] = fma(held[slot][k], n, means[1]);
      }
    }
    sum_over_group(sums, p.n.sizes.lanes);
    if (!piece.at.active || piece.columns.lane > 0) return;
    const i64 at = piece.at.row * p.n.pieces + piece.columns.first / piece.columns.chunk();
#pragma unroll
    for (int n = 0; n < 2; ++n) a.sums[at * 2 + n] = sums[n];
  });
  if (!a.x_to.data) return;
#pragma unroll
  for (int n = 0; n < 2; ++n) means[n] = sum_over_block(means[n]) / group.size();
  group.for_each_piece([&](const Piece<Access>& piece, int channel, int slot) {
    if (!piece.at.active) return;
    if constexpr (kHeld == 0) {
      const Slopes<Access, kHeld> slopes(group, piece, channel, slot, a.grad);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) held[0][k] = slopes.times_u[k];
    }
    float dx[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k)
      dx[k] = group.scale * (held[slot][k] - means[0] - group.normal(slot, k) * means[1]);
    piece.store(dx, a.x_to);
  });
}

}  // namespace device
}  // namespace mmkern
