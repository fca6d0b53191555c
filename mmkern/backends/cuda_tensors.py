"""Tensors as the CUDA kernels see them: addresses, dtype codes, alignment."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from mmkern.backends.grid_rows import four_axes

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # csrc/call.h

COLUMNS = 8  # of a row in a thread's registers
MAX_LANES = 512
MAX_COLUMNS = 1 << 30  # counted in int
# csrc/cuda/access.cuh, where all rows begin and end at multiples of 16 bytes.
ACCESS = {torch.float32: "Float32Vectors", torch.bfloat16: "Bfloat16Vectors", torch.float16: "Float16Vectors"}
SCALAR = "Pf0q"  # of csrc/cuda/device.cuh in C's layout: pointer, value
# The structs of csrc/cuda/grid_rows.cuh.
GRID = "P3q"  # data, strides
SIZES = "q3i3i0q"  # rows; heads, length, cols; lanes, dtype, vectors


@functools.cache
def lanes_of(cols: int) -> int:
    """How many threads share a row."""
    if cols > MAX_COLUMNS:
        raise ValueError(f"rows of {cols} columns; the CUDA kernels take up to {MAX_COLUMNS}")
    return min(1 << (-(-max(cols, 1) // COLUMNS) - 1).bit_length(), MAX_LANES)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def fits_vectors(item_size: int, cols: int, strides: Sequence[int], addresses: Sequence[int]) -> bool:
    """Whether all rows begin and end at multiples of 16 bytes."""
    bits = cols * item_size
    for stride in strides:
        bits |= stride * item_size
    for pointer in addresses:
        bits |= pointer
    return not bits & 15


def scalar(value: float | Tensor) -> tuple[int, float]:
    return (value.data_ptr(), 0.0) if isinstance(value, Tensor) else (0, value)


def collapsed_stride(x: Tensor, axes: int) -> int | None:
    """The stride of the first ``axes`` axes walked as one, or None where they do not collapse."""
    found, expected = 0, None
    for size, stride in zip(x.shape[:axes][::-1], x.stride()[:axes][::-1], strict=True):
        if size == 1:
            continue
        if expected is None:
            found = stride
        elif stride != expected:
            return None
        expected = stride * size
    return found


def dense_rows(x: Tensor) -> tuple[Tensor, int]:
    """``x`` as rows with one stride between them; copied only if its layout has none."""
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.shape[-1] == 1 or x.stride(-1) == 1:
        stride = collapsed_stride(x, x.dim() - 1)
        if stride is not None:
            return x, stride
    return x.contiguous(), x.shape[-1]


# ---- Rows with a stride for each of batch, head and place: grid_rows.cuh ---------------------------------------------


def grid_entries(x: Tensor | None) -> tuple[int, ...]:
    """Of the struct of a tensor of rows; numbers have an axis more than they need."""
    return (0,) * 4 if x is None else (x.data_ptr(), *x.stride()[:3])


def grid_rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else four_axes(x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous())


def grids_fit_vectors(tensors: Sequence[Tensor | None]) -> bool:
    return all(
        fits_vectors(x.element_size(), x.shape[-1], x.stride()[:3], (x.data_ptr(),)) for x in tensors if x is not None
    )
