"""Cases of the decoding family: each filter alone and all together, ties, rows without a token, layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mmkern.reference.decoding import NEUTRAL, Filter

from .case import Case
from .hyperbolic import randn

Logits = Callable[[torch.Generator], Tensor]

# Few tokens and many, fewer than a vector, blocks of 64 tokens and what is left, more than the few that are sorted.
SIZES = ((1, 1), (3, 2), (5, 7), (4, 64), (2, 65), (3, 111), (2, 1000), (2, 5001), (0, 9))
FILTERS: dict[str, dict[Filter, float]] = {
    "plain": {},
    "cold": {Filter.TEMPERATURE: 0.3},
    "greedy": {Filter.TEMPERATURE: 0.0},
    "top-k": {Filter.TOP_K: 5},
    "top-1": {Filter.TOP_K: 1},
    "top-k of many": {Filter.TOP_K: 300},
    "top-p": {Filter.TOP_P: 0.7},
    "no mass": {Filter.TOP_P: 0.0},
    "min-p": {Filter.MIN_P: 0.1},
    "typical": {Filter.TYPICAL_P: 0.5},
    "all": {
        Filter.TOP_K: 60,
        Filter.TEMPERATURE: 1.7,
        Filter.TOP_P: 0.9,
        Filter.MIN_P: 0.02,
        Filter.TYPICAL_P: 0.8,
        Filter.REPETITION_PENALTY: 1.3,
    },
}


def row_of_filters(given: dict[Filter, float]) -> list[float]:
    return [(NEUTRAL | given)[column] for column in Filter]


def logits(rows: int, size: int, scale: float = 2.0) -> Logits:
    return lambda g: scale * randn(g, rows, size)


def whole(rows: int, size: int) -> Logits:
    """Of few values: many are equal."""
    return lambda g: torch.randint(-3, 3, (rows, size), generator=g).double()


def halves(_: torch.Generator) -> Tensor:
    """Each second one is as large as the largest; the others' first bytes come next to theirs."""
    return torch.tensor([1.0, 0.25], dtype=torch.float64).repeat(2, 350)


def equal(_: torch.Generator) -> Tensor:
    return torch.zeros(2, 64, dtype=torch.float64)


def mixed(g: torch.Generator) -> Tensor:
    """Among rows as they are: NaN, +inf, nothing but -inf, one token left, and huge ones."""
    x = randn(g, 6, 90)
    x[0, 40], x[1, 89], x[2], x[3, 1:], x[4] = torch.nan, torch.inf, -torch.inf, -torch.inf, 3e4 * x[4]
    return x


def case(
    label: str, make: Logits, filters: list[dict[Filter, float]], *, history: bool = False, allowed: bool = False
) -> Case:
    """``filters``: one for all rows, or one a row, whose seeds then are their own too."""

    def build(g: torch.Generator) -> list[Any]:
        x = make(g)
        rows, size = x.shape
        seeds = torch.randint(2**40, (len(filters), 2), generator=g)
        table = torch.tensor([row_of_filters(f) for f in filters], dtype=torch.float64)
        past = torch.randint(-1, size + 2, (rows, 6), generator=g) if history else None
        words = torch.randint(-(2**63), 2**63 - 1, (rows, -(-size // 64)), generator=g) if allowed else None
        return [x, seeds, table, past, words]

    return Case("sample_tokens", label, build, wide=(2,))


def _cases() -> Iterator[Case]:
    for rows, size in SIZES:
        yield case(f"{rows}x{size}", logits(rows, size), [{}])
        yield case(f"{rows}x{size}, all", logits(rows, size), [FILTERS["all"]], history=True)
    for name, filters in FILTERS.items():
        yield case(f"{name}, 3x700", logits(3, 700), [filters])
        yield case(f"{name}, ties", whole(4, 130), [filters])
        yield case(f"{name}, mixed", mixed, [filters])
    yield case("as many as are large", halves, [{Filter.TOP_K: 350}])
    yield case("all as near", equal, [FILTERS["typical"]])
    yield case("a request a row", logits(len(FILTERS), 400), list(FILTERS.values()), history=True, allowed=True)
    yield case("allowed", logits(4, 200), [{}], allowed=True)
    yield case("history", logits(4, 200), [{Filter.REPETITION_PENALTY: 2.0}], history=True)
    yield case("strided", lambda g: randn(g, 5, 90)[:, 7:60], [FILTERS["top-p"]])
    yield case("expanded", lambda g: randn(g, 1, 90).expand(4, 90), [FILTERS["top-k"]])


CASES = list(_cases())
