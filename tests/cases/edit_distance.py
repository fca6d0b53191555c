"""Cases of edit distance: alike and unlike, of every length about a word of 64 rows, empty, padded, strided."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .case import Case
from .ctc import lengths

Make = Callable[[torch.Generator], tuple[Tensor, Tensor]]

SIZES = ((0, 3, 4), (3, 0, 4), (3, 4, 0), (2, 1, 1), (20, 7, 9), (9, 63, 70), (5, 64, 64), (4, 65, 40), (3, 130, 200))


def tokens(g: torch.Generator, rows: int, width: int, labels: int = 4) -> Tensor:
    return torch.randint(0, labels, (rows, width), generator=g)


def alike(g: torch.Generator, rows: int, width: int, labels: int = 50) -> tuple[Tensor, Tensor]:
    """b is a with a few edits, of each kind."""
    a = tokens(g, rows, width, labels)
    b = a.clone()
    for row in range(rows):
        at = torch.randint(0, width - 4, (3,), generator=g).tolist()
        b[row, at[0]] = labels
        b[row, at[1] : -1] = b[row, at[1] + 1 :].clone()
        b[row, at[2] + 1 :] = b[row, at[2] : -1].clone()
    return a, b


def case(label: str, make: Make, *, of: tuple[Any, Any] = (None, None)) -> Case:
    """``of``: what makes the lengths, from a generator and the size."""

    def build(g: torch.Generator) -> list[Any]:
        pair = make(g)
        return [*pair, *(f and f(g, *x.shape) for f, x in zip(of, pair, strict=True))]

    return Case("edit_distance", label, build)


def _cases() -> Iterator[Case]:
    for rows, n, m in SIZES:

        def make(g: torch.Generator, rows: int = rows, n: int = n, m: int = m) -> tuple[Tensor, Tensor]:
            return tokens(g, rows, n), tokens(g, rows, m)

        yield case(f"{rows}x{n}, {m}", make)
        yield case(f"{rows}x{n}, {m}, lengths", make, of=(lengths, lengths))
    yield case("alike", lambda g: alike(g, 12, 100))
    yield case("equal", lambda g: (torch.arange(70).expand(2, 70), torch.arange(70).expand(2, 70)))
    yield case("nothing in common", lambda g: (tokens(g, 3, 70), tokens(g, 3, 50) + 4))
    yield case("large", lambda g: (2**40 * tokens(g, 5, 20), 2**40 * tokens(g, 5, 30)))
    yield case("strided", lambda g: (tokens(g, 6, 90)[::2, 5:80], tokens(g, 40, 3).T))


CASES = list(_cases())
# More columns than are kept at a time; more tokens than a table takes; words of rows that have a loop of their own, or
# not.
LONG = [
    case("long", lambda g: (tokens(g, 1, 90), tokens(g, 1, 1300))),
    case("many tokens", lambda g: (torch.randperm(1500, generator=g)[None], tokens(g, 1, 300, 1500))),
    *(case(f"{n} rows", lambda g, n=n: alike(g, 2, n)) for n in (190, 250, 300)),
]
# Lengths that nobody may read and refuse on a GPU.
BEYOND = case(
    "lengths beyond",
    lambda g: (tokens(g, 3, 9), tokens(g, 3, 12)),
    of=(lambda g, *size: torch.tensor([-4, 2**40, 9]), lambda g, *size: torch.tensor([5, 2**40, -1])),
)
