"""Launchers of the diffusion family: ``NAME(*inputs, *outputs)``; those of the loss are in ``denoising_loss.py``.

One kernel takes a step. Each element is read once and written once; a tile lies in one sample, whose numbers are then
the same for all of it. Standard deviations, where the guided output is rescaled, are found before by two small kernels.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from mmkern.kernels.denoising_loss import masked_squared_error, masked_squared_error_backward
from mmkern.kernels.elements import Grid, Layout, Tile, load, store, tile_of
from mmkern.kernels.philox import normal
from mmkern.kernels.scalar_math import div, sqrt
from torch import Tensor

from mmkern.reference.diffusion import Column, StepArguments

__all__ = [
    "corrected_step",
    "denoise_step",
    "masked_squared_error",
    "masked_squared_error_backward",
    "multistep",
]


def _columns(*columns: Column) -> tuple[tl.constexpr, ...]:
    return tuple(tl.constexpr(column.value) for column in columns)


_X0_SAMPLE, _X0_OUTPUT, _X0_SCALE = _columns(Column.X0_SAMPLE, Column.X0_OUTPUT, Column.X0_SCALE)
_SAMPLE, _OUTPUT, _X0 = _columns(Column.SAMPLE, Column.OUTPUT, Column.X0)
_HISTORY, _NOISE = _columns(Column.HISTORY0, Column.NOISE)
_CORRECTED_SAMPLE, _CORRECTED_X0 = _columns(Column.CORRECTED_SAMPLE, Column.CORRECTED_X0)
(_CORRECTED_HISTORY,) = _columns(Column.CORRECTED_HISTORY0)
_KNOWN, _KNOWN_NOISE = _columns(Column.KNOWN, Column.KNOWN_NOISE)
_ALL_NAN = tl.constexpr(tl.PropagateNan.ALL)


# ---- Where things lie ------------------------------------------------------------------------------------------------


class Numbers(NamedTuple):
    """A row of them for each sample, or one for all."""

    data: Any
    row: Any  # how long one is; None where there is one


@triton.jit
def _tile(rows, axes, cols, tiles, tiles_of_row, SHIFTED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The tile of this program, of ``tiles`` in a sample of ``rows``, and which of them it is; the counter of the noise
    at the first element of its rows, and its first column. ``SHIFTED``: rows begin up to three elements early, where a
    counter does.
    """
    program = tl.program_id(0)
    sample, part = (program // tiles).to(tl.int64), program % tiles
    row = (part // tiles_of_row).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    begin = (part % tiles_of_row).to(tl.int64) * BLOCK
    tile = tile_of(sample, row, rows, begin, axes, cols, BLOCK)
    first = (sample * rows + row) * cols
    if SHIFTED:
        col = tile.col - (first % 4)[:, None]
        tile = Tile(sample, tile.index, tile.is_row, col, (col >= 0) & (col < cols))
    return tile, part, first // 4, begin


@triton.jit
def _number(numbers, tile, COLUMN: tl.constexpr):
    at = numbers.data + COLUMN
    if numbers.row is not None:
        at += tile.sample * numbers.row
    return tl.load(at)


# ---- The step --------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What a step reads: ``StepArguments`` as they lie; what is None is compiled away."""

    x: Grid
    outputs: tuple[Grid | None, ...]
    mask: Grid | None
    history: tuple[Grid | None, ...]
    noise: Grid | None
    seed: Any
    keep: Grid | None
    known: Grid | None
    known_noise: Grid | None
    weights: Numbers | None
    factors: Numbers | None  # of the guided output
    coefficients: Numbers
    limits: Numbers | None


class Results(NamedTuple):
    """Where a step writes; None is not wanted."""

    next: Grid
    x0: Grid | None
    corrected: Grid | None


@triton.jit
def _load_outputs(problem, tile):
    """0 where there is none: a kernel's tuple takes no None."""
    outputs = ()
    for k in tl.static_range(len(problem.outputs)):
        output = tl.zeros([1, 1], tl.float32)
        if problem.outputs[k] is not None:
            output = load(problem.outputs[k], tile)
        outputs = outputs + (output,)
    return outputs


@triton.jit
def _guided(outputs, problem, tile):
    """The outputs of the model, put together."""
    total = tl.zeros([1, 1], tl.float32)
    if problem.mask is not None:
        mask = load(problem.mask, tile)
    for k in tl.static_range(len(outputs)):
        if problem.outputs[k] is not None:
            weight = 1.0
            if problem.weights is not None:
                weight = _number(problem.weights, tile, 2 * k)
                if problem.mask is not None:
                    weight = tl.fma(mask, _number(problem.weights, tile, 2 * k + 1), weight)
            total = tl.fma(outputs[k], weight, total)
    return total


@triton.jit
def _plus(total, x, numbers, tile, COLUMN: tl.constexpr):
    return tl.fma(x, _number(numbers, tile, COLUMN), total)


@triton.jit
def _clipped(x0, limits, tile):
    if limits is not None:
        limit = _number(limits, tile, 0)
        x0 = tl.minimum(tl.maximum(x0, -limit, _ALL_NAN), limit, _ALL_NAN) * _number(limits, tile, 1)
    return x0


@triton.jit(do_not_specialize=["rows", "cols", "tiles", "tiles_of_row"])
def step_kernel(
    problem,
    to,
    rows,
    axes,
    cols,  # in units
    tiles,
    tiles_of_row,
    UNIT: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program takes a tile."""
    tile, _, counter, begin = _tile(rows, axes, cols * UNIT, tiles, tiles_of_row, SHIFTED, BLOCK_ROWS, BLOCK)
    by = problem.coefficients
    x, output = load(problem.x, tile), _guided(_load_outputs(problem, tile), problem, tile)
    if problem.factors is not None:
        output *= _number(problem.factors, tile, 0)
    x0 = _plus(x * _number(by, tile, _X0_SAMPLE), output, by, tile, _X0_OUTPUT) * _number(by, tile, _X0_SCALE)
    x0 = _clipped(x0, problem.limits, tile)
    out = _plus(x * _number(by, tile, _SAMPLE), output, by, tile, _OUTPUT)
    out = _plus(out, x0, by, tile, _X0)
    if to.corrected is not None:
        corrected = _plus(x * _number(by, tile, _CORRECTED_SAMPLE), x0, by, tile, _CORRECTED_X0)
    for k in tl.static_range(len(problem.history)):
        if problem.history[k] is not None:
            past = load(problem.history[k], tile)
            out = _plus(out, past, by, tile, _HISTORY + k)
            if to.corrected is not None:
                corrected = _plus(corrected, past, by, tile, _CORRECTED_HISTORY + k)
    if problem.seed is not None:
        out = _plus(out, normal(problem.seed, counter, begin, BLOCK), by, tile, _NOISE)
    elif problem.noise is not None:
        out = _plus(out, load(problem.noise, tile), by, tile, _NOISE)
    if problem.keep is not None:
        known = load(problem.known, tile) * _number(by, tile, _KNOWN)
        known = _plus(known, load(problem.known_noise, tile), by, tile, _KNOWN_NOISE)
        out = tl.fma(load(problem.keep, tile), known - out, out)
    store(to.next, tile, out)
    store(to.x0, tile, x0)
    if to.corrected is not None:
        store(to.corrected, tile, corrected)


# ---- Standard deviations of a sample ---------------------------------------------------------------------------------


@triton.jit
def _store_moments(to, parts, x, tile):
    """Count, mean and sum of the squared distances to it, ``parts`` elements from each other."""
    inside = tile.is_row & tile.is_col
    count = tl.sum(tl.sum(inside.to(tl.float32), 1), 0)
    # A tile of rows that begin early may have none.
    mean = div(tl.sum(tl.sum(tl.where(inside, x, 0.0), 1), 0), tl.maximum(count, 1.0))
    distance = tl.where(inside, x - mean, 0.0)
    tl.store(to, count)
    tl.store(to + parts, mean)
    tl.store(to + 2 * parts, tl.sum(tl.sum(distance * distance, 1), 0))


@triton.jit(do_not_specialize=["rows", "cols", "tiles", "tiles_of_row"])
def moments_kernel(
    problem,
    moments,  # [samples, 2, 3, tiles]
    rows,
    axes,
    cols,  # in units
    tiles,
    tiles_of_row,
    UNIT: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of the guided output and of output 1, in one tile."""
    tile, part, _, _ = _tile(rows, axes, cols * UNIT, tiles, tiles_of_row, SHIFTED, BLOCK_ROWS, BLOCK)
    outputs = _load_outputs(problem, tile)
    to = moments + tile.sample * 6 * tiles + part
    _store_moments(to, tiles, _guided(outputs, problem, tile), tile)
    _store_moments(to + 3 * tiles, tiles, outputs[1], tile)


@triton.jit
def _all_squares(moments, parts, BLOCK: tl.constexpr):
    """The sum of the squared distances to the mean of all parts: Chan et al. 1983, of many parts at once."""
    count, total = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        n = tl.load(moments + part, part < parts, 0.0)
        count += n
        total += n * tl.load(moments + parts + part, part < parts, 0.0)
    mean = div(tl.sum(total, 0), tl.sum(count, 0))
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        distance = tl.load(moments + parts + part, part < parts, 0.0) - mean
        squares += tl.load(moments + 2 * parts + part, part < parts, 0.0)
        squares += tl.load(moments + part, part < parts, 0.0) * distance * distance
    return tl.sum(squares, 0)


@triton.jit(do_not_specialize=["parts"])
def factors_kernel(moments, rescale, factors, parts, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """One program takes a sample. ``EACH``: of how far to go there is a number for each."""
    sample = tl.program_id(0).to(tl.int64)
    moments += sample * 6 * parts
    guided, aim = _all_squares(moments, parts, BLOCK), _all_squares(moments + 3 * parts, parts, BLOCK)
    far = tl.load(rescale + (sample if EACH else 0))
    tl.store(factors + sample, 1 + far * (sqrt(div(aim, guided)) - 1))


# ---- Launchers -------------------------------------------------------------------------------------------------------

_TILE = 1024  # elements
_PARTS = 1024  # of a sample, whose moments are added up at a time
_WARPS = 4  # 8 elements a thread: 16 bytes of bfloat16


@dataclass(frozen=True)
class _Cut:
    """How the samples of a call are cut into tiles."""

    tiles: int  # of a sample
    grid: tuple[int]
    shape: tuple[Any, ...]  # what the kernels are told of it
    options: dict[str, Any]

    @classmethod
    def of(cls, layout: Layout, drawn: bool) -> _Cut:
        is_shifted = drawn and layout.cols % 4 != 0
        width = layout.cols + 3 * is_shifted
        block_rows, block = layout.block(_TILE, width=width)
        tiles_of_row = triton.cdiv(width, block)
        tiles = triton.cdiv(layout.rows, block_rows) * tiles_of_row
        shape = layout.rows, layout.row_axes, layout.cols // layout.unit, tiles, tiles_of_row
        options = {"UNIT": layout.unit, "SHIFTED": is_shifted, "BLOCK_ROWS": block_rows, "BLOCK": block}
        return cls(tiles, (layout.samples * tiles,), shape, options | {"num_warps": _WARPS, "enable_fp_fusion": False})


def _numbers(numbers: Tensor | None) -> Numbers | None:
    if numbers is None:
        return None
    return Numbers(numbers, tl.constexpr(numbers.shape[1]) if len(numbers) > 1 else None)


def _run(args: StepArguments, *results: Tensor | None) -> None:
    x = args.x
    if x.numel() == 0:
        return
    weights, is_rescaled = args.weights, args.rescale is not None and args.outputs[1] is not None
    mask = None if weights is None else args.mask
    of_samples = [n for n in (weights, args.coefficients, args.limits) if n is not None]
    each = x.dim() > 1 and x.shape[0] > 1 and (is_rescaled or any(len(n) > 1 for n in of_samples))
    others = [*args.outputs, mask, *args.history, args.noise, args.keep, args.known, args.known_noise, *results]
    layout = Layout.of(x, others, each)
    cut = _Cut.of(layout, args.seed is not None)
    place = layout.place
    problem = Problem(
        place(x),
        layout.places(args.outputs),
        place(mask),
        layout.places(args.history),
        place(args.noise),
        args.seed,
        place(args.keep),
        place(args.known),
        place(args.known_noise),
        _numbers(weights),
        None,
        _numbers(args.coefficients),
        _numbers(args.limits),
    )
    with torch.cuda.device_of(x):
        if is_rescaled:
            problem = problem._replace(factors=_numbers(_factors(problem, layout.samples, cut, args.rescale)))
        step_kernel[cut.grid](problem, Results(*layout.places(results)), *cut.shape, **cut.options)


def _factors(problem: Problem, samples: int, cut: _Cut, rescale: Tensor) -> Tensor:
    """``[samples, 1]``: what the guided output is multiplied by."""
    moments = rescale.new_empty((samples, 2, 3, cut.tiles))
    factors = rescale.new_empty((samples, 1))
    moments_kernel[cut.grid](problem, moments, *cut.shape, **cut.options)
    block = min(triton.next_power_of_2(cut.tiles), _PARTS)
    options = {"EACH": len(rescale) > 1, "BLOCK": block, "num_warps": _WARPS, "enable_fp_fusion": False}
    factors_kernel[(samples,)](moments, rescale, factors, cut.tiles, **options)
    return factors


def denoise_step(*given: Any) -> None:
    """``(*StepArguments, next)``."""
    *args, following = given
    _run(StepArguments.of(args), following, None, None)


def multistep(*given: Any) -> None:
    """``(*StepArguments, next, x0)``."""
    *args, following, x0 = given
    _run(StepArguments.of(args), following, x0, None)


def corrected_step(*given: Any) -> None:
    """``(*StepArguments, next, x0, corrected)``."""
    *args, following, x0, corrected = given
    _run(StepArguments.of(args), following, x0, corrected)
