"""Unlearning by alignment calibration: one loss of the pairs to keep and of those to forget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ._checks import LARGEST, check_number, check_tensor, positive, scalar
from ._contrastive import (
    check_pairs,
    log_sums,
    lorentz_retained_pairwise_logsumexp,
    losses_of,
    of_equal_length,
    retained_pairwise_logsumexp,
    wide,
)
from .hyperbolic import lorentz_distance

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def alignment_calibration_loss(
    x: Tensor,
    y: Tensor,
    forget: Tensor,
    *,
    geometry: Literal["euclidean", "lorentz"] = "euclidean",
    curvature: float | Tensor | None = None,
    logit_scale: float | Tensor,
    alpha: float,
    beta: float,
    gamma: float,
    margin: float | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Keeps the pairs of R and pulls those of U apart: ``retain + α negative + β positive + γ performance``.

    With R the rows to retain and U those to forget, scores ``s``, and a sum over nothing 0:

    * retain: the loss of CLIP over R x R.
    * negative: ``−mean s_ij`` over i ≠ j both in U: what is forgotten comes closer to all else that is.
    * positive: ``mean s_ii`` over U, or with a margin ``mean max(0, margin − d_ii)``, d the distance.
    * performance: ``½ mean (log Σ_{j in R} exp s_ij + log Σ_{j in R} exp s_ji)`` over U.

    All are made of sums over rows and columns that one pass over the scores leaves.

    Args:
        x, y: ``[N, D]``, of one dtype; rows of one index belong together. Points, where the geometry is "lorentz".
        forget: ``[N]`` bool, True in U.
        geometry: "euclidean": ``s = scale·cos(x_i, y_j)``, rows are normalized here, and ``d = 1 − cos``. "lorentz":
            ``s = −scale·d``, d the hyperbolic distance.
        curvature: c of "lorentz", a float or a 0-d tensor above 0; else None.
        logit_scale: a float or a 0-d tensor.
        alpha, beta, gamma: weights of the terms, such as 1, 0.1 to 1, and 1.
        margin: a distance past which a pair of U need go no further; without, nothing bounds the loss of a
            "lorentz" pair from below.
        group: processes that hold the batch together, each some rows of x with those of y and ``forget`` that belong to
            them. The loss is that of all rows. Gradients of x and y are whole, those of numbers are parts: as in
            ``info_nce_loss``.
    Returns: 0-d; float32, or float64 for that. No second derivative.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Wang et al. 2024 (Alignment Calibration, arXiv 2406.03603), whose release has SimCLR and MoCo. The form for
        two modalities and its Lorentz twin (HAC, arXiv 2503.15166, publishes no equations) are a reconstruction.
    """
    op = "alignment_calibration_loss"
    check_pairs(op, x, y, "mean")
    _check(op, x, forget, geometry, curvature)
    for name, weight in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        check_number(op, name, weight, "a float", -LARGEST, LARGEST)
    if margin is not None:
        check_number(op, "margin", margin, "None or a float of at least 0", 0, LARGEST)
    scalar("logit_scale", beside="x")(op, {"x": x, "logit_scale": logit_scale})
    if geometry == "euclidean":
        raw, (x, y, factor) = retained_pairwise_logsumexp, of_equal_length(x, y)
        numbers: tuple[Any, ...] = (factor * logit_scale,)
    else:
        raw, numbers = lorentz_retained_pairwise_logsumexp, (curvature, logit_scale)
    shards, found = log_sums(op, raw, x, y, *numbers, pairs=(forget, forget), group=group)
    rows, cols, positive_rows, positive_cols, row_sums, _ = found
    counts = torch.stack([(~forget).sum(), forget.sum()])
    retained, forgotten = counts if shards is None else shards.total(counts)
    aligned = positive_rows
    if margin is not None:
        x, y = wide(x), wide(y)
        distances = 1 - factor * (x * y).sum(-1) if curvature is None else lorentz_distance(x, y, curvature)
        aligned = (margin - distances).relu()
    performance = 0.5 * (_or_nothing(rows) + _or_nothing(cols))
    of_forgotten = (beta * aligned + gamma * performance).where(forget, 0.0)
    of_retained = losses_of(rows, cols, positive_rows, positive_cols).where(~forget, 0.0)
    loss: Tensor = (
        of_retained.sum() / retained.clamp_min(1)
        + of_forgotten.sum() / forgotten.clamp_min(1)
        - alpha * row_sums.sum() / (forgotten * (forgotten - 1)).clamp_min(1)
    )
    return loss if shards is None else shards.total(loss)


def _check(op: str, x: Tensor, forget: Any, geometry: Any, curvature: Any) -> None:
    if geometry not in ("euclidean", "lorentz"):
        raise ValueError(f'{op}: geometry is {geometry!r}, expected "euclidean" or "lorentz"')
    if geometry == "lorentz":
        positive("curvature", beside="x")(op, {"x": x, "curvature": curvature})
    elif curvature is not None:
        raise ValueError(f"{op}: curvature is {curvature}, expected None of a euclidean geometry")
    if not isinstance(forget, Tensor):
        raise TypeError(f"{op}: forget is {type(forget).__name__}, expected a Tensor")
    check_tensor(op, "forget", forget, x, (torch.bool,), x.shape[:1], "x")


def _or_nothing(log_sum: Tensor) -> Tensor:
    """0 where the sum is over nothing."""
    return log_sum.where(log_sum != -torch.inf, 0.0)
