// The hyperbolic family on CUDA, and the list of its kernels. The bindings (nvcc) and the test harness (g++) make a
// table of the list, NVRTC is asked for the names one by one: a kernel's name is the C++ expression. Each kernel takes
// one struct by value. Who launches what, with which grid: mmkern/backends/cuda.py, once for all three compilers.
#pragma once

#include "hyperbolic_centroid.cuh"
#include "hyperbolic_pairwise.cuh"
#include "hyperbolic_rows.cuh"
#include "pairwise_product.cuh"
#include "sum_partials.cuh"

#define MMKERN_ROW_KERNELS(KERNEL, ...) KERNEL(rows<__VA_ARGS__::Forward>) KERNEL(rows<__VA_ARGS__::Backward>)
#define MMKERN_PAIRWISE_KERNELS(KERNEL, ...) KERNEL(pairwise<__VA_ARGS__>) KERNEL(pairwise_weights<__VA_ARGS__>)

#define MMKERN_HYPERBOLIC_KERNELS(KERNEL)                                                                              \
  MMKERN_ROW_KERNELS(KERNEL, Radial<LorentzExpMap0>)                                                                   \
  MMKERN_ROW_KERNELS(KERNEL, Radial<LorentzLogMap0>)                                                                   \
  MMKERN_ROW_KERNELS(KERNEL, Radial<PoincareExpMap0>)                                                                  \
  MMKERN_ROW_KERNELS(KERNEL, Radial<PoincareLogMap0>)                                                                  \
  MMKERN_ROW_KERNELS(KERNEL, Radial<LorentzToPoincare>)                                                                \
  MMKERN_ROW_KERNELS(KERNEL, Radial<PoincareToLorentz>)                                                                \
  MMKERN_ROW_KERNELS(KERNEL, Radial<MobiusScalarMul>)                                                                  \
  MMKERN_ROW_KERNELS(KERNEL, PointScalar<LorentzHalfAperture>)                                                         \
  MMKERN_ROW_KERNELS(KERNEL, PairMap<LorentzExpMap, Combined>)                                                         \
  MMKERN_ROW_KERNELS(KERNEL, PairMap<LorentzLogMap, Compared>)                                                         \
  MMKERN_ROW_KERNELS(KERNEL, PairMap<MobiusAdd, Combined>)                                                             \
  MMKERN_ROW_KERNELS(KERNEL, PairMap<PoincareExpMap, Combined>)                                                        \
  MMKERN_ROW_KERNELS(KERNEL, PairMap<PoincareLogMap, Compared>)                                                        \
  MMKERN_ROW_KERNELS(KERNEL, PairScalar<LorentzDistance>)                                                              \
  MMKERN_ROW_KERNELS(KERNEL, PairScalar<PoincareDistance>)                                                             \
  MMKERN_ROW_KERNELS(KERNEL, PairScalar<LorentzExteriorAngle>)                                                         \
  MMKERN_ROW_KERNELS(KERNEL, PairScalar<LorentzEntailmentLoss>)                                                        \
  MMKERN_ROW_KERNELS(KERNEL, Transport<LorentzParallelTransport>)                                                      \
  KERNEL(centroid)                                                                                                     \
  KERNEL(centroid_backward)                                                                                            \
  MMKERN_PAIRWISE_KERNELS(KERNEL, LorentzPairwiseInner)                                                                \
  MMKERN_PAIRWISE_KERNELS(KERNEL, LorentzPairwiseDistance)                                                             \
  MMKERN_PAIRWISE_KERNELS(KERNEL, PoincarePairwiseDistance)                                                            \
  KERNEL(pairwise_product)                                                                                             \
  KERNEL(sum_partials)
