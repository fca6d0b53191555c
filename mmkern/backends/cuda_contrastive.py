"""Log-sum-exps of all pairs of points on CUDA. The kernels are ``csrc/cuda/contrastive.cuh``; the structs below mirror
theirs."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from torch import Tensor

from mmkern.backends.cuda_launch import launch
from mmkern.backends.cuda_pairs import MATRIX, TILE_THREADS, WEIGHTS_TO, PairWeights, grid_of, matrix
from mmkern.backends.cuda_sums import Total
from mmkern.backends.cuda_tensors import SCALAR, address, dense_rows, scalar
from mmkern.backends.pair_blocks import blocks_of_pairs, room_for_sums

# x, y, curvature, logit_scale; mask, its stride, x_forgotten, y_forgotten, diagonal
_PROBLEM = f"{MATRIX} {MATRIX} {SCALAR} {SCALAR} PqPPq"
_LOG_SUM_ARGS = struct.Struct(f"{_PROBLEM} 6P P")  # others, positives, plain; products
_GRADIENT_ARGS = struct.Struct(f"{_PROBLEM} 4P 6P {WEIGHTS_TO} P")  # log-sum-exps; gradients; scale_partials
_MERGE_ARGS = struct.Struct("PPqq PPqq")  # parts, all, count, size


@dataclass(frozen=True)
class _Choice:
    """Which pairs are which; ``diagonal``: where j - i of positive ones lies."""

    positive_mask: Tensor | None = None
    x_forgotten: Tensor | None = None
    y_forgotten: Tensor | None = None
    diagonal: int | None = None

    def part(self, rows: slice, columns: slice) -> _Choice:
        return _Choice(
            None if self.positive_mask is None else self.positive_mask[rows, columns],
            None if self.x_forgotten is None else self.x_forgotten[rows],
            None if self.y_forgotten is None else self.y_forgotten[columns],
            None if self.diagonal is None else self.diagonal + rows.start - columns.start,
        )


def _by_mask(positive_mask: Tensor | None, positive_diagonal: bool) -> _Choice:
    mask = None if positive_mask is None else dense_rows(positive_mask)[0]
    return _Choice(positive_mask=mask, diagonal=0 if positive_diagonal else None)


def _by_forgetting(x_forgotten: Tensor, y_forgotten: Tensor, positive_diagonal: bool) -> _Choice:
    flags = x_forgotten.contiguous(), y_forgotten.contiguous()
    return _Choice(None, *flags, diagonal=0 if positive_diagonal else None)


@dataclass(frozen=True)
class _Scores:
    """``−logit_scale ·`` distances of all pairs of some rows."""

    x: Tensor
    y: Tensor
    curvature: float | Tensor
    logit_scale: float | Tensor
    choice: _Choice

    def part(self, rows: slice, columns: slice) -> _Scores:
        choice = self.choice.part(rows, columns)
        return _Scores(self.x[rows], self.y[columns], self.curvature, self.logit_scale, choice)

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.y.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        return grid_of(self.x, self.y)

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1]

    def launch(self, kernel: str, arguments: struct.Struct, *others: int) -> None:
        mask, diagonal = self.choice.positive_mask, self.choice.diagonal
        packed = arguments.pack(
            *matrix(self.x),
            *matrix(self.y),
            *scalar(self.curvature),
            *scalar(self.logit_scale),
            address(mask),
            0 if mask is None else mask.stride(0),
            address(self.choice.x_forgotten),
            address(self.choice.y_forgotten),
            self.shape[1] if diagonal is None else diagonal,  # out of reach
            *others,
        )
        launch(kernel, self.grid, TILE_THREADS, packed, self.x.device)


# ---- Forward ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """What tiles leave of the rows and of the columns, and what these make: ``kind`` is a type in score_tiles.cuh."""

    kind: str
    parts: tuple[Tensor, Tensor]
    outs: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, kind: str, grid: tuple[int, int], outs: tuple[Tensor, Tensor]) -> _Parts:
        rows, columns = (out.new_empty(count, *out.shape) for out, count in zip(outs, grid, strict=True))
        return cls(kind, (rows, columns), outs)

    def merge(self) -> None:
        sides = [
            (part.data_ptr(), out.data_ptr(), *part.shape) for part, out in zip(self.parts, self.outs, strict=True)
        ]
        blocks = -(-max(out.numel() for out in self.outs) // TILE_THREADS)
        arguments = _MERGE_ARGS.pack(*sides[0], *sides[1])
        launch(f"merge_sums<{self.kind}>", (blocks, 2), TILE_THREADS, arguments, self.outs[0].device)


def _log_sum_exps(scores: _Scores, *outs: Tensor) -> None:
    """``outs``: of others, of positives, and plain sums if there are any, over rows and over columns; the products."""
    rows, columns, positive_rows, positive_columns, *plain, products = outs
    if 0 in scores.shape:
        for slot, out in enumerate(outs):
            out.fill_(-inf if slot < 4 else 0)
        return
    others = _Parts.of("LogSum", scores.grid, (rows, columns))
    positives, merged = (positive_rows, positive_columns), [others]
    if scores.choice.positive_mask is None:
        for out in positives:
            out.fill_(-inf)
    else:
        merged.append(_Parts.of("LogSum", scores.grid, positives))
        positives = merged[-1].parts
    sums: tuple[Tensor | None, Tensor | None] = None, None
    if plain:
        merged.append(_Parts.of("PlainSum", scores.grid, (plain[0], plain[1])))
        sums = merged[-1].parts
    kept = products if products.numel() else None
    scores.launch("log_sums", _LOG_SUM_ARGS, *map(address, (*others.parts, *positives, *sums, kept)))
    for parts in merged:
        parts.merge()


# ---- Backward --------------------------------------------------------------------------------------------------------


def _log_sum_exps_backward(
    scores: _Scores, grads: Sequence[Tensor], log_sums: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> None:
    """``gradients``: room for those of x, y, the curvature and the scale."""
    if 0 in scores.shape:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return
    row_slices, column_slices = blocks_of_pairs(*scores.shape)
    blocks = [(rows, columns, scores.part(rows, columns)) for rows in row_slices for columns in column_slices]
    count = sum(part.blocks for *_, part in blocks)
    x_total = room_for_sums(gradients[0], len(column_slices))
    y_total = room_for_sums(gradients[1], len(row_slices))
    curvature, logit_scale = Total(gradients[2], count), Total(gradients[3], count)
    grads = [grad.contiguous() for grad in grads]
    for rows, columns, part in blocks:
        weights = PairWeights(part.x, part.y)
        sides = rows, columns
        numbers = [x[sides[slot % 2]].data_ptr() for given in (log_sums, grads) for slot, x in enumerate(given)]
        numbers += [0] * (10 - len(numbers))
        parts = curvature.take(part.blocks), logit_scale.take(part.blocks)
        part.launch("log_sum_weights", _GRADIENT_ARGS, *numbers, *weights.addresses, *parts)
        totals = None if x_total is None else x_total[rows], None if y_total is None else y_total[columns]
        weights.differentiate(totals, (columns.start > 0, rows.start > 0))
    curvature.finish()
    logit_scale.finish()
    for gradient, total in zip(gradients, (x_total, y_total), strict=False):
        if gradient is not None and total is not None and total is not gradient:
            gradient.copy_(total)


# ---- The ops ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LogSumExps:
    """x, y, the curvature, the scale, what ``choose`` takes, whether products are kept; ``outputs`` beside these."""

    choose: Callable[..., _Choice]
    arguments: int  # that ``choose`` takes
    outputs: int

    def forward(self, *given: Any) -> None:
        scores, outs = self._read(given)
        _log_sum_exps(scores, *outs)

    def backward(self, *given: Any) -> None:
        """The gradients of outputs, the arguments, the outputs; then room for the gradients."""
        scores, rest = self._read(given[self.outputs :])
        _log_sum_exps_backward(scores, given[: self.outputs], rest[:4], rest[self.outputs + 1 :])

    def _read(self, given: Sequence[Any]) -> tuple[_Scores, Sequence[Any]]:
        x, y, curvature, logit_scale = given[:4]
        last = 4 + self.arguments
        points = dense_rows(x)[0], dense_rows(y)[0]
        return _Scores(*points, curvature, logit_scale, self.choose(*given[4:last])), given[last + 1 :]


LOG_SUM_OPS = {
    "lorentz_pairwise_logsumexp": _LogSumExps(_by_mask, 2, 4),
    "lorentz_retained_pairwise_logsumexp": _LogSumExps(_by_forgetting, 3, 6),
}
