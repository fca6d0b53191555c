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

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from mmkern.reference import contrastive as reference

from ._checks import NUMBER, Arguments, check_number, check_tensor, floating_rows, matrices, positive, scalar
from ._define import Op, define
from ._define import named as _named
from ._define import needs_gradient as _needs_gradient
from ._layouts import dense_rows
from ._outputs import summed
from .hyperbolic import Reduction, lorentz_entailment_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mmkern.distributed.contrastive import Shards

_ROWS = summed(lambda args: (args[0].shape[0],))
_COLS = summed(lambda args: (args[1].shape[0],))
_PRODUCTS = summed(lambda args: (args[0].shape[0], args[1].shape[0]) if args[-1] else (0, 0))

# Up to so many pairs their products are kept from forward to backward, 1 MB of floats: forming them again would be a
# fourth of the work.
_KEPT_PAIRS = 1 << 18


def _check_positive_mask(op: str, args: Arguments) -> None:
    x, y = args["x"], args["y"]
    check_tensor(op, "positive_mask", args["positive_mask"], x, (torch.bool,), (x.shape[0], y.shape[0]), "x")


def _dense_positive_mask(args: Arguments) -> Arguments:
    if args["positive_mask"] is not None:
        args["positive_mask"] = dense_rows(args["positive_mask"])
    return args


def _logsumexp(name: str, *, curved: bool) -> Op:
    curvature, check = ("Tensor curvature, ", [positive("curvature", beside="x")]) if curved else ("", [])
    return define(
        f"{name}(Tensor x, Tensor y, {curvature}Tensor logit_scale, Tensor? positive_mask, bool positive_diagonal, "
        "bool keeps_products) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        family="contrastive",
        reference=getattr(reference, name),
        output=(_ROWS, _COLS, _ROWS, _COLS, _PRODUCTS),
        requires=[
            floating_rows("x", "y", axes=2),
            matrices("x", "y"),
            *check,
            scalar("logit_scale", beside="x"),
            _check_positive_mask,
        ],
        kinds={"curvature": "scalar", "logit_scale": "scalar", "positive_mask": "fixed"},
        arrange=_dense_positive_mask,
        second_derivative=False,
        backward_reads_outputs=True,
        differentiable=4,
        is_checked_by_signature=False,
    )


_pairwise_logsumexp = _logsumexp("pairwise_logsumexp", curved=False)
_lorentz_pairwise_logsumexp = _logsumexp("lorentz_pairwise_logsumexp", curved=True)


_sigmoid_loss = define(
    "sigmoid_loss(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, bool positive_diagonal, "
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


def _keeps_products(x: Tensor, y: Tensor, *others: Any) -> bool:
    return x.shape[0] * y.shape[0] <= _KEPT_PAIRS and _needs_gradient(x, y, *others)


def _check_pairs(op: str, x: Any, y: Any, reduction: str) -> None:
    floating_rows("x", "y", axes=2)(op, {"x": x, "y": y})
    if x.shape != y.shape or x.dim() != 2:
        raise ValueError(f"{op}: y has shape {list(y.shape)}, expected [N, D] as x, whose shape is {list(x.shape)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{op}: reduction is {reduction!r}, expected "mean", "sum" or "none"')


def _shards(op: str, group: ProcessGroup, x: Tensor, y: Tensor, *numbers: Any) -> Shards:
    from mmkern.distributed.contrastive import join  # with what joins processes, which one alone is spared

    return join(op, group, x, y, *numbers)


def _reduced(losses: Tensor, reduction: Reduction, shards: Shards | None) -> Tensor:
    if reduction == "none":
        return losses
    if shards is not None:
        total = shards.total(losses.sum())
        return total / shards.rows if reduction == "mean" else total
    return losses.mean() if reduction == "mean" else losses.sum()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
    _check_pairs(op, x, y, reduction)
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
    shards, (rows, cols, positive_rows, positive_cols) = _log_sums(
        op, _pairwise_logsumexp, x, y, logit_scale, mask=positive_mask, group=group
    )
    if hard_negatives is not None:
        rows = torch.logaddexp(rows, _of_hard_negatives(x, hard_negatives, logit_scale))
    if positive_mask is not None:
        positive_rows, positive_cols = _certain(positive_rows), _certain(positive_cols)
    losses = _losses(rows, cols, positive_rows, positive_cols)
    if label_smoothing:
        apart = _smoothing(x, y, hard_negatives, logit_scale, positive_rows, shards)
        losses = losses + label_smoothing * apart
    return _reduced(losses, reduction, shards)


def _log_sums(
    op: str, raw: Op, x: Tensor, y: Tensor, *numbers: Any, mask: Tensor | None, group: ProcessGroup | None
) -> tuple[Shards | None, Sequence[Tensor]]:
    """Over rows and columns of the whole batch, of pairs that are not positive, then of those that are."""
    if group is None:
        keeps = _keeps_products(x, y, *numbers)
        return None, _named(op, raw, raw, x, y, *numbers, mask, mask is None, keeps)[:-1]
    args = _named(op, raw, raw._prepare, (x, y, *numbers, None, True, False))
    shards = _shards(op, group, *args[:-3])
    return shards, shards.log_sums(raw, *args)


def _losses(rows: Tensor, cols: Tensor, positive_rows: Tensor, positive_cols: Tensor) -> Tensor:
    """Half of ``log(e^others + e^positive) − positive`` of either direction."""
    return -0.5 * (functional.logsigmoid(positive_rows - rows) + functional.logsigmoid(positive_cols - cols))


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
        return (logit_scale * torch.einsum("nd,nkd->nk", _wide(x), _wide(negatives))).logsumexp(1)
    keeps = _keeps_products(x, negatives, logit_scale)
    return _pairwise_logsumexp(x, negatives, logit_scale, None, False, keeps)[0]


def _smoothing(
    x: Tensor,
    y: Tensor,
    negatives: Tensor | None,
    logit_scale: float | Tensor,
    positive: Tensor,
    shards: Shards | None,
) -> Tensor:
    """``s_ii`` less the mean score of the row, and of the column: the means are scores with the mean row."""
    x, y = _wide(x), _wide(y)
    sums, rows = torch.stack([x.sum(0), y.sum(0)]), x.shape[0]
    if shards is not None:
        sums, rows = shards.sum(sums), shards.rows
    of_all, seen = sums
    columns = rows
    if negatives is not None:
        seen = seen + _wide(negatives).sum(-2)
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
    _check_pairs(op, x, y, "mean")
    if normalize:
        x, y = functional.normalize(x, dim=-1), functional.normalize(y, dim=-1)
    raw, call = _sigmoid_loss, (x, y, logit_scale, logit_bias, True, _needs_gradient(x, y, logit_scale, logit_bias))
    if group is None:
        total, rows = _named(op, raw, raw, *call)[0], x.shape[0]
    else:
        args = _named(op, raw, raw._prepare, call)
        shards = _shards(op, group, *args[:-2])
        total, rows = shards.sigmoid_loss(raw, *args), shards.rows
    loss: Tensor = total / rows
    return loss


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
    _check_pairs(op, x, y, reduction)
    if not isinstance(entailment_weight, NUMBER):
        raise TypeError(f"{op}: entailment_weight is {type(entailment_weight).__name__}, expected a float")
    shards, found = _log_sums(op, _lorentz_pairwise_logsumexp, x, y, curvature, logit_scale, mask=None, group=group)
    losses = _losses(*found)
    if entailment_weight:
        entailed = lorentz_entailment_loss(_wide(y), _wide(x), curvature, min_radius, reduction="none")
        losses = losses + entailment_weight * entailed
    return _reduced(losses, reduction, shards)
