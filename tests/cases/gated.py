"""Cases of activations beside a scale, a shift or a gate: layouts, activations, what elements share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmkern.reference.activations import Activation

from .case import Case
from .modulation import LAYOUTS, randn

Shape = Callable[[Tensor], tuple[int, ...]]

# Where an activation may overflow on its way.
FAR = (-1e38, -1e30, -1e4, -100.0, -88.4, -20.0, -0.0, 0.0, 20.0, 100.0, 1e4, 1e30, 1e38)


def _kept(*axes: int) -> Shape:
    """The sizes of x on these axes, 1 on the others."""

    def shape(x: Tensor) -> tuple[int, ...]:
        kept = {axis % x.dim() for axis in axes if -x.dim() <= axis < x.dim()}
        return tuple(n if axis in kept else 1 for axis, n in enumerate(x.shape))

    return shape


# The shapes of scale and shift.
SHARED: dict[str, tuple[Shape | None, Shape | None]] = {
    "neither": (None, None),
    "scale alone": (_kept(0, -1), None),
    "shift alone": (None, _kept(-1)),
    "channels": (_kept(0, -1), _kept(0, -1)),
    "last axis": (_kept(-1), _kept(-1)),
    "rows": (_kept(0, 1), _kept(0, 1)),
    "first axis": (_kept(0), _kept(0)),
    "inner rows": (_kept(1, -1), _kept(1, -1)),
    "one number": (_kept(), _kept()),
    "each": (_kept(*range(5)), _kept(*range(5))),
    "shared scale": (_kept(0, -1), _kept(*range(5))),
    "shared shift": (_kept(*range(5)), _kept(0)),
}


def affine_case(layout: str, shared: str, activation: Activation = Activation.SILU) -> Case:
    def build(g: torch.Generator) -> list[Any]:
        x = LAYOUTS[layout](lambda *shape: randn(g, *shape))
        given = (None if shape is None else randn(g, *shape(x)) for shape in SHARED[shared])
        return [x, *given, 0.75, int(activation)]

    return Case("affine_activation", f"{layout}-{shared}-{activation.name.lower()}", build)


def gated_case(layout: str, activation: Activation = Activation.GELU) -> Case:
    def build(g: torch.Generator) -> list[Any]:
        x = LAYOUTS[layout](lambda *shape: randn(g, *shape))
        return [x, int(activation)]

    return Case("gated_activation", f"{layout}-{activation.name.lower()}", build)


def _cases() -> Iterator[Case]:
    yield from (affine_case(layout, "channels") for layout in LAYOUTS)
    yield from (affine_case(layout, shared) for layout in ("2x70x20", "rows inside", "sliced") for shared in SHARED)
    yield from (affine_case("2x7x64", "channels", activation) for activation in Activation)
    yield from (gated_case(layout) for layout in ("2x7x64", "2x70x20", "2x3x5x16", "rows inside", "no row", "expanded"))
    yield from (gated_case("2x70x20", activation) for activation in Activation)


CASES = list(dict.fromkeys(_cases()))


def wide(cols: int) -> list[Case]:
    """Rows for several warps, in one piece or more."""

    def build(g: torch.Generator, *shape: int) -> list[Any]:
        return [randn(g, 2, 9, cols), randn(g, *shape), randn(g, *shape), 0.75, int(Activation.SILU)]

    return [
        Case("affine_activation", f"2x9x{cols}-channels", lambda g: build(g, 2, 1, cols)),
        Case("affine_activation", f"2x9x{cols}-rows", lambda g: build(g, 2, 9, 1)),
        Case("gated_activation", f"2x9x{cols}", lambda g: [randn(g, 2, 9, 2 * cols), int(Activation.GELU)]),
    ]


def of_every_kernel() -> list[Case]:
    """In blocks of 16 bytes and one by one, and beside numbers that stay in float32 at least."""
    cases = [
        make(layout) for layout in ("2x7x64", "2x70x20") for make in (lambda x: affine_case(x, "each"), gated_case)
    ]
    odd = affine_case("5x123", "channels")
    return [*cases, odd, replace(cases[0], label=f"{cases[0].label}-wide", wide=(1, 2))]


def odd() -> list[Case]:
    """Several rows to a warp and to a block; runs that do not fill one; parts of a run; every kind of sharing."""
    cases = [case for case in CASES if case.label.startswith(("2x70x20-", "sliced-", "rows inside-"))]
    return [*cases, *wide(300), *wide(1153)]
