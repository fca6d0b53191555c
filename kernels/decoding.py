"""A token of each row of logits: ``mmkern.reference.decoding``, without a sort.

A program has a row, which it walks over a tile at a time. Where the largest end, by number or by mass, it finds bit by bit:
the largest key of which, with all above it, there are as many. Masses are summed in float64, so that it does not hang on
the order.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from mmkern.kernels.philox import uniform
from mmkern.kernels.scalar_math import INFINITY, div, exp, log, log1p

from mmkern.backends.token_rows import TokenRows

_LEAST_MASS = tl.constexpr(1e-300)  # one is kept in any case
_BLOCK = 4096
_PER_WARP = 256


class Row(NamedTuple):
    logits: Any
    allowed: Any  # words of 64 tokens; or None
    size: Any


class Scale(NamedTuple):
    """``exp((logit - top)·inverse)`` is a token's weight."""

    top: Any
    inverse: Any


class Boundary(NamedTuple):
    """Kept are tokens of larger keys and the first so many of this one, if their weight is that large."""

    key: Any
    ties: Any
    least: Any


@triton.jit
def _logits(row, first, BLOCK: tl.constexpr):
    """Of tokens from ``first`` on; -∞ of what is not allowed, or no token."""
    token = first + tl.arange(0, BLOCK)
    logit = tl.load(row.logits + token, token < row.size, -INFINITY).to(tl.float32)
    if row.allowed is not None:
        word = tl.load(row.allowed + token // 64, token < row.size, 0)
        logit = tl.where(((word >> (token % 64)) & 1) != 0, logit, -INFINITY)
    return logit


@triton.jit
def _keys(logit):
    """From 0 to 2³² - 1, in the order of the logits; both zeros have one."""
    bits = (logit + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def _weights(logit, scale):
    return exp((logit - scale.top) * scale.inverse)


@triton.jit
def _mass(row, scale, key, BLOCK: tl.constexpr):
    """Of tokens with this key or a larger one; without a scale, how many there are."""
    total = tl.zeros([1], tl.float64)
    for first in range(0, row.size, BLOCK):
        logit = _logits(row, first, BLOCK)
        weight = tl.full([BLOCK], 1.0, tl.float32)
        if scale is not None:
            weight = _weights(logit, scale)
        total += tl.sum(tl.where((_keys(logit) >= key) & (logit > -INFINITY), weight, 0.0).to(tl.float64), 0)
    return tl.sum(total, 0)


@triton.jit
def _boundary(row, scale, least, BLOCK: tl.constexpr):
    """The largest key of which, with all above it, the mass is ``least``, and how many of that key it takes; or 0."""
    key = tl.zeros([1], tl.int64)
    for step in range(32):
        larger = key + (tl.full([1], 1, tl.int64) << (31 - step))
        key = tl.where(_mass(row, scale, larger, BLOCK) >= least, larger, key)
    found = tl.sum(key, 0)
    above = _mass(row, scale, found + 1, BLOCK)
    bits = (found - 2147483648).to(tl.int32)
    logit = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    weight = tl.full([1], 1.0, tl.float32)
    if scale is not None:
        weight = _weights(tl.zeros([1], tl.float32) + logit, scale)
    ties = tl.sum(tl.ceil((least - above) / weight.to(tl.float64)), 0)
    return found, tl.minimum(tl.maximum(ties, 1.0), 2147483647.0).to(tl.int32)


@triton.jit
def _are_kept(logit, weight, boundary, seen):
    """Of a tile, before which so many had the boundary's key; and how many have it in the end."""
    key = _keys(logit)
    is_tie = (key == boundary.key).to(tl.int32)
    rank = seen + tl.cumsum(is_tie, 0) - is_tie
    kept = (key > boundary.key) | ((is_tie != 0) & (rank < boundary.ties))
    return kept & (weight >= boundary.least) & (logit > -INFINITY), seen + tl.sum(is_tie, 0)


@triton.jit
def _surprise(logit, scale, log_total):
    return log_total - (logit.to(tl.float64) - scale.top) * scale.inverse


@triton.jit
def _distances(row, scale, boundary, log_total, entropy, first, seen, BLOCK: tl.constexpr):
    """Of a tile: of each surprise to the entropy, as bits in their order; and its weight, 0 where it is not kept."""
    logit = _logits(row, first, BLOCK)
    weight = _weights(logit, scale)
    kept, seen = _are_kept(logit, weight, boundary, seen)
    distance = tl.abs(_surprise(tl.where(kept, logit, scale.top), scale, log_total) - entropy)
    return distance.to(tl.int64, bitcast=True), tl.where(kept, weight, 0.0).to(tl.float64), seen


@triton.jit
def _mass_within(row, scale, boundary, log_total, entropy, bits, BLOCK: tl.constexpr):
    """Of kept tokens with smaller distances."""
    total = tl.zeros([1], tl.float64)
    seen = tl.zeros([], tl.int32)
    for first in range(0, row.size, BLOCK):
        distance, weight, seen = _distances(row, scale, boundary, log_total, entropy, first, seen, BLOCK)
        total += tl.sum(tl.where(distance < bits, weight, 0.0), 0)
    return tl.sum(total, 0)


@triton.jit
def _totals(row, scale, boundary, BLOCK: tl.constexpr):
    """Of kept tokens: the weights, and those times ``(top - logit)·inverse``."""
    mass, surprise = tl.zeros([1], tl.float64), tl.zeros([1], tl.float64)
    seen = tl.zeros([], tl.int32)
    for first in range(0, row.size, BLOCK):
        logit = _logits(row, first, BLOCK)
        weight = _weights(logit, scale)
        kept, seen = _are_kept(logit, weight, boundary, seen)
        wide = tl.where(kept, weight, 0.0).to(tl.float64)
        mass += tl.sum(wide, 0)
        surprise += tl.sum(wide * _surprise(tl.where(kept, logit, scale.top), scale, 0.0), 0)
    return tl.sum(mass, 0), tl.sum(surprise, 0)


@triton.jit(do_not_specialize=["size"])
def sample_tokens_kernel(
    logits,  # [rows, size]
    seeds,  # [rows or 1, 2], int64: key, and the first counter of all rows
    filters,  # [rows or 1, 6], float32
    allowed,  # [rows or 1, words], int64; or None
    log_probs,  # [rows], float32
    tokens,  # [rows], int64
    size,
    logits_stride,
    seeds_stride,  # 0 where the rows share one
    filters_stride,
    allowed_stride,
    counters,  # from row to row
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    here = None
    if allowed is not None:
        here = allowed + program * allowed_stride
    row = Row(logits + program * logits_stride, here, size)
    own = filters + program * filters_stride
    top_k, temperature, top_p = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    min_p, typical_p = tl.load(own + 3), tl.load(own + 4)

    largest = tl.zeros([BLOCK], tl.float32) - INFINITY
    odd = tl.zeros([BLOCK], tl.int32)
    for first in range(0, size, BLOCK):
        logit = _logits(row, first, BLOCK)
        odd |= (~(logit < INFINITY)).to(tl.int32)
        largest = tl.maximum(largest, logit)
    top = tl.max(largest, 0)
    is_bad = (tl.max(odd, 0) != 0) | (top == -INFINITY)

    scale = Scale(top, tl.where(temperature == 0, 1.0, 1.0 / temperature))
    key, ties = tl.zeros([], tl.int64), tl.full([], 2147483647, tl.int32)
    if (top_k < size) & ~is_bad:
        key, ties = _boundary(row, None, top_k.to(tl.float64), BLOCK)
    if (top_p < 1) & ~is_bad:
        mass, _ = _totals(row, scale, Boundary(key, ties, 0.0), BLOCK)
        narrower, fewer = _boundary(row, scale, tl.maximum(top_p * mass, _LEAST_MASS), BLOCK)
        fewer = tl.where(narrower == key, tl.minimum(fewer, ties), fewer)
        ties = tl.where(narrower >= key, fewer, ties)
        key = tl.maximum(key, narrower)
    boundary = Boundary(key, ties, min_p)

    mass, surprise = _totals(row, scale, boundary, BLOCK)
    log_total = tl.log(mass)
    entropy = log_total + surprise / mass
    farthest = tl.full([], 9223372036854775807, tl.int64)
    before, least = tl.zeros([], tl.float64), tl.full([], 0.0, tl.float64)
    if (typical_p < 1) & ~is_bad:
        least = tl.maximum(typical_p * mass, _LEAST_MASS)
        bits = tl.zeros([1], tl.int64)
        for step in range(63):
            farther = bits + (tl.full([1], 1, tl.int64) << (62 - step))
            inside = _mass_within(row, scale, boundary, log_total, entropy, tl.sum(farther, 0), BLOCK)
            bits = tl.where(inside < least, farther, bits)
        farthest = tl.sum(bits, 0)
        before = _mass_within(row, scale, boundary, log_total, entropy, farthest, BLOCK)

    seen, winner = tl.zeros([], tl.int32), tl.zeros([], tl.int64)
    best, total = tl.full([], -1.0, tl.float32), tl.zeros([], tl.float64)
    tied = tl.zeros([], tl.float64)
    for first in range(0, size, BLOCK):
        distance, weight, seen = _distances(row, scale, boundary, log_total, entropy, first, seen, BLOCK)
        of_ties = tl.where(distance == farthest, weight, 0.0)
        earlier = before + tied + tl.cumsum(of_ties, 0) - of_ties
        is_near = (distance < farthest) | ((distance == farthest) & (earlier < least))
        weight = tl.where(is_near, weight, 0.0)
        tied += tl.sum(of_ties, 0)
        total += tl.sum(weight, 0)
        counter = tl.zeros([1], tl.int64) + program * counters
        v = uniform(seeds + program * seeds_stride, counter, first, BLOCK).reshape(BLOCK)
        score = div(weight.to(tl.float32), -log1p(-v))
        score = tl.where(temperature == 0, (_logits(row, first, BLOCK) == top).to(tl.float32), score)
        leader = tl.max(score, 0)
        winner = tl.where(leader > best, first + tl.argmax(score, 0, tie_break_left=True), winner)
        best = tl.maximum(best, leader)

    at = program + tl.arange(0, 1)
    chosen = tl.load(row.logits + winner).to(tl.float32)
    log_prob = (chosen - scale.top) * scale.inverse - log(tl.zeros([1], tl.float32) + total.to(tl.float32))
    tl.store(log_probs + at, tl.where(is_bad, float("nan"), log_prob))
    tl.store(tokens + at, tl.where(is_bad, -1, winner))


def sample_tokens(*given: Any) -> None:
    """The arguments of the op; log-probabilities and tokens."""
    *arguments, log_probs, tokens = given
    rows = TokenRows.of(*arguments)
    count, size = rows.logits.shape
    if count == 0:
        return
    block = min(triton.next_power_of_2(max(size, 16)), _BLOCK)
    sample_tokens_kernel[(count,)](
        *rows,
        log_probs,
        tokens,
        size,
        *rows.strides,
        rows.counters,
        BLOCK=block,
        num_warps=max(1, min(block // _PER_WARP, 16)),
    )
