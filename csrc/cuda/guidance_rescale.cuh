// How far the guided output of each sample goes to the standard deviation of output 1, before the step is taken. Blocks
// measure parts of samples, in two passes of which the second reads from a cache; then a thread for each sample puts
// its parts together, in their order.
#pragma once

#include "denoise_step.cuh"

namespace mmkern {
inline namespace device {

// Count, mean and sum of the squared distances to it.
struct Moments {
  float n, mean, squares;

  // Chan et al. 1983.
  MMKERN_FN void add(const Moments& more) {
    const float all = n + more.n, share = more.n / all, distance = more.mean - mean;
    mean = fma(distance, share, mean);
    squares += fma(distance * distance, n * share, more.squares);
    n = all;
  }
};

// Of the guided output, and of output 1.
struct OutputMoments {
  Moments of[2];
};

struct MeasureArgs {
  Guidance guidance;
  OutputMoments* found;  // [samples, parts]
  SampleParts parts;
};

// f(outputs, has) for each unit of this block's part that this thread's group takes, by all threads together.
template <class Access, class F>
MMKERN_FN void for_each_unit(const MeasureArgs& a, F f) {
  a.parts.for_each_unit(a.guidance.sizes.lanes, [&](i64 i) {
    const Unit<Access> unit(a.guidance, i);
    float outputs[2][kColumns];
    unit.guide(outputs[0]);
    unit.load(outputs[1], a.guidance.outputs[1], a.guidance.dtypes[1]);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      if (unit.columns.has(k)) f(outputs[0][k], outputs[1][k]);
    }
  });
}

// Six blocks a multiprocessor: left to itself, ptxas has room for more of them on sm_100 and spills.
template <class Access>
__global__ void __launch_bounds__(kPieceThreads, 6) measure_outputs(const MeasureArgs a) {
  float n = 0, sums[2] = {}, squares[2] = {};
  for_each_unit<Access>(a, [&](float guided, float output) {
    n += 1;
    sums[0] += guided;
    sums[1] += output;
  });
  n = sum_over_block(n);
  const float means[2] = {sum_over_block(sums[0]) / n, sum_over_block(sums[1]) / n};
  for_each_unit<Access>(a, [&](float guided, float output) {
    squares[0] = fma(guided - means[0], guided - means[0], squares[0]);
    squares[1] = fma(output - means[1], output - means[1], squares[1]);
  });
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float total = sum_over_block(squares[i]);
    if (threadIdx.x == 0) a.found[blockIdx.x].of[i] = {n, means[i], total};
  }
}

struct FactorArgs {
  const OutputMoments* found;  // [samples, parts]
  OfSamples<float> rescale;    // how far each sample goes
  float* factors;              // [samples]
  i64 samples, parts;
};

__global__ void __launch_bounds__(kPieceThreads) find_factors(const FactorArgs a) {
  const i64 sample = i64(blockIdx.x) * blockDim.x + threadIdx.x;
  if (sample >= a.samples) return;
  const OutputMoments* const found = a.found + sample * a.parts;
  OutputMoments all = found[0];
  for (i64 part = 1; part < a.parts; ++part) {
#pragma unroll
    for (int i = 0; i < 2; ++i) all.of[i].add(found[part].of[i]);
  }
  a.factors[sample] = fma(*a.rescale.of(sample), sqrtf(all.of[1].squares / all.of[0].squares) - 1, 1);
}

}  // namespace device
}  // namespace mmkern
