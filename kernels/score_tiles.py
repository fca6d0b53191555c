"""Tiles of S = X Yᵀ, and products with a matrix of weights: what the all-pairs ops are made of.

float32 tiles are IEEE (TF32 would break the numerics contract), 16-bit tiles use the matrix instructions of their type.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

# All that a thread can have: left to itself ptxas spills a few to halve the registers, or where it has them, to load
# more ahead of a float32 product. AMD's compiler knows no such option.
ALL_REGISTERS = {} if torch.version.hip else {"maxnreg": 255}


@dataclass(frozen=True)
class Tiling:
    """Tile sides, fixed by the matrix's sides and the storage type alone."""

    rows: int
    columns: int
    depth: int
    warps: int

    @classmethod
    def of(cls, rows: int, columns: int, dtype: torch.dtype, *, is_copied: bool, is_heavy: bool = False) -> Tiling:
        """``is_copied``: see ``are_copied``. ``is_heavy``: for functions of a score that hold many numbers beside it."""
        # 32 elements a thread, 16 beside the registers of a float32 product: with more the functions of a score spill.
        if dtype.itemsize == 2:
            tall, wide, per_warp = (64, 64, 512) if is_heavy else (128, 64, 1024)
            depth = 64 if is_copied else 32
        else:
            tall, wide, depth, per_warp = (64, 32 if is_heavy else 64, 32, 512)
        i, j = _side(rows, tall), _side(columns, wide)
        return cls(i, j, depth, max(i * j // per_warp, 1))

    @classmethod
    def large(cls, rows: int, columns: int, dtype: torch.dtype, widest: int, *, is_copied: bool) -> Tiling:
        """For functions of a score that hold few numbers beside it."""
        if dtype.itemsize == 4:
            tiling = cls.of(rows, columns, dtype, is_copied=is_copied)
            return replace(tiling, depth=16, warps=max(tiling.warps, 4))
        # No side below 64, which is what sm_90's matrix instructions take.
        widest, depth = (widest, 64) if is_copied else (64, 32)
        i, j = _side(max(rows, 64), 128), _side(max(columns, 64), widest)
        return cls(i, j, depth, max(i // 16, 1))

    @property
    def T(self) -> Tiling:  # noqa: N802
        return Tiling(self.columns, self.rows, self.depth, self.warps)

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        return triton.cdiv(rows, self.rows), triton.cdiv(columns, self.columns)


def are_copied(*matrices: Tensor) -> bool:
    """Whether their rows are copied by 16 bytes; else they go through registers. Triton knows multiples of 16."""
    return all((x.stride(0) | x.shape[1]) % 16 == 0 for x in matrices)


def _side(size: int, largest: int) -> int:
    return min(max(int(triton.next_power_of_2(size)), 16), largest)


@triton.jit
def tile_position(TILES_TALL: tl.constexpr, tiles_i, tiles_j):
    """This program's tile; neighbours share rows of Y in the cache."""
    program = tl.program_id(0)
    group = program // (TILES_TALL * tiles_j)
    first = group * TILES_TALL
    tall = tl.minimum(tiles_i - first, TILES_TALL)
    within = program % (TILES_TALL * tiles_j)
    return (first + within % tall).to(tl.int64), (within // tall).to(tl.int64)


@triton.jit
def score_tile(x, y, x_stride, y_stride, i, j, rows, columns, depth, BLOCK_K: tl.constexpr):
    """``x_i · y_j`` in float32."""
    score = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    k = tl.arange(0, BLOCK_K)
    x_tile = x + i[:, None] * x_stride + k[None, :]
    y_tile = y + j[None, :] * y_stride + k[:, None]
    for start in range(0, depth, BLOCK_K):
        inside = start + k < depth
        a = tl.load(x_tile + start, (i < rows)[:, None] & inside[None, :], 0.0)
        b = tl.load(y_tile + start, (j < columns)[None, :] & inside[:, None], 0.0)
        score = tl.dot(a, b, score, input_precision="ieee")
    return score


@triton.jit
def squared_difference_tile(x, y, x_stride, y_stride, i, j, rows, columns, depth):
    """``|x_i - y_j|²`` from the differences themselves, for pairs whose scores would cancel."""
    total = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for k in range(0, depth):
        a = tl.load(x + i * x_stride + k, i < rows, 0.0).to(tl.float32)
        b = tl.load(y + j * y_stride + k, j < columns, 0.0).to(tl.float32)
        difference = a[:, None] - b[None, :]
        total = tl.fma(difference, difference, total)
    return total


@triton.jit
def rounded_to_tf32(weight):
    """The weight that a TF32 product multiplies."""
    bits = (weight.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(tl.abs(weight) < 1e38, bits.to(tl.float32, bitcast=True), weight)


@triton.jit
def product_kernel(
    weights,  # [rows, columns]
    y,  # [columns, depth]
    x,  # [rows, depth]
    share,  # [rows], float32; or None
    near,  # [rows / NEAR_ROWS, columns / NEAR_COLUMNS]: tiles of weights to be taken with differences; or None
    out,  # [rows, depth], contiguous
    row_places,  # [rows], int64: in out, of as many as count says; or None
    column_places,  # [columns], int64: in y, of as many as count says; or None
    count,  # one int32; None without places
    weights_row_stride,
    weights_column_stride,
    y_stride,
    x_stride,
    near_row_stride,
    near_column_stride,
    rows,
    columns,
    depth,
    IS_EXACT: tl.constexpr,
    ADDS: tl.constexpr,
    NEAR_ROWS: tl.constexpr,
    NEAR_COLUMNS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """``out_i = Σ_j w_ij y_j + share_i x_i``, with ``w_ij (y_j - x_i)`` in the near tiles; ADDS: added to out."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if row_places is not None:
        rows = tl.load(count)
        if tl.program_id(0) * BLOCK_I >= rows:
            return
    if column_places is not None:
        columns = tl.load(count)
    row_mask, mask_d = i < rows, d < depth
    near_row = near
    if near is not None:
        near_row = near + tl.program_id(0) * BLOCK_I // NEAR_ROWS * near_row_stride

    total = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    for start in range(0, columns, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J).to(tl.int64)
        mask = row_mask[:, None] & (j < columns)[None, :]
        if near is not None:
            mask = mask & (tl.load(near_row + start // NEAR_COLUMNS * near_column_stride) == 0)
        w = tl.load(weights + i[:, None] * weights_row_stride + j[None, :] * weights_column_stride, mask, 0.0)
        row_of_y = j
        if column_places is not None:
            row_of_y = tl.load(column_places + j, j < columns, 0)
        b = tl.load(y + row_of_y[:, None] * y_stride + d[None, :], (j < columns)[:, None] & mask_d[None, :], 0.0)
        if w.dtype == b.dtype and b.dtype == tl.float32:
            total += tl.dot(w, b, input_precision="ieee")  # in parts: one long sum loses digits
        elif w.dtype == b.dtype:
            total = tl.dot(w, b, total, input_precision="ieee")
        else:  # 16-bit points and rounded weights are exact in TF32
            b = b.to(tl.float32)
            if IS_EXACT:
                rounded = rounded_to_tf32(w)
                total = tl.dot(rounded_to_tf32(w - rounded), b, total, input_precision="tf32")
                w = rounded
            total = tl.dot(w, b, total, input_precision="tf32")

    mask = row_mask[:, None] & mask_d[None, :]
    if share is not None:
        tile = tl.load(x + i[:, None] * x_stride + d[None, :], mask, 0.0).to(tl.float32)
    if near is not None:
        for start in range(0, columns, BLOCK_J):
            if tl.load(near_row + start // NEAR_COLUMNS * near_column_stride) != 0:
                for column in range(start, tl.minimum(start + BLOCK_J, columns)):
                    j = tl.full([1], column, tl.int64)
                    w = tl.load(weights + i * weights_row_stride + j * weights_column_stride, row_mask, 0.0)
                    b = tl.load(y + j * y_stride + d, mask_d, 0.0).to(tl.float32)
                    total += w.to(tl.float32)[:, None] * (b[None, :] - tile)
    if share is not None:
        total += tl.load(share + i, row_mask, 0.0)[:, None] * tile
    row_of_out = i
    if row_places is not None:
        row_of_out = tl.load(row_places + i, row_mask, 0)
    at_out = out + row_of_out[:, None] * depth + d[None, :]
    if ADDS:
        total += tl.load(at_out, mask, 0.0)
    tl.store(at_out, total.to(out.dtype.element_ty), mask)


@dataclass(frozen=True)
class Chosen:
    """Some rows of a matrix, the first ``count`` of ``places``: the device alone knows how many."""

    places: Tensor
    count: Tensor

    @classmethod
    def of(cls, is_left_out: Tensor) -> Chosen:
        """The rows that are not left out, in their order; ``places`` has the others behind them."""
        places = is_left_out.to(torch.uint8).argsort(stable=True)
        return cls(places, (~is_left_out).sum(dtype=torch.int32))


@dataclass(frozen=True)
class Weights:
    """``[rows, columns]`` weights and where their products need differences; ``.T`` is the other operand's view.

    Those in float32 of 16-bit points are numbers of TF32, unless ``is_exact``. Of ``rows`` or ``columns`` that are chosen
    others are not read.
    """

    values: Tensor
    near: Tensor | None
    tiling: Tiling
    is_exact: bool = False
    rows: Chosen | None = None
    columns: Chosen | None = None

    @property
    def T(self) -> Weights:  # noqa: N802
        near = None if self.near is None else self.near.T
        return replace(
            self, values=self.values.T, near=near, tiling=self.tiling.T, rows=self.columns, columns=self.rows
        )


def launch_product(
    weights: Weights, y: Tensor, x: Tensor, share: Tensor | None, out: Tensor, *, adds: bool = False
) -> None:
    """Run ``product_kernel``; ``x`` and ``y`` have unit stride along the last axis. ``adds``: to a float32 ``out``.

    Rows of ``out`` that are not chosen stay as they are.
    """
    rows, columns = weights.values.shape
    depth = x.shape[1]
    tiling = weights.tiling
    block_d = _side(depth, 128 if weights.values.element_size() == 2 and are_copied(x, y) else 64)
    # Of a float32 product a thread holds parts of both operands: with more of them it spills.
    block_j, per_warp = (64, 1024) if x.dtype.itemsize == 2 else (16, 512)
    near, chosen = weights.near, weights.rows or weights.columns
    product_kernel[(triton.cdiv(rows, tiling.rows), triton.cdiv(depth, block_d))](
        weights.values,
        y,
        x,
        share,
        near,
        out,
        weights.rows and weights.rows.places,
        weights.columns and weights.columns.places,
        chosen and chosen.count,
        *weights.values.stride(),
        y.stride(0),
        x.stride(0),
        *((0, 0) if near is None else near.stride()),
        rows,
        columns,
        depth,
        IS_EXACT=weights.is_exact,
        ADDS=adds,
        NEAR_ROWS=tiling.rows,
        NEAR_COLUMNS=tiling.columns,
        BLOCK_I=tiling.rows,
        BLOCK_D=block_d,
        BLOCK_J=min(tiling.columns, block_j),
        num_warps=min(max(tiling.rows * block_d // per_warp, 1), 8),
        enable_fp_fusion=False,
        **(ALL_REGISTERS if weights.is_exact or chosen else {}),
    )
