"""Cases of the modulation family: layouts, what rows share, far means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .case import Case

Make = Callable[..., Tensor]
Modulators = dict[str, Tensor]


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


LAYOUTS: dict[str, Callable[[Make], Tensor]] = {
    "1x1": lambda make: make(1, 1),
    "5x123": lambda make: make(5, 123),
    "vector": lambda make: make(33),
    "2x7x64": lambda make: make(2, 7, 64),
    "2x70x20": lambda make: make(2, 70, 20),  # more rows than a block
    "3x1x48": lambda make: make(3, 1, 48),
    "2x3x5x16": lambda make: make(2, 3, 5, 16),
    "rows inside": lambda make: make(2, 5, 3, 24).transpose(1, 2),
    "columns": lambda make: make(24, 7).T,
    "sliced": lambda make: make(2, 8, 80)[:, ::2, 5:70],
    "expanded": lambda make: make(1, 3, 48).expand(4, 3, 48),
    "no row": lambda make: make(2, 0, 16),
}


def _of(g: torch.Generator, x: Tensor, names: str, shared: int) -> Modulators:
    """Shared by the rows of the last ``shared`` of the leading axes."""
    leading = x.dim() - 1
    kept = max(leading - shared, 0)
    shape = (*x.shape[:kept], *[1] * (leading - kept), x.shape[-1])
    return {name: randn(g, *shape) for name in names.split()}


def _affine(g: torch.Generator, x: Tensor) -> Modulators:
    return {name: randn(g, x.shape[-1]) for name in ("weight", "bias")}


KINDS: dict[str, Callable[[torch.Generator, Tensor], Modulators]] = {
    "plain": lambda g, x: {},
    "affine": _affine,
    "shared": lambda g, x: _of(g, x, "scale shift", 1),
    "each": lambda g, x: _of(g, x, "scale shift", 0),
    "scale alone": lambda g, x: _of(g, x, "scale", 1),
    "shift alone": lambda g, x: _of(g, x, "shift", 0),
    "each and affine": lambda g, x: _of(g, x, "scale shift", 0) | _affine(g, x),
    "shared and affine": lambda g, x: _of(g, x, "scale shift", 1) | _affine(g, x),
    "frames": lambda g, x: _of(g, x, "scale shift", 1) | {"frame_scale": randn(g, *x.shape[:-1], 1)},
    "all frames": lambda g, x: _affine(g, x) | {"frame_scale": randn(g, *[1] * x.dim())},
}
GATES: dict[str, Callable[[torch.Generator, Tensor], Modulators]] = {
    "no gate": lambda g, x: {},
    "shared gate": lambda g, x: _of(g, x, "gate", 1),
    "gate of each": lambda g, x: _of(g, x, "gate", 0),
    "one gate": lambda g, x: _of(g, x, "gate", 9),
}
_NAMES = ("weight", "bias", "scale", "shift", "frame_scale")


def case(layout: str, kind: str, centered: bool = True, mean: float = 0.0) -> Case:
    def build(g: torch.Generator) -> list[Any]:
        x = LAYOUTS[layout](lambda *shape: mean + randn(g, *shape))
        given = KINDS[kind](g, x)
        return [x, *(given.get(name) for name in _NAMES), 1e-6, centered]

    label = f"{layout}-{kind}{'' if centered else '-rms'}{'-far' if mean else ''}"
    return Case("ada_layer_norm", label, build, wide=tuple(range(1, 6)))


def residual_case(layout: str, kind: str, gate: str, centered: bool = True) -> Case:
    def build(g: torch.Generator) -> list[Any]:
        x, residual = (LAYOUTS[layout](lambda *shape: randn(g, *shape)) for _ in range(2))
        given = KINDS[kind](g, x)
        return [x, residual, GATES[gate](g, x).get("gate"), *(given.get(name) for name in _NAMES), 1e-6, centered]

    label = f"{layout}-{kind}-{gate}{'' if centered else '-rms'}"
    return Case("residual_ada_layer_norm", label, build, wide=tuple(range(2, 8)))


def _cases() -> Iterator[Case]:
    yield from (case(layout, "shared") for layout in LAYOUTS)
    yield from (case(layout, kind) for layout in ("2x7x64", "2x70x20") for kind in KINDS if kind != "shared")
    yield from (case("rows inside", kind, False) for kind in ("plain", "affine", "each and affine", "frames"))
    yield from (case("5x123", kind, mean=1e4) for kind in ("plain", "affine"))
    yield from (residual_case(layout, "shared", "shared gate") for layout in LAYOUTS)
    yield from (
        residual_case("2x70x20", kind, gate) for kind in ("plain", "each", "shared and affine") for gate in GATES
    )
    yield from (residual_case("rows inside", "frames", gate, False) for gate in GATES)


CASES = list(dict.fromkeys(_cases()))


def wide(cols: int, rows: int = 3, centered: bool = True) -> list[Case]:
    """Rows for several warps, with and without a residual; the frames are two rows long."""

    def build(g: torch.Generator, has_residual: bool) -> list[Any]:
        x = [randn(g, 2, rows, cols) for _ in range(1 + has_residual)]
        gate = _of(g, x[0], "gate", 1).values() if has_residual else []
        modulators = _affine(g, x[0]) | _of(g, x[0], "scale shift", 1)
        frames = randn(g, 2, rows // 2 + 1, 1).repeat_interleave(2, 1)[:, :rows]
        return [*x, *gate, *modulators.values(), frames, 1e-6, centered]

    label = f"2x{rows}x{cols}{'' if centered else '-rms'}"
    return [
        Case("ada_layer_norm", label, lambda g: build(g, False), wide=tuple(range(1, 6))),
        Case("residual_ada_layer_norm", label, lambda g: build(g, True), wide=tuple(range(2, 8))),
    ]


def of_every_kernel() -> list[Case]:
    """Rows that a lane holds in one chunk, in two and not at all, in blocks of 16 bytes and one by one."""
    return [case for cols in (64, 123, 4101, 4104, 8200) for case in wide(cols)]


def odd() -> list[Case]:
    """Several rows to a warp, to a block; runs that do not fill one; parts of a run; every kind of sharing."""
    labels = "5x123-affine", "2x70x20-all frames", "2x70x20-each-shared gate", "rows inside-frames-one gate-rms"
    starts = "2x70x20-shared and affine", "sliced-shared"
    cases = [case for case in CASES if case.label in labels or case.label.startswith(starts)]
    return [*cases, *wide(300, 9), *wide(4104), *wide(8200)]
