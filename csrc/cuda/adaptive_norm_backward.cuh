// The backward of adaptive_norm.cuh. What rows share gets a sum of each column for each warp, which is added up
// elsewhere (mmkern/backends/modulation_sums.py).
#pragma once

#include "device.cuh"

#include "adaptive_norm.cuh"

namespace mmkern {
inline namespace device {

// Where gradients go; null where they are not wanted.
struct AdaptiveNormBackwardArgs {
  AdaptiveNormProblem problem;
  GridRows grad, total_grad;  // of y, and of r or null
  GridRows x_to, residual_to;
  GridRows gate_to, scale_to, shift_to;  // of rows that have one each
  float* sums;                           // [parts, 2, cols]: of u and u n, where each row has its scale of u (1 + s)
  float* gate_sums;                      // [parts, cols]
  float* frame_sums;                     // [rows]
};

// kCount sums of each column over the rows of a group, whose part of what is written is [kCount, cols]. Sums of one
// chunk are added up in registers, of two, which do not fit beside the row, in shared memory, of more in that part.
template <int kHeld, int kCount>
struct ColumnSums {
  float* memory;  // unless in registers
  float held[kCount][kColumns];

  MMKERN_FN ColumnSums(float* part, float* shared, Columns& columns) : memory(kHeld == 2 ? shared : part), held{} {
    if (kHeld == 1 || !part) return;
    for_each(columns, [&](int n) { columns.store_floats(held[n], memory, i64(n) * columns.cols); });
  }

  MMKERN_FN void add(const Columns& columns, int n, const float (&v)[kColumns]) {
    if (kHeld != 1) columns.load_floats(held[n], memory, i64(n) * columns.cols);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) held[n][k] += v[k];
    if (kHeld != 1) columns.store_floats(held[n], memory, i64(n) * columns.cols);
  }

  // The groups of a warp together, by all its lanes.
  MMKERN_FN void finish(float* part, Columns& columns) {
    if (kHeld == 0 || !part) return;
    const bool writes = WarpSums(columns.lanes).writes;
    for_each(columns, [&](int n) {
      if (kHeld == 1)
        add_groups_of_warp(held[n], columns.lanes);
      else
        columns.load_floats(held[n], memory, i64(n) * columns.cols);
      if (writes) columns.store_floats(held[n], part, i64(n) * columns.cols);
    });
  }

 private:
  template <class F>
  MMKERN_FN void for_each(Columns& columns, F f) {
    for_each_chunk<kHeld>(columns, [&](int) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) f(n);
    });
  }
};

// The backward of one row after the other, by the lanes of a group.
template <class Access, int kHeld>
struct BackwardRows {
  // Whether a lane keeps w (1 + s) from row to row.
  static constexpr bool keeps_modulation = kHeld == 1 && Access::vectors;

  const AdaptiveNormBackwardArgs& a;
  const AdaptiveNormProblem& p;
  Columns& columns;
  NormRow<kHeld> row;
  ColumnSums<kHeld, 2> sums;  // of u and u n
  ColumnSums<kHeld, 1> gate_sums;
  float slope[kSlots<kHeld>][kColumns];  // y', then n'
  float by[kColumns], f;
  bool formed;

  MMKERN_FN BackwardRows(const AdaptiveNormBackwardArgs& a, Columns& columns, float* shared)
      : a(a),
        p(a.problem),
        columns(columns),
        row{a.problem, columns},
        sums(part_of(a.sums, 2), shared, columns),
        gate_sums(part_of(a.gate_sums, 1), shared + 2 * columns.cols, columns),
        formed(false) {}

  MMKERN_FN void run(const GridPlace& at) {
    // What is held is asked for at once.
    row.measure(at, [&](int slot, const float (&)[kColumns]) {
      if (kHeld > 0) columns.load(slope[slot], a.grad.data, at.in(a.grad));
      if (keeps_modulation && !formed) form(at);
    });
    formed = !p.of_each_row;
    f = frame_scale(p, at);
    float totals[kTotals] = {};
    for_each_chunk<kHeld>(columns, [&](int slot) { add_up(slot, at, totals); });
    sum_over_group(totals, columns.lanes);
    if (!at.active) return;
    if (a.frame_sums && columns.lane == 0) a.frame_sums[at.row] = totals[kFrame];
    const float n = float(p.sizes.cols), centre = p.centered ? totals[kSlope] / n : 0;
    const float along = totals[kAlong] / n;
    for_each_chunk<kHeld>(columns, [&](int slot) { write(slot, at, centre, along); });
  }

  MMKERN_FN void finish() {
    sums.finish(part_of(a.sums, 2), columns);
    gate_sums.finish(part_of(a.gate_sums, 1), columns);
  }

 private:
  enum { kSlope, kAlong, kFrame, kTotals };  // of a row: the sums of n', of n' n, and of y' y / f

  // What this group writes of [parts, count, cols], or null.
  MMKERN_FN float* part_of(float* all, int count) const {
    return all ? all + WarpSums(columns.lanes).row * count * columns.cols : nullptr;
  }

  MMKERN_FN void form(const GridPlace& at) {
    float plus[kColumns];
    form_modulation(p, columns, at, by, plus);
  }

  // A chunk that is not held comes back, with its y' and its modulators.
  MMKERN_FN void bring(int slot, const GridPlace& at) {
    row.bring(slot, at);
    if (kHeld == 0) columns.load(slope[slot], a.grad.data, at.in(a.grad));
    if (!keeps_modulation) form(at);
  }

  MMKERN_FN void add_up(int slot, const GridPlace& at, float (&totals)[kTotals]) {
    bring(slot, at);
    float normal[kColumns], u[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) normal[k] = row.normal(slot, k);
    if (a.frame_sums) {
      float again[kColumns], plus[kColumns];
      form_modulation(p, columns, at, again, plus);
#pragma unroll
      for (int k = 0; k < kColumns; ++k)
        totals[kFrame] = fma(slope[slot][k], fma(normal[k], by[k], plus[k]), totals[kFrame]);
    }
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      u[k] = f * slope[slot][k];
      slope[slot][k] = u[k] * by[k];
      totals[kSlope] += slope[slot][k];
      totals[kAlong] = fma(slope[slot][k], normal[k], totals[kAlong]);
    }
    if (!at.active) return;
    if (p.of_each_row) differentiate_modulation(at, normal, u);
    if (!a.sums) return;
    sums.add(columns, 0, u);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) u[k] *= normal[k];
    sums.add(columns, 1, u);
  }

  // The gradients of scale and shift of a row that has its own; u becomes u (1 + s).
  MMKERN_FN void differentiate_modulation(const GridPlace& at, const float (&normal)[kColumns], float (&u)[kColumns]) {
    store_floats(u, a.shift_to, at);
    if (a.scale_to.data) {
      float weight[kColumns], of_scale[kColumns];
      load_or(weight, 1, columns, p.weight, 0);
      load_or(of_scale, 0, columns, p.bias, 0);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) of_scale[k] = u[k] * fma(normal[k], weight[k], of_scale[k]);
      store_floats(of_scale, a.scale_to, at);
    }
    if (!a.sums) return;
    float scale[kColumns];
    load_or(scale, 0, columns, p.scale.data, at.in(p.scale));
#pragma unroll
    for (int k = 0; k < kColumns; ++k) u[k] *= 1 + scale[k];
  }

  MMKERN_FN void write(int slot, const GridPlace& at, float centre, float along) {
    float (&of_r)[kColumns] = slope[slot];
    if constexpr (kHeld == 0) {
      bring(slot, at);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) of_r[k] *= f * by[k];
    }
#pragma unroll
    for (int k = 0; k < kColumns; ++k) of_r[k] = row.scale * (of_r[k] - centre - row.normal(slot, k) * along);
    float other[kColumns];
    if (a.total_grad.data) {
      columns.load(other, a.total_grad.data, at.in(a.total_grad));
#pragma unroll
      for (int k = 0; k < kColumns; ++k) of_r[k] += other[k];
    }
    if (a.residual_to.data) columns.store(of_r, a.residual_to.data, at.in(a.residual_to));
    if (a.gate_to.data || a.gate_sums) {
      columns.load(other, p.x.data, at.in(p.x));
#pragma unroll
      for (int k = 0; k < kColumns; ++k) other[k] *= of_r[k];
      store_floats(other, a.gate_to, at);
      if (a.gate_sums) gate_sums.add(columns, 0, other);
    }
    if (!a.x_to.data) return;
    load_or(other, 1, columns, p.gate.data, at.in(p.gate));
#pragma unroll
    for (int k = 0; k < kColumns; ++k) of_r[k] *= other[k];
    columns.store(of_r, a.x_to.data, at.in(a.x_to));
  }

  MMKERN_FN void store_floats(const float (&v)[kColumns], const GridRows& to, const GridPlace& at) const {
    if (to.data) columns.store_floats(v, static_cast<float*>(to.data), at.in(to));
  }
};

template <class Access, int kHeld>
__global__ void __launch_bounds__(kMaxLanes, 1) adaptive_norm_backward(const AdaptiveNormBackwardArgs a) {
  MMKERN_DYNAMIC_SHARED(float, shared);  // [3, cols], where a lane holds two chunks
  const GridSizes& n = a.problem.sizes;
  Columns columns = Access::columns(n);
  columns.cols = n.cols;
  BackwardRows<Access, kHeld> rows(a, columns, shared);
  a.problem.runs.for_each_row(n, blockIdx.x, [&](GridPlace at) {
    columns.cols = at.active ? n.cols : 0;
    rows.run(at);
  });
  columns.cols = n.cols;
  rows.finish();
}

}  // namespace device
}  // namespace mmkern
