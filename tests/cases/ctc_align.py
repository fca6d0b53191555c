"""Cases of forced alignment: repeats among targets, just enough frames and too few, lengths, bad rows, layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .case import Case
from .ctc import Make, equal, flat, lengths, mixed, scores

ALIGN = "ctc_forced_align"
Targets = Callable[[torch.Generator], Tensor]


def drawn(rows: int, count: int, labels: int, blank: int = 0, *, alike: bool = False) -> Targets:
    """Any labels but blank; ``alike``: of two alone, so that many repeat."""

    def make(g: torch.Generator) -> Tensor:
        few = 2 if alike else labels - 1
        found = torch.randint(0, max(few, 1), (rows, count), generator=g)
        return found + (found >= blank) if labels > 1 else found

    return make


def align(
    label: str,
    make: Make,
    targets: Targets,
    blank: int = 0,
    of: Callable[[torch.Generator], Tensor] | None = None,
    of_targets: Callable[[torch.Generator], Tensor] | None = None,
) -> Case:
    """``of``, ``of_targets``: what makes the lengths."""

    def build(g: torch.Generator) -> list[Any]:
        return [make(g), targets(g), of(g) if of else None, of_targets(g) if of_targets else None, blank]

    return Case(ALIGN, label, build)


def _cases() -> Iterator[Case]:
    yield align("0x3x4", flat(0, 3, 4), drawn(0, 2, 4))
    yield align("no frames", flat(2, 0, 4), drawn(2, 0, 4))
    yield align("no frames for targets", flat(2, 0, 4), drawn(2, 1, 4))
    yield align("no targets", flat(2, 5, 4), drawn(2, 0, 4))
    yield align("one", flat(1, 1, 2), drawn(1, 1, 2))
    yield align("3x9x5", flat(3, 9, 5), drawn(3, 4, 5))
    yield align("repeats", flat(4, 20, 6), drawn(4, 8, 6, alike=True))
    yield align("a frame each", flat(4, 8, 9), drawn(4, 8, 9))
    yield align("too few frames", flat(4, 9, 6), drawn(4, 8, 6, alike=True))
    yield align("last blank", flat(3, 30, 12), drawn(3, 10, 12, 11), 11)
    yield align(
        "some",
        scores(5, 40, 17),
        drawn(5, 12, 17),
        of=lambda g: lengths(g, 5, 40),
        of_targets=lambda g: lengths(g, 5, 12),
    )
    yield align("wide", flat(2, 25, 300), drawn(2, 9, 300))
    yield align("many targets", flat(2, 330, 40), drawn(2, 150, 40))
    yield align("equal", equal, drawn(3, 15, 37, 1), 1)
    yield align("all equal", lambda g: torch.zeros(2, 12, 5, dtype=torch.float64), drawn(2, 4, 5))
    yield align("mixed", mixed, drawn(5, 3, 19), of=lambda g: torch.tensor([8, 8, 6, 8, 5]))
    yield align("strided", lambda g: flat(40, 3, 9)(g)[::2].transpose(0, 1), drawn(3, 6, 9))


CASES = list(_cases())
# Targets and lengths that nobody may read and refuse on a GPU.
BEYOND = [
    align("targets beyond", flat(3, 9, 20), lambda g: torch.tensor([[1, 20], [-1, 2], [3, 4]])),
    align(
        "lengths beyond",
        flat(3, 9, 20),
        drawn(3, 4, 20),
        of=lambda g: torch.tensor([-4, 2**40, 9]),
        of_targets=lambda g: torch.tensor([2**40, -3, 2]),
    ),
]
