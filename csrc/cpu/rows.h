// A matrix seen as rows: where it starts, its size, and the distance between rows in elements.
#pragma once

#include <stdint.h>

#ifndef MMKERN_ISA
#define MMKERN_ISA baseline
#endif

namespace mmkern {
inline namespace MMKERN_ISA {

template <class S>
struct Rows {
  S* data;
  int64_t rows, cols, stride;

  S* operator[](int64_t r) const { return data + r * stride; }
  Rows part(int64_t first, int64_t n) const { return {data + first * stride, n, cols, stride}; }
};

// The transpose of a matrix: row r is what lies at data + r, data + r + stride, ...
template <class S>
struct Columns {
  S* data;
  int64_t rows, cols, stride;

  explicit Columns(const Rows<S>& of) : data(of.data), rows(of.cols), cols(of.rows), stride(of.stride) {}
};

}  // namespace MMKERN_ISA
}  // namespace mmkern
