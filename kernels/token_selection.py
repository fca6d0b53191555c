"""Which tokens of a row of logits are kept, the largest by number or by mass, without a sort: found bit by bit, the
largest key of which, with all above it, there are as many. Masses are summed in float64, so that it does not hang on
the order.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from mmkern.kernels.scalar_math import INFINITY, exp

LEAST_MASS = tl.constexpr(1e-300)  # one is kept in any case


class Row(NamedTuple):
    logits: Any
    allowed: Any  # words of 64 tokens; or None
    size: Any


class Scale(NamedTuple):
    """``exp((logit - top)·inverse)`` is a token's weight; without an inverse the logit itself, a probability."""

    top: Any
    inverse: Any


class Boundary(NamedTuple):
    """Kept are tokens of larger keys and the first so many of this one, if their weight is that large."""

    key: Any
    ties: Any
    least: Any


@triton.jit
def logits_of(row, first, BLOCK: tl.constexpr):
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
def weights_of(logit, scale):
    weight = logit
    if scale.inverse is not None:
        weight = exp((logit - scale.top) * scale.inverse)
    return weight


@triton.jit
def _mass(row, scale, key, BLOCK: tl.constexpr):
    """Of tokens with this key or a larger one; without a scale, how many there are."""
    total = tl.zeros([1], tl.float64)
    for first in range(0, row.size, BLOCK):
        logit = logits_of(row, first, BLOCK)
        weight = tl.full([BLOCK], 1.0, tl.float32)
        if scale is not None:
            weight = weights_of(logit, scale)
        total += tl.sum(tl.where((_keys(logit) >= key) & (logit > -INFINITY), weight, 0.0).to(tl.float64), 0)
    return tl.sum(total, 0)


@triton.jit
def boundary_of(row, scale, least, BLOCK: tl.constexpr):
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
        weight = weights_of(tl.zeros([1], tl.float32) + logit, scale)
    ties = tl.sum(tl.ceil((least - above) / weight.to(tl.float64)), 0)
    return found, tl.minimum(tl.maximum(ties, 1.0), 2147483647.0).to(tl.int32)


@triton.jit
def are_kept(logit, weight, boundary, seen):
    """Of a tile, before which so many had the boundary's key; and how many have it in the end."""
    key = _keys(logit)
    is_tie = (key == boundary.key).to(tl.int32)
    rank = seen + tl.cumsum(is_tie, 0) - is_tie
    kept = (key > boundary.key) | ((is_tie != 0) & (rank < boundary.ties))
    return kept & (weight >= boundary.least) & (logit > -INFINITY), seen + tl.sum(is_tie, 0)


@triton.jit
def surprise_of(logit, scale, log_total):
    return log_total - (logit.to(tl.float64) - scale.top) * scale.inverse


@triton.jit
def totals(row, scale, boundary, BLOCK: tl.constexpr):
    """Of kept tokens: the weights, and those times ``(top - logit)·inverse``."""
    mass, surprise = tl.zeros([1], tl.float64), tl.zeros([1], tl.float64)
    seen = tl.zeros([], tl.int32)
    for first in range(0, row.size, BLOCK):
        logit = logits_of(row, first, BLOCK)
        weight = weights_of(logit, scale)
        kept, seen = are_kept(logit, weight, boundary, seen)
        wide = tl.where(kept, weight, 0.0).to(tl.float64)
        mass += tl.sum(wide, 0)
        if scale.inverse is not None:
            surprise += tl.sum(wide * surprise_of(tl.where(kept, logit, scale.top), scale, 0.0), 0)
    return tl.sum(mass, 0), tl.sum(surprise, 0)


@triton.jit
def boundary_by(row, scale, top_k, top_p, is_bad, BLOCK: tl.constexpr):
    """Of the k largest, and of those the fewest with that share of their mass: a key, and how many of it."""
    key, ties = tl.zeros([], tl.int64), tl.full([], 2147483647, tl.int32)
    if (top_k < row.size) & ~is_bad:
        key, ties = boundary_of(row, None, top_k.to(tl.float64), BLOCK)
    if (top_p < 1) & ~is_bad:
        mass, _ = totals(row, scale, Boundary(key, ties, 0.0), BLOCK)
        narrower, fewer = boundary_of(row, scale, tl.maximum(top_p * mass, LEAST_MASS), BLOCK)
        fewer = tl.where(narrower == key, tl.minimum(fewer, ties), fewer)
        ties = tl.where(narrower >= key, fewer, ties)
        key = tl.maximum(key, narrower)
    return key, ties


@triton.jit
def largest_of(row, BLOCK: tl.constexpr):
    """The largest logit; and whether the row has NaN, +∞, or nothing above -∞."""
    largest = tl.zeros([BLOCK], tl.float32) - INFINITY
    odd = tl.zeros([BLOCK], tl.int32)
    for first in range(0, row.size, BLOCK):
        logit = logits_of(row, first, BLOCK)
        odd |= (~(logit < INFINITY)).to(tl.int32)
        largest = tl.maximum(largest, logit)
    top = tl.max(largest, 0)
    return top, (tl.max(odd, 0) != 0) | (top == -INFINITY)
