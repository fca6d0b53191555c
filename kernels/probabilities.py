"""Probabilities of tokens: ``mmkern.reference.probabilities``. A program has a row, which it walks over a tile at a time."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from mmkern.kernels.scalar_math import INFINITY, div, exp, log
from mmkern.kernels.token_selection import Boundary, Row, Scale, are_kept, boundary_by, largest_of, logits_of, totals
from torch import Tensor

_BLOCK = 2048
_PER_WARP = 128  # where the boundary of what is kept is looked for; else twice that


def _options(size: int, per_warp: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(max(size, 16)), _BLOCK)
    return {"BLOCK": block, "num_warps": max(1, block // per_warp)}


# ---- The logarithm of one --------------------------------------------------------------------------------------------


@triton.jit
def log_prob_kernel(
    logits,  # [rows, size]
    tokens,  # [rows], int64
    log_probs,  # [rows]
    largest,  # [rows]
    log_sums,  # [rows]: lse is the sum of both
    size,
    stride,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = Row(logits + program * stride, None, size)
    top, is_bad = largest_of(row, BLOCK)
    mass = tl.zeros([1], tl.float32)
    for first in range(0, size, BLOCK):
        mass += tl.sum(exp(logits_of(row, first, BLOCK) - top), 0)
    at = program + tl.arange(0, 1)
    token = tl.load(tokens + at)
    is_token = (token >= 0) & (token < size)
    own = tl.load(row.logits + token, is_token, float("nan")).to(tl.float32)
    top, log_sum = tl.where(is_bad, float("nan"), top), tl.where(is_bad, float("nan"), log(mass))
    tl.store(largest + at, top)
    tl.store(log_sums + at, log_sum)
    tl.store(log_probs + at, own - top - log_sum)


@triton.jit
def log_prob_backward_kernel(
    grad,  # [rows]
    logits,  # [rows, size]
    tokens,  # [rows], int64
    largest,  # [rows]
    log_sums,  # [rows]
    to,  # [rows, size]
    size,
    stride,
    to_stride,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = Row(logits + program * stride, None, size)
    at = program + tl.arange(0, 1)
    token, top, log_sum = tl.load(tokens + at), tl.load(largest + at), tl.load(log_sums + at)
    upstream = tl.where((token >= 0) & (token < size), tl.load(grad + at), 0.0)
    for first in range(0, size, BLOCK):
        place = first + tl.arange(0, BLOCK)
        p = exp(logits_of(row, first, BLOCK) - top - log_sum)
        gradient = upstream * tl.where(place == token, 1 - p, -p)
        tl.store(to + program * to_stride + place, gradient.to(to.dtype.element_ty), place < size)


def _rows(x: Tensor) -> Tensor:
    """``[..., V]`` as ``[rows, V]``, a view."""
    return x.view(-1, x.shape[-1]) if x.dim() != 2 else x


def token_log_prob(logits: Tensor, tokens: Tensor, log_probs: Tensor, largest: Tensor, log_sums: Tensor) -> None:
    if tokens.numel() == 0:
        return
    x = _rows(logits)
    with torch.cuda.device_of(logits):
        log_prob_kernel[(len(x),)](
            x, tokens, log_probs, largest, log_sums, x.shape[1], x.stride(0), **_options(x.shape[1], 2 * _PER_WARP)
        )


def token_log_prob_backward(
    grad: Tensor,
    logits: Tensor,
    tokens: Tensor,
    log_probs: Tensor,
    largest: Tensor,
    log_sums: Tensor,
    to: Tensor | None,
) -> None:
    """``to`` is None where no gradient is wanted."""
    if tokens.numel() == 0 or to is None:
        return
    x, gradient = _rows(logits), _rows(to)
    with torch.cuda.device_of(logits):
        log_prob_backward_kernel[(len(x),)](
            grad.contiguous(),
            x,
            tokens,
            largest,
            log_sums,
            gradient,
            x.shape[1],
            x.stride(0),
            gradient.stride(0),
            **_options(x.shape[1], 2 * _PER_WARP),
        )


# ---- Those of the largest --------------------------------------------------------------------------------------------


@triton.jit
def renormalize_kernel(
    probs,  # [rows, size]
    filters,  # [rows or 1, 2], float32
    out,  # [rows, size]
    size,
    stride,
    filters_stride,  # 0 where the rows share one
    out_stride,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = Row(probs + program * stride, None, size)
    own = filters + program * filters_stride
    top_k, top_p = tl.load(own), tl.load(own + 1)
    odd, top = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        p = logits_of(row, first, BLOCK)
        inside = first + tl.arange(0, BLOCK) < size
        odd |= (inside & ~((p >= 0) & (p < INFINITY))).to(tl.int32)
        top = tl.where(p > top, p, top)
    is_bad = (tl.max(odd, 0) != 0) | (tl.max(top, 0) == 0)

    scale = Scale(0.0, None)
    key, ties = boundary_by(row, scale, top_k, top_p, is_bad, BLOCK)
    boundary = Boundary(key, ties, 0.0)
    mass, _ = totals(row, scale, boundary, BLOCK)
    total = tl.where(is_bad, float("nan"), mass.to(tl.float32))
    seen = tl.zeros([], tl.int32)
    for first in range(0, size, BLOCK):
        place = first + tl.arange(0, BLOCK)
        p = logits_of(row, first, BLOCK)
        kept, seen = are_kept(p, p, boundary, seen)
        share = div(tl.where(kept, p, 0.0), tl.zeros([BLOCK], tl.float32) + total)
        tl.store(out + program * out_stride + place, share.to(out.dtype.element_ty), place < size)


def renormalize(probs: Tensor, filters: Tensor, out: Tensor) -> None:
    rows, size = probs.shape
    if rows == 0:
        return
    filters_stride = filters.stride(0) if len(filters) > 1 else 0
    with torch.cuda.device_of(probs):
        renormalize_kernel[(rows,)](
            probs, filters, out, size, probs.stride(0), filters_stride, out.stride(0), **_options(size, _PER_WARP)
        )
