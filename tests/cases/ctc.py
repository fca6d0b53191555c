"""Cases of CTC: paths with repeats and blanks, rows of any length, frames without a number to tell by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .case import Case
from .hyperbolic import randn

Make = Callable[[torch.Generator], Tensor]

# Rows, frames, labels: none, one, fewer than a vector, some vectors and what is left, wide.
SIZES = ((0, 3, 4), (2, 0, 4), (1, 1, 1), (3, 9, 2), (4, 33, 5), (2, 40, 17), (3, 21, 64), (2, 12, 500))
NONE = -(2**63)  # a blank that no token is


def lengths(g: torch.Generator, rows: int, most: int) -> Tensor:
    """From none to all, both among them."""
    drawn = torch.randint(0, most + 1, (rows,), generator=g)
    drawn[:1], drawn[1:2] = most, 0
    return drawn


def scores(rows: int, frames: int, labels: int) -> Make:
    """Such that repeats and blanks come up, and few numbers are equal."""
    return lambda g: (2 * randn(g, rows, frames, labels) + 3 * repeats(g, rows, frames, labels)).log_softmax(-1)


def repeats(g: torch.Generator, rows: int, frames: int, labels: int) -> Tensor:
    path = tokens(g, rows, frames, labels)
    return torch.nn.functional.one_hot(path, labels).double()


def tokens(g: torch.Generator, rows: int, width: int, labels: int) -> Tensor:
    """In runs."""
    drawn = torch.randint(0, labels, (rows, width), generator=g)
    keep = torch.rand(rows, width, generator=g) < 0.5
    return drawn.gather(1, torch.arange(width).where(keep, 0).cummax(-1).values) if width else drawn


def equal(g: torch.Generator) -> Tensor:
    """Of few values: many are equal."""
    return torch.randint(-3, 0, (3, 40, 37), generator=g).double()


def mixed(g: torch.Generator) -> Tensor:
    """Among rows as they are: NaN, +inf, both behind the end, and a frame of nothing but -inf."""
    x = randn(g, 5, 8, 19).log_softmax(-1)
    x[0, 3, 17], x[1, 7, 0], x[2, 6, 18], x[3, 4] = torch.nan, torch.inf, torch.nan, -torch.inf
    return x


def greedy(label: str, make: Make, blank: int = 0, of: Callable[[torch.Generator], Tensor] | None = None) -> Case:
    """``of``: what makes the lengths."""
    return Case("ctc_greedy_decode", label, lambda g: [make(g), of(g) if of else None, blank])


def collapse(label: str, make: Make, blank: int = NONE, of: Callable[[torch.Generator], Tensor] | None = None) -> Case:
    return Case("collapse_repeats", label, lambda g: [make(g), of(g) if of else None, blank])


def _cases() -> Iterator[Case]:
    for rows, frames, labels in SIZES:
        size = f"{rows}x{frames}x{labels}"

        def drawn(g: torch.Generator, rows: int = rows, frames: int = frames) -> Tensor:
            return lengths(g, rows, frames)

        yield greedy(size, scores(rows, frames, labels))
        yield greedy(f"{size}, lengths", scores(rows, frames, labels), labels - 1, drawn)
        make = lambda g, rows=rows, frames=frames, labels=labels: tokens(g, rows, frames, labels)  # noqa: E731
        yield collapse(size, make)
        yield collapse(f"{size}, blank, lengths", make, 0, drawn)
    yield greedy("equal", equal, 1)
    yield greedy("mixed", mixed, 0, lambda g: torch.tensor([8, 8, 6, 8, 5]))
    yield greedy("strided", lambda g: scores(3, 20, 60)(g)[:, ::2, 7:40])
    yield greedy("frames first", lambda g: scores(20, 4, 33)(g).transpose(0, 1))
    yield collapse("large", lambda g: tokens(g, 2, 50, 3) + 2**40, 2**40)
    yield collapse("below 0", lambda g: tokens(g, 2, 50, 3) - 1)
    yield collapse("strided", lambda g: tokens(g, 40, 30, 4)[::2, 3:], 0)
    yield collapse("transposed", lambda g: tokens(g, 40, 30, 4).T, 0)
    yield collapse("expanded", lambda g: tokens(g, 1, 30, 4).expand(5, 30), 0)
    yield collapse("several stretches", lambda g: tokens(g, 2, 1500, 3), 0)


def beam(
    label: str,
    make: Make,
    width: int,
    *,
    blank: int = 0,
    nbest: int = 1,
    prune: float = -torch.inf,
    of: Callable[[torch.Generator], Tensor] | None = None,
) -> Case:
    def build(g: torch.Generator) -> list[Any]:
        return [make(g), of(g) if of else None, width, blank, nbest, prune]

    return Case("ctc_beam_decode", label, build)


def flat(rows: int, frames: int, labels: int) -> Make:
    return lambda g: randn(g, rows, frames, labels).log_softmax(-1)


def far(g: torch.Generator) -> Tensor:
    """Labels so unlikely that their probabilities are 0 in any type."""
    x = randn(g, 2, 9, 5)
    return torch.where(x > 0.3, x, 500 * x).log_softmax(-1)


def _beams() -> Iterator[Case]:
    yield beam("0x3x4", flat(0, 3, 4), 4)
    yield beam("2x0x4", flat(2, 0, 4), 4, nbest=2)
    yield beam("blank alone", flat(2, 4, 1), 3, nbest=3)
    yield beam("all of 3 labels", flat(3, 6, 3), 300, nbest=20)
    yield beam("all of 4 labels", flat(2, 5, 4), 700, nbest=5, blank=3)
    yield beam("narrow", flat(4, 30, 6), 1)
    yield beam("some", flat(3, 40, 12), 20, nbest=4, of=lambda g: lengths(g, 3, 40))
    yield beam("peaked", scores(3, 50, 20), 25, nbest=3)
    yield beam("wide", flat(2, 12, 300), 40, nbest=2)
    yield beam("pruned", flat(2, 30, 40), 15, nbest=3, prune=-3.5)
    yield beam("all but one pruned", flat(2, 30, 7), 5, nbest=5, prune=0.0)
    yield beam("far", far, 60, nbest=8)
    yield beam("mixed", mixed, 8, nbest=2, of=lambda g: torch.tensor([8, 8, 6, 8, 5]))
    yield beam("strided", lambda g: flat(40, 3, 9)(g)[::2].transpose(0, 1), 10, nbest=2)


CASES = list(_cases())
BEAMS = list(_beams())
# Lengths that nobody may read and refuse on a GPU.
BEYOND = [
    greedy("lengths beyond", scores(3, 9, 20), 0, lambda g: torch.tensor([-4, 2**40, 9])),
    collapse("lengths beyond", lambda g: tokens(g, 3, 9, 3), 0, lambda g: torch.tensor([-4, 2**40, 9])),
]
