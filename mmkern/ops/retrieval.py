"""The best of all pairs: top-k of scores, distances and logits that are never a matrix in memory."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mmkern.reference import retrieval as reference

from ._checks import (
    LARGEST,
    Arguments,
    Check,
    accumulation_dtype,
    check_number,
    check_tensor,
    floating_rows,
    matrices,
    positive,
)
from ._define import Op, define, named
from ._outputs import indices, summed

Metric = Literal["dot", "cosine", "l2", "lorentz"]


def _at_most_rows_of(y: str) -> Check:
    """``k`` is an int from 0 to the rows of ``y``."""

    def check(op: str, args: Arguments) -> None:
        k, rows = args["k"], args[y].shape[0]
        if not isinstance(k, int) or isinstance(k, bool):
            raise TypeError(f"{op}: k is {type(k).__name__}, expected an int")
        if k < 0 or k > rows:
            raise ValueError(f"{op}: k is {k}, expected an int from 0 to {rows}, the rows of {y}")

    return check


def _pairwise(metric: str) -> Op:
    name = "pairwise_topk" if metric == "dot" else f"{metric}_pairwise_topk"
    curvature, curved = ("Tensor curvature, ", [positive("curvature", "x")]) if metric == "lorentz" else ("", [])
    return define(
        f"{name}(Tensor x, Tensor y, {curvature}int k) -> (Tensor, Tensor)",
        family="retrieval",
        reference=getattr(reference, name),
        from_indices=getattr(reference, f"{name}_of_pairs"),
        output=(summed(_pairs), indices(_pairs)),
        requires=[floating_rows("x", "y", axes=2), matrices("x", "y"), *curved, _at_most_rows_of("y")],
        kinds={"curvature": "scalar"},
        differentiable=1,
        is_checked_by_signature=False,
    )


def _pairs(args: Any) -> tuple[int, ...]:
    return args[0].shape[0], args[-1]


_PAIRWISE = {metric: _pairwise(metric) for metric in ("dot", "cosine", "l2", "lorentz")}


def _check_bias(op: str, args: Arguments) -> None:
    h, bias = args["h"], args["linear_bias"]
    check_tensor(op, "linear_bias", bias, h, (h.dtype, accumulation_dtype(h.dtype)), args["weight"].shape[:1], "h")


def _wide_bias(args: Arguments) -> Arguments:
    bias = args["linear_bias"]
    if bias is not None:
        args["linear_bias"] = bias.to(accumulation_dtype(args["h"].dtype)).contiguous()
    return args


def _logits(args: Any) -> tuple[int, ...]:
    return args[0].shape[0], args[3]


_linear_topk = define(
    "linear_topk(Tensor h, Tensor weight, Tensor? linear_bias, int k, float softcap, bool sums_logs) "
    "-> (Tensor, Tensor, Tensor)",
    family="retrieval",
    reference=reference.linear_topk,
    from_indices=reference.linear_topk_of_pairs,
    output=(
        summed(_logits),
        indices(_logits),
        summed(lambda args: (args[0].shape[0] if args[5] else 0,)),
    ),
    requires=[floating_rows("h", "weight", axes=2), matrices("h", "weight"), _check_bias, _at_most_rows_of("weight")],
    kinds={"h": "grid", "weight": "grid", "linear_bias": "fixed"},
    arrange=_wide_bias,
    differentiable=1,
    is_checked_by_signature=False,
)


def pairwise_topk(
    x: Tensor, y: Tensor, k: int, metric: Metric = "dot", *, curvature: float | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For each row of x the k best rows of y: ``topk_j metric(x_i, y_j)``, without the N x M matrix.

    The best have the largest scores, ``x·y`` (dot) or ``x·y / |x||y|`` (cosine), or the smallest distances,
    ``|x − y|`` (l2) or ``acosh(−c⟨x, y⟩)/√c`` (lorentz). They come best first, of equal ones the lower index first. NaN
    counts as the largest number, as in torch.topk: first among scores, last among distances. Distances of near rows
    are taken from the differences of coordinates, and keep their digits.

    Args:
        x: queries ``[N, D]``.
        y: the rows that are searched, ``[M, D]``, of the dtype of x.
        k: how many, from 0 to M.
        metric: "dot", "cosine" (a row of zeros scores 0), "l2" or "lorentz" (points as in ``lorentz_distance``).
        curvature: c, a float or a 0-d tensor; for "lorentz", and None for the others.
    Returns: ``(values, indices)``, each ``[N, k]``: scores or distances in float32 (float64 beside that), and rows of y
        in int64. Values have a gradient for x, y and curvature, which gathers k rows of y for each of x, N·k·D numbers,
        while it is computed; indices have none.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Johnson et al. 2017, Billion-scale similarity search with GPUs, §2 (exact search).
    """
    op = "pairwise_topk"
    if metric not in _PAIRWISE:
        raise ValueError(f"{op}: metric is {metric!r}, expected {', '.join(map(repr, _PAIRWISE))}")
    if (curvature is None) == (metric == "lorentz"):
        expected = "a float or a 0-d Tensor" if curvature is None else "None"
        raise TypeError(f"{op}: curvature is {type(curvature).__name__}, expected {expected} for metric {metric!r}")
    raw = _PAIRWISE[metric]
    values, chosen = named(op, raw, raw, x, y, *(() if curvature is None else (curvature,)), k)
    return values, chosen


def linear_topk(
    h: Tensor,
    weight: Tensor,
    k: int,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    log_prob: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k largest logits of a vocabulary: ``topk_j h·w_j + b_j``, without the N x V matrix.

    Args:
        h: ``[..., D]``.
        weight: ``[V, D]``, of the dtype of h.
        k: how many, from 0 to V.
        linear_bias: ``[V]``, of the dtype of h or float32 (float64 beside that), or None.
        softcap: c above 0: logits are ``c·tanh(logit/c)``; or None.
        log_prob: values are ``log softmax(logits)``, over the whole vocabulary.
    Returns: ``(values, indices)``, each ``[..., k]``, the largest first, of equal ones the lower index first, NaN
        before all; float32 (float64 beside that) and int64. No gradient: it is for decoding, and a teacher's logits.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Fan et al. 2018, Hierarchical Neural Story Generation (top-k sampling); the soft-cap is that of Gemma 2.
    """
    op = "linear_topk"
    floating_rows("h")(op, {"h": h})
    if softcap is not None:
        check_number(op, "softcap", softcap, "a number above 0", torch.finfo(torch.float32).tiny, LARGEST)
    if not isinstance(log_prob, bool):
        raise TypeError(f"{op}: log_prob is {type(log_prob).__name__}, expected a bool")
    matrix = h[None] if h.dim() == 1 else h.flatten(0, -2)
    rows, *tensors = (t.detach() if isinstance(t, Tensor) else t for t in (matrix, weight, linear_bias))
    values, chosen, log_sums = _linear_topk(rows, *tensors, k, softcap or 0.0, log_prob)
    if log_prob:
        values = values - log_sums[:, None]
    shape = (*h.shape[:-1], k)
    return values.reshape(shape), chosen.reshape(shape)
