"""Absorbing-state diffusion: ``mmkern.reference.absorbing``. A program has a row, which it walks over a tile at a time; of
a row that is not masked it reads nothing.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from mmkern.kernels.attention_rows import rows_at
from mmkern.kernels.attention_tiles import Strided
from mmkern.kernels.philox import uniform
from mmkern.kernels.scalar_math import INFINITY, div, exp, expm1, log, log1p
from torch import Tensor

from mmkern.backends.absorbing_rows import AbsorbingRows
from mmkern.backends.grid_rows import four_axes, sizes, written

_BLOCK = 1024
_PER_WARP = 256


def _options(block: int) -> dict[str, Any]:
    return {"num_warps": max(1, block // _PER_WARP), "enable_fp_fusion": False}


# ---- A step ----------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    scores: Any  # of the first branch
    to_next: Any
    weights: Any  # or None of one branch
    size: Any  # V


@triton.jit
def _guided(row, first, BRANCHES: tl.constexpr, BLOCK: tl.constexpr):
    """Of tokens from ``first`` on; -∞ where it is that in a branch, or there is no token."""
    token = first + tl.arange(0, BLOCK)
    inside = token < row.size
    total = tl.load(row.scores + token, inside, -INFINITY).to(tl.float32)
    if row.weights is not None:
        least = tl.where(total < INFINITY, total, INFINITY)
        total *= tl.load(row.weights)
        for k in tl.static_range(1, BRANCHES):
            score = tl.load(row.scores + k * row.to_next + token, inside, -INFINITY).to(tl.float32)
            total = tl.fma(score, tl.load(row.weights + k), total)
            least = tl.where(score < least, score, least)
        total = tl.where(least == -INFINITY, least, total)
    return total


@triton.jit(do_not_specialize=["size", "of_sample", "counters"])
def step_kernel(
    log_scores,  # Strided: of the first branch
    tokens,  # [rows], int64
    seed,  # [2], int64: key and offset
    rates,  # [samples or 1]
    weights,  # [samples or 1, BRANCHES]; or None
    log_probs,  # [rows]
    out,  # [rows], int64
    heads,
    length,
    size,
    to_next,  # branch
    of_sample,  # rows
    rates_stride,  # 0 where all samples share one
    weights_stride,
    counters,  # of a row
    BRANCHES: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + number)
    if token != size:
        tl.store(out + number, token)
        tl.store(log_probs + number, 0.0)
    else:
        sample = number // of_sample
        own = None
        if weights is not None:
            own = weights + sample * weights_stride
        row = Row(rows_at(log_scores, number, heads, length), to_next, own, size)
        rate = tl.load(rates + sample * rates_stride)

        scores = _guided(row, 0, BRANCHES, BLOCK)
        largest, odd = scores, (~(scores < INFINITY)).to(tl.int32)
        if not ONE_TILE:
            for first in range(BLOCK, size, BLOCK):
                more = _guided(row, first, BRANCHES, BLOCK)
                largest = tl.maximum(largest, more)
                odd |= (~(more < INFINITY)).to(tl.int32)
        top = tl.max(largest, 0)
        is_bad = (tl.max(odd, 0) != 0) | ~(rate >= 0) | ((top == -INFINITY) & (rate == INFINITY))
        top = tl.where((top > -INFINITY) & (top < INFINITY), top, 0.0)

        leaders, mass = tl.full([], -1.0, tl.float32), tl.zeros([], tl.float64)
        winner, chosen = size, tl.zeros([], tl.float32)
        at = tl.zeros([1], tl.int64) + number * counters
        for first in range(0, size, BLOCK):
            if not ONE_TILE:
                scores = _guided(row, first, BRANCHES, BLOCK)
            weight = exp(scores - top)
            mass += tl.sum(weight, 0).to(tl.float64)
            v = uniform(seed, at, first, BLOCK).reshape(BLOCK)
            race = div(weight, -log1p(-v))
            leader, place = tl.max(race, 0), tl.argmax(race, 0, tie_break_left=True)
            is_ahead = (leader > leaders) & (leader > 0)
            of_leader = tl.sum(tl.where(tl.arange(0, BLOCK) == place, scores, 0.0), 0)
            winner, chosen = tl.where(is_ahead, first + place, winner), tl.where(is_ahead, of_leader, chosen)
            leaders = tl.maximum(leaders, leader)

        # In units of the largest score: what there is room for. What the tokens leave of it, MASK has.
        room = tl.exp(-top.to(tl.float64) - tl.log(rate.to(tl.float64)))
        v = tl.sum(tl.where(tl.arange(0, 4)[None, :] == size % 4, uniform(seed, at, size // 4 * 4, 4), 0.0), 1)
        of_mask = div(tl.where(room > mass, room - mass, 0.0).to(tl.float32), -log1p(-v))
        stays = tl.sum(of_mask, 0) > leaders
        stays |= winner == size
        log_p = tl.where(stays, tl.log(1 - mass / room), (chosen - top) - tl.log(tl.where(room > mass, room, mass)))
        tl.store(log_probs + number, tl.where(is_bad, float("nan"), log_p.to(tl.float32)))
        tl.store(out + number, tl.where(is_bad, -1, tl.where(stays, size, winner)))


def absorbing_step(
    log_scores: Tensor,
    tokens: Tensor,
    seed: Tensor,
    rates: Tensor,
    weights: Tensor | None,
    log_probs: Tensor,
    out: Tensor,
) -> None:
    if tokens.numel() == 0:
        return
    rows = AbsorbingRows.of(log_scores, rates, weights)
    count, heads, length = sizes(rows.first)
    size = log_scores.shape[-1] - 1
    block = min(triton.next_power_of_2(max(size, 16)), _BLOCK)
    with torch.cuda.device_of(log_scores):
        step_kernel[(count,)](
            Strided.of(rows.first),
            tokens,
            seed,
            rates,
            weights,
            log_probs,
            out,
            heads,
            length,
            size,
            rows.to_next,
            rows.of_sample,
            rows.rates_stride,
            rows.weights_stride,
            rows.counters,
            BRANCHES=rows.branches,
            ONE_TILE=size <= block,
            BLOCK=block,
            **_options(block),
        )


# ---- The loss --------------------------------------------------------------------------------------------------------


@triton.jit
def _true_score(sigma):
    """``r = 1 / (exp(σ̄) − 1)``, and its logarithm."""
    near = expm1(tl.where(sigma < 1, sigma, 1.0))
    far = exp(-tl.where(sigma < 1, 1.0, sigma))
    ratio = tl.where(sigma < 1, div(1.0, near), div(far, 1 - far))
    log_near = tl.where(near > 0, -log(tl.where(near > 0, near, 1.0)), INFINITY)
    log_ratio = tl.where(sigma < 1, log_near, -sigma - log1p(-far))
    return tl.where(sigma < INFINITY, ratio, float("nan")), log_ratio


@triton.jit
def _divergence(own, sigma):
    """``s − r·log s + r·(log r − 1)`` of a target's score, and its slope ``s − r``."""
    ratio, log_ratio = _true_score(sigma)
    d = own - log_ratio
    is_near = tl.abs(d) < 1
    more = expm1(tl.where(is_near, d, 0.0))
    score = exp(own)
    value = tl.where(is_near, ratio * (more - d), score - ratio * (1 + d))
    return value, tl.where(is_near, ratio * more, score - ratio)


@triton.jit
def _target(at, number, targets, masked, sigma, of_sample, sigma_stride, size):
    """Of a row: whether it is masked, its target, or -1 where that is no token, the target's score, and σ̄."""
    is_masked = tl.load(masked + number) != 0
    target = tl.load(targets + number)
    target = tl.where((target >= 0) & (target < size), target, -1)
    own = tl.load(at + target, is_masked & (target >= 0), float("nan")).to(tl.float32)
    return is_masked, target, own, tl.load(sigma + number // of_sample * sigma_stride)


@triton.jit(do_not_specialize=["size", "of_sample"])
def entropy_kernel(
    log_scores,  # Strided
    targets,  # [rows], int64
    masked,  # [rows], uint8
    sigma,  # [samples or 1]
    out,  # [rows]
    heads,
    length,
    size,  # V
    of_sample,  # rows
    sigma_stride,  # 0 where all samples share one
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    at = rows_at(log_scores, number, heads, length)
    is_masked, target, own, total = _target(at, number, targets, masked, sigma, of_sample, sigma_stride, size)
    others = tl.zeros([1], tl.float32)
    for first in range(0, size, BLOCK):
        token = first + tl.arange(0, BLOCK)
        inside = is_masked & (token < size) & (token != target)
        score = exp(tl.load(at + token, inside, -INFINITY).to(tl.float32))
        others += tl.sum(tl.where(inside, score, 0.0), 0)
    value, _ = _divergence(own, total)
    tl.store(out + number, tl.where(is_masked, others + value, 0.0))


@triton.jit(do_not_specialize=["size", "of_sample"])
def gradient_kernel(
    grad,  # [rows]
    log_scores,  # Strided
    targets,  # [rows], int64
    masked,  # [rows], uint8
    sigma,  # [samples or 1]
    to,  # Strided
    heads,
    length,
    size,  # V
    of_sample,  # rows
    sigma_stride,  # 0 where all samples share one
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    at, to_row = rows_at(log_scores, number, heads, length), rows_at(to, number, heads, length)
    is_masked, target, own, total = _target(at, number, targets, masked, sigma, of_sample, sigma_stride, size)
    _, slope = _divergence(own, total)
    upstream = tl.load(grad + number)
    for first in range(0, size + 1, BLOCK):
        token = first + tl.arange(0, BLOCK)
        inside = is_masked & (token < size)
        score = exp(tl.load(at + token, inside, 0.0).to(tl.float32))
        gradient = tl.where(inside, upstream * tl.where(token == target, slope, score), 0.0)
        tl.store(to_row + token, gradient.to(to.data.dtype.element_ty), token <= size)


def _shape(log_scores: Tensor, sigma: Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
    rows, heads, length = sizes(log_scores)
    size, samples = log_scores.shape[-1] - 1, log_scores.shape[0] if log_scores.dim() > 1 else 1
    block = min(triton.next_power_of_2(max(size, 16)), _BLOCK)
    return (heads, length, size, rows // samples, int(len(sigma) > 1)), {"BLOCK": block, **_options(block)}


def _bytes(masked: Tensor) -> Tensor:
    return masked.view(torch.uint8)


def absorbing_score_entropy(log_scores: Tensor, targets: Tensor, masked: Tensor, sigma: Tensor, out: Tensor) -> None:
    if targets.numel() == 0:
        return
    shape, options = _shape(log_scores, sigma)
    with torch.cuda.device_of(log_scores):
        x = Strided.of(four_axes(log_scores))
        entropy_kernel[(targets.numel(),)](x, targets, _bytes(masked), sigma, out, *shape, **options)


def absorbing_score_entropy_backward(
    grad: Tensor, log_scores: Tensor, targets: Tensor, masked: Tensor, sigma: Tensor, to: Tensor | None
) -> None:
    """``to`` is None where no gradient is wanted."""
    if targets.numel() == 0 or to is None:
        return
    shape, options = _shape(log_scores, sigma)
    given = grad.contiguous(), Strided.of(four_axes(log_scores)), targets, _bytes(masked), sigma

    def run(to: Tensor) -> None:
        gradient_kernel[(targets.numel(),)](*given, Strided.of(four_axes(to)), *shape, **options)

    with torch.cuda.device_of(log_scores):
        written((to,), run)
