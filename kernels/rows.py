"""The one row loop of the row-wise ops.

Such an op is inner products of a row's vectors (SUMS), a scalar function of them (SOLVE) and linear combinations of the
vectors with what it returns (OUTPUTS). Up to ``MAX_BLOCK`` columns a row stays in registers and is read once; a longer one is
read in column chunks, twice.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 4096
# Elements of a vector that a warp holds, 16 a thread. Up to here a row is one warp's, so that its scalar function is computed
# once; a longer row is shared by several warps, which all compute it. Short rows make smaller tiles: a thread that has parts
# of many rows holds the scalars of all of them.
_PER_WARP, _SHORT, _PER_WARP_SHORT = 512, 128, 128


@triton.jit
def _load(pointers, strides, inner, row, col, mask):
    """One float32 tile of each vector; ``row`` counts ``inner`` fastest."""
    tiles = ()
    for i in tl.static_range(len(pointers)):
        offset = (row // inner) * strides[i][0] + (row % inner) * strides[i][1]
        tile = tl.load(pointers[i] + offset[:, None] + col[None, :], mask, 0.0).to(tl.float32)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _load_scalars(pointers, strides, inner, row, mask):
    values = ()
    for i in tl.static_range(len(pointers)):
        offset = (row // inner) * strides[i][0] + (row % inner) * strides[i][1]
        values = values + (tl.load(pointers[i] + offset, mask, 0.0).to(tl.float32),)
    return values


@triton.jit
def _store(pointers, offset, values, mask):
    for i in tl.static_range(len(pointers)):
        if pointers[i] is not None:
            tl.store(pointers[i] + offset, values[i].to(pointers[i].dtype.element_ty), mask)


@triton.jit
def _add(a, b):
    total = ()
    for i in tl.static_range(len(a)):
        total = total + (a[i] + b[i],)
    return total


@triton.jit
def scalar(value):
    """A float, or what a pointer points to, in float32 (torch.compile passes Python floats as float64)."""
    x = value
    if x.dtype.is_ptr():
        x = tl.load(x)
    return x.to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def row_kernel(
    vectors,  # tuple of [rows, cols]
    vector_strides,  # tuple of (outer, inner)
    scalars,  # tuple of [rows]
    scalar_strides,  # tuple of (outer, inner)
    outputs,  # tuple of contiguous [rows, cols]; None is not wanted
    scalar_outputs,  # tuple of contiguous [rows]; None is not wanted
    curvature,  # float, or pointer to one
    option,  # float
    rows,
    inner,
    cols,
    FUNCTION: tl.constexpr,
    SUMS: tl.constexpr,
    SOLVE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
):
    """One program takes BLOCK_ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK)
    row_mask = row < rows
    mask = row_mask[:, None] & (col < cols)[None, :]
    c = scalar(curvature)

    tiles = _load(vectors, vector_strides, inner, row, col, mask)
    sums = SUMS(tiles)
    if not ONE_CHUNK:
        for start in range(BLOCK, cols, BLOCK):
            mask = row_mask[:, None] & (start + col < cols)[None, :]
            sums = _add(sums, SUMS(_load(vectors, vector_strides, inner, row, start + col, mask)))

    row_values = _load_scalars(scalars, scalar_strides, inner, row, row_mask)
    coefficients, results = SOLVE(FUNCTION, sums, row_values, c, scalar(option))
    _store(scalar_outputs, row, results, row_mask)

    if len(outputs) > 0:
        offset = row[:, None] * cols + col[None, :]
        if ONE_CHUNK:
            _store(outputs, offset, OUTPUTS(tiles, coefficients), mask)
        else:
            for start in range(0, cols, BLOCK):
                mask = row_mask[:, None] & (start + col < cols)[None, :]
                tiles = _load(vectors, vector_strides, inner, row, start + col, mask)
                _store(outputs, offset + start, OUTPUTS(tiles, coefficients), mask)


@dataclass(frozen=True)
class Flavour:
    """What the ops of one kind share: which inner products they take and how they combine the vectors."""

    sums: Any
    outputs: Any = None


@dataclass(frozen=True)
class Blocks:
    """How a row of ``cols`` columns is cut: fixed by ``cols`` alone."""

    rows: int
    cols: int
    one_chunk: bool
    warps: int

    @classmethod
    def of(cls, cols: int) -> Blocks:
        block = min(triton.next_power_of_2(cols), MAX_BLOCK)
        tile = max(block, _PER_WARP_SHORT if block < _SHORT else _PER_WARP)
        return cls(tile // block, block, cols <= block, max(tile // _PER_WARP, 1))


def launch(
    flavour: Flavour,
    solve: Any,
    vectors: Sequence[Tensor],
    outputs: Sequence[Tensor | None],
    curvature: float | Tensor,
    *,
    function: Any = None,
    scalars: Sequence[Tensor] = (),
    scalar_outputs: Sequence[Tensor | None] = (),
    option: float = 0.0,
) -> None:
    """Run ``row_kernel`` over vectors ``[..., D]`` and scalars ``[...]`` of any leading strides."""
    cols = vectors[0].shape[-1]
    leading = vectors[0].shape[:-1]
    vectors, scalars, inner, strides = collapse([unit_stride(v) for v in vectors], scalars, leading)
    blocks = Blocks.of(cols)
    rows = prod(leading)
    with torch.cuda.device_of(vectors[0]):
        row_kernel[(triton.cdiv(rows, blocks.rows),)](
            tuple(vectors),
            tuple(strides[: len(vectors)]),
            tuple(scalars),
            tuple(strides[len(vectors) :]),
            tuple(outputs),
            tuple(scalar_outputs),
            curvature if isinstance(curvature, Tensor) else float(curvature),
            float(option),
            rows,
            inner,
            cols,
            FUNCTION=function,
            SUMS=flavour.sums,
            SOLVE=solve,
            OUTPUTS=flavour.outputs,
            BLOCK_ROWS=blocks.rows,
            BLOCK=blocks.cols,
            ONE_CHUNK=blocks.one_chunk,
            num_warps=blocks.warps,
            enable_fp_fusion=False,  # what the interpreter computed is what a device computes
        )


def unit_stride(x: Tensor) -> Tensor:
    """``x`` with a last axis that may be read in one piece (gradients arrive as expanded views)."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def collapse(
    vectors: Sequence[Tensor], scalars: Sequence[Tensor], leading: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], int, list[tuple[int, int]]]:
    """View the leading axes of all tensors as ``[outer, inner]``, one stride each; tensors that resist are copied.

    Returns the vectors, the scalars, ``inner`` and (outer, inner) strides of vectors, then scalars. Two axes cover transposed and
    broadcast inputs without a copy.
    """
    tensors = [*vectors, *scalars]
    axes = len(leading)
    for split in range(axes, -1, -1):
        strides = [_collapsed(leading, t.stride(), split) for t in tensors]
        if all(s is not None for s in strides):
            break
    else:
        split = axes
        tensors = [
            t if _collapsed(leading, t.stride(), axes) is not None else t.clone(memory_format=torch.contiguous_format)
            for t in tensors
        ]
        strides = [_collapsed(leading, t.stride(), axes) for t in tensors]
    pairs = [s for s in strides if s is not None]
    return tensors[: len(vectors)], tensors[len(vectors) :], prod(leading[split:]), pairs


def _collapsed(leading: Sequence[int], strides: Sequence[int], split: int) -> tuple[int, int] | None:
    outer = merged_stride(leading[:split], strides[:split])
    inner = merged_stride(leading[split:], strides[split : len(leading)])
    return None if outer is None or inner is None else (outer, inner)


def merged_stride(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The stride of these axes taken as one, or None where there is none."""
    total, step = 1, 0
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if total == 1:
            step = stride
        elif stride != step * total:
            return None
        total *= size
    return step
