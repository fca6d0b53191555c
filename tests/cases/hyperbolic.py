"""Cases of the hyperbolic family: which arguments each op is tried with.

``tests/contract.py`` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .case import Case

CURVATURES = (0.1, 1.0, 10.0)


def randn(g: torch.Generator, *shape: int, norm: float | None = None) -> Tensor:
    """Normal numbers; with ``norm``, rows of about that length."""
    x = torch.randn(*shape, generator=g, dtype=torch.float64)
    return x if norm is None else x * (norm / shape[-1] ** 0.5)


def in_ball(g: torch.Generator, *shape: int, curvature: float = 1.0, radius: float = 0.7) -> Tensor:
    """Points whose distance to the centre is up to ``radius`` of the ball's."""
    x = randn(g, *shape)
    length = torch.rand(*shape[:-1], 1, generator=g, dtype=torch.float64) * radius / curvature**0.5
    return x / x.norm(dim=-1, keepdim=True) * length


# The layouts that a vector argument comes in. Each takes make(*shape) -> Tensor.
Make = Callable[..., Tensor]
LAYOUTS: dict[str, Callable[[Make], Tensor]] = {
    "5x1": lambda make: make(5, 1),
    "1x5": lambda make: make(1, 5),
    "3x64": lambda make: make(3, 64),
    "9x123": lambda make: make(9, 123),
    "17x129": lambda make: make(17, 129),
    "7x700": lambda make: make(7, 700),
    "2x3x40": lambda make: make(2, 3, 40),
    "vector": lambda make: make(33),
    "strided": lambda make: make(6, 4, 24).transpose(0, 1),
    "columns": lambda make: make(24, 7).T,
    "sliced": lambda make: make(8, 80)[::2, 5:70],
    "expanded": lambda make: make(1, 48).expand(7, 48),
    "empty": lambda make: make(0, 16),
}

_TO_POINT = ("lorentz_log_map0", "lorentz_to_poincare", "lorentz_half_aperture")
_RADIAL_BALL = ("poincare_log_map0", "poincare_to_lorentz")
_RADIAL_TANGENT = ("lorentz_exp_map0", "poincare_exp_map0")
_LORENTZ_PAIRS = ("lorentz_log_map", "lorentz_distance", "lorentz_exterior_angle", "lorentz_entailment_loss")
_CONES = ("lorentz_exterior_angle", "lorentz_entailment_loss")
_BALL_PAIRS = ("mobius_add", "poincare_log_map", "poincare_distance")
_TANGENT_PAIRS = ("lorentz_exp_map", "poincare_exp_map")
PAIRWISE = ("lorentz_pairwise_inner", "lorentz_pairwise_distance", "poincare_pairwise_distance")
OPTIONS: dict[str, list[float]] = {"lorentz_half_aperture": [0.1], "lorentz_entailment_loss": [0.1]}


def _curvature(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _case(op: str, label: str, build: Callable[[torch.Generator], list[Any]], c: float | Tensor) -> Case:
    def full(g: torch.Generator) -> list[Any]:
        return [*build(g), c if isinstance(c, float) else c.clone(), *OPTIONS.get(op, [])]

    return Case(op, label, full, wide=(0,) if op == "mobius_scalar_mul" else ())


def _point(op: str, c: float) -> Callable[[torch.Generator], Make]:
    """What the (first) vector argument of an op is made of."""
    if op in (*_RADIAL_BALL, *_BALL_PAIRS, "poincare_exp_map", "mobius_scalar_mul", "poincare_pairwise_distance"):
        return lambda g: lambda *shape: in_ball(g, *shape, curvature=c)
    return lambda g: lambda *shape: randn(g, *shape, norm=1.2 / c**0.5)


def _row_wise(op: str, layout: str, c: float) -> Callable[[torch.Generator], list[Any]]:
    shape, point = LAYOUTS[layout], _point(op, c)
    tangent: Callable[[torch.Generator], Make] = lambda g: lambda *s: randn(g, *s, norm=0.8 / c**0.5)  # noqa: E731
    if op in (*_LORENTZ_PAIRS, *_BALL_PAIRS):
        return lambda g: [shape(point(g)), shape(point(g))]
    if op in _TANGENT_PAIRS:
        return lambda g: [shape(point(g)), shape(tangent(g))]
    if op == "lorentz_parallel_transport":
        return lambda g: [shape(point(g)), shape(point(g)), shape(tangent(g))]
    if op == "mobius_scalar_mul":
        return lambda g: _with_factor(g, shape(point(g)))
    return lambda g: [shape(point(g))]


def _with_factor(g: torch.Generator, x: Tensor) -> list[Any]:
    return [torch.randn(x.shape[:-1], generator=g, dtype=torch.float64), x]


ROW_WISE = (
    *_RADIAL_TANGENT,
    *_TO_POINT,
    *_RADIAL_BALL,
    "mobius_scalar_mul",
    *_LORENTZ_PAIRS,
    *_BALL_PAIRS,
    *_TANGENT_PAIRS,
    "lorentz_parallel_transport",
)


def _row_wise_cases() -> Iterator[Case]:
    for op in ROW_WISE:
        for layout in LAYOUTS:
            if layout == "5x1" and op in _CONES:
                continue  # on a line the angle is 0 or π, and its gradient rounding noise
            yield _case(op, layout, _row_wise(op, layout, 1.0), _curvature(1.0))
        for c in (0.1, 10.0):
            yield _case(op, f"c={c}", _row_wise(op, "9x123", c), c)


def _centroid_cases() -> Iterator[Case]:
    for shape in ((5, 33), (2, 8), (2, 3, 7, 24)):
        label = "x".join(map(str, shape))
        yield _case(
            "lorentz_centroid",
            label,
            lambda g, s=shape: [randn(g, *s, norm=1.0), torch.rand(*s[:-1], generator=g, dtype=torch.float64) + 0.1],
            _curvature(0.7),
        )
    yield _case(
        "lorentz_centroid", "c=10.0", lambda g: [randn(g, 6, 40, norm=0.3), torch.ones(6, dtype=torch.float64)], 10.0
    )


def _pairwise_cases() -> Iterator[Case]:
    sizes = ((1, 1, 1), (5, 3, 5), (17, 33, 64), (123, 129, 40), (7, 300, 123), (100, 9, 257), (0, 4, 8), (4, 0, 8))
    for op in PAIRWISE:
        point, far = _point(op, 1.0), _point(op, 0.1)
        for n, m, d in sizes:
            yield _case(
                op,
                f"{n}x{m}x{d}",
                lambda g, p=point, s=(n, m, d): [p(g)(s[0], s[2]), p(g)(s[1], s[2])],
                _curvature(1.0),
            )
        yield _case(op, "strided", lambda g, p=point: [p(g)(9, 60)[:, 3:40], p(g)(37, 11).T], _curvature(1.0))
        yield _case(op, "near", lambda g, p=point: near(p(g)(12, 64), g), _curvature(1.0))
        yield _case(op, "c=0.1", lambda g, p=far: [p(g)(21, 48), p(g)(34, 48)], 0.1)


def near(x: Tensor, g: torch.Generator) -> list[Tensor]:
    """Points and their neighbours at 1e-6 to 1e-1, and, last, two coinciding ones."""
    gap = torch.logspace(-6, -1, x.shape[0] - 2, dtype=torch.float64)
    y = x.clone()
    y[:-2] += randn(g, x.shape[0] - 2, x.shape[1], norm=1.0) * gap[:, None]
    return [x, y]


def _special_cases() -> Iterator[Case]:
    """Where the usual formulas break: zero vectors, near and coinciding points, far points."""
    for op in (*_RADIAL_TANGENT, *_TO_POINT, *_RADIAL_BALL):
        yield _case(
            op,
            "zero and tiny",
            lambda g: [torch.stack([torch.zeros(16, dtype=torch.float64), *randn(g, 3, 16, norm=1e-4)])],
            _curvature(1.0),
        )
    for op in ("lorentz_log_map", "lorentz_distance", "poincare_log_map", "poincare_distance"):
        point = _point(op, 1.0)
        yield _case(op, "near", lambda g, p=point: near(p(g)(12, 64), g), _curvature(1.0))
    yield _case(
        "lorentz_exp_map0",
        "far",
        lambda g: [randn(g, 6, 64, norm=1.0) * torch.tensor([[1.0], [5], [11], [20], [40], [80]])],
        _curvature(1.0),
    )
    yield _case(
        "lorentz_log_map0",
        "far",
        lambda g: [randn(g, 5, 64, norm=1.0) * torch.tensor([[1.0], [1e2], [1e4], [1e9], [1e15]])],
        _curvature(1.0),
    )
    yield _case(
        "lorentz_log_map0",
        "far between near",
        lambda g: [randn(g, 40, 48, norm=1.0) * torch.tensor([1.0, 1e15, 2.0, 3.0, 4.0]).repeat(8)[:, None]],
        _curvature(1.0),
    )
    yield _case(
        "lorentz_exp_map0",
        "across the end of the series",
        lambda g: [randn(g, 40, 24, norm=1.0) * torch.linspace(1.7, 2.3, 40)[:, None]],
        _curvature(1.0),
    )
    yield _case(
        "lorentz_distance", "far", lambda g: [randn(g, 6, 64, norm=1e3), randn(g, 6, 64, norm=1e3)], _curvature(1.0)
    )


CASES: list[Case] = [*_row_wise_cases(), *_centroid_cases(), *_pairwise_cases(), *_special_cases()]
OPS = tuple(dict.fromkeys(case.op for case in CASES))
