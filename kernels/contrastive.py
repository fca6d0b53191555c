"""Launchers of the contrastive family, whose scores live in tiles: the tile loop of ``hyperbolic_pairs.py`` with other ends.

Forward, a tile leaves the log-sum-exps of its rows and of its columns, which are then merged. Backward, a block of pairs at
a time has its weights in memory. The sigmoid loss asks for no other pair's score, and makes its gradients on the way.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf, prod
from typing import Any

import torch
import triton
import triton.language as tl
from mmkern.kernels.hyperbolic_pairs import LORENTZ_DISTANCE, AllPairs, Pair, float_or_tensor
from mmkern.kernels.rows import scalar
from mmkern.kernels.scalar_math import INFINITY, div, exp, log, log1p
from torch import Tensor

BLOCK_SIDE = 4096  # of the weights that a backward has at a time: 64 MB of floats


@triton.jit
def _product(score, x_term, y_term, c):
    return score, score


DOT = Pair(None, _product, None, None, None, None)


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def _is_diagonal(i, j, diagonal):
    """Pairs with ``j == i + diagonal``."""
    return j.to(tl.int32)[None, :] == (i + diagonal).to(tl.int32)[:, None]


@triton.jit
def _is_there(i, j, n, m):
    return (i < n)[:, None] & (j < m)[None, :]


@triton.jit
def _is_positive(i, j, n, m, positives, positives_stride, diagonal):
    """Those of the diagonal and, if there is a mask, of that."""
    is_positive = _is_diagonal(i, j, diagonal)
    if positives is not None:
        at = positives + i[:, None] * positives_stride + j[None, :]
        is_positive = is_positive | (tl.load(at, _is_there(i, j, n, m), 0) != 0)
    return is_positive


# Log-sum-exps


@triton.jit
def _log_sum(scores, AXIS: tl.constexpr):
    top = tl.max(scores, AXIS)
    shift = tl.where(tl.abs(top) < INFINITY, top, 0.0)
    total = tl.sum(exp(scores - tl.expand_dims(shift, AXIS)), AXIS)
    # 0, infinity and NaN have no digits of a logarithm.
    return tl.where((total > 0) & (total < INFINITY), shift + log(total), tl.where(total == 0, -INFINITY, total))


@triton.jit
def _log_sums(given, value, i, j, n, m, tile_i, tile_j, tiles_j):
    """``given``: room for those of rows [tiles_j, n] and of columns [tiles_i, m].

    Those of positive pairs likewise with a mask; else a row has one at most, whose score goes where the result will be.
    """
    (
        row_parts, column_parts, positive_rows, positive_columns, positives, positives_stride, logit_scale, sign,
        diagonal,
    ) = given  # fmt: skip
    score = scalar(logit_scale) * sign * value
    there = _is_there(i, j, n, m)
    is_positive = _is_positive(i, j, n, m, positives, positives_stride, diagonal)
    at_row, at_column = tile_j * n + i, tile_i * m + j
    if positives is not None:
        chosen = tl.where(there & is_positive, score, -INFINITY)
        tl.store(positive_rows + at_row, _log_sum(chosen, 1), i < n)
        tl.store(positive_columns + at_column, _log_sum(chosen, 0), j < m)
    else:
        tl.store(positive_rows + i[:, None] + 0 * j[None, :], score, there & is_positive)
        tl.store(positive_columns + 0 * i[:, None] + j[None, :], score, there & is_positive)
    others = tl.where(there & ~is_positive, score, -INFINITY)
    tl.store(row_parts + at_row, _log_sum(others, 1), i < n)
    tl.store(column_parts + at_column, _log_sum(others, 0), j < m)


@triton.jit
def _log_sum_and_gradient(logs, grads, at, count):
    return tl.load(logs + at, at < count, INFINITY), tl.load(grads + at, at < count, 0.0)


@triton.jit
def _softmax_gradient(score, logs, grads, positive_logs, positive_grads, at, count, positives, is_positive):
    log_sum, grad = _log_sum_and_gradient(logs, grads, at, count)
    if positives is not None:
        positive_log_sum, positive_grad = _log_sum_and_gradient(positive_logs, positive_grads, at, count)
        log_sum = tl.where(is_positive, positive_log_sum, log_sum)
        grad = tl.where(is_positive, positive_grad, grad)
    return grad * exp(score - log_sum)


# ∂/∂s_ij = g_i exp(s - rows_i) + h_j exp(s - columns_j)
@triton.jit
def _log_sum_gradients(given, s, c, i, j, n, m, tile, VALUE: tl.constexpr):
    """Of the values; ``given`` has room for a part of the scale's gradient from each tile."""
    (
        rows_grad, columns_grad, positive_rows_grad, positive_columns_grad, rows, columns, positive_rows,
        positive_columns, positives, positives_stride, logit_scale, sign, diagonal, scale_parts,
    ) = given  # fmt: skip
    value = s
    if VALUE is not None:
        value = VALUE(s, c)
    by = scalar(logit_scale) * sign
    score = by * value
    is_positive = _is_positive(i, j, n, m, positives, positives_stride, diagonal)
    gradient = _softmax_gradient(
        score, rows, rows_grad, positive_rows, positive_rows_grad, i[:, None], n, positives, is_positive
    )
    gradient += _softmax_gradient(
        score, columns, columns_grad, positive_columns, positive_columns_grad, j[None, :], m, positives, is_positive
    )
    if positives is None:  # a row's only one: its log-sum-exp is its score
        alone = tl.load(positive_rows_grad + i, i < n, 0.0)[:, None]
        alone += tl.load(positive_columns_grad + j, j < m, 0.0)[None, :]
        gradient = tl.where(is_positive, alone, gradient)
    # A pair that is there has a log-sum-exp; one that is not may meet -inf, and have made NaN of it.
    gradient = tl.where(_is_there(i, j, n, m), gradient, 0.0)
    if scale_parts is not None:
        tl.store(scale_parts + tile, sign * _sum(gradient * value))
    return by * gradient


# The sigmoid loss


@triton.jit
def _sigmoid_term(product, logit_scale, logit_bias, i, j, n, m, diagonal):
    """``softplus(l)``, l with its sign, and its derivative by l without."""
    sign = tl.where(j.to(tl.int32)[None, :] == (i + diagonal).to(tl.int32)[:, None], -1.0, 1.0)
    logit = sign * tl.fma(product, logit_scale, logit_bias)
    less = exp(-tl.abs(logit))
    share = div(1.0, 1 + less)
    loss = tl.where(logit < 0, 0.0, logit) + log1p(less)
    slope = sign * tl.where(logit < 0, less * share, share)
    mask = (i < n)[:, None] & (j < m)[None, :]
    return tl.where(mask, loss, 0.0), tl.where(mask, slope, 0.0)


@triton.jit
def _sigmoid_loss(given, value, i, j, n, m, tile_i, tile_j, tiles_j):
    loss_parts, logit_scale, logit_bias, diagonal = given
    loss, _ = _sigmoid_term(value, scalar(logit_scale), scalar(logit_bias), i, j, n, m, diagonal)
    tl.store(loss_parts + tile_i * tiles_j + tile_j, _sum(loss))


@triton.jit
def _sigmoid_gradients(given, s, c, i, j, n, m, tile, VALUE: tl.constexpr):
    loss_parts, scale_parts, bias_parts, logit_scale, logit_bias, diagonal = given
    scale = scalar(logit_scale)
    loss, slope = _sigmoid_term(s, scale, scalar(logit_bias), i, j, n, m, diagonal)
    tl.store(loss_parts + tile, _sum(loss))
    tl.store(scale_parts + tile, _sum(slope * s))
    tl.store(bias_parts + tile, _sum(slope))
    return scale * slope


# Launchers


@dataclass(frozen=True)
class _Total:
    """A number that tiles add to, in a fixed order; None is not wanted."""

    out: Tensor | None
    parts: list[Tensor] = field(default_factory=list)

    def room(self, pairs: AllPairs) -> Tensor | None:
        if self.out is None:
            return None
        self.parts.append(pairs.room(prod(pairs.tiles)))
        return self.parts[-1]

    def write(self) -> None:
        if self.out is not None:
            torch.sum(torch.cat(self.parts), 0, out=self.out)


@dataclass(frozen=True)
class _Block:
    """Some rows and columns of all pairs."""

    pairs: AllPairs
    rows: slice
    columns: slice

    def diagonal(self, *, is_there: bool) -> int:
        """Where the pairs of one index lie: columns to the right of the block's own diagonal. Out of reach if not there."""
        return self.rows.start - self.columns.start if is_there else self.pairs.shape[1]


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _differentiate(
    pairs: AllPairs,
    function: Any,
    given: Callable[[_Block], tuple[Any, ...]],
    gradients: tuple[Tensor | None, Tensor | None],
    curvature: _Total,
    *,
    is_exact: bool,
) -> None:
    """A block of pairs after the other: squares, or longer ones of a short side."""
    n, m = pairs.shape
    row_slices = _slices(n, BLOCK_SIDE * max(BLOCK_SIDE // m, 1))
    column_slices = _slices(m, BLOCK_SIDE * max(BLOCK_SIDE // n, 1))
    x_total = _room_for_sums(gradients[0], len(column_slices))
    y_total = _room_for_sums(gradients[1], len(row_slices))
    for rows in row_slices:
        for columns in column_slices:
            block = _Block(pairs.part(rows, columns), rows, columns)
            block.pairs.differentiate(
                function,
                given(block),
                block.pairs.room_for_weights(is_exact=is_exact),
                (None if x_total is None else x_total[rows], None if y_total is None else y_total[columns]),
                curvature.room(block.pairs),
                adds=(columns.start > 0, rows.start > 0),
            )
    for gradient, total in zip(gradients, (x_total, y_total), strict=True):
        if gradient is not None and total is not None and total is not gradient:
            gradient.copy_(total)


def _room_for_sums(gradient: Tensor | None, terms: int) -> Tensor | None:
    if gradient is None or gradient.dtype == torch.float32 or terms == 1:
        return gradient
    return torch.empty_like(gradient, dtype=torch.float32)


def _fill(value: float, tensors: tuple[Tensor | None, ...]) -> None:
    for x in tensors:
        if x is not None:
            x.fill_(value)


@dataclass(frozen=True)
class _Scores:
    """``sign · logit_scale ·`` values, and which pairs are positive."""

    logit_scale: float | Tensor
    sign: int
    positive_mask: Tensor | None
    positive_diagonal: bool

    def given(self, block: _Block) -> tuple[Any, ...]:
        positives = None if self.positive_mask is None else self.positive_mask[block.rows, block.columns]
        return (
            None if positives is None else positives.view(torch.uint8),
            0 if positives is None else positives.stride(0),
            float_or_tensor(self.logit_scale),
            self.sign,
            block.diagonal(is_there=self.positive_diagonal),
        )


def _log_sum_exps(pairs: AllPairs, scores: _Scores, outs: tuple[Tensor, ...], products: Tensor) -> None:
    pairs = replace(pairs, is_heavy=scores.positive_mask is not None)  # else sm_80 spills
    (n, m), (tiles_i, tiles_j) = pairs.shape, pairs.tiles
    if n * m == 0:
        _fill(-inf, outs)
        return
    kinds = 1 if scores.positive_mask is None else 2
    parts = [room for _ in range(kinds) for room in (pairs.room(tiles_j, n), pairs.room(tiles_i, m))]
    single = outs[2 * kinds :]
    _fill(-inf, single)
    given = scores.given(_Block(pairs, slice(0, n), slice(0, m)))
    pairs.reduce(_log_sums, (*parts, *single, *given), products if products.numel() else None)
    for out, part in zip(outs, parts, strict=False):
        torch.logsumexp(part, 0, out=out)


def _log_sum_exps_backward(
    pairs: AllPairs,
    scores: _Scores,
    grads: tuple[Tensor, ...],
    log_sums: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, Tensor | None],
    curvature_grad: Tensor | None,
    logit_scale_grad: Tensor | None,
) -> None:
    if prod(pairs.shape) == 0:
        _fill(0.0, (*gradients, curvature_grad, logit_scale_grad))
        return
    grads = tuple(grad.contiguous() for grad in grads)
    # With 32 numbers a thread only the plainest do not spill.
    pairs = replace(pairs, is_heavy=pairs.pair is not DOT or scores.positive_mask is not None)
    curvature, logit_scale = _Total(curvature_grad), _Total(logit_scale_grad)

    def given(block: _Block) -> tuple[Any, ...]:
        sides = (block.rows, block.columns) * 2
        of_pairs = [x[side] for tensors in (grads, log_sums) for x, side in zip(tensors, sides, strict=True)]
        return *of_pairs, *scores.given(block), logit_scale.room(block.pairs)

    _differentiate(pairs, _log_sum_gradients, given, gradients, curvature, is_exact=False)
    curvature.write()
    logit_scale.write()


def pairwise_logsumexp(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor,
    positive_mask: Tensor | None,
    positive_diagonal: bool,
    keeps_products: bool,
    *outs: Tensor,
) -> None:
    scores = _Scores(logit_scale, 1, positive_mask, positive_diagonal)
    _log_sum_exps(AllPairs.of(DOT, x, y, 0.0, torch.float32), scores, outs[:4], outs[4])


def pairwise_logsumexp_backward(*given: Any) -> None:
    """The gradients of the log-sum-exps, the arguments, the outputs; then room for those of x, y and the scale."""
    grads, (x, y, logit_scale, positive_mask, positive_diagonal, _), outs = given[:4], given[4:10], given[10:15]
    scores = _Scores(logit_scale, 1, positive_mask, positive_diagonal)
    x_grad, y_grad, logit_scale_grad = given[15:]
    pairs = AllPairs.of(DOT, x, y, 0.0, torch.float32)
    _log_sum_exps_backward(pairs, scores, grads, outs[:4], (x_grad, y_grad), None, logit_scale_grad)


def lorentz_pairwise_logsumexp(
    x: Tensor,
    y: Tensor,
    curvature: float | Tensor,
    logit_scale: float | Tensor,
    positive_mask: Tensor | None,
    positive_diagonal: bool,
    keeps_products: bool,
    *outs: Tensor,
) -> None:
    scores = _Scores(logit_scale, -1, positive_mask, positive_diagonal)
    _log_sum_exps(AllPairs.of(LORENTZ_DISTANCE, x, y, curvature, torch.float32), scores, outs[:4], outs[4])


def lorentz_pairwise_logsumexp_backward(*given: Any) -> None:
    """As of ``pairwise_logsumexp``, with a curvature before the scale."""
    grads, (x, y, curvature, logit_scale, positive_mask, positive_diagonal, _), outs = (
        given[:4],
        given[4:11],
        given[11:16],
    )
    scores = _Scores(logit_scale, -1, positive_mask, positive_diagonal)
    x_grad, y_grad, curvature_grad, logit_scale_grad = given[16:]
    pairs = AllPairs.of(LORENTZ_DISTANCE, x, y, curvature, torch.float32)
    _log_sum_exps_backward(pairs, scores, grads, outs[:4], (x_grad, y_grad), curvature_grad, logit_scale_grad)


def sigmoid_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    positive_diagonal: bool,
    makes_gradients: bool,
    loss: Tensor,
    x_grad: Tensor,
    y_grad: Tensor,
    logit_scale_grad: Tensor,
    logit_bias_grad: Tensor,
) -> None:
    pairs = AllPairs.of(DOT, x, y, 0.0, torch.float32)
    n, m = pairs.shape
    _fill(0.0, (logit_scale_grad, logit_bias_grad))
    if n * m == 0:
        _fill(0.0, (loss, x_grad, y_grad))
        return
    scalars = float_or_tensor(logit_scale), float_or_tensor(logit_bias)
    loss_total = _Total(loss)
    if makes_gradients:
        totals = loss_total, _Total(logit_scale_grad), _Total(logit_bias_grad)

        def given(block: _Block) -> tuple[Any, ...]:
            diagonal = block.diagonal(is_there=positive_diagonal)
            return *(total.room(block.pairs) for total in totals), *scalars, diagonal

        pairs = replace(pairs, is_heavy=True)
        # The gradients are float32, also those of 16-bit points.
        is_exact = x.element_size() == 2
        _differentiate(pairs, _sigmoid_gradients, given, (x_grad, y_grad), _Total(None), is_exact=is_exact)
        for total in totals[1:]:
            total.write()
    else:
        diagonal = 0 if positive_diagonal else m
        pairs.reduce(_sigmoid_loss, (loss_total.room(pairs), *scalars, diagonal))
    loss_total.write()
