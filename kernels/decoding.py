"""A token of each row of logits: ``mmkern.reference.decoding``, without a sort. What else the family has is in
``absorbing.py``, ``masked_decode.py`` and ``probabilities.py``. A program has a row, which it walks over a tile at a time.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from mmkern.kernels.absorbing import absorbing_score_entropy, absorbing_score_entropy_backward, absorbing_step
from mmkern.kernels.masked_decode import masked_decode_step
from mmkern.kernels.philox import uniform
from mmkern.kernels.probabilities import renormalize, token_log_prob, token_log_prob_backward
from mmkern.kernels.scalar_math import div, log, log1p
from mmkern.kernels.token_selection import (
    LEAST_MASS,
    Boundary,
    Row,
    Scale,
    are_kept,
    boundary_by,
    largest_of,
    logits_of,
    surprise_of,
    totals,
    weights_of,
)

from mmkern.backends.token_rows import TokenRows

__all__ = [
    "absorbing_score_entropy",
    "absorbing_score_entropy_backward",
    "absorbing_step",
    "masked_decode_step",
    "renormalize",
    "sample_tokens",
    "token_log_prob",
    "token_log_prob_backward",
]

_BLOCK = 2048
_PER_WARP = 128


@triton.jit
def _distances(row, scale, boundary, log_total, entropy, first, seen, BLOCK: tl.constexpr):
    """Of a tile: of each surprise to the entropy, as bits in their order; and its weight, 0 where it is not kept."""
    logit = logits_of(row, first, BLOCK)
    weight = weights_of(logit, scale)
    kept, seen = are_kept(logit, weight, boundary, seen)
    distance = tl.abs(surprise_of(tl.where(kept, logit, scale.top), scale, log_total) - entropy)
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

    top, is_bad = largest_of(row, BLOCK)
    scale = Scale(top, tl.where(temperature == 0, 1.0, 1.0 / temperature))
    key, ties = boundary_by(row, scale, top_k, top_p, is_bad, BLOCK)
    boundary = Boundary(key, ties, min_p)

    mass, surprise = totals(row, scale, boundary, BLOCK)
    log_total = tl.log(mass)
    entropy = log_total + surprise / mass
    farthest = tl.full([], 9223372036854775807, tl.int64)
    before, least = tl.zeros([], tl.float64), tl.full([], 0.0, tl.float64)
    if (typical_p < 1) & ~is_bad:
        least = tl.maximum(typical_p * mass, LEAST_MASS)
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
        score = tl.where(temperature == 0, (logits_of(row, first, BLOCK) == top).to(tl.float32), score)
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
