"""Launchers of the contrastive family, whose scores live in tiles: the tile loop of ``hyperbolic_pairs.py`` with other ends.

Forward, a tile leaves the log-sum-exps of its rows and of its columns, which are then merged. Backward, a block of pairs at
a time has its weights in memory. The sigmoid loss asks for no other pair's score, and makes its gradients on the way.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf, prod
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from mmkern.kernels.hyperbolic_pairs import LORENTZ_DISTANCE, AllPairs, Pair, float_or_tensor
from mmkern.kernels.log_sums import (
    is_diagonal,
    is_there,
    labelled_gradients,
    labelled_log_sums,
    masked_gradients,
    masked_log_sums,
    retained_gradients,
    retained_log_sums,
    sum_of_tile,
)
from mmkern.kernels.rows import scalar
from mmkern.kernels.scalar_math import div, exp, log1p
from torch import Tensor

from mmkern.backends.pair_blocks import blocks_of_pairs, room_for_sums


@triton.jit
def _product(score, x_term, y_term, c):
    return score, score


DOT = Pair(None, _product, None, None, None, None)


# The sigmoid loss


@triton.jit
def _sigmoid_term(product, logit_scale, logit_bias, i, j, n, m, diagonal):
    """``softplus(l)``, l with its sign, and its derivative by l without."""
    sign = tl.where(is_diagonal(i, j, diagonal), -1.0, 1.0)
    logit = sign * tl.fma(product, logit_scale, logit_bias)
    less = exp(-tl.abs(logit))
    share = div(1.0, 1 + less)
    loss = tl.where(logit < 0, 0.0, logit) + log1p(less)
    slope = sign * tl.where(logit < 0, less * share, share)
    there = is_there(i, j, n, m)
    return tl.where(there, loss, 0.0), tl.where(there, slope, 0.0)


@triton.jit
def _sigmoid_loss(given, value, i, j, n, m, tile_i, tile_j, tiles_j):
    loss_parts, logit_scale, logit_bias, diagonal = given
    loss, _ = _sigmoid_term(value, scalar(logit_scale), scalar(logit_bias), i, j, n, m, diagonal)
    tl.store(loss_parts + tile_i * tiles_j + tile_j, sum_of_tile(loss))


@triton.jit
def _sigmoid_gradients(given, s, c, i, j, n, m, tile, VALUE: tl.constexpr):
    loss_parts, scale_parts, bias_parts, logit_scale, logit_bias, diagonal = given
    scale = scalar(logit_scale)
    loss, slope = _sigmoid_term(s, scale, scalar(logit_bias), i, j, n, m, diagonal)
    tl.store(loss_parts + tile, sum_of_tile(loss))
    tl.store(scale_parts + tile, sum_of_tile(slope * s))
    tl.store(bias_parts + tile, sum_of_tile(slope))
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
    row_slices, column_slices = blocks_of_pairs(*pairs.shape)
    x_total = room_for_sums(gradients[0], len(column_slices))
    y_total = room_for_sums(gradients[1], len(row_slices))
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


def _fill(value: float, tensors: tuple[Tensor | None, ...]) -> None:
    for x in tensors:
        if x is not None:
            x.fill_(value)


@dataclass(frozen=True)
class _Choice:
    """How the kernels are told which pairs are which: functions of a tile, and what these take for a block of pairs.

    ``wholes``: how the parts of tiles make each pair of outputs, over rows and over columns; "alone" is without parts.
    """

    reduce: Any
    differentiate: Any
    given: Callable[[_Block], tuple[Any, ...]]
    wholes: tuple[Literal["log", "alone", "sum"], ...]
    is_plain: bool = False  # nothing is read but the diagonal


def _by_mask(positive_mask: Tensor | None) -> _Choice:
    def given(block: _Block) -> tuple[Any, ...]:
        if positive_mask is None:
            return None, 0
        part = positive_mask[block.rows, block.columns]
        return part.view(torch.uint8), part.stride(0)

    wholes = ("log", "alone" if positive_mask is None else "log")
    return _Choice(masked_log_sums, masked_gradients, given, wholes, positive_mask is None)


def _by_labels(x_labels: Tensor, y_labels: Tensor, first_words: int) -> _Choice:
    """Words are cut in halves: a tile has 32 bits for each pair."""
    x, y = (labels.clone(memory_format=torch.contiguous_format).view(torch.int32) for labels in (x_labels, y_labels))

    def given(block: _Block) -> tuple[Any, ...]:
        return x[block.rows], y[block.columns], 2 * first_words, x.shape[1]

    return _Choice(labelled_log_sums, labelled_gradients, given, ("log", "log", "sum", "sum"))


def _by_forgetting(x_forgotten: Tensor, y_forgotten: Tensor) -> _Choice:
    x, y = (flags.contiguous().view(torch.uint8) for flags in (x_forgotten, y_forgotten))
    return _Choice(
        retained_log_sums,
        retained_gradients,
        lambda block: (x[block.rows], y[block.columns]),
        ("log", "alone", "sum"),
    )


@dataclass(frozen=True)
class _Scores:
    """``sign · logit_scale ·`` values, and which pairs are which."""

    logit_scale: float | Tensor
    sign: int
    choice: _Choice
    positive_diagonal: bool

    def given(self, block: _Block) -> tuple[Any, ...]:
        return (
            *self.choice.given(block),
            float_or_tensor(self.logit_scale),
            self.sign,
            block.diagonal(is_there=self.positive_diagonal),
        )


_NOTHING = {"log": -inf, "alone": -inf, "sum": 0.0}


def _log_sum_exps(pairs: AllPairs, scores: _Scores, *outs: Tensor) -> None:
    """``outs`` end with the products."""
    choice, (*outs, products) = scores.choice, outs
    pairs = replace(pairs, is_heavy=not choice.is_plain)  # else sm_80 spills
    (n, m), (tiles_i, tiles_j) = pairs.shape, pairs.tiles
    sides = ((tiles_j, n), (tiles_i, m))
    wholes = [whole for whole in choice.wholes for _ in sides]
    for whole, out in zip(wholes, outs, strict=True):
        if whole == "alone" or n * m == 0:
            out.fill_(_NOTHING[whole])
    if n * m == 0:
        return
    rooms = [
        out if whole == "alone" else pairs.room(*sides[slot % 2])
        for slot, (whole, out) in enumerate(zip(wholes, outs, strict=True))
    ]
    given = scores.given(_Block(pairs, slice(0, n), slice(0, m)))
    pairs.reduce(choice.reduce, (*rooms, *given), products if products.numel() else None)
    for whole, room, out in zip(wholes, rooms, outs, strict=True):
        if whole != "alone":
            (torch.logsumexp if whole == "log" else torch.sum)(room, 0, out=out)


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
    pairs = replace(pairs, is_heavy=pairs.pair is not DOT or not scores.choice.is_plain)
    curvature, logit_scale = _Total(curvature_grad), _Total(logit_scale_grad)

    def given(block: _Block) -> tuple[Any, ...]:
        sides = block.rows, block.columns
        of_pairs = [x[sides[slot % 2]] for tensors in (grads, log_sums) for slot, x in enumerate(tensors)]
        return *of_pairs, *scores.given(block), logit_scale.room(block.pairs)

    _differentiate(pairs, scores.choice.differentiate, given, gradients, curvature, is_exact=False)
    curvature.write()
    logit_scale.write()


@dataclass(frozen=True)
class _LogSumExps:
    """An op: x, y, the curvature if there is one, the scale, what ``choose`` takes, whether the diagonal is positive..."""

    pair: Pair
    choose: Callable[..., _Choice]
    arguments: int  # that ``choose`` takes
    grads: int  # outputs that have one

    def forward(self, *given: Any) -> None:
        pairs, scores, outs = self._read(given)
        _log_sum_exps(pairs, scores, *outs)

    def backward(self, *given: Any) -> None:
        """The gradients of outputs, the arguments, the outputs; then room for those of x, y and the numbers."""
        grads = given[: self.grads]
        pairs, scores, rest = self._read(given[self.grads :])
        log_sums, gradients = rest[:4], rest[2 * len(scores.choice.wholes) + 1 :]
        x_grad, y_grad, *curvature_grad, logit_scale_grad = gradients
        _log_sum_exps_backward(
            pairs, scores, grads, log_sums, (x_grad, y_grad), *(curvature_grad or [None]), logit_scale_grad
        )

    def _read(self, given: tuple[Any, ...]) -> tuple[AllPairs, _Scores, tuple[Any, ...]]:
        is_curved = self.pair is not DOT
        x, y, curvature = given[0], given[1], given[2] if is_curved else 0.0
        logit_scale, *choice = given[2 + is_curved : 3 + is_curved + self.arguments]
        positive_diagonal, _, *rest = given[3 + is_curved + self.arguments :]
        scores = _Scores(logit_scale, -1 if is_curved else 1, self.choose(*choice), positive_diagonal)
        return AllPairs.of(self.pair, x, y, curvature, torch.float32), scores, tuple(rest)


_DOT, _LORENTZ = (_LogSumExps(pair, _by_mask, 1, 4) for pair in (DOT, LORENTZ_DISTANCE))
_LABELLED = _LogSumExps(DOT, _by_labels, 3, 6)
_RETAINED, _LORENTZ_RETAINED = (_LogSumExps(pair, _by_forgetting, 2, 6) for pair in (DOT, LORENTZ_DISTANCE))
pairwise_logsumexp, pairwise_logsumexp_backward = _DOT.forward, _DOT.backward
lorentz_pairwise_logsumexp, lorentz_pairwise_logsumexp_backward = _LORENTZ.forward, _LORENTZ.backward
labelled_pairwise_logsumexp, labelled_pairwise_logsumexp_backward = _LABELLED.forward, _LABELLED.backward
retained_pairwise_logsumexp, retained_pairwise_logsumexp_backward = _RETAINED.forward, _RETAINED.backward
lorentz_retained_pairwise_logsumexp = _LORENTZ_RETAINED.forward
lorentz_retained_pairwise_logsumexp_backward = _LORENTZ_RETAINED.backward


def sigmoid_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    factor: float,
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
        _fill(0.0 * factor, (loss, x_grad, y_grad))
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
    # At last, since weights that are 16 bits beside points of 16 would lose digits.
    torch._foreach_mul_([loss, x_grad, y_grad, logit_scale_grad, logit_bias_grad], factor)
