// Norms of rows and their modulation on CUDA: what both directions share, and the forward. What they mean, and how the
// gradients follow: csrc/cpu/adaptive_norm.h.
//
// A group of lanes shares a row. Rows that share their modulators are a run of neighbours, and a block takes rows of
// one run, so that a lane forms the numbers of its columns once.
#pragma once

#include "device.cuh"

#include "access.cuh"

namespace mmkern {
inline namespace device {

// ---- Chunks of a row ----

// A lane holds kHeld chunks of a row in registers. Where that is 0, rows are longer: each pass over one reads it again,
// chunk by chunk, from a cache.
template <int kHeld>
constexpr int kSlots = kHeld > 0 ? kHeld : 1;

// f(slot) for each chunk, of which `columns` then speaks.
template <int kHeld, class F>
MMKERN_FN void for_each_chunk(Columns& columns, F f) {
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int slot = 0; slot < kHeld; ++slot) {
      columns.first = slot * columns.chunk();
      f(slot);
    }
  } else {
    for (columns.first = 0; columns.first < columns.cols; columns.first += columns.chunk()) f(0);
  }
}

// ---- Problem ----

// Laid out alike in mmkern/backends/cuda_modulation.py, as are the arguments of both kernels.
struct AdaptiveNormProblem {
  GridSizes sizes;
  GridRows x, residual;         // without a residual, x is r
  GridRows gate, scale, shift;  // float32, as all modulators; expanded over the rows that share one
  GridRows frame_scale;         // one number a row
  const float *weight, *bias;   // [cols]
  Runs runs;                    // of rows that share scale and shift, and in the backward the gate
  float eps;
  int centered, of_each_row;  // the latter: each row has its own scale and shift
};

// ---- Modulators ----

MMKERN_FN void load_or(float (&v)[kColumns], float otherwise, const Columns& columns, const void* data, i64 offset) {
  if (data) return columns.load_floats(v, static_cast<const float*>(data), offset);
#pragma unroll
  for (int k = 0; k < kColumns; ++k) v[k] = otherwise;
}

// y = f (n by + plus) with by = w (1 + s), plus = b (1 + s) + h.
MMKERN_FN void form_modulation(const AdaptiveNormProblem& p, const Columns& columns, const GridPlace& at,
                               float (&by)[kColumns], float (&plus)[kColumns]) {
  float scale[kColumns], bias[kColumns];
  load_or(by, 1, columns, p.weight, 0);
  load_or(scale, 0, columns, p.scale.data, at.in(p.scale));
  load_or(bias, 0, columns, p.bias, 0);
  load_or(plus, 0, columns, p.shift.data, at.in(p.shift));
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    by[k] *= 1 + scale[k];
    plus[k] = fma(bias[k], 1 + scale[k], plus[k]);
  }
}

MMKERN_FN float frame_scale(const AdaptiveNormProblem& p, const GridPlace& at) {
  return p.frame_scale.data && at.active ? at.number(p.frame_scale) : 1;
}

// ---- A row ----

// n = (r - mean) scale, and r = residual + gate x, or x.
template <int kHeld>
struct NormRow {
  const AdaptiveNormProblem& p;
  Columns& columns;
  float centred[kSlots<kHeld>][kColumns];  // r - mean; 0 outside the row
  float mean, scale;

  // also(slot, r) is called with each chunk while it is there.
  template <class F>
  MMKERN_FN void measure(const GridPlace& at, F also) {
    mean = 0;
    float total[1] = {0};
    for_each_chunk<kHeld>(columns, [&](int slot) {
      load(slot, at);
      also(slot, centred[slot]);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) total[0] += centred[slot][k];
    });
    if (p.centered) {
      sum_over_group(total, columns.lanes);
      mean = total[0] / float(p.sizes.cols);
    }
    float squares[1] = {0};
    for_each_chunk<kHeld>(columns, [&](int slot) {
      if constexpr (kHeld == 0) load(slot, at);
      centre(slot);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) squares[0] = fma(centred[slot][k], centred[slot][k], squares[0]);
    });
    sum_over_group(squares, columns.lanes);
    scale = 1 / sqrt(squares[0] / float(p.sizes.cols) + p.eps);
  }

  // Where a chunk is not held, it comes back.
  MMKERN_FN void bring(int slot, const GridPlace& at) {
    if constexpr (kHeld == 0) {
      load(slot, at);
      centre(slot);
    }
  }

  MMKERN_FN float normal(int slot, int k) const { return centred[slot][k] * scale; }

 private:
  MMKERN_FN void load(int slot, const GridPlace& at) {
    float (&r)[kColumns] = centred[slot];
    columns.load(r, p.x.data, at.in(p.x));
    if (!p.residual.data) return;
    float residual[kColumns], gate[kColumns];
    columns.load(residual, p.residual.data, at.in(p.residual));
    load_or(gate, 1, columns, p.gate.data, at.in(p.gate));
#pragma unroll
    for (int k = 0; k < kColumns; ++k) r[k] = fma(gate[k], r[k], residual[k]);
  }

  MMKERN_FN void centre(int slot) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) centred[slot][k] = columns.has(k) ? centred[slot][k] - mean : 0;
  }
};

// ---- Forward ----

struct AdaptiveNormArgs {
  AdaptiveNormProblem problem;
  GridRows out, total;  // the latter r, or null
};

template <class Access, int kHeld>
__global__ void __launch_bounds__(kMaxLanes, 1) adaptive_norm(const AdaptiveNormArgs a) {
  const AdaptiveNormProblem& p = a.problem;
  Columns columns = Access::columns(p.sizes);
  NormRow<kHeld> row{p, columns};
  float by[kSlots<kHeld>][kColumns], plus[kSlots<kHeld>][kColumns];
  bool formed = false;
  p.runs.for_each_row(p.sizes, blockIdx.x, [&](GridPlace at) {
    columns.cols = at.active ? p.sizes.cols : 0;
    row.measure(at, [&](int slot, const float (&r)[kColumns]) {
      if (a.total.data) columns.store(r, a.total.data, at.in(a.total));
      if (kHeld > 0 && !formed) form_modulation(p, columns, at, by[slot], plus[slot]);
    });
    formed = !p.of_each_row;
    const float f = frame_scale(p, at);
    for_each_chunk<kHeld>(columns, [&](int slot) {
      row.bring(slot, at);
      if constexpr (kHeld == 0) form_modulation(p, columns, at, by[slot], plus[slot]);
      float y[kColumns];
#pragma unroll
      for (int k = 0; k < kColumns; ++k) y[k] = f * fma(row.normal(slot, k), by[slot][k], plus[slot][k]);
      columns.store(y, a.out.data, at.in(a.out));
    });
  });
}

}  // namespace device
}  // namespace mmkern
