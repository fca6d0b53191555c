"""Contrastive losses of all pairs of a batch, whose scores are never a matrix in memory.

Row i of ``x`` and row i of ``y`` belong together. With the log-sum-exp ``n_i`` over the pairs that do not, and the
score ``p_i`` of the one that does, ``−log softmax`` is ``−log σ(p_i − n_i)``, whose digits do not cancel.

With a ``group`` of processes (torch.distributed) the batch is that of all of them. Each holds some of the rows of x and
the rows of y that belong to them, any number, 0 included, and all call the loss, and its backward, together:

* "mean" and "sum" are over the whole batch, the same number in each process; "none" gives the losses of its own rows.
* Each process gets the whole gradient of its own rows of x and y, through the scores of all processes. It is that of
  the one loss of all, taken once: of "mean" or "sum", which all differentiate with the same upstream gradient (not
  counted once a process), or with "none" of the sum of all processes' ``upstream · losses``.
* Of logit_scale, logit_bias and curvature each process gets its part, and the *sum* over the processes is the gradient.
  So it is with the weights that made x and y. DDP and FSDP take the mean over their processes instead: there, multiply
  the loss by the number in ``group``, ``(loss * group.size()).backward()``. Where DDP joins several groups, each with a
  batch of its own, that gives the mean over the batches.

Blocks of y go round in a ring, the next one on its way while scores with this one are summed up; no process holds more
than two of others. Backward, and for SigLIP forward too, gradients of y travel behind the blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from mmkern.reference import contrastive as reference

from ._checks import NUMBER, check_number, floating_rows, matrices, scalar
from ._contrastive import (
    check_pairs,
    join,
    keeps_products,
    log_sums,
    lorentz_pairwise_logsumexp,
    losses_of,
    pairwise_logsumexp,
    reduced,
    wide,
)
from ._define import define, named, needs_gradient
from ._outputs import summed
from .hyperbolic import Reduction, lorentz_entailment_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mmkern.distributed.contrastive import Shards

_sigmoid_loss = define(
    "sigmoid_loss(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, float factor, bool positive_diagonal, "
    "bool makes_gradients) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    family="contrastive",
    reference=reference.sigmoid_loss,
    output=(
        summed(lambda args: ()),
        summed(lambda args: (args[0].shape[0] if args[-1] else 0, args[0].shape[1])),
        summed(lambda args: (args[1].shape[0] if args[-1] else 0, args[1].shape[1])),
        summed(lambda args: ()),
        summed(lambda args: ()),
    ),
    requires=[
        floating_rows("x", "y", axes=2),
        matrices("x", "y"),
        scalar("logit_scale", beside="x"),
        scalar("logit_bias", beside="x"),
    ],
    kinds={"logit_scale": "scalar", "logit_bias": "scalar"},
    second_derivative=False,
    makes_gradients=True,
    is_checked_by_signature=False,
)


def info_nce_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor,
    *,
    normalize: bool = False,
    label_smoothing: float = 0.0,
    positive_mask: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    """The symmetric contrastive loss of CLIP: ``½ (−log softmax_j s_ii − log softmax_i s_ii)``, ``s = scale·x yᵀ``.

    Args:
        x, y: ``[N, D]``, of one dtype; rows of one index belong together.
        logit_scale: the factor of the scores, such as ``exp(log_scale)``; a float or a 0-d tensor, which may need a
            gradient.
        normalize: divide the rows by their length first.
        label_smoothing: ε: the share of the target that is spread over all pairs of a row, and of a column.
        positive_mask: ``[N, N]`` bool: pairs that belong together, in place of the diagonal. The loss then is
            ``log Σ_j exp(s_ij) − log Σ_{j positive} exp(s_ij)``; a row without a positive pair counts 0.
        hard_negatives: ``[K, D]`` for all rows of x, or ``[N, K, D]`` for each its own: further rows that x is told
            apart from. With a group, each process has its own, for its own rows.
        reduction: "mean", "sum" or "none".
        group: processes that hold the batch together, each some rows of x and the rows of y that belong to them.
            "mean" and "sum" are over all rows, "none" gives the losses of its own. Gradients of x and y are whole;
            those of numbers, like those of weights behind x and y, are parts, whose sum over the processes is the
            gradient: where the mean is taken, as under DDP and FSDP, multiply the loss by ``group.size()``. More in
            this module's docstring. Not beside a positive_mask.
    Returns: 0-d, or ``[N]`` with "none"; float32, or float64 for that. No second derivative.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Radford et al. 2021 (CLIP), figure 3; with several positives, Lin et al. 2022 (EgoVLP), eq. 5.
    """
    op = "info_nce_loss"
    check_pairs(op, x, y, reduction)
    check_number(op, "label_smoothing", label_smoothing, "a number from 0 to 1", 0, 1)
    if label_smoothing and positive_mask is not None:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}, expected 0 beside a positive_mask")
    if group is not None and positive_mask is not None:
        raise ValueError(f"{op}: positive_mask is a {type(positive_mask).__name__}, expected None beside a group")
    if hard_negatives is not None:
        _check_hard_negatives(op, x, hard_negatives)
    if normalize:
        x, y = functional.normalize(x, dim=-1), functional.normalize(y, dim=-1)
        hard_negatives = None if hard_negatives is None else functional.normalize(hard_negatives, dim=-1)
    shards, (rows, cols, positive_rows, positive_cols) = log_sums(
        op,
        pairwise_logsumexp,
        x,
        y,
        logit_scale,
        pairs=(positive_mask,),
        diagonal=positive_mask is None,
        group=group,
    )
    if hard_negatives is not None:
        rows = torch.logaddexp(rows, _of_hard_negatives(x, hard_negatives, logit_scale))
    if positive_mask is not None:
        positive_rows, positive_cols = _certain(positive_rows), _certain(positive_cols)
    losses = losses_of(rows, cols, positive_rows, positive_cols)
    if label_smoothing:
        apart = _smoothing(x, y, hard_negatives, logit_scale, positive_rows, shards)
        losses = losses + label_smoothing * apart
    return reduced(losses, reduction, shards)


def _certain(positive: Tensor) -> Tensor:
    """Where there is no positive pair, its score is such that the loss is 0."""
    return positive.where(positive != -torch.inf, torch.inf)


def _check_hard_negatives(op: str, x: Tensor, negatives: Tensor) -> None:
    floating_rows("x", "hard_negatives", axes=2)(op, {"x": x, "hard_negatives": negatives})
    n, width = x.shape
    if negatives.shape[-1] != width or negatives.dim() > 3 or (negatives.dim() == 3 and negatives.shape[0] != n):
        got = list(negatives.shape)
        raise ValueError(f"{op}: hard_negatives has shape {got}, expected [K, {width}] or [{n}, K, {width}]")


def _of_hard_negatives(x: Tensor, negatives: Tensor, logit_scale: float | Tensor) -> Tensor:
    """Of each row of x, the log-sum-exp of its scores with them."""
    if negatives.dim() == 3:
        return (logit_scale * torch.einsum("nd,nkd->nk", wide(x), wide(negatives))).logsumexp(1)
    keeps = keeps_products(x, negatives, logit_scale)
    return pairwise_logsumexp(x, negatives, logit_scale, None, False, keeps)[0]


def _smoothing(
    x: Tensor,
    y: Tensor,
    negatives: Tensor | None,
    logit_scale: float | Tensor,
    positive: Tensor,
    shards: Shards | None,
) -> Tensor:
    """``s_ii`` less the mean score of the row, and of the column: the means are scores with the mean row."""
    x, y = wide(x), wide(y)
    sums, rows = torch.stack([x.sum(0), y.sum(0)]), x.shape[0]
    if shards is not None:
        sums, rows = shards.sum(sums), shards.rows
    of_all, seen = sums
    columns = rows
    if negatives is not None:
        seen = seen + wide(negatives).sum(-2)
        columns += negatives.shape[-2]
    of_rows = logit_scale * (x * (seen / columns)).sum(-1)
    of_cols = logit_scale * (y * (of_all / rows)).sum(-1)
    apart: Tensor = positive - 0.5 * (of_rows + of_cols)
    return apart


def siglip_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    normalize: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    """SigLIP's sigmoid loss: ``−1/N Σ_ij log σ(z_ij l_ij)``, ``l = scale·x yᵀ + bias``, z = 1 where i = j, else −1.

    Args:
        x, y: ``[N, D]``, of one dtype; rows of one index belong together.
        logit_scale, logit_bias: floats or 0-d tensors, which may need a gradient.
        normalize: divide the rows by their length first.
        group: processes that hold the batch together, each some rows of x and the rows of y that belong to them.
            The loss is that of all rows. Gradients of x and y are whole; those of numbers, like those of weights behind
            x and y, are parts, whose sum over the processes is the gradient: where the mean is taken, as under DDP and
            FSDP, multiply the loss by ``group.size()``. More in this module's docstring.
    Returns: 0-d; float32, or float64 for that. Where a gradient is needed, all gradients are made in the same pass over
        the scores. No second derivative.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Zhai et al. 2023 (SigLIP), algorithm 1.
    """
    op = "siglip_loss"
    check_pairs(op, x, y, "mean")
    if normalize:
        x, y = functional.normalize(x, dim=-1), functional.normalize(y, dim=-1)
    raw, numbers = _sigmoid_loss, (logit_scale, logit_bias)
    options = True, needs_gradient(x, y, *numbers)
    if group is None:
        loss: Tensor = named(op, raw, raw, x, y, *numbers, _share(x.shape[0]), *options)[0]
        return loss
    x, y, *numbers, _, _, _ = named(op, raw, raw._prepare, (x, y, *numbers, 1.0, *options))
    shards = join(op, group, x, y, *numbers)
    return shards.sigmoid_loss(raw, x, y, *numbers, _share(shards.rows), *options)


def _share(rows: int) -> float:
    """Of a row in the mean, which none has where there is none."""
    return 1 / rows if rows else float("nan")


def lorentz_contrastive_loss(
    x: Tensor,
    y: Tensor,
    curvature: float | Tensor,
    logit_scale: float | Tensor,
    *,
    entailment_weight: float = 0.0,
    min_radius: float = 0.1,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    """MERU's loss: that of CLIP with ``s_ij = −scale·distance(x_i, y_j)``, and how far x lies outside the cones of y.

    Args:
        x: points ``[N, D]``, the specific concepts (images).
        y: points ``[N, D]``, the general ones (texts) that belong to them.
        curvature: c, a float or a 0-d tensor above 0.
        logit_scale: a float or a 0-d tensor.
        entailment_weight: of ``lorentz_entailment_loss(y, x)``; 0.2 in the paper.
        min_radius: K of the cones, in units of 1/√c.
        reduction: "mean", "sum" or "none".
        group: processes that hold the batch together, each some rows of x and the rows of y that belong to them.
            "mean" and "sum" are over all rows, "none" gives the losses of its own. Gradients of x and y are whole;
            those of numbers, like those of weights behind x and y, are parts, whose sum over the processes is the
            gradient: where the mean is taken, as under DDP and FSDP, multiply the loss by ``group.size()``. More in
            this module's docstring.
    Returns: 0-d, or ``[N]`` with "none"; float32, or float64 for that. No second derivative. Near and coinciding points
        keep their digits.
    Raises: as ``info_nce_loss``.
    Source: Desai et al. 2023 (MERU), §3.
    """
    op = "lorentz_contrastive_loss"
    check_pairs(op, x, y, reduction)
    if not isinstance(entailment_weight, NUMBER):
        raise TypeError(f"{op}: entailment_weight is {type(entailment_weight).__name__}, expected a float")
    shards, found = log_sums(op, lorentz_pairwise_logsumexp, x, y, curvature, logit_scale, pairs=(None,), group=group)
    losses = losses_of(*found)
    if entailment_weight:
        entailed = lorentz_entailment_loss(wide(y), wide(x), curvature, min_radius, reduction="none")
        losses = losses + entailment_weight * entailed
    return reduced(losses, reduction, shards)
