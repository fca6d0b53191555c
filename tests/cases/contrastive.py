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
LABELLED = "labelled_pairwise_logsumexp"
RETAINED = ("retained_pairwise_logsumexp", "lorentz_retained_pairwise_logsumexp")
OF_EVERY_CUDA_KERNEL = ((LOG_SUMS[1], "kept positives"), (LOG_SUMS[1], "near"), (RETAINED[1], "forgotten"))
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


def labelled_case(
    label: str,
    x: Any,
    y: Any,
    x_labels: Any,
    y_labels: Any,
    first_words: int,
    *,
    scale: float = 3.0,
    diagonal: bool = True,
) -> Case:
    """``x_labels(g)`` and ``y_labels(g)`` make the words."""
    return Case(
        LABELLED,
        label,
        lambda g: [x(g), y(g), _scalar(scale), x_labels(g), y_labels(g), first_words, diagonal, False],
    )


def retained_case(
    op: str,
    label: str,
    x: Any,
    y: Any,
    x_forgotten: Any,
    y_forgotten: Any,
    *,
    scale: float = 3.0,
    diagonal: bool = True,
) -> Case:
    """``x_forgotten(g)`` and ``y_forgotten(g)`` make the flags."""

    def build(g: torch.Generator) -> list[Any]:
        curvature = [_scalar(0.7)] if op.startswith("lorentz") else []
        return [x(g), y(g), *curvature, _scalar(scale), x_forgotten(g), y_forgotten(g), diagonal, False]

    return Case(op, label, build)


def keeping(given: Case) -> Case:
    """The same, with products kept for the backward."""
    return replace(given, build=lambda g: [*given.build(g)[:-1], True])


def sigmoid_case(
    label: str,
    x: Any,
    y: Any,
    *,
    scale: float = 3.0,
    factor: float = 0.25,
    positive_diagonal: bool = True,
    makes_gradients: bool = True,
) -> Case:
    return Case(
        "sigmoid_loss",
        label,
        lambda g: [x(g), y(g), _scalar(scale), _scalar(-2.0), factor, positive_diagonal, makes_gradients],
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


def labels(rows: int, words: int, share: float = 0.03) -> Any:
    """Words whose bits are set at random, the last one, a sign, too."""
    return lambda g: pack(torch.rand(rows, words, 64, generator=g) < share)


def pack(bits: Tensor) -> Tensor:
    """``[rows, words, 64]`` bool; bit by bit, as no helper does."""
    words = torch.zeros(bits.shape[:-1], dtype=torch.int64)
    for bit in range(64):
        words |= bits[..., bit].to(torch.int64) << bit
    return words


def flags(rows: int, share: float = 0.4) -> Any:
    return lambda g: torch.rand(rows, generator=g) < share


def only(row: int, rows: int) -> Any:
    return lambda g: torch.arange(rows) == row


def _labelled() -> Iterator[Case]:
    for n, m, d in SIZES:
        yield labelled_case(f"{n}x{m}x{d}", points(n, d), points(m, d), labels(n, 4), labels(m, 4), 1)
    x, y, square = points(70, 24), points(90, 24), points(60, 64, norm=1.0)
    yield labelled_case("labels", x, y, labels(70, 5), labels(90, 5), 2, diagonal=False)
    yield labelled_case("labels and the diagonal", square, square, labels(60, 3), labels(60, 3), 2)
    yield labelled_case("every label", x, y, labels(70, 2, 2), labels(90, 2, 2), 1)
    for words, first in ((3, 0), (3, 3), (0, 0)):
        yield labelled_case(
            f"one kind, {first} of {words}", x, y, labels(70, words, 0.2), labels(90, words, 0.2), first
        )
    yield labelled_case("large scale", square, square, labels(60, 2), labels(60, 2), 1, scale=100.0)
    yield labelled_case("strided", x, y, lambda g: labels(70, 6)(g)[:, 1:5], lambda g: labels(4, 90)(g).T, 2)
    yield labelled_case("expanded", x, y, lambda g: labels(1, 3, 0.1)(g).expand(70, 3), labels(90, 3), 1)
    yield keeping(labelled_case("kept labels", points(33, 8), points(1100, 8), labels(33, 4), labels(1100, 4), 1))


def _retained(op: str) -> Iterator[Case]:
    for n, m, d in SIZES:
        yield retained_case(op, f"{n}x{m}x{d}", points(n, d), points(m, d), flags(n), flags(m))
    x, y, square = points(70, 24), points(90, 24), points(60, 64, norm=1.0)
    yield retained_case(op, "forgotten", x, y, flags(70), flags(90), diagonal=False)
    yield retained_case(op, "nothing forgotten", x, y, flags(70, 0), flags(90, 0))
    yield retained_case(op, "all forgotten", x, y, flags(70, 2), flags(90, 2))
    yield retained_case(op, "one forgotten", x, y, only(5, 70), only(5, 90))
    yield retained_case(op, "one retained", x, y, lambda g: ~only(5, 70)(g), lambda g: ~only(5, 90)(g))
    # What does not count outweighs what does by more than an exponential holds.
    yield retained_case(op, "large scale", square, square, flags(60), flags(60), scale=300.0)
    yield retained_case(op, "strided", x, y, lambda g: flags(140)(g)[::2], lambda g: flags(1, 2)(g).expand(90))
    yield keeping(retained_case(op, "kept forgotten", points(33, 8), points(1100, 8), flags(33), flags(1100)))


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
    yield from _labelled()
    for op in RETAINED:
        yield from _retained(op)
    yield Case(
        RETAINED[1],
        "near",
        lambda g: [
            *near(randn(g, 12, 64, norm=1.2), g),
            *map(_scalar, (0.7, 3.0)),
            *(flags(12)(g) for _ in "xy"),
            *(False, False),
        ],
    )
    for n, m, d in SIZES:
        yield sigmoid_case(f"{n}x{m}x{d}", points(n, d), points(m, d))
    yield sigmoid_case("no positives", points(60, 24), points(70, 24), positive_diagonal=False)
    yield sigmoid_case("large scale", points(60, 64, norm=1.0), points(60, 64, norm=1.0), scale=100.0)
    yield sigmoid_case("strided", lambda g: randn(g, 21, 60, norm=1.0)[:, 3:40], lambda g: randn(g, 37, 11).T / 6)
    yield sigmoid_case("loss alone", points(60, 24), points(70, 24), makes_gradients=False)


CASES = list(_cases())
