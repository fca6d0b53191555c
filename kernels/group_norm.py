"""Group norm, its modulation and an activation: ``NAME(*inputs, *options, *outputs)`` and its ``NAME_backward``.

A program takes a group of a sample. One that fits into a tile is read once; a longer one is read in tiles for its
moments, and again, from a cache, for its result. The backward leaves two sums of each channel of a sample, of which the
gradients of what modulates it are made.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from mmkern.kernels.activations import activated
from mmkern.kernels.attention_tiles import Strided
from mmkern.kernels.rows import scalar, unit_stride
from mmkern.kernels.scalar_math import div, sqrt
from torch import Tensor

from mmkern.backends.modulation_sums import add_up_runs


class Problem(NamedTuple):
    """What both kernels read; what is None is compiled away."""

    x: Strided  # [samples, groups, channels, positions]
    weight: Any  # [groups, channels], float32
    bias: Any
    scale: Strided | None  # [samples, groups, channels, 1], float32
    shift: Strided | None


class Group(NamedTuple):
    """One group of a sample. Made in a kernel."""

    sample: Any
    number: Any
    channels: Any
    positions: Any


@triton.jit
def _group(groups, channels, positions):
    """That of this program."""
    program = tl.program_id(0).to(tl.int64)
    return Group(program // groups, program % groups, channels, positions)


@triton.jit
def _at(x, group, channel):
    """Where channels begin."""
    offset = group.sample * x.strides[0] + group.number * x.strides[1] + channel * x.strides[2]
    return x.data + offset * x.unit


@triton.jit
def _tile(group, c, s, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Channels from ``c`` on at positions from ``s`` on: which they are, and which of them there are."""
    channel, col = c + tl.arange(0, BLOCK_ROWS).to(tl.int64), s + tl.arange(0, BLOCK)
    return channel, col, (channel < group.channels)[:, None] & (col < group.positions)[None, :]


@triton.jit
def _load(x, group, channel, col, mask):
    return tl.load(_at(x, group, channel)[:, None] + col[None, :], mask, 0.0).to(tl.float32)


@triton.jit
def _store(to, group, channel, col, mask, values):
    tl.store(_at(to, group, channel)[:, None] + col[None, :], values.to(to.data.dtype.element_ty), mask)


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def _moments(x, group, eps, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Mean, what its rounding left, and ``1 / √(var + eps)``: by Welford in each lane, then of all lanes."""
    mean, squares = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32), tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    of_channel = tl.cdiv(group.positions - tl.arange(0, BLOCK), BLOCK)  # numbers of a lane in a channel that it has
    for c in range(0, group.channels, BLOCK_ROWS):
        for s in range(0, group.positions, BLOCK):
            channel, col, mask = _tile(group, c, s, BLOCK_ROWS, BLOCK)
            share = div(1.0, (c // BLOCK_ROWS * of_channel + s // BLOCK + 1).to(tl.float32))[None, :]
            v = _load(x, group, channel, col, mask)
            d = tl.where(mask, v - mean, 0.0)
            mean += d * share
            squares += d * (v - mean)
    count = tl.cdiv(group.channels - tl.arange(0, BLOCK_ROWS), BLOCK_ROWS)[:, None] * of_channel[None, :]
    count = count.to(tl.float32)
    size = tl.to_tensor(group.channels).to(tl.float32) * tl.to_tensor(group.positions).to(tl.float32)
    total = div(_sum(count * mean), size)
    off = mean - total
    rest = div(_sum(count * off), size)
    variance = div(_sum(squares + count * off * off), size) - rest * rest
    return total, rest, div(1.0, sqrt(tl.where(variance < 0, 0.0, variance) + eps))


@triton.jit
def _modulation(problem, group, c, BLOCK_ROWS: tl.constexpr):
    """``y = n·times + plus`` of channels from ``c`` on."""
    channel = c + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    inside = channel < group.channels
    at = group.number * group.channels + channel
    times, plus = tl.full([BLOCK_ROWS], 1.0, tl.float32), tl.zeros([BLOCK_ROWS], tl.float32)
    if problem.weight is not None:
        times = tl.load(problem.weight + at, inside, 0.0)
    if problem.bias is not None:
        plus = tl.load(problem.bias + at, inside, 0.0)
    if problem.scale is not None:
        factor = 1 + tl.load(_at(problem.scale, group, channel), inside, 0.0)
        times *= factor
        plus *= factor
    if problem.shift is not None:
        plus += tl.load(_at(problem.shift, group, channel), inside, 0.0)
    return times, plus


@triton.jit
def forward_kernel(
    problem,
    out,
    eps,
    groups,
    channels,
    positions,
    ACTIVATION: tl.constexpr,
    WHOLE: tl.constexpr,  # a tile holds a group
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = _group(groups, channels, positions)
    if WHOLE:
        channel, col, mask = _tile(group, 0, 0, BLOCK_ROWS, BLOCK)
        v = _load(problem.x, group, channel, col, mask)
        size = tl.to_tensor(channels).to(tl.float32) * tl.to_tensor(positions).to(tl.float32)
        d = tl.where(mask, v - div(_sum(v), size), 0.0)
        d = tl.where(mask, d - div(_sum(d), size), 0.0)
        n = d * div(1.0, sqrt(div(_sum(d * d), size) + scalar(eps)))
        times, plus = _modulation(problem, group, 0, BLOCK_ROWS)
        y, _ = activated(n * times[:, None] + plus[:, None], ACTIVATION)
        _store(out, group, channel, col, mask, y)
    else:
        mean, rest, scale = _moments(problem.x, group, scalar(eps), BLOCK_ROWS, BLOCK)
        for c in range(0, channels, BLOCK_ROWS):
            times, plus = _modulation(problem, group, c, BLOCK_ROWS)
            for s in range(0, positions, BLOCK):
                channel, col, mask = _tile(group, c, s, BLOCK_ROWS, BLOCK)
                n = (_load(problem.x, group, channel, col, mask) - mean - rest) * scale
                y, _ = activated(n * times[:, None] + plus[:, None], ACTIVATION)
                _store(out, group, channel, col, mask, y)


@triton.jit
def backward_kernel(
    problem,
    grad,
    to,  # of x; None is not wanted
    sums,  # [samples, groups, 2, channels]: Σ u and Σ u·n with u the gradient of y times the activation's slope
    eps,
    groups,
    channels,
    positions,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = _group(groups, channels, positions)
    mean, rest, scale = _moments(problem.x, group, scalar(eps), BLOCK_ROWS, BLOCK)
    centre, along = tl.zeros([BLOCK_ROWS], tl.float32), tl.zeros([BLOCK_ROWS], tl.float32)
    for c in range(0, channels, BLOCK_ROWS):
        times, plus = _modulation(problem, group, c, BLOCK_ROWS)
        u_sum, n_sum = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32), tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
        for s in range(0, positions, BLOCK):
            channel, col, mask = _tile(group, c, s, BLOCK_ROWS, BLOCK)
            n = (_load(problem.x, group, channel, col, mask) - mean - rest) * scale
            _, slope = activated(n * times[:, None] + plus[:, None], ACTIVATION)
            u = _load(grad, group, channel, col, mask) * slope
            u_sum += u
            n_sum += u * n
        of_u, of_un = tl.sum(u_sum, 1), tl.sum(n_sum, 1)
        centre += times * of_u
        along += times * of_un
        channel = c + tl.arange(0, BLOCK_ROWS)
        at = sums + tl.program_id(0).to(tl.int64) * 2 * channels + channel
        tl.store(at, of_u, channel < channels)
        tl.store(at + channels, of_un, channel < channels)
    if to is not None:
        size = tl.to_tensor(channels).to(tl.float32) * tl.to_tensor(positions).to(tl.float32)
        mean_u, mean_un = div(tl.sum(centre, 0), size), div(tl.sum(along, 0), size)
        for c in range(0, channels, BLOCK_ROWS):
            times, plus = _modulation(problem, group, c, BLOCK_ROWS)
            for s in range(0, positions, BLOCK):
                channel, col, mask = _tile(group, c, s, BLOCK_ROWS, BLOCK)
                n = (_load(problem.x, group, channel, col, mask) - mean - rest) * scale
                _, slope = activated(n * times[:, None] + plus[:, None], ACTIVATION)
                u = _load(grad, group, channel, col, mask) * slope
                _store(to, group, channel, col, mask, scale * (times[:, None] * u - mean_u - n * mean_un))


# ---- Launchers -------------------------------------------------------------------------------------------------------

# Elements of a tile, and of one that a warp holds.
_TILE, _PER_WARP = 4096, 256
# What a thread of 16 warps can have: left to itself ptxas spills a few to halve the registers. AMD's compiler knows no
# such option.
_OPTIONS = {} if torch.version.hip else {"maxnreg": 128}


@dataclass(frozen=True)
class _Tile:
    rows: int
    cols: int
    is_whole: bool

    @classmethod
    def of(cls, x: Tensor) -> _Tile:
        channels, positions = x.shape[2:]
        cols = min(int(triton.next_power_of_2(positions)), _TILE)
        rows = min(int(triton.next_power_of_2(channels)), _TILE // cols)
        return cls(rows, cols, rows >= channels and cols >= positions)

    def options(self, activation: int) -> dict[str, Any]:
        return {
            "ACTIVATION": activation,
            "BLOCK_ROWS": self.rows,
            "BLOCK": self.cols,
            "num_warps": min(max(self.rows * self.cols // _PER_WARP, 1), 16),
            "enable_fp_fusion": False,
            **_OPTIONS,
        }


def _problem(x: Tensor, weight: Any, bias: Any, scale: Any, shift: Any) -> Problem:
    affine = (None if m is None else m.contiguous() for m in (weight, bias))
    modulators = (None if m is None else Strided.of(m[..., None]) for m in (scale, shift))
    x_rows = Strided.of(unit_stride(x))
    assert x_rows is not None
    return Problem(x_rows, *affine, *modulators)


def group_norm_act(x: Tensor, *given: Any) -> None:
    """``(x, weight, bias, scale, shift, eps, activation, out)``."""
    *modulators, eps, activation, out = given
    if x.numel() == 0:
        return
    tile, problem = _Tile.of(x), _problem(x, *modulators)
    options = tile.options(int(activation)) | {"WHOLE": tile.is_whole}
    with torch.cuda.device_of(x):
        grid = (x.shape[0] * x.shape[1],)
        forward_kernel[grid](problem, Strided.of(out), float(eps), *x.shape[1:], **options)


def group_norm_act_backward(grad: Tensor, x: Tensor, *given: Any) -> None:
    """``(grad, x, weight, bias, scale, shift, eps, activation, dx, dweight, dbias, dscale, dshift)``; None is not
    wanted."""
    weight, bias, scale, shift, eps, activation, dx, *others = given
    samples, groups, channels, positions = x.shape
    make = torch.empty if x.numel() else torch.zeros
    sums = make((samples, groups, 2, channels), dtype=torch.float32, device=x.device)
    if x.numel():
        problem, options = _problem(x, weight, bias, scale, shift), _Tile.of(x).options(int(activation))
        with torch.cuda.device_of(x):
            tensors = problem, Strided.of(unit_stride(grad)), Strided.of(dx), sums
            backward_kernel[samples * groups,](*tensors, float(eps), groups, channels, positions, **options)
    add_up_runs(*sums.unbind(2), (weight, bias, scale), others)
