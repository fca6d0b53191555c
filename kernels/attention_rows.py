"""Launchers of the attention_rows family: ``NAME(*inputs, *options, *outputs)`` and its ``NAME_backward``.

Rows are those of ``[B, H, L, D]`` in any order in memory, inputs and outputs alike: read where they lie, without a copy.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from mmkern.kernels.attention_tiles import Strided
from mmkern.kernels.rows import Blocks, scalar, unit_stride
from mmkern.kernels.scalar_math import div, log1p, sqrt
from torch import Tensor

from mmkern.backends.grid_rows import four_axes, sizes, written

_NONE = tl.constexpr(-float("inf"))  # the log-sum-exp of no key


@triton.jit
def rows_at(x, row, heads, length):
    """Where rows begin; ``row`` counts those of ``[B, H, L]``."""
    head = row // length
    offset = (head // heads) * x.strides[0] + (head % heads) * x.strides[1] + (row % length) * x.strides[2]
    return x.data + offset * x.unit


# ---- Merging ---------------------------------------------------------------------------------------------------------


@triton.jit
def _weights(lse, other_lse):
    """``exp(lse_i − lse)`` of both parts, and lse; 0, 0 and −∞ where neither saw a key."""
    top = tl.where(lse > other_lse, lse, other_lse)
    top = tl.where(top == _NONE, 0.0, top)
    first, second = tl.exp(lse - top), tl.exp(other_lse - top)
    total = first + second
    sees_none = total == 0
    divisor = tl.where(sees_none, 1.0, total)
    # One of the two is 1, so that their product is the other.
    merged = tl.where(sees_none, _NONE, top + log1p(first * second))
    return div(first, divisor), div(second, divisor), merged


@triton.jit(do_not_specialize=["rows"])
def merge_kernel(
    out,
    lse,
    other,
    other_lse,
    merged,
    merged_lse,
    heads,
    length,
    rows,
    cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program takes BLOCK_ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    a_lse = tl.load(rows_at(lse, row, heads, length), inside, 0.0)
    b_lse = tl.load(rows_at(other_lse, row, heads, length), inside, 0.0)
    w, v, total = _weights(a_lse, b_lse)
    tl.store(rows_at(merged_lse, row, heads, length), total, inside)
    a_at, b_at = rows_at(out, row, heads, length), rows_at(other, row, heads, length)
    to = rows_at(merged, row, heads, length)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (col < cols)[None, :]
        a = tl.load(a_at[:, None] + col[None, :], mask & (a_lse != _NONE)[:, None], 0.0).to(tl.float32)
        b = tl.load(b_at[:, None] + col[None, :], mask & (b_lse != _NONE)[:, None], 0.0).to(tl.float32)
        value = w[:, None] * a + v[:, None] * b
        tl.store(to[:, None] + col[None, :], value.to(merged.data.dtype.element_ty), mask)


@triton.jit
def store_tile(to, row, col, values, heads, length, mask):
    if to is not None:
        at = rows_at(to, row, heads, length)[:, None] + col[None, :]
        tl.store(at, values.to(to.data.dtype.element_ty), mask)


@triton.jit
def _store_numbers(to, row, values, heads, length, mask):
    if to is not None:
        tl.store(rows_at(to, row, heads, length), values, mask)


@triton.jit(do_not_specialize=["rows"])
def merge_backward_kernel(
    grad,
    grad_lse,
    out,
    lse,
    other,
    other_lse,
    out_grad,  # None is not wanted, here and below
    out_lse_grad,
    other_grad,
    other_lse_grad,
    heads,
    length,
    rows,
    cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``a' = w g``, ``lse_a' = w (v g·(a − b) + lse')``, and the same of the other part."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    a_lse = tl.load(rows_at(lse, row, heads, length), inside, 0.0)
    b_lse = tl.load(rows_at(other_lse, row, heads, length), inside, 0.0)
    has_a, has_b = a_lse != _NONE, b_lse != _NONE
    w, v, _ = _weights(a_lse, b_lse)
    gain = tl.zeros([BLOCK_ROWS], tl.float32)
    g_at = rows_at(grad, row, heads, length)
    a_at, b_at = rows_at(out, row, heads, length), rows_at(other, row, heads, length)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (col < cols)[None, :]
        both = mask & (has_a & has_b)[:, None]
        g = tl.load(g_at[:, None] + col[None, :], mask, 0.0).to(tl.float32)
        a = tl.load(a_at[:, None] + col[None, :], both, 0.0).to(tl.float32)
        b = tl.load(b_at[:, None] + col[None, :], both, 0.0).to(tl.float32)
        gain += tl.sum(tl.where(both, g * (a - b), 0.0), 1)
        store_tile(out_grad, row, col, tl.where(has_a[:, None], w[:, None] * g, 0.0), heads, length, mask)
        store_tile(other_grad, row, col, tl.where(has_b[:, None], v[:, None] * g, 0.0), heads, length, mask)
    from_lse = tl.load(rows_at(grad_lse, row, heads, length), inside, 0.0)
    _store_numbers(out_lse_grad, row, tl.where(has_a, w * (v * gain + from_lse), 0.0), heads, length, inside)
    _store_numbers(other_lse_grad, row, tl.where(has_b, v * (from_lse - w * gain), 0.0), heads, length, inside)


# ---- Rotary embeddings -----------------------------------------------------------------------------------------------


@triton.jit
def _members(pair, pairs, INTERLEAVED: tl.constexpr):
    """The channels of both members of each pair."""
    if INTERLEAVED:
        return 2 * pair, 2 * pair + 1
    else:  # a kernel's return does not end it
        return pair, pair + pairs


@triton.jit
def _load_row_tile(at, channel, mask):
    return tl.load(at[:, None] + channel[None, :], mask, 0.0).to(tl.float32)


@triton.jit
def _load_weight(weight, channel, mask):
    """``[1, channels]``, ones where there is none."""
    if weight is None:
        return tl.full([1, channel.shape[0]], 1.0, tl.float32)
    else:
        return tl.load(weight + channel, mask, 0.0)[None, :]


@triton.jit
def _rms_scale(squares, cols, eps):
    return div(1.0, sqrt(div(squares, cols.to(tl.float32)) + eps))


@triton.jit(do_not_specialize=["rows"])
def rotary_kernel(
    x,
    weight,  # [cols], float32, or None
    cos,
    sin,
    out,
    eps,
    heads,
    length,
    rows,
    cols,
    pairs,
    NORMALIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    PASSED: tl.constexpr,
):
    """One program takes BLOCK_ROWS rows: PAIRS pairs and, where there are any, PASSED channels that pass."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    at, to = rows_at(x, row, heads, length), rows_at(out, row, heads, length)
    pair = tl.arange(0, PAIRS)
    is_pair = pair < pairs
    mask = inside[:, None] & is_pair[None, :]
    first, second = _members(pair, pairs, INTERLEAVED)
    a, b = _load_row_tile(at, first, mask), _load_row_tile(at, second, mask)
    if PASSED > 0:
        rest = 2 * pairs + tl.arange(0, PASSED)
        rest_mask = inside[:, None] & (rest < cols)[None, :]
        passed = _load_row_tile(at, rest, rest_mask)
    if NORMALIZE:
        squares = tl.sum(a * a + b * b, 1)
        if PASSED > 0:
            squares += tl.sum(passed * passed, 1)
        scale = _rms_scale(squares, cols, scalar(eps))[:, None]
        a, b = a * scale, b * scale
        if PASSED > 0:
            passed = passed * scale
    a, b = a * _load_weight(weight, first, is_pair), b * _load_weight(weight, second, is_pair)
    c = _load_row_tile(rows_at(cos, row, heads, length), pair, mask)
    s = _load_row_tile(rows_at(sin, row, heads, length), pair, mask)
    kind = out.data.dtype.element_ty
    tl.store(to[:, None] + first[None, :], (a * c - b * s).to(kind), mask)
    tl.store(to[:, None] + second[None, :], (a * s + b * c).to(kind), mask)
    if PASSED > 0:
        passed = passed * _load_weight(weight, rest, rest < cols)
        tl.store(to[:, None] + rest[None, :], passed.to(kind), rest_mask)


@triton.jit(do_not_specialize=["rows", "rows_a_program"])
def rotary_backward_kernel(
    grad,
    x,
    weight,
    cos,
    sin,
    x_grad,  # None is not wanted
    partials,  # [programs, cols], float32: of the gradient of the weight; None is not wanted
    eps,
    heads,
    length,
    rows,
    rows_a_program,
    cols,
    pairs,
    NORMALIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    PASSED: tl.constexpr,
):
    """y' is g turned back; ``w' = Σ y' n`` with ``n = s x``; ``x' = s (n' − n mean(n' n))`` with ``n' = y' w``."""
    program = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    is_pair = pair < pairs
    first, second = _members(pair, pairs, INTERLEAVED)
    a_weight, b_weight = _load_weight(weight, first, is_pair), _load_weight(weight, second, is_pair)
    a_sum, b_sum = tl.zeros([BLOCK_ROWS, PAIRS], tl.float32), tl.zeros([BLOCK_ROWS, PAIRS], tl.float32)
    if PASSED > 0:
        rest = 2 * pairs + tl.arange(0, PASSED)
        rest_weight = _load_weight(weight, rest, rest < cols)
        rest_sum = tl.zeros([BLOCK_ROWS, PASSED], tl.float32)
    last = tl.minimum((program + 1) * rows_a_program, rows)
    for start in range(program * rows_a_program, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = row < last
        mask = inside[:, None] & is_pair[None, :]
        at, g_at = rows_at(x, row, heads, length), rows_at(grad, row, heads, length)
        c = _load_row_tile(rows_at(cos, row, heads, length), pair, mask)
        s = _load_row_tile(rows_at(sin, row, heads, length), pair, mask)
        a_grad, b_grad = _load_row_tile(g_at, first, mask), _load_row_tile(g_at, second, mask)
        a_turned, b_turned = a_grad * c + b_grad * s, b_grad * c - a_grad * s
        if PASSED > 0:
            rest_mask = inside[:, None] & (rest < cols)[None, :]
            rest_grad = _load_row_tile(g_at, rest, rest_mask)
        if NORMALIZE or partials is not None:
            a, b = _load_row_tile(at, first, mask), _load_row_tile(at, second, mask)
            if PASSED > 0:
                passed = _load_row_tile(at, rest, rest_mask)
        if NORMALIZE:
            squares = tl.sum(a * a + b * b, 1)
            if PASSED > 0:
                squares += tl.sum(passed * passed, 1)
            scale = _rms_scale(squares, cols, scalar(eps))[:, None]
            a, b = a * scale, b * scale
            if PASSED > 0:
                passed = passed * scale
        if partials is not None:
            a_sum += a_turned * a
            b_sum += b_turned * b
            if PASSED > 0:
                rest_sum += rest_grad * passed
        if x_grad is not None:
            to = rows_at(x_grad, row, heads, length)
            kind = x_grad.data.dtype.element_ty
            a_slope, b_slope = a_turned * a_weight, b_turned * b_weight
            if PASSED > 0:
                rest_slope = rest_grad * rest_weight
            if NORMALIZE:
                along = tl.sum(a_slope * a + b_slope * b, 1)
                if PASSED > 0:
                    along += tl.sum(rest_slope * passed, 1)
                mean = div(along, cols.to(tl.float32))[:, None]
                a_slope, b_slope = scale * (a_slope - a * mean), scale * (b_slope - b * mean)
                if PASSED > 0:
                    rest_slope = scale * (rest_slope - passed * mean)
            tl.store(to[:, None] + first[None, :], a_slope.to(kind), mask)
            tl.store(to[:, None] + second[None, :], b_slope.to(kind), mask)
            if PASSED > 0:
                tl.store(to[:, None] + rest[None, :], rest_slope.to(kind), rest_mask)
    if partials is not None:
        to = partials + program * cols
        tl.store(to + first, tl.sum(a_sum, 0), is_pair)
        tl.store(to + second, tl.sum(b_sum, 0), is_pair)
        if PASSED > 0:
            tl.store(to + rest, tl.sum(rest_sum, 0), rest < cols)


# ---- Launchers -------------------------------------------------------------------------------------------------------

# Programs of a backward kernel, each of which writes a part of the weight's gradient.
_PROGRAMS = 512


def _rows(x: Tensor | None) -> Strided | None:
    """A tensor ``[..., D]``."""
    return None if x is None else Strided.of(four_axes(unit_stride(x)))


def _numbers(x: Tensor | None) -> Strided | None:
    """A tensor ``[...]``, one number a row."""
    return None if x is None else Strided.of(four_axes(x[..., None]))


def _merge_options(cols: int) -> dict[str, Any]:
    blocks = Blocks.of(max(cols, 1))
    return {"BLOCK_ROWS": blocks.rows, "BLOCK": blocks.cols, "num_warps": blocks.warps, "enable_fp_fusion": False}


def merge_attention(
    out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, merged: Tensor, merged_lse: Tensor
) -> None:
    rows, heads, length = sizes(out)
    if rows == 0:
        return
    cols = out.shape[-1]
    options = _merge_options(cols)
    inputs = _rows(out), _numbers(lse), _rows(other), _numbers(other_lse)

    def run(merged: Tensor, merged_lse: Tensor) -> None:
        grid = (triton.cdiv(rows, options["BLOCK_ROWS"]),)
        merge_kernel[grid](*inputs, _rows(merged), _numbers(merged_lse), heads, length, rows, cols, **options)

    with torch.cuda.device_of(out):
        written((merged, merged_lse), run)


def merge_attention_backward(
    grad: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    other: Tensor,
    other_lse: Tensor,
    out_grad: Tensor | None,
    lse_grad: Tensor | None,
    other_grad: Tensor | None,
    other_lse_grad: Tensor | None,
) -> None:
    rows, heads, length = sizes(out)
    if rows == 0:
        return
    cols = out.shape[-1]
    options = _merge_options(cols)
    inputs = _rows(grad), _numbers(grad_lse), _rows(out), _numbers(lse), _rows(other), _numbers(other_lse)

    def run(
        out_grad: Tensor | None, lse_grad: Tensor | None, other_grad: Tensor | None, other_lse_grad: Tensor | None
    ) -> None:
        gradients = _rows(out_grad), _numbers(lse_grad), _rows(other_grad), _numbers(other_lse_grad)
        grid = (triton.cdiv(rows, options["BLOCK_ROWS"]),)
        merge_backward_kernel[grid](*inputs, *gradients, heads, length, rows, cols, **options)

    with torch.cuda.device_of(out):
        written((out_grad, lse_grad, other_grad, other_lse_grad), run)


@dataclass(frozen=True)
class _Tiles:
    """How rows of ``cols`` channels, ``2 pairs`` of them rotated, are cut: fixed by these two alone."""

    rows: int
    pairs: int
    passed: int
    warps: int

    @classmethod
    def of(cls, cols: int, pairs: int) -> _Tiles:
        rest = cols - 2 * pairs
        blocks = Blocks.of(max(cols, 1))
        passed = triton.next_power_of_2(rest) if rest else 0
        warps = max(blocks.warps, triton.next_power_of_2(cols) // 512)
        return cls(blocks.rows, triton.next_power_of_2(max(pairs, 1)), passed, min(warps, 16))

    def options(self, normalize: bool, interleaved: bool) -> dict[str, Any]:
        return {
            "NORMALIZE": normalize,
            "INTERLEAVED": interleaved,
            "BLOCK_ROWS": self.rows,
            "PAIRS": self.pairs,
            "PASSED": self.passed,
            "num_warps": self.warps,
            "enable_fp_fusion": False,
        }


def rotary_embedding(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    normalize: bool,
    interleaved: bool,
    out: Tensor,
) -> None:
    rows, heads, length = sizes(x)
    if rows == 0:
        return
    cols, pairs = x.shape[-1], cos.shape[-1]
    tiles = _Tiles.of(cols, pairs)
    inputs = _rows(x), weight, _rows(cos), _rows(sin)

    def run(out: Tensor) -> None:
        shape = heads, length, rows, cols, pairs
        grid = (triton.cdiv(rows, tiles.rows),)
        rotary_kernel[grid](*inputs, _rows(out), float(eps), *shape, **tiles.options(normalize, interleaved))

    with torch.cuda.device_of(x):
        written((out,), run)


def rotary_embedding_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    normalize: bool,
    interleaved: bool,
    x_grad: Tensor | None,
    weight_grad: Tensor | None,
) -> None:
    rows, heads, length = sizes(x)
    if rows == 0:
        if weight_grad is not None:
            weight_grad.zero_()
        return
    cols, pairs = x.shape[-1], cos.shape[-1]
    tiles = _Tiles.of(cols, pairs)
    rows_a_program = triton.cdiv(triton.cdiv(rows, tiles.rows), _PROGRAMS) * tiles.rows
    programs = triton.cdiv(rows, rows_a_program)
    partials = None if weight_grad is None else weight_grad.new_empty(programs, cols)
    inputs = _rows(grad), _rows(x), weight, _rows(cos), _rows(sin)

    def run(x_grad: Tensor | None) -> None:
        shape = heads, length, rows, rows_a_program, cols, pairs
        options = tiles.options(normalize, interleaved)
        rotary_backward_kernel[(programs,)](*inputs, _rows(x_grad), partials, float(eps), *shape, **options)

    with torch.cuda.device_of(x):
        written((x_grad,), run)
    if partials is not None:
        torch.sum(partials, 0, out=weight_grad)
