"""Launchers of the vocabulary family: the tile loop of ``score_tiles.py``, whose rows are the input's and columns tokens.

A program walks along a share of the tokens with some of the rows that have a target, and keeps the greatest logit and a
sum of exponentials for each; what the shares leave is merged. Backward, logits are formed again, a panel of tokens at a
time: their gradients are in memory for two products, one of which has then summed up all rows.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from mmkern.kernels.rows import scalar
from mmkern.kernels.scalar_math import INFINITY, div, exp, tanh
from mmkern.kernels.score_tiles import (
    ALL_REGISTERS,
    Chosen,
    Tiling,
    Weights,
    are_copied,
    launch_product,
    rounded_to_tf32,
    score_tile,
    tile_position,
)
from torch import Tensor

from mmkern.backends.pair_blocks import room_for_sums
from mmkern.reference import vocabulary as reference

_PROGRAMS = 512  # about so many share the work
_PANEL = 1 << 24  # gradients of logits in memory at a time: 64 MB, or those of 1024 tokens
_NARROWEST = 1024
_TILES_TALL = 8


@triton.jit
def _logits(product, bias, j, m, softcap, inverse_temperature):
    """And their slopes by the products."""
    logit, slope = product, scalar(inverse_temperature)
    if bias is not None:
        logit += tl.load(bias + j, j < m, 0.0).to(tl.float32)[None, :]
    if softcap is not None:
        cap = scalar(softcap)
        bent = tanh(div(logit, cap))
        logit, slope = cap * bent, slope * tl.fma(-bent, bent, 1.0)
    return scalar(inverse_temperature) * logit, slope


@triton.jit
def _weights_of(token_weights, j, m):
    weights = (j < m).to(tl.float32)
    if token_weights is not None:
        weights = tl.load(token_weights + j, j < m, 0.0)
    return weights[None, :]


@triton.jit
def _are_targets(wanted, first, BLOCK_J: tl.constexpr):
    """Among the tokens from ``first`` on."""
    place = wanted - first
    place = tl.where((place >= 0) & (place < BLOCK_J), place, -1).to(tl.int32)
    return tl.arange(0, BLOCK_J)[None, :] == place[:, None]


@triton.jit
def log_sums_kernel(
    x,  # [n, depth]
    y,  # [m, depth]
    bias,  # [m]; or None
    token_weights,  # [m], float32; or None
    target,  # [n], int64
    places,  # [n], int64: of rows with a target, as many as count says
    count,  # one int32
    positive,  # [n], float32: the targets' logits
    tops,  # [shares, n], float32: the greatest of the other logits
    sums,  # [shares, n], float32: of their exponentials below it
    totals,  # [shares, n], float32: of weighted logits; or None
    softcap,  # float; or None
    inverse_temperature,
    x_stride,
    y_stride,
    n,
    m,
    depth,
    tiles_of_share,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Some rows with a share of the tokens; programs of one share follow each other."""
    blocks = tl.cdiv(n, BLOCK_I)
    share = tl.program_id(0) // blocks
    slot = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    chosen = tl.load(count)
    if tl.program_id(0) % blocks * BLOCK_I >= chosen:
        return
    i = tl.load(places + slot, slot < chosen, n)
    wanted = tl.load(target + i, i < n, -1)
    top = tl.zeros([BLOCK_I], tl.float32) - INFINITY
    log_sum = tl.zeros([BLOCK_I], tl.float32)
    own = tl.zeros([BLOCK_I], tl.float32)
    total = tl.zeros([BLOCK_I], tl.float32)
    begin, end = share * tiles_of_share, tl.minimum((share + 1) * tiles_of_share, tl.cdiv(m, BLOCK_J))
    for tile in range(begin, end):
        token = tile * BLOCK_J + tl.arange(0, BLOCK_J)
        j = token.to(tl.int64)
        product = score_tile(x, y, x_stride, y_stride, i, j, n, m, depth, BLOCK_K)
        logit, _ = _logits(product, bias, j, m, softcap, inverse_temperature)
        is_token = (token < m)[None, :]
        is_target = _are_targets(wanted, tile * BLOCK_J, BLOCK_J)
        own += tl.sum(tl.where(is_target, logit, 0.0), 1)
        if totals is not None:
            total += tl.sum(tl.where(is_token, logit * _weights_of(token_weights, j, m), 0.0), 1)
        other = tl.where(is_token & ~is_target, logit, -INFINITY)
        greatest = tl.max(other, 1)
        greatest = tl.where(greatest > top, greatest, top)
        shift = tl.where(tl.abs(greatest) < INFINITY, greatest, 0.0)
        log_sum = log_sum * exp(top - shift) + tl.sum(exp(other - shift[:, None]), 1)
        top = greatest
    is_here = (wanted >= begin * BLOCK_J) & (wanted < tl.minimum(end * BLOCK_J, m))
    tl.store(positive + i, own, is_here & (i < n))
    at = share * n + i
    tl.store(tops + at, top, i < n)
    tl.store(sums + at, log_sum, i < n)
    if totals is not None:
        tl.store(totals + at, total, i < n)


@triton.jit
def logit_gradients_kernel(
    x,  # [n, depth]
    y,  # [m, depth]
    bias,  # [m]; or None
    token_weights,  # [m], float32; or None
    target,  # [n], int64
    places,  # [n], int64: of rows with a target, as many as count says
    count,  # one int32
    others,  # [n], float32
    others_grad,  # [n], float32
    positive_grad,  # [n], float32
    totals_grad,  # [n], float32; or None
    gradients,  # [n, m], float32, contiguous: of products, a row for each place
    bias_parts,  # [tiles_i, m], float32; None is not wanted
    softcap,  # float; or None
    inverse_temperature,
    x_stride,
    y_stride,
    n,
    m,
    depth,
    first,  # of the tokens
    tiles_i,
    tiles_j,
    TF32: tl.constexpr,
    TILES_TALL: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program takes one tile."""
    tile_i, tile_j = tile_position(TILES_TALL, tiles_i, tiles_j)
    chosen = tl.load(count)
    if tile_i * BLOCK_I >= chosen:
        return
    slot = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    i = tl.load(places + slot, slot < chosen, n)
    j = tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
    product = score_tile(x, y, x_stride, y_stride, i, j, n, m, depth, BLOCK_K)
    logit, slope = _logits(product, bias, j, m, softcap, inverse_temperature)
    log_sum = tl.load(others + i, i < n, INFINITY)
    log_sum = tl.where(log_sum == -INFINITY, INFINITY, log_sum)  # no weight, not 0/0
    gradient = tl.load(others_grad + i, i < n, 0.0)[:, None] * exp(logit - log_sum[:, None])
    wanted = tl.load(target + i, i < n, -1)
    is_target = _are_targets(wanted, first + tile_j * BLOCK_J, BLOCK_J)
    gradient = tl.where(is_target, tl.load(positive_grad + i, i < n, 0.0)[:, None], gradient)
    if totals_grad is not None:
        gradient += tl.load(totals_grad + i, i < n, 0.0)[:, None] * _weights_of(token_weights, j, m)
    mask = (i < n)[:, None] & (j < m)[None, :]
    gradient = tl.where(mask, gradient * slope, 0.0)
    if bias_parts is not None:
        tl.store(bias_parts + tile_i * m + j, tl.sum(gradient, 0), j < m)
    if TF32:
        gradient = rounded_to_tf32(gradient)
    tl.store(gradients + slot[:, None] * m + j[None, :], gradient, mask)


@dataclass(frozen=True)
class _Problem:
    """What both kernels take of a call, and how many programs they ask for."""

    x: Tensor
    y: Tensor
    bias: Tensor | None
    token_weights: Tensor | None
    target: Tensor
    rows: Chosen
    softcap: float | None
    inverse_temperature: float

    @classmethod
    def of(
        cls,
        x: Tensor,
        y: Tensor,
        bias: Tensor | None,
        token_weights: Tensor | None,
        target: Tensor,
        softcap: float,
        inverse_temperature: float,
        ignore_index: int,
    ) -> _Problem:
        rows = Chosen.of(target == ignore_index)
        return cls(x, y, bias, token_weights, target, rows, softcap or None, float(inverse_temperature))

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.y.shape[0]

    def tiling(self, widest: int) -> Tiling:
        return Tiling.large(*self.shape, self.x.dtype, widest, is_copied=are_copied(self.x, self.y))

    def part(self, tokens: slice) -> _Problem:
        bias, weights = (None if of is None else of[tokens] for of in (self.bias, self.token_weights))
        return replace(self, y=self.y[tokens], bias=bias, token_weights=weights)

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.y, self.bias, self.token_weights, self.target, self.rows.places, self.rows.count

    def numbers(self) -> tuple[float | int | None, ...]:
        strides = self.x.stride(0), self.y.stride(0)
        return self.softcap, self.inverse_temperature, *strides, *self.shape, self.x.shape[1]


def _constants(tiling: Tiling) -> dict[str, Any]:
    return {
        "BLOCK_I": tiling.rows,
        "BLOCK_J": tiling.columns,
        "BLOCK_K": tiling.depth,
        "num_warps": tiling.warps,
        "enable_fp_fusion": False,
        **ALL_REGISTERS,
    }


def linear_logsumexp(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    softcap: float,
    inverse_temperature: float,
    ignore_index: int,
    sums_logits: bool,
    others: Tensor,
    positive: Tensor,
    totals: Tensor,
) -> None:
    problem = _Problem.of(input, linear_weight, linear_bias, weight, target, softcap, inverse_temperature, ignore_index)
    is_plain = linear_bias is None and not softcap and not sums_logits
    n, tiling = len(input), problem.tiling(128 if is_plain else 64)  # of more numbers, wider ones spill
    if n == 0:
        return
    blocks, tiles = tiling.grid(*problem.shape)
    tiles_of_share = triton.cdiv(tiles, max(min(_PROGRAMS // blocks, tiles), 1))
    shares = triton.cdiv(tiles, tiles_of_share)
    parts = input.new_empty((2 + sums_logits, shares, n), dtype=torch.float32)
    positive.fill_(torch.nan)  # of targets that are no token
    with torch.cuda.device_of(input):
        log_sums_kernel[(blocks * shares,)](
            *problem.tensors(),
            positive,
            parts[0],
            parts[1],
            parts[2] if sums_logits else None,
            *problem.numbers(),
            tiles_of_share,
            **_constants(tiling),
        )
    torch.logsumexp(parts[1].log() + parts[0], 0, out=others)
    torch.sum(parts[2:], (0, 1), out=totals)
    for out in (others, positive, totals):
        out.masked_fill_(target == ignore_index, 0.0)


def linear_logsumexp_backward(
    others_grad: Tensor,
    positive_grad: Tensor,
    totals_grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    softcap: float,
    inverse_temperature: float,
    ignore_index: int,
    sums_logits: bool,
    others: Tensor,
    positive: Tensor,
    totals: Tensor,
    input_grad: Tensor | None,
    linear_weight_grad: Tensor | None,
    linear_bias_grad: Tensor | None,
) -> None:
    problem = _Problem.of(input, linear_weight, linear_bias, weight, target, softcap, inverse_temperature, ignore_index)
    of_rows = others, others_grad.contiguous(), positive_grad.contiguous()
    of_totals = totals_grad.contiguous() if sums_logits else None
    n, m = problem.shape
    width = max(_PANEL // max(n, 1) // 128 * 128, _NARROWEST)  # of whole tiles, whose rows are stored by 16 bytes
    panels = [slice(start, min(start + width, m)) for start in range(0, m, width)]
    input_total = room_for_sums(input_grad, len(panels))
    if input_total is not None:
        input_total.zero_()
    for tokens in panels:
        part = problem.part(tokens)
        bias_parts = None
        if linear_bias_grad is not None:
            bias_parts = input.new_zeros(part.tiling(64).grid(*part.shape)[0], part.shape[1], dtype=torch.float32)
        with torch.cuda.device_of(input):
            weights = _gradients_of_products(part, (*of_rows, of_totals), bias_parts, tokens.start)
            if input_total is not None:
                launch_product(weights, part.y, input, None, input_total, adds=tokens.start > 0)
            if linear_weight_grad is not None:
                launch_product(weights.T, input, part.y, None, linear_weight_grad[tokens])
        if linear_bias_grad is not None and bias_parts is not None:
            linear_bias_grad[tokens] = bias_parts.sum(0)
    if input_grad is not None and input_total is not None and input_total is not input_grad:
        input_grad.copy_(input_total)


def _gradients_of_products(
    problem: _Problem, of_rows: tuple[Tensor | None, ...], bias_parts: Tensor | None, first: int
) -> Weights:
    """Of the rows with a target, one beside the other."""
    tiling = problem.tiling(64)
    tiles = tiling.grid(*problem.shape)
    values = problem.x.new_empty(problem.shape, dtype=torch.float32)
    logit_gradients_kernel[(prod(tiles),)](
        *problem.tensors(),
        *of_rows,
        values,
        bias_parts,
        *problem.numbers(),
        first,
        *tiles,
        TF32=problem.x.element_size() == 2,
        TILES_TALL=_TILES_TALL,
        **_constants(tiling),
    )
    return Weights(values, None, tiling, rows=problem.rows)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    softcap: float,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    mean: bool,
    loss: Tensor,
    input_grad: Tensor,
    linear_weight_grad: Tensor,
    linear_bias_grad: Tensor,
) -> None:
    """In four products, as the other op: of logits that are not kept."""
    call = (input, linear_weight, linear_bias, weight, target, softcap, 1.0, ignore_index, bool(label_smoothing))
    found = input.new_empty((3, input.shape[0]), dtype=torch.float32).unbind()
    linear_logsumexp(*call, *found)
    row_loss = _RowLoss(weight, target, linear_weight.shape[0], ignore_index, label_smoothing, z_loss, mean)
    loss.copy_(row_loss.of(*found))
    gradients = input_grad, linear_weight_grad, None if linear_bias is None else linear_bias_grad
    linear_logsumexp_backward(*row_loss.gradients(*found), *call, *found, *gradients)


@dataclass(frozen=True)
class _RowLoss:
    """What ``reference.cross_entropy`` makes of the log-sum-exps, and its gradients."""

    token_weights: Tensor | None
    target: Tensor
    vocabulary: int
    ignore_index: int
    label_smoothing: float
    z_loss: float
    mean: bool

    def of(self, others: Tensor, positive: Tensor, totals: Tensor) -> Tensor:
        return reference.cross_entropy(
            others,
            positive,
            totals,
            self.token_weights,
            self.target,
            vocabulary=self.vocabulary,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            reduction="mean" if self.mean else "sum",
        )

    def gradients(self, others: Tensor, positive: Tensor, totals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = self.target != self.ignore_index
        weights = reference.weights_of_targets(self.token_weights, self.target, self.vocabulary, self.ignore_index)
        share, z_loss = (1 / weights.sum(), self.z_loss / seen.sum()) if self.mean else (1.0, self.z_loss)
        weights = (1 - self.label_smoothing) * share * weights
        of_totals = self.label_smoothing / self.vocabulary * share
        whole = self.vocabulary if self.token_weights is None else self.token_weights.sum()
        of_log_sums = of_totals * whole + 2 * z_loss * torch.logaddexp(others, positive)
        wrong, right = torch.sigmoid(others - positive), torch.sigmoid(positive - others)
        return (
            ((weights + of_log_sums) * wrong).where(seen, 0.0),
            (of_log_sums * right - weights * wrong).where(seen, 0.0),
            torch.zeros_like(totals).where(~seen, -of_totals),
        )
