"""What the contrastive family means, in plain PyTorch: the log-sum-exps of all scores that a row or a column has.

With those of the negative pairs and the score of the positive one, ``−log softmax`` is
``softplus(negatives − positive)``: no digits are lost where the positive outweighs the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .hyperbolic import lorentz_pairwise_distance

Scalar = float | Tensor
LogSums = tuple[Tensor, ...]  # and the products of all pairs, or none of them


def pairwise_logsumexp(
    x: Tensor,
    y: Tensor,
    logit_scale: Scalar,
    positive_mask: Tensor | None,
    positive_diagonal: bool,
    keeps_products: bool,
) -> LogSums:
    """Of ``s_ij = scale·x_i·y_j``: see ``_log_sums``."""
    products = _wide(x) @ _wide(y).T
    return *_log_sums(logit_scale * products, positive_mask, positive_diagonal), _kept(products, keeps_products)


def lorentz_pairwise_logsumexp(
    x: Tensor,
    y: Tensor,
    curvature: Scalar,
    logit_scale: Scalar,
    positive_mask: Tensor | None,
    positive_diagonal: bool,
    keeps_products: bool,
) -> LogSums:
    """Of ``s_ij = −scale·distance(x_i, y_j)``: see ``_log_sums``."""
    x, y = _wide(x), _wide(y)
    scores = -logit_scale * lorentz_pairwise_distance(x, y, curvature)
    return *_log_sums(scores, positive_mask, positive_diagonal), _kept(x @ y.T, keeps_products)


def labelled_pairwise_logsumexp(
    x: Tensor,
    y: Tensor,
    logit_scale: Scalar,
    x_labels: Tensor,
    y_labels: Tensor,
    first_words: int,
    positive_diagonal: bool,
    keeps_products: bool,
) -> LogSums:
    """``pairwise_logsumexp`` whose positive pairs share a label of either kind; then sums of their scores, and counts.

    Labels are sets of bits, 64 a word; the first ``first_words`` words are of one kind, the others of the other.
    """
    products = _wide(x) @ _wide(y).T
    scores = logit_scale * products
    shared = [torch.zeros_like(scores, dtype=torch.bool) for _ in range(2)]
    for word in range(x_labels.shape[1]):
        shared[word >= first_words] |= (x_labels[:, word, None] & y_labels[None, :, word]) != 0
    positive = _with_diagonal(shared[0] & shared[1], positive_diagonal)
    found = *_log_sums(scores, positive, False), *_sums(scores, positive)
    return *found, *_sums(torch.ones_like(scores), positive), _kept(products, keeps_products)


def retained_pairwise_logsumexp(
    x: Tensor,
    y: Tensor,
    logit_scale: Scalar,
    x_forgotten: Tensor,
    y_forgotten: Tensor,
    positive_diagonal: bool,
    keeps_products: bool,
) -> LogSums:
    """Of ``s_ij = scale·x_i·y_j``: see ``_sums_apart``."""
    products = _wide(x) @ _wide(y).T
    found = _sums_apart(logit_scale * products, x_forgotten, y_forgotten, positive_diagonal)
    return *found, _kept(products, keeps_products)


def lorentz_retained_pairwise_logsumexp(
    x: Tensor,
    y: Tensor,
    curvature: Scalar,
    logit_scale: Scalar,
    x_forgotten: Tensor,
    y_forgotten: Tensor,
    positive_diagonal: bool,
    keeps_products: bool,
) -> LogSums:
    """Of ``s_ij = −scale·distance(x_i, y_j)``: see ``_sums_apart``."""
    x, y = _wide(x), _wide(y)
    scores = -logit_scale * lorentz_pairwise_distance(x, y, curvature)
    found = _sums_apart(scores, x_forgotten, y_forgotten, positive_diagonal)
    return *found, _kept(x @ y.T, keeps_products)


def _log_sums(scores: Tensor, positive_mask: Tensor | None, positive_diagonal: bool) -> tuple[Tensor, ...]:
    """Over rows and over columns, of pairs that are not positive, then of those that are; −inf where there is none."""
    positive = torch.zeros_like(scores, dtype=torch.bool) if positive_mask is None else positive_mask.clone()
    positive = _with_diagonal(positive, positive_diagonal)
    negatives, positives = _chosen(scores, ~positive), _chosen(scores, positive)
    return negatives.logsumexp(1), negatives.logsumexp(0), positives.logsumexp(1), positives.logsumexp(0)


def _sums_apart(
    scores: Tensor, x_forgotten: Tensor, y_forgotten: Tensor, positive_diagonal: bool
) -> tuple[Tensor, ...]:
    """As ``_log_sums`` with the diagonal, but over retained columns of a row, and over retained rows of a column.

    Then the sums of the scores of forgotten rows with forgotten columns, but of positive pairs.
    """
    positive = _with_diagonal(torch.zeros_like(scores, dtype=torch.bool), positive_diagonal)
    positives = _chosen(scores, positive)
    rows = _chosen(scores, ~positive & ~y_forgotten).logsumexp(1)
    cols = _chosen(scores, ~positive & ~x_forgotten[:, None]).logsumexp(0)
    both = x_forgotten[:, None] & y_forgotten & ~positive
    return rows, cols, positives.logsumexp(1), positives.logsumexp(0), *_sums(scores, both)


def _sums(scores: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    some = scores.where(chosen, 0.0)
    return some.sum(1), some.sum(0)


def _chosen(scores: Tensor, chosen: Tensor) -> Tensor:
    return scores.where(chosen, -torch.inf)


def _with_diagonal(positive: Tensor, is_positive: bool) -> Tensor:
    return positive.fill_diagonal_(True) if is_positive else positive


def sigmoid_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Scalar,
    logit_bias: Scalar,
    factor: float,
    positive_diagonal: bool,
    makes_gradients: bool,
) -> tuple[Tensor, ...]:
    """``factor·Σ_ij softplus(l_ij)``, ``l = scale·x·y + bias``, of the diagonal's positive pairs ``softplus(−l_ii)``.

    Then its gradients for x, y, the scale and the bias, if they are asked for; else empty ones, and zeros.
    """
    x, y = _wide(x), _wide(y)
    products = x @ y.T
    sign = torch.ones_like(products)
    if positive_diagonal:
        sign.fill_diagonal_(-1)
    logits = sign * (logit_scale * products + logit_bias)
    loss = -factor * functional.logsigmoid(-logits).sum()
    if not makes_gradients:
        return loss, x[:0], y[:0], loss.new_zeros(()), loss.new_zeros(())
    slope = factor * sign * logits.sigmoid()
    return loss, logit_scale * slope @ y, logit_scale * slope.T @ x, (slope * products).sum(), slope.sum()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _kept(products: Tensor, keeps: bool) -> Tensor:
    return products if keeps else products[:0, :0]
