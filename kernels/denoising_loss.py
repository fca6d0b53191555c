"""The squared error of each sample, and its gradient: ``NAME(*inputs, *outputs)``.

A program adds up tiles of one sample; what the programs of a sample leave is added up in its order.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from mmkern.kernels.elements import Grid, Layout, load, store, tile_of
from torch import Tensor


class Problem(NamedTuple):
    pred: Grid
    target: Grid
    mask: Grid | None


@triton.jit
def _difference(problem, tile):
    """Also times the mask."""
    d = load(problem.pred, tile) - load(problem.target, tile)
    masked = d
    if problem.mask is not None:
        masked = load(problem.mask, tile) * d
    return d, masked


@triton.jit
def _tile(sample, number, rows, axes, cols, tiles_of_row, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = number // tiles_of_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return tile_of(sample, row, rows, number % tiles_of_row * BLOCK, axes, cols, BLOCK)


@triton.jit(do_not_specialize=["rows", "cols", "tiles", "tiles_of_row", "parts", "tiles_of_part"])
def sums_kernel(
    problem,
    sums,  # [samples, parts]
    rows,
    axes,
    cols,  # in units
    tiles,
    tiles_of_row,
    parts,
    tiles_of_part,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program takes ``tiles_of_part`` of the ``tiles`` of a sample."""
    program = tl.program_id(0).to(tl.int64)
    first = program % parts * tiles_of_part
    total = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    for number in range(first, tl.minimum(first + tiles_of_part, tiles)):
        tile = _tile(program // parts, number, rows, axes, cols * UNIT, tiles_of_row, BLOCK_ROWS, BLOCK)
        d, masked = _difference(problem, tile)
        # Outside d is 0, but a mask that is broadcast may be infinite there.
        total += tl.where(tile.is_row & tile.is_col, masked * d, 0.0)
    tl.store(sums + program, tl.sum(tl.sum(total, 1), 0))


@triton.jit(do_not_specialize=["rows", "cols", "tiles", "tiles_of_row"])
def gradients_kernel(
    problem,
    grad,  # [samples]
    to_pred,  # None is not wanted
    to_target,
    rows,
    axes,
    cols,  # in units
    tiles,
    tiles_of_row,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program takes a tile."""
    program = tl.program_id(0).to(tl.int64)
    tile = _tile(program // tiles, program % tiles, rows, axes, cols * UNIT, tiles_of_row, BLOCK_ROWS, BLOCK)
    _, masked = _difference(problem, tile)
    gradient = 2 * tl.load(grad + tile.sample) * masked
    store(to_pred, tile, gradient)
    store(to_target, tile, -gradient)


# ---- Launchers -------------------------------------------------------------------------------------------------------

_TILE = 1024  # elements
_PROGRAMS = 1024  # that add up, unless there are more samples
_WARPS = 4  # 8 elements a thread: 16 bytes of bfloat16


@dataclass(frozen=True)
class _Call:
    layout: Layout
    problem: Problem
    tiles: int  # of a sample
    shape: tuple[Any, ...]
    options: dict[str, Any]

    @classmethod
    def of(cls, pred: Tensor, target: Tensor, mask: Tensor | None, *gradients: Tensor | None) -> _Call:
        layout = Layout.of(pred, [target, mask, *gradients], in_samples=pred.dim() > 1)
        block_rows, block = layout.block(_TILE)
        tiles_of_row = triton.cdiv(layout.cols, block)
        tiles = triton.cdiv(layout.rows, block_rows) * tiles_of_row
        shape = layout.rows, layout.row_axes, layout.cols // layout.unit, tiles, tiles_of_row
        options = {"UNIT": layout.unit, "BLOCK_ROWS": block_rows, "BLOCK": block}
        options |= {"num_warps": _WARPS, "enable_fp_fusion": False}
        return cls(layout, Problem(*layout.places((pred, target, mask))), tiles, shape, options)


def masked_squared_error(pred: Tensor, target: Tensor, mask: Tensor | None, out: Tensor) -> None:
    """``out``: a number each sample."""
    if pred.numel() == 0:
        out.zero_()
        return
    call = _Call.of(pred, target, mask)
    tiles_of_part = triton.cdiv(call.tiles, triton.cdiv(_PROGRAMS, len(out)))
    parts = triton.cdiv(call.tiles, tiles_of_part)
    sums = out if parts == 1 else out.new_empty((len(out), parts))
    with torch.cuda.device_of(pred):
        sums_kernel[(len(out) * parts,)](call.problem, sums, *call.shape, parts, tiles_of_part, **call.options)
    if parts > 1:
        torch.sum(sums, 1, out=out)


def masked_squared_error_backward(
    grad: Tensor, pred: Tensor, target: Tensor, mask: Tensor | None, dpred: Tensor | None, dtarget: Tensor | None
) -> None:
    """None is not wanted."""
    if pred.numel() == 0:
        return
    call = _Call.of(pred, target, mask, dpred, dtarget)
    to = call.layout.places((dpred, dtarget))
    with torch.cuda.device_of(pred):
        gradients_kernel[(len(grad) * call.tiles,)](call.problem, grad.contiguous(), *to, *call.shape, **call.options)
