"""Metrics of retrieval: recall at k, and those of EPIC-KITCHENS-100's multi-instance retrieval.

``recall_at_k`` takes the indices of :func:`mmkern.ops.pairwise_topk`. Average precision and nDCG ask where all relevant
items rank, so they take the scores of every item, a block of queries at a time where there are many. Items of equal
score count as in scikit-learn: average precision takes them together, nDCG gives each the mean of their places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def recall_at_k(indices: Tensor, targets: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """The share of queries that have a relevant item among their first k.

    Args:
        indices: ``[N, K]`` int64, the best items of each query, best first.
        targets: ``[N]`` int64, the relevant item of each; ``[N, R]`` for several, −1 where there are fewer; or
            ``[N, M]`` bool, which items are relevant. A query without one counts as missed.
        ks: from 1 to K.
    Returns: for each k a number from 0 to 1; NaN without queries.
    Raises: ValueError where shapes or a k do not fit, TypeError for other dtypes.
    Source: Radford et al. 2021 (CLIP), table 13 (image and text retrieval).
    """
    op = "recall_at_k"
    if indices.dtype != torch.int64 or targets.dtype not in (torch.int64, torch.bool):
        got = f"{indices.dtype} and {targets.dtype}"
        raise TypeError(f"{op}: indices and targets are {got}, expected torch.int64, and torch.int64 or torch.bool")
    is_mask = targets.dtype == torch.bool
    if (
        indices.dim() != 2
        or targets.shape[:1] != indices.shape[:1]
        or targets.dim() not in ((2,) if is_mask else (1, 2))
    ):
        got = f"{list(indices.shape)} and {list(targets.shape)}"
        raise ValueError(
            f"{op}: indices and targets have shapes {got}, expected [N, K], and [N], [N, R] or a mask [N, M]"
        )
    wrong = [k for k in ks if not 1 <= k <= indices.shape[1]]
    if wrong:
        raise ValueError(f"{op}: k is {wrong[0]}, expected one from 1 to {indices.shape[1]}, the indices of a query")
    hits = (
        targets.gather(1, indices) if is_mask else (indices[:, :, None] == targets.reshape(len(targets), 1, -1)).any(-1)
    )
    return {k: hits[:, :k].any(1).double().mean().item() for k in ks}


def mean_average_precision(scores: Tensor, relevance: Tensor) -> float:
    """The mean over queries of ``Σ_relevant precision at its rank / number of relevant items``.

    Args:
        scores: ``[N, M]``, higher is better.
        relevance: ``[N, M]``, in [0, 1]; an item is relevant where it is 1, as a pair of the same verb and noun is in
            EPIC-KITCHENS-100 (or bool).
    Returns: a number from 0 to 1, over the queries that have a relevant item; NaN where none has.
    Raises: ValueError where shapes differ.
    Source: Damen et al. 2022, Rescaling Egocentric Vision, §4.5 (multi-instance retrieval, mAP).
    """
    _check_same_shape("mean_average_precision", scores, relevance)
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranked, relevant = scores.gather(1, order), (relevance == 1).gather(1, order)
    found = relevant.double().cumsum(1)
    last = _last_of_equal(ranked)
    precision = found.gather(1, last) / (last + 1)
    total = relevant.sum(1)
    average = precision.where(relevant, 0.0).sum(1) / total
    return average[total > 0].mean().item()


def ndcg(scores: Tensor, relevance: Tensor, k: int | Literal["relevant"] | None = None) -> float:
    """The mean over queries of ``DCG / ideal DCG``, ``DCG = Σ_rank relevance / log2(1 + rank)``.

    Args:
        scores: ``[N, M]``, higher is better.
        relevance: ``[N, M]``, at least 0: in EPIC-KITCHENS-100 the mean of the overlaps of verbs and of nouns.
        k: how many items of a query count, the first ones; all where None; "relevant": as many as have a relevance
            above 0, which is what EPIC-KITCHENS-100 counts.
    Returns: a number from 0 to 1, over the queries that have a relevant item; NaN where none has.
    Raises: ValueError where shapes differ, or for another k.
    Source: Damen et al. 2022, §4.5 (nDCG); Järvelin and Kekäläinen 2002, eq. 2.
    """
    _check_same_shape("ndcg", scores, relevance)
    m = scores.shape[1]
    if k is not None and k != "relevant" and (not isinstance(k, int) or k < 1):
        raise ValueError(f'ndcg: k is {k!r}, expected an int above 0, "relevant" or None')
    relevance = relevance.double()
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranked, gains = scores.gather(1, order), relevance.gather(1, order)
    places = torch.arange(m, device=scores.device)
    counted = (relevance > 0).sum(1, keepdim=True) if k == "relevant" else places.new_full((1, 1), k or m)
    discount = (1 / torch.log2(places.double() + 2)).where(places < counted, 0.0)
    dcg = (gains * _mean_of_equal(ranked, discount.expand(scores.shape))).sum(1)
    ideal = (relevance.sort(1, descending=True).values * discount).sum(1)
    return (dcg / ideal)[ideal > 0].mean().item()


def _check_same_shape(op: str, scores: Tensor, relevance: Tensor) -> None:
    if scores.dim() != 2 or scores.shape != relevance.shape:
        raise ValueError(
            f"{op}: relevance has shape {list(relevance.shape)}, expected [N, M] as scores, {list(scores.shape)}"
        )


def _groups(ranked: Tensor) -> Tensor:
    """Of sorted rows: the number of the run of equal scores that a place belongs to."""
    steps = torch.zeros_like(ranked, dtype=torch.int64)
    steps[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    return steps.cumsum(1)


def _last_of_equal(ranked: Tensor) -> Tensor:
    places = torch.arange(ranked.shape[1], device=ranked.device).expand(ranked.shape)
    groups = _groups(ranked)
    return torch.zeros_like(groups).scatter_reduce(1, groups, places, "amax").gather(1, groups)


def _mean_of_equal(ranked: Tensor, values: Tensor) -> Tensor:
    groups = _groups(ranked)
    return torch.zeros_like(values).scatter_reduce(1, groups, values, "mean", include_self=False).gather(1, groups)
