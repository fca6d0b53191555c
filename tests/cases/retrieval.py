"""Cases of the retrieval family: sizes, few queries and many, ties, near pairs, layouts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .case import Case
from .hyperbolic import near, randn

PAIRWISE = ("pairwise_topk", "cosine_pairwise_topk", "l2_pairwise_topk", "lorentz_pairwise_topk")
# N, M, D, k. Few queries and many, more columns than a tile or a panel has, all columns, none of anything.
SIZES = (
    (1, 1, 3, 1),
    (5, 9, 7, 4),
    (2, 700, 40, 3),
    (17, 33, 64, 33),
    (49, 600, 20, 10),
    (97, 130, 200, 5),
    (20, 900, 8, 40),
    (4, 3, 700, 2),
    (3, 21, 700, 6),
    (0, 4, 8, 2),
    (4, 0, 8, 0),
    (14, 5, 8, 0),
)


def case(op: str, label: str, x: Any, y: Any, k: int) -> Case:
    """``x(g)`` and ``y(g)`` make the rows."""
    curvature = [torch.tensor(0.7, dtype=torch.float64)] if op.startswith("lorentz") else []
    return Case(op, label, lambda g: [x(g), y(g), *curvature, k])


def linear(
    label: str, h: Any, weight: Any, k: int, *, bias: Any = None, softcap: float = 0.0, logs: bool = True
) -> Case:
    def build(g: torch.Generator) -> list[Any]:
        return [h(g), weight(g), None if bias is None else bias(g), k, softcap, logs]

    return Case("linear_topk", label, build, wide=(2,))


def points(*shape: int, norm: float = 1.2) -> Any:
    return lambda g: randn(g, *shape, norm=norm)


def whole(n: int, width: int) -> Any:
    """Rows of small whole numbers: many scores are equal, and without rounding."""
    return lambda g: torch.randint(-1, 2, (n, width), generator=g).double()


def _near(g: torch.Generator) -> list[Tensor]:
    """Rows of y about those of x, at distances of a few roundings to a third of their length."""
    x = randn(g, 15, 64, norm=1.2)
    _, y = near(x, g)
    apart = [x + randn(g, 15, 64, norm=10.0**-e) for e in range(6)]
    return [x, torch.cat([y, *apart, randn(g, 300, 64, norm=1.2)])]


def _cases() -> Iterator[Case]:
    for op in PAIRWISE:
        for n, m, d, k in SIZES:
            yield case(op, f"{n}x{m}x{d}, {k}", points(n, d), points(m, d), k)
        yield case(op, "ties", whole(20, 5), whole(400, 5), 30)
        yield case(op, "ties of few", whole(3, 5), whole(400, 5), 30)
        yield case(op, "zeros", lambda g: torch.zeros(14, 8, dtype=torch.float64), points(20, 8), 6)
        yield case(op, "far", points(20, 16, norm=8.0), points(70, 16, norm=8.0), 9)
        yield case(op, "strided", lambda g: randn(g, 21, 60, norm=1.0)[:, 3:40], lambda g: randn(g, 37, 90).T / 6, 7)
        yield case(op, "expanded", lambda g: randn(g, 1, 24).expand(15, 24), points(40, 24), 3)
    yield case("cosine_pairwise_topk", "short", points(14, 8, norm=5e-13), points(20, 8, norm=5e-13), 6)
    for op in ("l2_pairwise_topk", "lorentz_pairwise_topk"):
        curvature = [torch.tensor(0.7, dtype=torch.float64)] if op.startswith("lorentz") else []
        yield Case(op, "near", lambda g, c=curvature: [*_near(g), *c, 8])
    for n, m, d, k in SIZES:
        yield linear(f"{n}x{m}x{d}, {k}", points(n, d), points(m, d), k)
    for n in (3, 20):
        h, weight, bias = points(n, 48, norm=3.0), points(600, 48, norm=3.0), lambda g: randn(g, 600)
        yield linear(f"bias of {n}", h, weight, 12, bias=bias)
        yield linear(f"soft-capped, {n}", h, weight, 12, bias=bias, softcap=5.0)
        yield linear(f"no sums, {n}", h, weight, 12, bias=bias, logs=False)
        yield linear(f"large, {n}", points(n, 48, norm=30.0), points(600, 48, norm=30.0), 2)
    yield linear("ties", whole(20, 5), whole(400, 5), 30)


CASES = list(_cases())
