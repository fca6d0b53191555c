"""Log-sum-exps of all pairs, tile by tile, and their gradients: functions for the tile loop of ``hyperbolic_pairs.py``.

Which pairs are positive, and which count at all, is told by a mask, by labels that rows share, or by rows that are to be
forgotten. ``given`` begins with room for what a tile leaves of its rows, [tiles_j, n], and of its columns, [tiles_i, m];
where a row has one positive pair at most, with room for the score of that.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from mmkern.kernels.rows import scalar
from mmkern.kernels.scalar_math import INFINITY, exp, log


@triton.jit
def sum_of_tile(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def is_diagonal(i, j, diagonal):
    """Pairs with ``j == i + diagonal``."""
    return j.to(tl.int32)[None, :] == (i + diagonal).to(tl.int32)[:, None]


@triton.jit
def is_there(i, j, n, m):
    return (i < n)[:, None] & (j < m)[None, :]


@triton.jit
def _is_positive(i, j, n, m, positives, positives_stride, diagonal):
    """Those of the diagonal and, if there is a mask, of that."""
    is_positive = is_diagonal(i, j, diagonal)
    if positives is not None:
        at = positives + i[:, None] * positives_stride + j[None, :]
        is_positive = is_positive | (tl.load(at, is_there(i, j, n, m), 0) != 0)
    return is_positive


@triton.jit
def _share(i, j, n, m, x_words, y_words, words, begin, end):
    """Whether rows have a bit in common in words from ``begin`` to ``end``, of so many."""
    common = tl.zeros([i.shape[0], j.shape[0]], tl.int32)
    for word in range(begin, end):
        of_x = tl.load(x_words + i * words + word, i < n, 0)
        of_y = tl.load(y_words + j * words + word, j < m, 0)
        common = common | (of_x[:, None] & of_y[None, :])
    return common != 0


@triton.jit
def _shares_labels(i, j, n, m, x_words, y_words, first_words, words, diagonal):
    """Those of the diagonal, and of rows that share a label of either kind."""
    first = _share(i, j, n, m, x_words, y_words, words, 0, first_words)
    second = _share(i, j, n, m, x_words, y_words, words, first_words, words)
    return first & second | is_diagonal(i, j, diagonal)


@triton.jit
def _are_forgotten(x_forgotten, y_forgotten, i, j, n, m):
    rows = tl.load(x_forgotten + i, i < n, 0) != 0
    return rows[:, None], (tl.load(y_forgotten + j, j < m, 0) != 0)[None, :]


# Forward


@triton.jit
def _log_sum(scores, AXIS: tl.constexpr):
    top = tl.max(scores, AXIS)
    shift = tl.where(tl.abs(top) < INFINITY, top, 0.0)
    total = tl.sum(exp(scores - tl.expand_dims(shift, AXIS)), AXIS)
    # 0, infinity and NaN have no digits of a logarithm.
    return tl.where((total > 0) & (total < INFINITY), shift + log(total), tl.where(total == 0, -INFINITY, total))


@triton.jit
def _store_rows(parts, scores, chosen, i, n, tile_j):
    tl.store(parts + tile_j * n + i, _log_sum(tl.where(chosen, scores, -INFINITY), 1), i < n)


@triton.jit
def _store_columns(parts, scores, chosen, j, m, tile_i):
    tl.store(parts + tile_i * m + j, _log_sum(tl.where(chosen, scores, -INFINITY), 0), j < m)


@triton.jit
def _store_sums(row_parts, column_parts, values, chosen, i, j, n, m, tile_i, tile_j):
    values = tl.where(chosen, values, 0.0)
    tl.store(row_parts + tile_j * n + i, tl.sum(values, 1), i < n)
    tl.store(column_parts + tile_i * m + j, tl.sum(values, 0), j < m)


@triton.jit
def _store_alone(rows, columns, scores, chosen, i, j):
    """A positive score where the result will be."""
    tl.store(rows + i[:, None] + 0 * j[None, :], scores, chosen)
    tl.store(columns + 0 * i[:, None] + j[None, :], scores, chosen)


@triton.jit
def masked_log_sums(given, value, i, j, n, m, tile_i, tile_j, tiles_j):
    (
        row_parts, column_parts, positive_rows, positive_columns, positives, positives_stride, logit_scale, sign,
        diagonal,
    ) = given  # fmt: skip
    score = scalar(logit_scale) * sign * value
    there = is_there(i, j, n, m)
    is_positive = _is_positive(i, j, n, m, positives, positives_stride, diagonal)
    if positives is not None:
        _store_rows(positive_rows, score, there & is_positive, i, n, tile_j)
        _store_columns(positive_columns, score, there & is_positive, j, m, tile_i)
    else:
        _store_alone(positive_rows, positive_columns, score, there & is_positive, i, j)
    _store_rows(row_parts, score, there & ~is_positive, i, n, tile_j)
    _store_columns(column_parts, score, there & ~is_positive, j, m, tile_i)


@triton.jit
def labelled_log_sums(given, value, i, j, n, m, tile_i, tile_j, tiles_j):
    """With sums of positive scores, and counts."""
    (
        row_parts, column_parts, positive_rows, positive_columns, sum_rows, sum_columns, count_rows, count_columns,
        x_words, y_words, first_words, words, logit_scale, sign, diagonal,
    ) = given  # fmt: skip
    score = scalar(logit_scale) * sign * value
    there = is_there(i, j, n, m)
    is_positive = _shares_labels(i, j, n, m, x_words, y_words, first_words, words, diagonal)
    _store_rows(row_parts, score, there & ~is_positive, i, n, tile_j)
    _store_columns(column_parts, score, there & ~is_positive, j, m, tile_i)
    is_positive = there & is_positive
    _store_rows(positive_rows, score, is_positive, i, n, tile_j)
    _store_columns(positive_columns, score, is_positive, j, m, tile_i)
    _store_sums(sum_rows, sum_columns, score, is_positive, i, j, n, m, tile_i, tile_j)
    _store_sums(count_rows, count_columns, 1.0, is_positive, i, j, n, m, tile_i, tile_j)


@triton.jit
def retained_log_sums(given, value, i, j, n, m, tile_i, tile_j, tiles_j):
    """A forgotten column counts for no row, a forgotten row for no column; with sums of what both are."""
    (
        row_parts, column_parts, positive_rows, positive_columns, sum_rows, sum_columns, x_forgotten, y_forgotten,
        logit_scale, sign, diagonal,
    ) = given  # fmt: skip
    score = scalar(logit_scale) * sign * value
    there = is_there(i, j, n, m)
    is_positive = is_diagonal(i, j, diagonal)
    rows, columns = _are_forgotten(x_forgotten, y_forgotten, i, j, n, m)
    _store_alone(positive_rows, positive_columns, score, there & is_positive, i, j)
    others = there & ~is_positive
    _store_rows(row_parts, score, others & ~columns, i, n, tile_j)
    _store_columns(column_parts, score, others & ~rows, j, m, tile_i)
    _store_sums(sum_rows, sum_columns, score, others & rows & columns, i, j, n, m, tile_i, tile_j)


# Backward. ∂/∂s_ij = g_i exp(s - rows_i) + h_j exp(s - columns_j); of plain sums, g_i + h_j.


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


@triton.jit
def _sum_gradient(rows_grad, columns_grad, i, j, n, m):
    return tl.load(rows_grad + i, i < n, 0.0)[:, None] + tl.load(columns_grad + j, j < m, 0.0)[None, :]


@triton.jit
def _of_values(gradient, value, by, sign, scale_parts, tile, i, j, n, m):
    """From the gradient of scores; a tile leaves its part of the scale's."""
    # A pair that is there has a log-sum-exp; one that is not may meet -inf, and have made NaN of it.
    gradient = tl.where(is_there(i, j, n, m), gradient, 0.0)
    if scale_parts is not None:
        tl.store(scale_parts + tile, sign * sum_of_tile(gradient * value))
    return by * gradient


@triton.jit
def masked_gradients(given, s, c, i, j, n, m, tile, VALUE: tl.constexpr):
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
        alone = _sum_gradient(positive_rows_grad, positive_columns_grad, i, j, n, m)
        gradient = tl.where(is_positive, alone, gradient)
    return _of_values(gradient, value, by, sign, scale_parts, tile, i, j, n, m)


@triton.jit
def labelled_gradients(given, s, c, i, j, n, m, tile, VALUE: tl.constexpr):
    (
        rows_grad, columns_grad, positive_rows_grad, positive_columns_grad, sum_rows_grad, sum_columns_grad, rows,
        columns, positive_rows, positive_columns, x_words, y_words, first_words, words, logit_scale, sign, diagonal,
        scale_parts,
    ) = given  # fmt: skip
    value = s
    if VALUE is not None:
        value = VALUE(s, c)
    by = scalar(logit_scale) * sign
    score = by * value
    is_positive = _shares_labels(i, j, n, m, x_words, y_words, first_words, words, diagonal)
    gradient = _softmax_gradient(
        score, rows, rows_grad, positive_rows, positive_rows_grad, i[:, None], n, x_words, is_positive
    )
    gradient += _softmax_gradient(
        score, columns, columns_grad, positive_columns, positive_columns_grad, j[None, :], m, x_words, is_positive
    )
    plain = _sum_gradient(sum_rows_grad, sum_columns_grad, i, j, n, m)
    gradient += tl.where(is_positive, plain, 0.0)
    return _of_values(gradient, value, by, sign, scale_parts, tile, i, j, n, m)


@triton.jit
def retained_gradients(given, s, c, i, j, n, m, tile, VALUE: tl.constexpr):
    (
        rows_grad, columns_grad, positive_rows_grad, positive_columns_grad, sum_rows_grad, sum_columns_grad, rows,
        columns, _, _, x_forgotten, y_forgotten, logit_scale, sign, diagonal, scale_parts,
    ) = given  # fmt: skip
    value = s
    if VALUE is not None:
        value = VALUE(s, c)
    by = scalar(logit_scale) * sign
    score = by * value
    forgotten_rows, forgotten_columns = _are_forgotten(x_forgotten, y_forgotten, i, j, n, m)
    # What does not count may outweigh what does past all bounds.
    of_row = _softmax_gradient(score, rows, rows_grad, None, None, i[:, None], n, None, None)
    of_column = _softmax_gradient(score, columns, columns_grad, None, None, j[None, :], m, None, None)
    gradient = tl.where(forgotten_columns, 0.0, of_row) + tl.where(forgotten_rows, 0.0, of_column)
    plain = _sum_gradient(sum_rows_grad, sum_columns_grad, i, j, n, m)
    gradient = tl.where(forgotten_rows & forgotten_columns, plain, gradient)
    alone = _sum_gradient(positive_rows_grad, positive_columns_grad, i, j, n, m)
    gradient = tl.where(is_diagonal(i, j, diagonal), alone, gradient)
    return _of_values(gradient, value, by, sign, scale_parts, tile, i, j, n, m)
