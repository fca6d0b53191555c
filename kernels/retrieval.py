"""Launchers of the retrieval family: the tile loop of ``hyperbolic_pairs.py``, whose rows keep their k best.

A program walks along a share of the columns of its rows. A tile's scores, as integers of the same order, are compared with
the worst that a row keeps, and as long as a row has a better one, each row takes its best. Keys and places of all shares,
packed into one integer, are then merged: ``torch.topk`` of them has the lower index first among equals.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from mmkern.kernels.hyperbolic_pairs import LORENTZ_DISTANCE, Pair, _nearness, _terms, float_or_tensor
from mmkern.kernels.rows import scalar, unit_stride
from mmkern.kernels.scalar_math import INFINITY, div, exp, sqrt, tanh
from mmkern.kernels.score_tiles import ALL_REGISTERS, Tiling, are_copied, score_tile, squared_difference_tile
from torch import Tensor

from mmkern.reference import retrieval as reference

MOST = 64  # that a row keeps in registers; for more, the formula of the reference, a few rows at a time
_PROGRAMS = 512  # about so many share the work
_ROWS_AT_ONCE = 1 << 24  # of the formula: pairs

_SMALLEST = tl.constexpr(-(2**31))
_LARGEST = tl.constexpr(2**31 - 1)


@triton.jit
def _product(score, x_term, y_term, c):
    return score, score


@triton.jit
def _logit(score, x_term, y_term, c):
    """The column's term is its bias, c the soft-cap, or 0."""
    logit = score + y_term
    if c is not None:
        logit = c * tanh(div(logit, c))
    return logit, logit


@triton.jit
def _inverse_length(FUNCTION: tl.constexpr, sums, scalars, c, option):
    length = sqrt(sums[0])
    return (), (div(1.0, tl.where(length < 1e-12, 1e-12, length)),)


@triton.jit
def _cosine(score, x_term, y_term, c):
    cosine = score * (x_term * y_term)
    return cosine, cosine


@triton.jit
def _square(FUNCTION: tl.constexpr, sums, scalars, c, option):
    return (), (sums[0],)


@triton.jit
def _l2_s(score, x_term, y_term, c):
    scale = x_term + y_term
    return scale - 2 * score, scale


@triton.jit
def _l2_near_s(dd, x_term, y_term, c):
    return dd


@triton.jit
def _root(s, c):
    return sqrt(s)  # where rounding might make it negative, the pair is near


DOT = Pair(None, _product, None, None, None, None)
LOGITS = Pair(None, _logit, None, None, None, None)
COSINE = Pair(_inverse_length, _cosine, None, None, None, None)
L2 = Pair(_square, _l2_s, _l2_near_s, _root, None, None)


@triton.jit
def _ordered(value, NAN_FIRST: tl.constexpr):
    """An integer of the same order, above the smallest; NaN above or below all numbers, 0 as −0."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(value == value, key, _LARGEST if NAN_FIRST else _SMALLEST + 1)


@triton.jit
def _take_best(keys, j, best, at):
    """Each row's best of a tile in place of its worst, as long as some row gains by it."""
    top, worst = tl.max(keys, 1), tl.min(best, 1)
    while tl.max((top > worst).to(tl.int32), 0) != 0:
        first = tl.min(tl.where(keys == top[:, None], j[None, :], _LARGEST), 1)
        last = tl.max(tl.where(best == worst[:, None], at, -1), 1)
        leaves = (best == worst[:, None]) & (at == last[:, None]) & (top > worst)[:, None]
        best = tl.where(leaves, top[:, None], best)
        at = tl.where(leaves, first[:, None], at)
        keys = tl.where(j[None, :] == first[:, None], _SMALLEST, keys)
        top, worst = tl.max(keys, 1), tl.min(best, 1)
    return best, at


@triton.jit
def topk_kernel(
    x,  # [n, depth]
    y,  # [m, depth]
    x_terms,  # [n], float32; or None
    y_terms,  # [m], float32; or None
    packed,  # [n, shares, k], int64: key and place
    log_tops,  # [shares, n], float32: of the sums of exponentials below them; or None
    log_sums,  # [shares, n], float32; or None
    curvature,
    x_stride,
    y_stride,
    n,
    m,
    depth,
    k,
    tiles_of_share,
    shares,
    SIGN: tl.constexpr,
    SCORE: tl.constexpr,
    NEAR: tl.constexpr,
    VALUE: tl.constexpr,
    NEARNESS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The k best of ``SIGN`` times the values in a share of the columns; programs of one share follow each other."""
    blocks = tl.cdiv(n, BLOCK_I)
    share = tl.program_id(0) // blocks
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    c = curvature
    if curvature is not None:
        c = scalar(curvature)
    x_term, y_term = 0.0, tl.zeros([1, BLOCK_J], tl.float32)
    if x_terms is not None:
        x_term = tl.load(x_terms + i, i < n, 0.0)[:, None]
    # Places from k on are taken by what nothing replaces.
    slot = tl.arange(0, K)
    best = tl.zeros([BLOCK_I, K], tl.int32) + tl.where(slot < k, _SMALLEST, _LARGEST)[None, :]
    at = tl.zeros([BLOCK_I, K], tl.int32) + (-slot + _LARGEST)[None, :]
    log_top = tl.zeros([BLOCK_I], tl.float32) - INFINITY
    log_sum = tl.zeros([BLOCK_I], tl.float32)
    for tile in range(share * tiles_of_share, tl.minimum((share + 1) * tiles_of_share, tl.cdiv(m, BLOCK_J))):
        place = tile * BLOCK_J + tl.arange(0, BLOCK_J)
        j = place.to(tl.int64)
        if y_terms is not None:
            y_term = tl.load(y_terms + j, j < m, 0.0)[None, :]
        score = score_tile(x, y, x_stride, y_stride, i, j, n, m, depth, BLOCK_K)
        value, scale = SCORE(score, x_term, y_term, c)
        if NEAR is not None:
            near = (value < NEARNESS * scale) & (i < n)[:, None] & (j < m)[None, :]
            if tl.max(tl.max(near.to(tl.int32), 1), 0) != 0:
                value = NEAR(squared_difference_tile(x, y, x_stride, y_stride, i, j, n, m, depth), x_term, y_term, c)
        if VALUE is not None:
            value = VALUE(value, c)
        if log_sums is not None:
            logit = tl.where((j < m)[None, :], value, -INFINITY)
            top = tl.max(logit, 1)
            top = tl.where(top > log_top, top, log_top)
            shift = tl.where(top == -INFINITY, 0.0, top)
            log_sum = log_sum * exp(log_top - shift) + tl.sum(exp(logit - shift[:, None]), 1)
            log_top = top
        keys = tl.where((i < n)[:, None] & (j < m)[None, :], _ordered(SIGN * value, SIGN > 0), _SMALLEST)
        best, at = _take_best(keys, place, best, at)
    there = (i < n)[:, None] & (slot < k)[None, :]
    found = (best.to(tl.int64) << 32) | (-at + _LARGEST).to(tl.int64)
    tl.store(packed + (i[:, None] * shares + share) * k + slot[None, :], found, there)
    if log_sums is not None:
        tl.store(log_tops + share * n + i, log_top, i < n)
        tl.store(log_sums + share * n + i, log_sum, i < n)


def _select(
    pair: Pair,
    sign: int,
    x: Tensor,
    y: Tensor,
    terms: tuple[Tensor | None, Tensor | None],
    curvature: float | Tensor | None,
    k: int,
    values: Tensor,
    indices: Tensor,
    logs: Tensor | None = None,
) -> None:
    """The k best by ``sign`` times the pair's value, which is written."""
    x, y = unit_stride(x), unit_stride(y)
    (n, depth), m = x.shape, y.shape[0]
    if n == 0 or m == 0:
        if logs is not None:
            logs.fill_(-torch.inf)
        return
    width = triton.next_power_of_2(max(k, 16))
    tiling = Tiling.of(n, m, x.dtype, is_copied=are_copied(x, y), is_heavy=True)
    # Beside a float32 product a row has fewer registers, and they spill.
    tall, warps = (64, 4) if x.dtype.itemsize == 2 else (32, 4) if pair.near is None else (16, 8)
    tall = min(tiling.rows, 4096 // width, tall)
    blocks, tiles = triton.cdiv(n, tall), triton.cdiv(m, tiling.columns)
    tiles_of_share = triton.cdiv(tiles, max(min(_PROGRAMS // blocks, tiles), 1))
    shares = triton.cdiv(tiles, tiles_of_share)
    packed = x.new_empty((n, shares, k), dtype=torch.int64)
    log_tops, log_sums = (None, None) if logs is None else x.new_empty((2, shares, n), dtype=torch.float32)
    with torch.cuda.device_of(x):
        topk_kernel[(blocks * shares,)](
            x,
            y,
            *terms,
            packed,
            log_tops,
            log_sums,
            curvature,
            x.stride(0),
            y.stride(0),
            n,
            m,
            depth,
            k,
            tiles_of_share,
            shares,
            SIGN=sign,
            SCORE=pair.score,
            NEAR=pair.near,
            VALUE=pair.value,
            NEARNESS=_nearness(torch.float32),
            K=width,
            BLOCK_I=tall,
            BLOCK_J=tiling.columns,
            BLOCK_K=tiling.depth,
            num_warps=warps,
            enable_fp_fusion=False,
            **ALL_REGISTERS,
        )
    found = packed.flatten(1).topk(k, dim=1).values
    keys = (found >> 32).to(torch.int32)
    torch.mul((keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32), sign, out=values)
    torch.sub(2**31 - 1, found & 0xFFFFFFFF, out=indices)
    if logs is not None:
        torch.logsumexp(log_sums.log() + log_tops, 0, out=logs)


def _by_formula(name: str, k: int, args: tuple[Any, ...], outs: tuple[Tensor, ...]) -> bool:
    """Whether a row keeps more than registers hold; then some rows at a time, and their scores as a matrix."""
    if k <= MOST:
        return False
    x, *others = args
    step = max(_ROWS_AT_ONCE // others[0].shape[0], 1)
    for first in range(0, x.shape[0], step):
        found = getattr(reference, name)(x[first : first + step], *others)
        for out, part in zip(outs, found, strict=True):
            out[first : first + step] = part
    return True


def pairwise_topk(x: Tensor, y: Tensor, k: int, values: Tensor, indices: Tensor) -> None:
    if not _by_formula("pairwise_topk", k, (x, y, k), (values, indices)):
        _select(DOT, 1, x, y, (None, None), None, k, values, indices)


def cosine_pairwise_topk(x: Tensor, y: Tensor, k: int, values: Tensor, indices: Tensor) -> None:
    if not _by_formula("cosine_pairwise_topk", k, (x, y, k), (values, indices)):
        _select(COSINE, 1, x, y, _terms_of(COSINE, x, y, 0.0), None, k, values, indices)


def l2_pairwise_topk(x: Tensor, y: Tensor, k: int, values: Tensor, indices: Tensor) -> None:
    if not _by_formula("l2_pairwise_topk", k, (x, y, k), (values, indices)):
        _select(L2, -1, x, y, _terms_of(L2, x, y, 0.0), None, k, values, indices)


def lorentz_pairwise_topk(
    x: Tensor, y: Tensor, curvature: float | Tensor, k: int, values: Tensor, indices: Tensor
) -> None:
    if not _by_formula("lorentz_pairwise_topk", k, (x, y, curvature, k), (values, indices)):
        terms = _terms_of(LORENTZ_DISTANCE, x, y, curvature)
        _select(LORENTZ_DISTANCE, -1, x, y, terms, float_or_tensor(curvature), k, values, indices)


def linear_topk(
    h: Tensor,
    weight: Tensor,
    linear_bias: Tensor | None,
    k: int,
    softcap: float,
    sums_logs: bool,
    values: Tensor,
    indices: Tensor,
    logs: Tensor,
) -> None:
    if not _by_formula("linear_topk", k, (h, weight, linear_bias, k, softcap, sums_logs), (values, indices, logs)):
        cap = float(softcap) if softcap else None
        _select(LOGITS, 1, h, weight, (None, linear_bias), cap, k, values, indices, logs if sums_logs else None)


def _terms_of(pair: Pair, x: Tensor, y: Tensor, curvature: float | Tensor) -> tuple[Tensor | None, Tensor | None]:
    return _terms(pair, unit_stride(x), curvature), _terms(pair, unit_stride(y), curvature)
