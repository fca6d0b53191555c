"""Launchers of the modulation family: ``NAME(*inputs, *options, *outputs)`` and its ``NAME_backward``; here those of
the norms, whose activations are in ``gated.py``.

A row stays in registers, so that it is read once. In the backward a program takes neighbouring rows that share their
modulators, and leaves one sum of each column; a few small sums of these are the gradients of what rows share.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from mmkern.kernels.attention_rows import rows_at, store_tile
from mmkern.kernels.attention_tiles import Strided
from mmkern.kernels.gated import (
    affine_activation,
    affine_activation_backward,
    gated_activation,
    gated_activation_backward,
)
from mmkern.kernels.group_norm import group_norm_act, group_norm_act_backward
from mmkern.kernels.rows import scalar, unit_stride
from mmkern.kernels.scalar_math import div, sqrt
from torch import Tensor

from mmkern.backends.grid_rows import four_axes, sizes, written
from mmkern.backends.modulation_sums import PartialSums, Sharing

__all__ = [
    "ada_layer_norm",
    "ada_layer_norm_backward",
    "affine_activation",
    "affine_activation_backward",
    "gated_activation",
    "gated_activation_backward",
    "group_norm_act",
    "group_norm_act_backward",
    "residual_ada_layer_norm",
    "residual_ada_layer_norm_backward",
]


class Problem(NamedTuple):
    """What both kernels read; what is None is compiled away."""

    x: Strided
    residual: Strided | None
    gate: Strided | None
    weight: Any  # [C], float32
    bias: Any
    scale: Strided | None
    shift: Strided | None
    frame_scale: Strided | None


@triton.jit
def _load(x, row, col, heads, length, mask):
    return tl.load(rows_at(x, row, heads, length)[:, None] + col[None, :], mask, 0.0).to(tl.float32)


@triton.jit
def _load_sum(problem, row, col, heads, length, mask):
    """``residual + gate·x``, or x."""
    r = _load(problem.x, row, col, heads, length, mask)
    if problem.residual is not None:
        if problem.gate is not None:
            r *= _load(problem.gate, row, col, heads, length, mask)
        r += _load(problem.residual, row, col, heads, length, mask)
    return r


@triton.jit
def _normalize(r, mask, cols, eps, CENTERED: tl.constexpr):
    """``(r − mean)·scale``, 0 outside, and the scale."""
    count = cols.to(tl.float32)
    if CENTERED:
        r = tl.where(mask, r - div(tl.sum(r, 1), count)[:, None], 0.0)
    scale = div(1.0, sqrt(div(tl.sum(r * r, 1), count) + eps))[:, None]
    return r * scale, scale


@triton.jit
def _modulation(problem, row, col, heads, length, mask, col_mask):
    """``w``, ``b``, ``1 + s`` and f: numbers where there are none."""
    weight, bias, factor, f = 1.0, 0.0, 1.0, 1.0
    if problem.weight is not None:
        weight = tl.load(problem.weight + col, col_mask, 0.0)[None, :]
    if problem.bias is not None:
        bias = tl.load(problem.bias + col, col_mask, 0.0)[None, :]
    if problem.scale is not None:
        factor = 1 + _load(problem.scale, row, col, heads, length, mask)
    if problem.frame_scale is not None:
        f = tl.load(rows_at(problem.frame_scale, row, heads, length), row >= 0, 0.0)[:, None]
    return weight, bias, factor, f


@triton.jit
def _unscaled(n, problem, weight, bias, factor, row, col, heads, length, mask):
    """``(n·w + b)·(1 + s) + h``."""
    y = (n * weight + bias) * factor
    if problem.shift is not None:
        y += _load(problem.shift, row, col, heads, length, mask)
    return y


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    problem,
    out,
    total,  # r, or None
    eps,
    heads,
    length,
    rows,
    cols,
    CENTERED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program takes BLOCK_ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    row = tl.where(inside, row, 0)
    col = tl.arange(0, BLOCK)
    col_mask = col < cols
    mask = inside[:, None] & col_mask[None, :]
    r = _load_sum(problem, row, col, heads, length, mask)
    store_tile(total, row, col, r, heads, length, mask)
    n, _ = _normalize(r, mask, cols, scalar(eps), CENTERED)
    weight, bias, factor, f = _modulation(problem, row, col, heads, length, mask, col_mask)
    y = _unscaled(n, problem, weight, bias, factor, row, col, heads, length, mask)
    store_tile(out, row, col, f * y, heads, length, mask)


class Gradients(NamedTuple):
    """Where the backward writes; None is not wanted."""

    x: Strided | None
    residual: Strided | None
    gate: Strided | None  # of rows that have one each
    scale: Strided | None  # the same
    shift: Strided | None
    sums: Any  # [programs, 2, cols]: Σ u and Σ u·n, of u·(1 + s) where each row has its scale
    gate_sums: Any  # [programs, cols]
    frame_sums: Any  # [rows]


@triton.jit(do_not_specialize=["rows", "run", "rows_a_program"])
def backward_kernel(
    problem,
    grad,
    total_grad,  # of r, or None
    to,
    eps,
    heads,
    length,
    rows,
    run,
    rows_a_program,
    cols,
    CENTERED: tl.constexpr,
    OF_EACH_ROW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program takes ``rows_a_program`` rows of a run that shares its modulators."""
    program = tl.program_id(0).to(tl.int64)
    per_run = tl.cdiv(run, rows_a_program)
    begin = program // per_run * run + program % per_run * rows_a_program
    end = tl.minimum(begin + rows_a_program, (program // per_run + 1) * run)
    col = tl.arange(0, BLOCK)
    col_mask = col < cols
    u_sum, n_sum = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32), tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    gate_sum = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    for start in range(begin, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = row < end
        row = tl.where(inside, row, begin)
        mask = inside[:, None] & col_mask[None, :]
        n, scale = _normalize(_load_sum(problem, row, col, heads, length, mask), mask, cols, scalar(eps), CENTERED)
        weight, bias, factor, f = _modulation(problem, row, col, heads, length, mask, col_mask)
        g = _load(grad, row, col, heads, length, mask)
        if to.frame_sums is not None:
            y = _unscaled(n, problem, weight, bias, factor, row, col, heads, length, mask)
            tl.store(to.frame_sums + row, tl.sum(g * y, 1), inside)
        u = f * g
        if OF_EACH_ROW:
            store_tile(to.shift, row, col, u, heads, length, mask)
            store_tile(to.scale, row, col, u * (n * weight + bias), heads, length, mask)
        slope = u * factor
        if to.sums is not None:
            added = slope if OF_EACH_ROW else u
            u_sum += added
            n_sum += added * n
        slope *= weight
        count = cols.to(tl.float32)
        along = div(tl.sum(slope * n, 1), count)[:, None]
        slope -= n * along
        if CENTERED:
            # n has the mean 0
            slope -= div(tl.sum(slope, 1), count)[:, None]
        slope *= scale
        if total_grad is not None:
            slope += _load(total_grad, row, col, heads, length, mask)
        if to.gate is not None or to.gate_sums is not None:
            of_gate = slope * _load(problem.x, row, col, heads, length, mask)
            store_tile(to.gate, row, col, of_gate, heads, length, mask)
            if to.gate_sums is not None:
                gate_sum += tl.where(mask, of_gate, 0.0)
        store_tile(to.residual, row, col, slope, heads, length, mask)
        if problem.gate is not None:
            slope *= _load(problem.gate, row, col, heads, length, mask)
        store_tile(to.x, row, col, slope, heads, length, mask)
    if to.sums is not None:
        at = to.sums + program * 2 * cols + col
        tl.store(at, tl.sum(u_sum, 0), col_mask)
        tl.store(at + cols, tl.sum(n_sum, 0), col_mask)
    if to.gate_sums is not None:
        tl.store(to.gate_sums + program * cols + col, tl.sum(gate_sum, 0), col_mask)


# ---- Launchers -------------------------------------------------------------------------------------------------------

# Of a backward kernel, each of which leaves a sum of each column.
_PROGRAMS = 512
# Elements of a row that a warp holds.
_PER_WARP = 256


@dataclass(frozen=True)
class _Tile:
    """Fixed by the length of a row."""

    rows: int
    cols: int
    warps: int

    @classmethod
    def of(cls, cols: int) -> _Tile:
        block = int(triton.next_power_of_2(max(cols, 1)))
        rows = max(_PER_WARP // block, 1)
        return cls(min(rows, 16), block, min(max(block // _PER_WARP, 1), 16))

    def options(self) -> dict[str, Any]:
        return {
            "BLOCK_ROWS": self.rows,
            "BLOCK": self.cols,
            "num_warps": self.warps,
            "enable_fp_fusion": False,
        }


def _rows(x: Tensor | None) -> Strided | None:
    return None if x is None else Strided.of(four_axes(unit_stride(x)))


def _of_rows(modulator: Tensor | None, x: Tensor) -> Strided | None:
    """One for each row of x, expanded."""
    return None if modulator is None else _rows(modulator.expand(*x.shape[:-1], modulator.shape[-1]))


def _problem(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, weight: Any, bias: Any, scale: Any, shift: Any, frames: Any
) -> Problem:
    x_rows = _rows(x)
    assert x_rows is not None
    of_rows = [_of_rows(modulator, x) for modulator in (gate, scale, shift, frames)]
    return Problem(x_rows, _rows(residual), of_rows[0], weight, bias, *of_rows[1:])


def ada_layer_norm(x: Tensor, *given: Any) -> None:
    """``(x, weight, bias, scale, shift, frame_scale, eps, centered, out)``."""
    *args, out = given
    residual_ada_layer_norm(x, None, None, *args, out, None)


def residual_ada_layer_norm(x: Tensor, residual: Tensor | None, gate: Tensor | None, *given: Any) -> None:
    """``(x, residual, gate, weight, bias, scale, shift, frame_scale, eps, centered, out, total)``."""
    *modulators, eps, centered, out, total = given
    rows, heads, length = sizes(x)
    if rows == 0:
        return
    tile = _Tile.of(x.shape[-1])
    problem = _problem(x, residual, gate, *modulators)

    def run(out: Tensor, total: Tensor | None) -> None:
        shape = heads, length, rows, x.shape[-1]
        grid = (triton.cdiv(rows, tile.rows),)
        options = tile.options() | {"CENTERED": bool(centered)}
        forward_kernel[grid](problem, _rows(out), _rows(total), float(eps), *shape, **options)

    with torch.cuda.device_of(x):
        written((out, total), run)


def ada_layer_norm_backward(grad: Tensor, x: Tensor, *given: Any) -> None:
    """``(grad, x, weight, …, centered, dx, dweight, dbias, dscale, dshift, dframe_scale)``; None is not wanted."""
    *args, dx, dweight, dbias, dscale, dshift, dframe_scale = given
    gradients = dx, None, None, dweight, dbias, dscale, dshift, dframe_scale
    residual_ada_layer_norm_backward(grad, None, x, None, None, *args, *gradients)


def residual_ada_layer_norm_backward(
    grad: Tensor, total_grad: Tensor | None, x: Tensor, residual: Tensor | None, gate: Tensor | None, *given: Any
) -> None:
    """``(grad, total_grad, x, residual, gate, …, centered, dx, dresidual, dgate, …)``; None is not wanted."""
    weight, bias, scale, shift, frames, eps, centered, dx, dresidual, dgate, *others = given
    dscale, dshift = others[2:4]
    rows, heads, length = sizes(x)
    if rows == 0:
        for gradient in (dgate, *others):
            if gradient is not None:
                gradient.zero_()
        return
    cols, tile = x.shape[-1], _Tile.of(x.shape[-1])
    sharing, shared = Sharing.of(x, gate, scale, shift), (dgate, *others)
    run = sharing.run
    per_run = min(triton.cdiv(_PROGRAMS, rows // run), triton.cdiv(run, tile.rows))
    rows_a_program = triton.cdiv(triton.cdiv(run, per_run), tile.rows) * tile.rows
    programs = rows // run * triton.cdiv(run, rows_a_program)
    sums = PartialSums.empty(sharing, programs, x, shared)
    problem = _problem(x, residual, gate, weight, bias, scale, shift, frames)

    def launch(dx: Tensor | None, dresidual: Tensor | None) -> None:
        each = [_rows(g) if sharing.of_each_row else None for g in (dscale, dshift)]
        gate_of_each = _rows(dgate) if sharing.gate_rows == 1 else None
        to = Gradients(_rows(dx), _rows(dresidual), gate_of_each, *each, sums.columns, sums.gate, sums.frames)
        shape = heads, length, rows, run, rows_a_program, cols
        options = tile.options() | {"CENTERED": bool(centered), "OF_EACH_ROW": sharing.of_each_row}
        backward_kernel[(programs,)](problem, _rows(grad), _rows(total_grad), to, float(eps), *shape, **options)

    with torch.cuda.device_of(x):
        written((dx, dresidual), launch)
    sums.add_up((weight, bias, scale), shared)
