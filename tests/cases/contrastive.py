"""Cases of the contrastive family: sizes, layouts, scales, which pairs are positive."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .case import Case
from .hyperbolic import near, randn

LOG_SUMS = ("pairwise_logsumexp", "lorentz_pairwise_logsumexp")
# More rows than a block of them, more columns, few of both, none.
SIZES = (
    (1, 1, 3),
    (5, 3, 7),
    (17, 33, 64),
    (49, 300, 20),
    (123, 129, 40),
    (130, 9, 257),
    (0, 4, 8),
    (4, 0, 8),
    (600, 33, 8),
    (33, 1100, 8),
    (1950, 9, 4),
)


def case(
    op: str, label: str, x: Any, y: Any, *, scale: float = 3.0, positives: Any = None, diagonal: bool = True
) -> Case:
    """``x(g)`` and ``y(g)`` make the points, ``positives(g)`` the mask."""

    def build(g: torch.Generator) -> list[Any]:
        curvature = [_scalar(0.7)] if op.startswith("lorentz") else []
        mask = None if positives is None else positives(g)
        return [x(g), y(g), *curvature, _scalar(scale), mask, diagonal, False]

    return Case(op, label, build)


def keeping(given: Case) -> Case:
    """The same, with products kept for the backward."""
    return replace(given, build=lambda g: [*given.build(g)[:-1], True])


def sigmoid_case(
    label: str, x: Any, y: Any, *, scale: float = 3.0, positive_diagonal: bool = True, makes_gradients: bool = True
) -> Case:
    return Case(
        "sigmoid_loss",
        label,
        lambda g: [x(g), y(g), _scalar(scale), _scalar(-2.0), positive_diagonal, makes_gradients],
    )


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def points(*shape: int, norm: float = 1.2) -> Any:
    return lambda g: randn(g, *shape, norm=norm)


def mask(*shape: int, share: float = 0.2) -> Any:
    """Pairs chosen at random; the first row and the last column have none."""

    def build(g: torch.Generator) -> Tensor:
        chosen = torch.rand(*shape, generator=g) < share
        chosen[:1] = False
        chosen[:, -1:] = False
        return chosen

    return build


def _cases() -> Iterator[Case]:
    for op in LOG_SUMS:
        for n, m, d in SIZES:
            yield case(op, f"{n}x{m}x{d}", points(n, d), points(m, d))
        yield case(op, "no positives", points(60, 24), points(60, 24), diagonal=False)
        yield case(op, "positives", points(70, 24), points(90, 24), positives=mask(70, 90), diagonal=False)
        yield case(op, "positives and the diagonal", points(33, 24), points(33, 24), positives=mask(33, 33))
        yield case(
            op, "every pair positive", points(9, 24), points(20, 24), positives=mask(9, 20, share=2), diagonal=False
        )
        # Scores a hundred apart: a sum of exponentials would overflow or lose all its terms.
        yield case(op, "large scale", points(60, 64, norm=1.0), points(60, 64, norm=1.0), scale=100.0)
        yield case(op, "far apart", points(50, 16, norm=8.0), points(70, 16, norm=8.0), scale=20.0)
        yield case(op, "strided", lambda g: randn(g, 21, 60, norm=1.0)[:, 3:40], lambda g: randn(g, 37, 11).T / 6)
        yield case(op, "expanded", lambda g: randn(g, 1, 24).expand(9, 24), points(12, 24))
    # A distance has a slope at neighbours, and none where points coincide.
    yield Case(
        "lorentz_pairwise_logsumexp",
        "near",
        lambda g: [*near(randn(g, 12, 64, norm=1.2), g), _scalar(0.7), _scalar(3.0), None, False, False],
    )

    for op in LOG_SUMS:
        for n, m in ((70, 300), (600, 33), (33, 1100)):
            yield keeping(case(op, f"kept {n}x{m}x8", points(n, 8), points(m, 8)))
        yield keeping(case(op, "kept positives", points(70, 24), points(90, 24), positives=mask(70, 90)))
    for n, m, d in SIZES:
        yield sigmoid_case(f"{n}x{m}x{d}", points(n, d), points(m, d))
    yield sigmoid_case("no positives", points(60, 24), points(70, 24), positive_diagonal=False)
    yield sigmoid_case("large scale", points(60, 64, norm=1.0), points(60, 64, norm=1.0), scale=100.0)
    yield sigmoid_case("strided", lambda g: randn(g, 21, 60, norm=1.0)[:, 3:40], lambda g: randn(g, 37, 11).T / 6)
    yield sigmoid_case("loss alone", points(60, 24), points(70, 24), makes_gradients=False)


CASES = list(_cases())
