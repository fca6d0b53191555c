// Kernels that make each element of their results from what is in its place in other tensors: a group of lanes takes a
// piece, a chunk of a row. Where all tensors are dense there is one row, of any length.
#pragma once

#include "access.cuh"

namespace mmkern {
inline namespace device {

constexpr int kPieceThreads = 128;

// Laid out alike in mmkern/backends/cuda_pieces.py.
struct PieceSizes {
  GridSizes sizes;  // dtype: that of the first tensor, and of all where access is alike
  i64 pieces;       // of a row
};

// Which of the grid's groups this thread is in: the piece that it takes, where each takes one.
MMKERN_FN i64 group_of_grid(const GridSizes& n) { return (i64(blockIdx.x) * blockDim.x + threadIdx.x) / n.lanes; }

// A piece, as a lane has it. Of a row that is not there (`!at.active`) it has no columns, and reads zeros.
template <class Access>
struct Piece {
  GridPlace at;
  Columns columns;
  Dtype dtype;

  MMKERN_FN Piece(const PieceSizes& n, const GridPlace& place, i64 piece)
      : at(place), columns(Access::columns(n.sizes)), dtype(n.sizes.dtype) {
    columns.first = int(piece) * columns.chunk();
    columns.cols = at.active ? n.sizes.cols : 0;
  }
  // The i-th of all, row by row.
  MMKERN_FN Piece(const PieceSizes& n, i64 i)
      : Piece(n, GridPlace(n.sizes, i / n.pieces, n.sizes.rows), i % n.pieces) {}

  MMKERN_FN void load(float (&v)[kColumns], const GridRows& x, Dtype given) const {
    if constexpr (Access::alike)
      columns.load(v, x.data, at.in(x));
    else
      columns.load_as(given, v, x.data, at.in(x));
  }
  MMKERN_FN void load(float (&v)[kColumns], const GridRows& x) const { load(v, x, dtype); }

  MMKERN_FN void store(const float (&v)[kColumns], const GridRows& x, Dtype given) const {
    if constexpr (Access::alike)
      columns.store(v, x.data, at.in(x));
    else
      columns.store_as(given, v, x.data, at.in(x));
  }
  MMKERN_FN void store(const float (&v)[kColumns], const GridRows& x) const { store(v, x, dtype); }
};

}  // namespace device
}  // namespace mmkern
