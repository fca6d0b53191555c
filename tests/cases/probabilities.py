"""Cases of probabilities of tokens: sizes, ties, rows without a sum, layouts, tokens that are none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mmkern.reference.probabilities import Kept

from .case import Case
from .decoding import logits, mixed, whole
from .hyperbolic import randn

LOG_PROB, RENORMALIZE = "token_log_prob", "renormalize"
SIZES = ((1, 1), (3, 2), (5, 7), (4, 64), (2, 65), (3, 111), (2, 5001), (0, 9))
Make = Callable[[torch.Generator], Tensor]


def log_prob(label: str, make: Make, *, outside: bool = False) -> Case:
    def build(g: torch.Generator) -> list[Any]:
        x = make(g)
        tokens = torch.randint(x.shape[-1], x.shape[:-1], generator=g)
        if outside:
            tokens[0], tokens[1] = -1, x.shape[-1]
        return [x, tokens]

    return Case(LOG_PROB, label, build)


def far(g: torch.Generator) -> Tensor:
    """Numbers whose exponentials have no room, all of one sign."""
    return randn(g, 4, 70) + torch.tensor([[1e4], [-1e4], [300.0], [0.0]])


def _log_probs() -> Iterator[Case]:
    for rows, size in SIZES:
        yield log_prob(f"{rows}x{size}", logits(rows, size))
    yield log_prob("2x3x40", lambda g: randn(g, 2, 3, 40))
    yield log_prob("one row", lambda g: randn(g, 40))
    yield log_prob("mixed", mixed)
    yield log_prob("far", far)
    yield log_prob("sliced", lambda g: randn(g, 5, 90)[:, 7:60])
    yield log_prob("columns", lambda g: randn(g, 60, 5).T)
    yield log_prob("expanded", lambda g: randn(g, 1, 90).expand(4, 90))


def renormalize(label: str, make: Make, filters: list[dict[Kept, float]]) -> Case:
    """``filters``: one for all rows, or one a row."""

    def build(g: torch.Generator) -> list[Any]:
        neutral = {Kept.TOP_K: torch.inf, Kept.TOP_P: 1.0}
        table = [[(neutral | each)[column] for column in Kept] for each in filters]
        return [make(g), torch.tensor(table, dtype=torch.float64)]

    return Case(RENORMALIZE, label, build, wide=(1,))


def softmax(make: Make) -> Make:
    return lambda g: make(g).softmax(-1)


def odd(g: torch.Generator) -> Tensor:
    """Among rows as they are: NaN, ∞, less than 0, only zeros, one number, and sums far from 1."""
    x = randn(g, 7, 90).softmax(-1)
    x[0, 40], x[1, 89], x[2, 3], x[3], x[4, 1:] = torch.nan, torch.inf, -0.1, 0.0, 0.0
    x[5] *= 1e6
    return x


def _renormalized() -> Iterator[Case]:
    filters: dict[str, dict[Kept, float]] = {
        "all": {},
        "top-k": {Kept.TOP_K: 5},
        "top-1": {Kept.TOP_K: 1},
        "top-k of many": {Kept.TOP_K: 300},
        "top-p": {Kept.TOP_P: 0.7},
        "no mass": {Kept.TOP_P: 0.0},
        "both": {Kept.TOP_K: 40, Kept.TOP_P: 0.9},
    }
    for rows, size in SIZES:
        yield renormalize(f"{rows}x{size}", softmax(logits(rows, size)), [filters["both"]])
    for name, each in filters.items():
        yield renormalize(f"{name}, 3x700", softmax(logits(3, 700)), [each])
        yield renormalize(f"{name}, ties", softmax(whole(4, 130)), [each])
        yield renormalize(f"{name}, odd", odd, [each])
    yield renormalize("a filter a row", softmax(logits(len(filters), 400)), list(filters.values()))
    yield renormalize("sliced", lambda g: torch.rand(5, 90, generator=g)[:, 7:60], [filters["both"]])
    yield renormalize("columns", lambda g: torch.rand(60, 5, generator=g).T, [filters["both"]])


LOG_PROBS, RENORMALIZED = list(_log_probs()), list(_renormalized())
CASES = [*LOG_PROBS, *RENORMALIZED]
BEYOND = log_prob("tokens that are none", logits(4, 60), outside=True)
