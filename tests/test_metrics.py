"""Retrieval metrics, beside scikit-learn's and by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.metrics import average_precision_score, ndcg_score

from mmkern import metrics, ops


def problem(ties: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = (
        torch.randint(0, 6, (20, 30), generator=generator).double() if ties else torch.rand(20, 30, generator=generator)
    )
    relevance = torch.rand(20, 30, generator=generator)
    return scores, relevance.where(relevance < 0.8, 1.0).where(relevance > 0.3, 0.0)


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_that_of_scikit_learn(ties: bool) -> None:
    scores, relevance = problem(ties)
    expected = [average_precision_score((r == 1).numpy(), s.numpy()) for s, r in zip(scores, relevance, strict=True)]
    assert metrics.mean_average_precision(scores, relevance) == pytest.approx(sum(expected) / 20)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [None, 1, 7, 30])
def test_ndcg_is_that_of_scikit_learn(ties: bool, k: int | None) -> None:
    scores, relevance = problem(ties)
    assert metrics.ndcg(scores, relevance, k) == pytest.approx(ndcg_score(relevance.numpy(), scores.numpy(), k=k))


def test_ndcg_of_as_many_as_are_relevant() -> None:
    scores, relevance = problem(ties=False)
    expected = [
        ndcg_score(r[None].numpy(), s[None].numpy(), k=int((r > 0).sum()))
        for s, r in zip(scores, relevance, strict=True)
    ]
    assert metrics.ndcg(scores, relevance, "relevant") == pytest.approx(sum(expected) / 20)


def test_queries_without_a_relevant_item_do_not_count() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    relevance = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert metrics.mean_average_precision(scores, relevance) == 0.5
    assert metrics.ndcg(scores, relevance) == pytest.approx(1 / torch.tensor(3.0).log2().item())
    assert torch.tensor(metrics.ndcg(scores, 0 * relevance)).isnan()


def test_recall() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 40, 8, generator=generator)
    _, indices = ops.pairwise_topk(x, y, 10)
    rank = (x @ y.T).argsort(1, descending=True).argsort(1)
    expected = {k: (rank.diagonal() < k).double().mean().item() for k in (1, 5, 10)}
    assert metrics.recall_at_k(indices, torch.arange(40)) == expected
    mask = torch.eye(40, dtype=torch.bool)
    assert metrics.recall_at_k(indices, mask) == expected
    several = torch.stack([torch.arange(40), torch.full((40,), -1)], 1)
    assert metrics.recall_at_k(indices, several) == expected
    mask[:, 3] = True
    several[:, 1] = 3
    of_two = metrics.recall_at_k(indices, mask, (2,))
    assert of_two == metrics.recall_at_k(indices, several, (2,))
    assert of_two[2] == (torch.minimum(rank.diagonal(), rank[:, 3]) < 2).double().mean().item()


REFUSED: tuple[tuple[Callable[..., Any], type[Exception], str], ...] = (
    (lambda i, s: metrics.recall_at_k(i, i[:, 0], (4,)), ValueError, "recall_at_k: k is 4, expected one from 1 to 3"),
    (
        lambda i, s: metrics.recall_at_k(i, s),
        TypeError,
        "recall_at_k: indices and targets are torch.int64 and torch.float32",
    ),
    (lambda i, s: metrics.recall_at_k(i, i[:1, 0], (1,)), ValueError, r"shapes \[2, 3\] and \[1\]"),
    (
        lambda i, s: metrics.mean_average_precision(s, s[:1]),
        ValueError,
        r"mean_average_precision: relevance has shape \[1, 3\]",
    ),
    (lambda i, s: metrics.ndcg(s, s, 0), ValueError, "ndcg: k is 0, expected an int above 0"),
)


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input_is_named(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.tensor([[0, 1, 2], [2, 1, 0]]), torch.ones(2, 3))
