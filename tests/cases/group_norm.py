"""Cases of group norms: layouts, what modulates them, activations, far means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mmkern.reference.activations import Activation

from .case import Case
from .modulation import randn

Make = Callable[..., Tensor]

# [samples, groups, channels of each, positions]
LAYOUTS: dict[str, Callable[[Make], Tensor]] = {
    "1x1x1x1": lambda make: make(1, 1, 1, 1),
    "2x3x4x25": lambda make: make(2, 3, 4, 25),
    "2x2x5x64": lambda make: make(2, 2, 5, 64),
    "3x1x6x7": lambda make: make(3, 1, 6, 7),
    "2x6x1x33": lambda make: make(2, 6, 1, 33),
    "2x4x3x1": lambda make: make(2, 4, 3, 1),
    "1x2x3x1300": lambda make: make(1, 2, 3, 1300),
    "samples inside": lambda make: make(2, 3, 4, 20).permute(2, 0, 1, 3),
    "sliced": lambda make: make(2, 5, 6, 80)[:, 1:4, ::2, 5:70],
    "columns": lambda make: make(2, 3, 24, 5).transpose(2, 3),
    "expanded": lambda make: make(1, 3, 2, 48).expand(4, 3, 2, 48),
    "no sample": lambda make: make(0, 2, 3, 16),
    "no position": lambda make: make(2, 2, 3, 0),
}
KINDS = {
    "plain": "",
    "affine": "weight bias",
    "weight alone": "weight",
    "bias alone": "bias",
    "modulated": "scale shift",
    "scale alone": "scale",
    "shift alone": "weight shift",
    "all": "weight bias scale shift",
}


def case(layout: str, kind: str, activation: Activation = Activation.SILU, mean: float = 0.0) -> Case:
    def build(g: torch.Generator) -> list[Any]:
        x = LAYOUTS[layout](lambda *shape: mean + randn(g, *shape))
        sizes = {"weight": x.shape[1:3], "bias": x.shape[1:3], "scale": x.shape[:3], "shift": x.shape[:3]}
        given = [randn(g, *shape) if name in KINDS[kind].split() else None for name, shape in sizes.items()]
        return [x, *given, 1e-5, int(activation)]

    label = f"{layout}-{kind}-{activation.name.lower()}{'-far' if mean else ''}"
    return Case("group_norm_act", label, build, wide=(1, 2, 3, 4))


def _cases() -> Iterator[Case]:
    yield from (case(layout, "all") for layout in LAYOUTS)
    yield from (case("2x3x4x25", kind) for kind in KINDS)
    yield from (case("2x2x5x64", "all", activation) for activation in Activation)
    yield from (case(layout, "affine", Activation.NONE, 1e4) for layout in ("2x2x5x64", "1x2x3x1300"))


CASES = list(dict.fromkeys(_cases()))


def large(channels: int, positions: int) -> Case:
    """Groups for several warps, in one piece of each channel or more."""

    def build(g: torch.Generator) -> list[Any]:
        shape = 2, 2, channels
        tensors = (randn(g, *size) for size in ((*shape, positions), shape[1:], shape[1:], shape, shape))
        return [*tensors, 1e-5, int(Activation.SILU)]

    return Case("group_norm_act", f"2x2x{channels}x{positions}", build, wide=(1, 2, 3, 4))


def of_every_kernel() -> list[Case]:
    """Groups that threads hold in 5 pieces each, in 10 and not at all, in blocks of 16 bytes and one by one."""
    return [large(5, positions) for positions in (64, 123, 5000, 5001, 9000, 9001)]


def odd() -> list[Case]:
    """Several channels to a warp and to a block; channels that do not fill one; parts of a channel."""
    cases = [case for case in CASES if case.label.startswith(("2x3x4x25-", "sliced", "samples inside", "columns"))]
    return [*cases, large(70, 20), large(3, 300), large(3, 1153), large(6, 9001)]
