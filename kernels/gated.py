"""Activations beside a scale, a shift or a gate: ``NAME(*inputs, *options, *outputs)`` and its ``NAME_backward``.

Of scale and shift, one that is *whole* has a number for each element of x. Of others a program reads its part once: it
walks down rows that share a row of numbers, or along rows that have one number each, and in the backward leaves one sum
of each. A few small sums of these, in their order, are the gradients.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from mmkern.kernels.activations import activated
from mmkern.kernels.elements import Grid, Layout, load, store, tile_of
from mmkern.kernels.rows import scalar
from torch import Tensor


class Problem(NamedTuple):
    """What both kernels of the affine activation read; what is None is compiled away."""

    x: Grid
    scale: Grid | None
    shift: Grid | None
    offset: float


class Walk(NamedTuple):
    """The tiles of a program, one after the other. Made in a kernel."""

    number: Any  # which walk down rows, or which of a row's along it
    row: Any  # of the first tile
    end: Any  # of the rows
    begin: Any  # column of the first tile
    steps: Any


@triton.jit
def _walk(rows, run, tiles_of_row, parts, steps, DOWN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``parts`` of at most ``steps`` tiles each: of ``run`` rows that share numbers where these go DOWN, else of a row."""
    program = tl.program_id(0).to(tl.int64)
    if DOWN:
        number = program // tiles_of_row
        row = number // parts * run + number % parts * steps * BLOCK_ROWS
        end = tl.minimum(row + steps * BLOCK_ROWS, (number // parts + 1) * run)
        begin, count = program % tiles_of_row * BLOCK, tl.cdiv(end - row, BLOCK_ROWS)
    else:
        number = program % parts
        first = number * steps
        row, end, begin = program // parts * BLOCK_ROWS, rows, first * BLOCK
        count = tl.minimum(tiles_of_row - first, steps)
    return Walk(number, row, end, begin, count.to(tl.int32))


@triton.jit
def _tile(walk, step, axes, cols, DOWN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, begin = walk.row + tl.arange(0, BLOCK_ROWS), walk.begin
    if DOWN:
        row += step * BLOCK_ROWS
    else:
        begin += step * BLOCK
    return tile_of(0, row, walk.end, begin, axes, cols, BLOCK)


@triton.jit
def _shared(
    modulator, walk, axes, cols, WHOLE: tl.constexpr, DOWN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """What all tiles of a walk share of it; 0 of none."""
    value = tl.zeros([1, 1], tl.float32)
    if modulator is not None:
        if not WHOLE:
            value = load(modulator, _tile(walk, 0, axes, cols, DOWN, 1 if DOWN else BLOCK_ROWS, BLOCK))
    return value


@triton.jit
def _of_tile(modulator, shared, tile, WHOLE: tl.constexpr):
    return load(modulator, tile) if WHOLE else shared


@triton.jit(do_not_specialize=["rows", "cols", "run", "tiles_of_row", "parts", "steps"])
def affine_kernel(
    problem,
    out,
    rows,
    axes,
    cols,  # in units
    run,
    tiles_of_row,
    parts,
    steps,
    ACTIVATION: tl.constexpr,
    WHOLE_SCALE: tl.constexpr,
    WHOLE_SHIFT: tl.constexpr,
    DOWN: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols *= UNIT
    walk = _walk(rows, run, tiles_of_row, parts, steps, DOWN, BLOCK_ROWS, BLOCK)
    scale = _shared(problem.scale, walk, axes, cols, WHOLE_SCALE, DOWN, BLOCK_ROWS, BLOCK)
    shift = _shared(problem.shift, walk, axes, cols, WHOLE_SHIFT, DOWN, BLOCK_ROWS, BLOCK)
    for step in range(walk.steps):
        tile = _tile(walk, step, axes, cols, DOWN, BLOCK_ROWS, BLOCK)
        factor = scalar(problem.offset) + _of_tile(problem.scale, scale, tile, WHOLE_SCALE)
        u = tl.fma(factor, load(problem.x, tile), _of_tile(problem.shift, shift, tile, WHOLE_SHIFT))
        y, _ = activated(u, ACTIVATION)
        store(out, tile, y)


class Gradients(NamedTuple):
    """Where the backward writes; None is not wanted."""

    x: Grid | None
    scale: Grid | None  # a whole one
    shift: Grid | None
    scale_sums: Any  # of others, [walks, cols], or [rows, parts]
    shift_sums: Any


@triton.jit
def _store_sums(to, sums, walk, tile, cols, parts, DOWN: tl.constexpr):
    if to is not None:
        if DOWN:
            tl.store(to + walk.number * cols + tile.col, tl.sum(sums, 0)[None, :], tile.is_col)
        else:
            row = walk.row + tl.arange(0, sums.shape[0])
            tl.store(to + row * parts + walk.number, tl.sum(sums, 1), row < walk.end)


@triton.jit(do_not_specialize=["rows", "cols", "run", "tiles_of_row", "parts", "steps"])
def affine_backward_kernel(
    problem,
    grad,
    to,
    rows,
    axes,
    cols,  # in units
    run,
    tiles_of_row,
    parts,
    steps,
    ACTIVATION: tl.constexpr,
    WHOLE_SCALE: tl.constexpr,
    WHOLE_SHIFT: tl.constexpr,
    DOWN: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols *= UNIT
    walk = _walk(rows, run, tiles_of_row, parts, steps, DOWN, BLOCK_ROWS, BLOCK)
    scale = _shared(problem.scale, walk, axes, cols, WHOLE_SCALE, DOWN, BLOCK_ROWS, BLOCK)
    shift = _shared(problem.shift, walk, axes, cols, WHOLE_SHIFT, DOWN, BLOCK_ROWS, BLOCK)
    scale_sum, shift_sum = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32), tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    for step in range(walk.steps):
        tile = _tile(walk, step, axes, cols, DOWN, BLOCK_ROWS, BLOCK)
        x = load(problem.x, tile)
        factor = scalar(problem.offset) + _of_tile(problem.scale, scale, tile, WHOLE_SCALE)
        u = tl.fma(factor, x, _of_tile(problem.shift, shift, tile, WHOLE_SHIFT))
        _, slope = activated(u, ACTIVATION)
        slope *= load(grad, tile)
        store(to.x, tile, slope * factor)
        store(to.shift, tile, slope)
        store(to.scale, tile, slope * x)
        if to.shift_sums is not None:
            shift_sum += slope
        if to.scale_sums is not None:
            scale_sum += slope * x
    first = _tile(walk, 0, axes, cols, DOWN, BLOCK_ROWS, BLOCK)
    _store_sums(to.scale_sums, scale_sum, walk, first, cols, parts, DOWN)
    _store_sums(to.shift_sums, shift_sum, walk, first, cols, parts, DOWN)


@triton.jit
def _tile_of_program(rows, axes, cols, tiles_of_row, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    walk = _walk(rows, rows, tiles_of_row, tiles_of_row, 1, False, BLOCK_ROWS, BLOCK)
    return _tile(walk, 0, axes, cols, False, BLOCK_ROWS, BLOCK)


@triton.jit(do_not_specialize=["rows", "cols", "tiles_of_row"])
def gated_kernel(
    hidden,
    gate,
    out,
    rows,
    axes,
    cols,  # in units
    tiles_of_row,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = _tile_of_program(rows, axes, cols * UNIT, tiles_of_row, BLOCK_ROWS, BLOCK)
    value, _ = activated(load(gate, tile), ACTIVATION)
    store(out, tile, load(hidden, tile) * value)


@triton.jit(do_not_specialize=["rows", "cols", "tiles_of_row"])
def gated_backward_kernel(
    hidden,
    gate,
    grad,
    to_hidden,
    to_gate,
    rows,
    axes,
    cols,  # in units
    tiles_of_row,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = _tile_of_program(rows, axes, cols * UNIT, tiles_of_row, BLOCK_ROWS, BLOCK)
    value, slope = activated(load(gate, tile), ACTIVATION)
    g = load(grad, tile)
    store(to_hidden, tile, g * value)
    store(to_gate, tile, g * load(hidden, tile) * slope)


# ---- Launchers -------------------------------------------------------------------------------------------------------

_TILE = 1024  # elements
_PROGRAMS = 1024  # that walk, unless there are more rows of numbers
# Rows that a walk down has at least, beside whose elements the numbers that they share are few.
_ROWS_OF_WALK = 32
_WARPS = 4  # 8 elements a thread: 16 bytes of bfloat16


def _is_shared(modulator: Tensor | None, x: Tensor) -> bool:
    return modulator is not None and modulator.shape != x.shape


@dataclass(frozen=True)
class _Sharing:
    """What shares a number of scale and shift, or a row of them: neighbours, with the axes of x in another order."""

    order: list[int]  # outermost those along which the numbers differ
    groups: int  # of neighbours
    down: bool  # they are rows, and share a row

    @classmethod
    def of(cls, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> _Sharing:
        shared = next((m.shape for m in (scale, shift) if m is not None and _is_shared(m, x)), x.shape)
        *leading, last = range(x.dim())
        own = [axis for axis in leading if shared[axis] == x.shape[axis]]
        others = [axis for axis in leading if axis not in own]
        return cls([*own, *others, last], prod(shared[:-1]), shared != x.shape and shared[-1] == x.shape[-1])


@dataclass(frozen=True)
class _Walks:
    """How the elements of x are shared out among programs."""

    parts: int  # of the rows of a group, or of a row
    grid: tuple[int]
    shape: tuple[Any, ...]  # what the kernels are told of it
    options: dict[str, Any]

    @classmethod
    def of(cls, layout: Layout, sharing: _Sharing, leaves_sums: bool) -> _Walks:
        run = layout.rows // sharing.groups if sharing.down else layout.rows
        block_rows, block = layout.block(_TILE, rows=run)
        tiles_of_row, tiles_of_run = triton.cdiv(layout.cols, block), triton.cdiv(run, block_rows)
        walks, tiles, least = tiles_of_run, tiles_of_row, 1
        if sharing.down:
            walks, tiles, least = sharing.groups * tiles_of_row, tiles_of_run, triton.cdiv(_ROWS_OF_WALK, block_rows)
        steps = 1
        if sharing.down or leaves_sums:
            steps = max(triton.cdiv(tiles, triton.cdiv(_PROGRAMS, walks)), least)
        parts = triton.cdiv(tiles, steps)
        shape = layout.rows, layout.row_axes, layout.cols // layout.unit, run, tiles_of_row, parts, steps
        return cls(parts, (walks * parts,), shape, {"DOWN": sharing.down} | _options(layout, block_rows, block))


def _options(layout: Layout, block_rows: int, block: int) -> dict[str, Any]:
    options = {"UNIT": layout.unit, "BLOCK_ROWS": block_rows, "BLOCK": block}
    return options | {"num_warps": _WARPS, "enable_fp_fusion": False}


class _Affine:
    """A call, forward or backward; ``others`` are the tensors that its kernel takes beside the problem."""

    def __init__(
        self,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        offset: float,
        activation: int,
        others: Sequence[Tensor | None],
        leaves_sums: bool,
    ) -> None:
        self.sharing = _Sharing.of(x, scale, shift)
        self.layout = Layout.of(self._ordered(x), [self._ordered(t) for t in (scale, shift, *others) if t is not None])
        self.walks = _Walks.of(self.layout, self.sharing, leaves_sums)
        self.problem = Problem(*map(self.place, (x, scale, shift)), float(offset))
        whole = [m is not None and not _is_shared(m, x) for m in (scale, shift)]
        self.options = self.walks.options | {"WHOLE_SCALE": whole[0], "WHOLE_SHIFT": whole[1]}
        self.options["ACTIVATION"] = int(activation)

    def _ordered(self, x: Tensor) -> Tensor:
        return x.permute(self.sharing.order)

    def place(self, x: Tensor | None) -> Grid | None:
        return None if x is None else self.layout.place(self._ordered(x))

    def room(self, gradient: Tensor) -> Tensor:
        """``[groups, parts, numbers of a group]``, for sums; the gradient itself where its parts are one."""
        groups = self.sharing.groups
        parts = self.walks.parts if self.sharing.down else self.layout.rows // groups * self.walks.parts
        of_parts = gradient.view(groups, 1, -1)
        return of_parts if parts == 1 else of_parts.new_empty((groups, parts, of_parts.shape[-1]))


def affine_activation(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, offset: float, activation: int, out: Tensor
) -> None:
    if x.numel() == 0:
        return
    call = _Affine(x, scale, shift, offset, activation, [out], leaves_sums=False)
    with torch.cuda.device_of(x):
        affine_kernel[call.walks.grid](call.problem, call.place(out), *call.walks.shape, **call.options)


def affine_activation_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offset: float,
    activation: int,
    dx: Tensor | None,
    dscale: Tensor | None,
    dshift: Tensor | None,
) -> None:
    """None is not wanted."""
    gradients = (dscale, dshift)
    if x.numel() == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return
    # Laid out as if all were wanted, so that sums are the same whatever is.
    room = [
        torch.empty(m.shape, device="meta") if m is not None and g is None else g
        for m, g in zip((scale, shift), gradients, strict=True)
    ]
    call = _Affine(x, scale, shift, offset, activation, [grad, dx, *room], leaves_sums=True)
    whole = [None if _is_shared(g, x) else call.place(g) for g in gradients]
    sums = [call.room(g) if g is not None and _is_shared(g, x) else None for g in gradients]
    to = Gradients(call.place(dx), *whole, *sums)
    with torch.cuda.device_of(x):
        affine_backward_kernel[call.walks.grid](call.problem, call.place(grad), to, *call.walks.shape, **call.options)
    for gradient, of_parts in zip(gradients, sums, strict=True):
        if gradient is not None and of_parts is not None and of_parts.shape[1] > 1:
            torch.sum(of_parts, 1, out=gradient.view(len(of_parts), -1))


def _run_gated(kernel: Any, x: Tensor, activation: int, *others: Tensor) -> None:
    """``kernel(hidden, gate, *others, ...)``, tile by tile."""
    if x.numel() == 0:
        return
    tensors = (*x.chunk(2, -1), *others)
    layout = Layout.of(tensors[0], tensors[1:])
    block_rows, block = layout.block(_TILE)
    tiles_of_row = triton.cdiv(layout.cols, block)
    shape = layout.rows, layout.row_axes, layout.cols // layout.unit, tiles_of_row
    options = _options(layout, block_rows, block) | {"ACTIVATION": int(activation)}
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(layout.rows, block_rows) * tiles_of_row,)](*layout.places(tensors), *shape, **options)


def gated_activation(x: Tensor, activation: int, out: Tensor) -> None:
    _run_gated(gated_kernel, x, activation, out)


def gated_activation_backward(grad: Tensor, x: Tensor, activation: int, dx: Tensor) -> None:
    _run_gated(gated_backward_kernel, x, activation, grad, *dx.chunk(2, -1))
