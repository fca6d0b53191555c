// One step of a denoising sampler on CUDA: mmkern/reference/diffusion.py. Everything is read once and written once;
// what is put together on the way stays in registers.
//
// Nothing is summed but for the standard deviations of a rescaled guidance, which kernels of their own find first. So a
// group of lanes takes a unit, which is a piece. What is not there is a null pointer, the same for all threads.
#pragma once

#include "random.cuh"
#include "samples.cuh"

namespace mmkern {
inline namespace device {

constexpr int kModelOutputs = 5, kMaxHistory = 4;

// ---- Problem; laid out alike in mmkern/backends/cuda_diffusion.py ----

// Rows of numbers: Column of mmkern/reference/diffusion.py, in its order, ...
struct Coefficients {
  float x0_sample, x0_output, x0_scale;
  float sample, output, x0, history[kMaxHistory], noise;
  float corrected_sample, corrected_x0, corrected_history[kMaxHistory];
  float known, known_noise;
};
// ... and the others of StepArguments.
struct Weights {
  struct {
    float everywhere, masked;
  } of[kModelOutputs];
};
struct Limits {
  float largest, scale;
};

// What the guided output is made of.
struct Guidance : SampleSizes {
  GridRows outputs[kModelOutputs];
  Dtype dtypes[kModelOutputs];
  Mask mask;
  OfSamples<Weights> weights;
};

// A unit, as a lane has it. Of one that is not there (`!at.active`) nothing may be read: its threads end.
template <class Access>
struct Unit : Piece<Access> {
  using Piece<Access>::at;
  using Piece<Access>::columns;
  using Piece<Access>::load;

  const Guidance& p;
  i64 sample;

  MMKERN_FN Unit(const Guidance& problem, i64 unit)
      : Piece<Access>(problem, unit), p(problem), sample(problem.sample(at)) {}

  // v += by x.
  MMKERN_FN void add(float (&v)[kColumns], float by, const GridRows& x) const {
    if (!x.data) return;
    float more[kColumns];
    load(more, x);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) v[k] = fma(by, more[k], v[k]);
  }

  // The outputs of the model, put together.
  MMKERN_FN void guide(float (&g)[kColumns]) const {
    float mask[kColumns] = {};
    if (p.mask.rows.data) p.mask.load(mask, columns, at);
    const Weights* const weights = p.weights.of(sample);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) g[k] = 0;
#pragma unroll
    for (int i = 0; i < kModelOutputs; ++i) {
      if (!p.outputs[i].data) continue;
      float output[kColumns];
      load(output, p.outputs[i], p.dtypes[i]);
      const float everywhere = weights ? weights->of[i].everywhere : 1, masked = weights ? weights->of[i].masked : 0;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) g[k] = fma(fma(mask[k], masked, everywhere), output[k], g[k]);
    }
  }
};

// ---- The step ----

struct DenoiseStepArgs {
  Guidance guidance;
  GridRows x, history[kMaxHistory], noise;
  Normals normals;  // noise of one's own, where there is a seed
  Mask keep;
  GridRows known, known_noise;
  OfSamples<float> factors;  // of the guided output
  OfSamples<Coefficients> coefficients;
  OfSamples<Limits> limits;
  GridRows next, x0, corrected;
};

// Within [-largest, largest]; NaN of either is kept.
MMKERN_FN float clipped(float x, float largest) {
  x = x >= -largest || x != x ? x : -largest;
  return x > largest ? largest : x;
}

MMKERN_FN void estimate_x0(float (&x0)[kColumns], const float (&x)[kColumns], const float (&g)[kColumns],
                           const Coefficients& by, const Limits* limits) {
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    x0[k] = fma(by.x0_output, g[k], x[k] * by.x0_sample) * by.x0_scale;
    if (limits) x0[k] = clipped(x0[k], limits->largest) * limits->scale;
  }
}

template <class Access>
MMKERN_FN void add_noise(float (&next)[kColumns], const Unit<Access>& unit, const DenoiseStepArgs& a, float by) {
  if (!a.normals.seed) return unit.add(next, by, a.noise);
  float drawn[kColumns];
  a.normals.draw(drawn, unit.columns, unit.at.row * unit.columns.cols);
#pragma unroll
  for (int k = 0; k < kColumns; ++k) next[k] = fma(by, drawn[k], next[k]);
}

template <class Access>
MMKERN_FN void put_known(float (&next)[kColumns], const Unit<Access>& unit, const DenoiseStepArgs& a,
                         const Coefficients& by) {
  if (!a.keep.rows.data) return;
  float keep[kColumns], known[kColumns] = {};
  a.keep.load(keep, unit.columns, unit.at);
  unit.add(known, by.known, a.known);
  unit.add(known, by.known_noise, a.known_noise);
#pragma unroll
  for (int k = 0; k < kColumns; ++k) next[k] = fma(keep[k], known[k] - next[k], next[k]);
}

template <class Access>
__global__ void __launch_bounds__(kPieceThreads) denoise_step(const DenoiseStepArgs a) {
  const Unit<Access> unit(a.guidance, group_of_grid(a.guidance.sizes));
  if (!unit.at.active) return;
  const Coefficients& by = *a.coefficients.of(unit.sample);
  float x[kColumns], g[kColumns], x0[kColumns], next[kColumns], corrected[kColumns];
  unit.load(x, a.x);
  unit.guide(g);
  const float* const factor = a.factors.of(unit.sample);
#pragma unroll
  for (int k = 0; k < kColumns; ++k) g[k] *= factor ? *factor : 1;
  estimate_x0(x0, x, g, by, a.limits.of(unit.sample));
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    next[k] = fma(by.x0, x0[k], fma(by.output, g[k], x[k] * by.sample));
    corrected[k] = fma(by.corrected_x0, x0[k], x[k] * by.corrected_sample);
  }
#pragma unroll
  for (int i = 0; i < kMaxHistory; ++i) {
    if (!a.history[i].data) continue;
    float past[kColumns];
    unit.load(past, a.history[i]);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      next[k] = fma(by.history[i], past[k], next[k]);
      corrected[k] = fma(by.corrected_history[i], past[k], corrected[k]);
    }
  }
  add_noise(next, unit, a, by.noise);
  put_known(next, unit, a, by);
  unit.store(next, a.next);
  if (a.x0.data) unit.store(x0, a.x0);
  if (a.corrected.data) unit.store(corrected, a.corrected);
}

}  // namespace device
}  // namespace mmkern
