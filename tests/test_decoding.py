"""The decoding family: what is kept of a row, the statistics of what is drawn, and use."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkern.reference import decoding as reference
from mmkern.reference.decoding import Filters


def kept(row: list[float], top_k: int, top_p: float, min_p: float, typical_p: float) -> set[int]:
    """The tokens that are left, as the definitions say it, one after another."""

    def probabilities(tokens: list[int]) -> dict[int, float]:
        top = max(row[t] for t in tokens)
        weights = {t: math.exp(row[t] - top) for t in tokens}
        return {t: w / math.fsum(weights.values()) for t, w in weights.items()}

    def until(tokens: list[int], p: dict[int, float], least: float) -> list[int]:
        found: list[int] = []
        for t in tokens:
            if found and math.fsum(p[f] for f in found) >= least:
                break
            found.append(t)
        return found

    left = sorted((t for t in range(len(row)) if row[t] > -math.inf), key=lambda t: (-row[t], t))[:top_k]
    left = until(left, probabilities(left), top_p)
    p = probabilities(left)
    left = [t for t in left if p[t] >= min_p * p[left[0]]]
    p = probabilities(left)
    entropy = -math.fsum(q * math.log(q) for q in p.values() if q > 0)
    order = sorted(left, key=lambda t: (abs(-math.log(p[t]) - entropy), -row[t], t)) if len(left) > 1 else left
    return set(until(order, p, typical_p))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7, 111])
def test_what_is_kept(size: int, ties: bool) -> None:
    g = torch.Generator().manual_seed(size)
    for trial in range(60):
        row = 2 * torch.randn(size, generator=g, dtype=torch.float64)
        if ties:
            row = row.round()
        row[torch.rand(size, generator=g) < 0.1] = -torch.inf
        row[0] = 0.25
        share = torch.rand(4, generator=g).tolist()
        asked = {
            "top_k": 1 + int(share[0] * size) if trial % 2 else size,
            "top_p": share[1] if trial % 3 else 1.0,
            "min_p": share[2] * 0.3 if trial % 5 else 0.0,
            "typical_p": share[3] if trial % 7 else 1.0,
        }
        found = reference.kept_logits(row[None], Filters(**{k: torch.tensor([v]) for k, v in asked.items()}))[0]
        assert set(torch.nonzero(found > -torch.inf).flatten().tolist()) == kept(row.tolist(), **asked), asked
        assert torch.equal(found[found > -torch.inf], row[found > -torch.inf])


def draw(logits: Tensor, seed: int, **given: Any) -> tuple[Tensor, Tensor]:
    return reference.sample_tokens(logits, Filters(**given), torch.tensor([[seed, 0]]))


def chi_square(counts: Tensor, p: Tensor) -> float:
    """The probability of counts as far from p as these."""
    expected = counts.sum() * p
    is_there = expected > 0
    assert counts[~is_there].sum() == 0
    statistic = ((counts - expected)[is_there] ** 2 / expected[is_there]).sum()
    freedom = torch.tensor(float(is_there.sum() - 1))
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


@pytest.mark.parametrize("given", [{}, {"top_k": torch.tensor([4])}, {"temperature": torch.tensor([0.6])}], ids=str)
def test_tokens_come_as_often_as_they_should(given: dict[str, Tensor]) -> None:
    row = torch.randn(7, generator=torch.Generator().manual_seed(3))
    tokens, log_probs = draw(row.expand(1_000_000, -1), 5, **given)
    p = reference.kept_logits(row[None].double(), Filters(**given))[0].softmax(0)
    assert chi_square(tokens.bincount(minlength=7), p) > 1e-3
    torch.testing.assert_close(log_probs.double(), p.log()[tokens])


def test_penalties_and_what_is_allowed() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 3.0, 1.0]])
    filters = Filters(
        repetition_penalty=torch.tensor([2.0]),
        history=torch.tensor([[3, 1, 3, -1]]),
        allowed=torch.tensor([[0b01111]], dtype=torch.int32),
    )
    found = reference.kept_logits(logits, filters)
    assert found.tolist() == [[2.0, -2.0, 0.5, 1.5, -math.inf]]


def test_the_largest_at_temperature_0_and_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0], [-5.0, -4.0, -torch.inf, -4.0]])
    tokens, log_probs = draw(logits, 7, temperature=torch.tensor([0.0]))
    assert tokens.tolist() == [1, 1]
    torch.testing.assert_close(log_probs, logits.log_softmax(-1)[:, 1])


def test_a_row_that_has_no_token_is_marked() -> None:
    logits = torch.zeros(4, 3)
    logits[0, 1], logits[1, 2], logits[2] = torch.nan, torch.inf, -torch.inf
    tokens, log_probs = draw(logits, 7)
    assert tokens[:3].tolist() == [-1, -1, -1]
    assert log_probs[:3].isnan().all()
    assert tokens[3] >= 0


def test_a_row_with_a_key_of_its_own_draws_as_it_would_alone() -> None:
    logits, seeds = torch.randn(40, 9), torch.arange(80).view(40, 2)
    together, _ = reference.sample_tokens(logits, Filters(), seeds)
    alone = [
        reference.sample_tokens(row[None], Filters(), seed[None])[0] for row, seed in zip(logits, seeds, strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))
