"""A step of masked iterative decoding: ``mmkern.reference.masked_decode``. First a program has a row, of which it reads
nothing unless it is masked; then a sample, whose positions of most doubt it finds as the largest logits are found.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from mmkern.kernels.attention_rows import rows_at
from mmkern.kernels.attention_tiles import Strided
from mmkern.kernels.philox import uniform
from mmkern.kernels.scalar_math import INFINITY, div, exp, log, log1p
from mmkern.kernels.token_selection import (
    Boundary,
    Row,
    Scale,
    are_kept,
    boundary_of,
    largest_of,
    logits_of,
    totals,
    weights_of,
)
from torch import Tensor

from mmkern.backends.masked_rows import MaskedRows

_BLOCK = 2048
_PER_WARP = 128
_MOST_DOUBT = tl.constexpr(torch.finfo(torch.float32).max)


_REGISTERS = {} if torch.version.hip else {"maxnreg": 128}  # left to choose, ptxas takes fewer, and spills


def _options(block: int) -> dict[str, int]:
    return {"BLOCK": block, "num_warps": max(1, min(block // _PER_WARP, 16)), **_REGISTERS}


@triton.jit
def _uniform_at(seed, counter, i):
    """Word i of those from a counter on."""
    v = uniform(seed, counter, i // 4 * 4, 4)
    return tl.sum(tl.where(tl.arange(0, 4)[None, :] == i % 4, v, 0.0), 1)


@triton.jit(do_not_specialize=["size", "of_sample", "counters", "rows"])
def draw_kernel(
    logits,  # Strided
    tokens,  # [rows], int64
    masked,  # [rows], uint8
    seed,  # [2], int64: key and offset
    settings,  # [samples or 1, 3]
    log_probs,  # [rows]
    out,  # [rows], int64: what was drawn
    stays,  # [rows], int64
    doubts,  # [rows]: -∞ where nothing is
    heads,
    length,
    size,
    of_sample,  # rows
    settings_stride,  # 0 where all samples share one
    counters,  # of a row
    rows,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    tl.store(stays + number, 0)
    if tl.load(masked + number) == 0:
        tl.store(out + number, tl.load(tokens + number))
        tl.store(log_probs + number, 0.0)
        tl.store(doubts + number, -INFINITY)
    else:
        row = Row(rows_at(logits, number, heads, length), None, size)
        own = settings + number // of_sample * settings_stride
        top_k, temperature, noise = tl.load(own), tl.load(own + 1), tl.load(own + 2)
        top, is_bad = largest_of(row, BLOCK)
        key, ties = tl.zeros([], tl.int64), tl.full([], 2147483647, tl.int32)
        if (top_k < size) & ~is_bad:
            key, ties = boundary_of(row, None, top_k.to(tl.float64), BLOCK)
        boundary = Boundary(key, ties, 0.0)
        mass, _ = totals(row, Scale(top, 1.0), boundary, BLOCK)

        scale = Scale(top, tl.where(temperature == 0, 1.0, 1.0 / temperature))
        seen, winner = tl.zeros([], tl.int32), tl.zeros([], tl.int64)
        best = tl.full([], -1.0, tl.float32)
        at = tl.zeros([1], tl.int64) + number * counters
        for first in range(0, size, BLOCK):
            logit = logits_of(row, first, BLOCK)
            weight = weights_of(logit, scale)
            kept, seen = are_kept(logit, weight, boundary, seen)
            v = uniform(seed, at, first, BLOCK).reshape(BLOCK)
            score = div(tl.where(kept, weight, 0.0), -log1p(-v))
            score = tl.where(temperature == 0, (logit == top).to(tl.float32), score)
            leader = tl.max(score, 0)
            winner = tl.where(leader > best, first + tl.argmax(score, 0, tie_break_left=True), winner)
            best = tl.maximum(best, leader)

        place = number + tl.arange(0, 1)
        chosen = tl.load(row.logits + winner).to(tl.float32)
        log_p = chosen - top - log(tl.zeros([1], tl.float32) + mass.to(tl.float32))
        v = _uniform_at(seed, tl.zeros([1], tl.int64) + rows.to(tl.int64) * counters, number)
        doubt = -tl.where(noise > 0, exp(log_p) - noise * log(-log1p(-v)), exp(log_p))
        tl.store(log_probs + place, tl.where(is_bad, float("nan"), log_p))
        tl.store(out + place, tl.where(is_bad, -1, winner))
        tl.store(doubts + place, tl.where(is_bad, _MOST_DOUBT, doubt))


@triton.jit(do_not_specialize=["positions"])
def mask_kernel(
    doubts,  # [samples, positions]
    tokens,  # [samples, positions], int64
    counts,  # [samples or 1], int64
    out,  # [samples, positions], int64
    stays,  # [samples, positions], int64
    positions,
    counts_stride,  # 0 where all samples share one
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + sample * counts_stride)
    if count > 0:
        first_of = sample * positions
        row = Row(doubts + first_of, None, positions)
        key, ties = boundary_of(row, None, count.to(tl.float64), BLOCK)
        boundary = Boundary(key, ties, 0.0)
        seen = tl.zeros([], tl.int32)
        for first in range(0, positions, BLOCK):
            doubt = logits_of(row, first, BLOCK)
            kept, seen = are_kept(doubt, tl.full([BLOCK], 1.0, tl.float32), boundary, seen)
            place = first_of + first + tl.arange(0, BLOCK)
            tl.store(out + place, tl.load(tokens + place, kept, 0), kept)
            tl.store(stays + place, tl.full([BLOCK], 1, tl.int64), kept)


def masked_decode_step(
    logits: Tensor,
    tokens: Tensor,
    masked: Tensor,
    seed: Tensor,
    settings: Tensor,
    counts: Tensor,
    log_probs: Tensor,
    out: Tensor,
    stays: Tensor,
) -> None:
    if tokens.numel() == 0:
        return
    rows = MaskedRows.of(logits, settings, counts)
    size = logits.shape[-1]
    with torch.cuda.device_of(logits):
        draw_kernel[(rows.rows,)](
            Strided.of(rows.logits),
            tokens,
            masked.view(torch.uint8),
            seed,
            settings,
            log_probs,
            out,
            stays,
            rows.doubts,
            rows.heads,
            rows.length,
            size,
            rows.of_sample,
            rows.settings_stride,
            rows.counters,
            rows.rows,
            **_options(min(triton.next_power_of_2(max(size, 16)), _BLOCK)),
        )
        mask_kernel[(rows.rows // rows.of_sample,)](
            rows.doubts,
            tokens,
            counts,
            out,
            stays,
            rows.of_sample,
            rows.counts_stride,
            **_options(min(triton.next_power_of_2(max(rows.of_sample, 16)), _BLOCK)),
        )
