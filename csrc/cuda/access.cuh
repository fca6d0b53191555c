// In which accesses a lane reads and writes its columns: a kernel's first template argument. Names as in
// mmkern/backends/cuda_tensors.py.
#pragma once

#include "grid_rows.cuh"
#include "lanes.cuh"

namespace mmkern {
inline namespace device {

// In 16-byte accesses the type is known when the kernel is compiled: to find out between two loads would keep the
// second from starting before the first has come.
template <Dtype kDtype>
struct InVectors {
  static constexpr bool vectors = true, alike = true;
  static MMKERN_FN Columns columns(const GridSizes& n) {
    return {0, 0, int(threadIdx.x) % n.lanes, n.lanes, vectors, kDtype};
  }
};
struct Float32Vectors : InVectors<kFloat32> {};
struct Bfloat16Vectors : InVectors<kBfloat16> {};
struct Float16Vectors : InVectors<kFloat16> {};
// Where not all tensors are of one type (not alike), and some are of 16 bits: a lane has eight neighbours of each.
struct EightNeighbours : InVectors<kBfloat16> {
  static constexpr bool alike = false;
};
struct OneByOne {
  static constexpr bool vectors = false, alike = false;
  static MMKERN_FN Columns columns(const GridSizes& n) {
    return {0, 0, int(threadIdx.x) % n.lanes, n.lanes, vectors, n.dtype};
  }
};

}  // namespace device
}  // namespace mmkern
