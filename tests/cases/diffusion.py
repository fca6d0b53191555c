"""Cases of the diffusion family: layouts, every column of the coefficients, guidance, noise, limits, what is known; the
loss and its mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmkern.reference.diffusion import MAX_HISTORY, MAX_OUTPUTS, Column

from .case import Case
from .modulation import LAYOUTS as ROWS
from .modulation import randn

_NAMES = (
    "x",
    *(f"output{i}" for i in range(MAX_OUTPUTS)),
    "mask",
    *(f"history{i}" for i in range(MAX_HISTORY)),
    *("noise", "seed", "keep", "known", "known_noise", "weights", "rescale", "coefficients", "limits"),
)
LAYOUTS = ROWS | {
    "3x63": lambda make: make(3, 63),
    "2x2100": lambda make: make(2, 2100),
    "one row": lambda make: make(2, 1, 48).expand(2, 5, 48),
}
_WIDE = tuple(_NAMES.index(name) for name in ("mask", "keep", "weights", "rescale", "coefficients", "limits"))


STEPS = ("denoise_step", "multistep", "corrected_step")


@dataclass(frozen=True)
class Parts:
    """What a step is given beside the sample and the coefficients."""

    outputs: int = 1
    history: int = 0
    noise: str = ""  # "given" or "drawn"
    mask: Callable[[Tensor], tuple[int, ...]] | None = None  # the shape that broadcasts
    keep: Callable[[Tensor], tuple[int, ...]] | None = None
    rescale: bool = False
    limits: bool = False
    samples: bool = False  # have a row of numbers each


def _frames(x: Tensor) -> tuple[int, ...]:
    """``[B, T, 1]``."""
    return (*x.shape[:-1], 1)


def _places(x: Tensor) -> tuple[int, ...]:
    """``[1, ..., D]``."""
    return (*[1] * (x.dim() - 1), x.shape[-1])


def _planes(x: Tensor) -> tuple[int, ...]:
    """``[B, 1, H, W]``."""
    return (x.shape[0], 1, *x.shape[2:])


PARTS = {
    "plain": Parts(),
    "nothing": Parts(outputs=0),
    "two outputs": Parts(outputs=2),
    "five outputs": Parts(outputs=5, samples=True),
    "frames": Parts(outputs=3, mask=_frames),
    "places": Parts(outputs=3, mask=_places, samples=True),
    "planes": Parts(outputs=3, mask=_planes, keep=_frames),
    "history": Parts(history=4),
    "noise": Parts(noise="given", samples=True),
    "drawn": Parts(noise="drawn"),
    "known": Parts(keep=_frames),
    "known places": Parts(keep=_places, noise="given"),
    "rescale": Parts(outputs=2, rescale=True),
    "rescale each": Parts(outputs=2, rescale=True, samples=True, limits=True),
    "rescale to none": Parts(rescale=True),
    "limits": Parts(limits=True),
    "all": Parts(5, 4, "drawn", _frames, _frames, True, True, True),
}


def case(op: str, layout: str, parts: str) -> Case:
    def build(g: torch.Generator) -> list[Any]:
        p = PARTS[parts]

        def sample() -> Tensor:
            return LAYOUTS[layout](lambda *shape: randn(g, *shape))

        x = sample()
        rows = x.shape[0] if p.samples and x.dim() > 1 else 1
        given: dict[str, Any] = {"x": x, "coefficients": randn(g, rows, len(Column))}
        given |= {f"output{i}": sample() for i in range(p.outputs)}
        given |= {f"history{i}": sample() for i in range(p.history)}
        if p.outputs > 1:
            given["weights"] = randn(g, rows, 2 * MAX_OUTPUTS)
        if p.mask is not None:
            given["mask"] = randn(g, *p.mask(x)).sigmoid()
        if p.noise == "given":
            given["noise"] = sample()
        if p.noise == "drawn":
            given["seed"] = torch.tensor([2**40 + 7, 5])
        if p.keep is not None:
            given |= {"keep": randn(g, *p.keep(x)).sigmoid(), "known": sample(), "known_noise": sample()}
        if p.rescale:
            given["rescale"] = randn(g, rows, 1).sigmoid()
        if p.limits:
            given["limits"] = randn(g, rows, 2).abs() + 0.1
        return [given.get(name) for name in _NAMES]

    return Case(op, f"{layout}-{parts}", build, wide=_WIDE)


def loss_case(layout: str, mask: Callable[[Tensor], tuple[int, ...]] | None = None) -> Case:
    def build(g: torch.Generator) -> list[Any]:
        pred, target = (LAYOUTS[layout](lambda *shape: randn(g, *shape)) for _ in range(2))
        return [pred, target, None if mask is None else randn(g, *mask(pred)).sigmoid()]

    name = "" if mask is None else f"-{mask.__name__.strip('_')}"
    return Case("masked_squared_error", f"{layout}{name}", build, wide=(2,))


def loss_of_target_out_of_order() -> Case:
    """Its rows lie in another order than those of pred."""

    def build(g: torch.Generator) -> list[Any]:
        return [randn(g, 2, 7, 64), randn(g, 7, 2, 64).transpose(0, 1), None]

    return Case("masked_squared_error", "2x7x64-target out of order", build)


def wide_losses(cols: int) -> list[Case]:
    """Rows for several warps, in one piece or more; a mask that has no row's stride, and one of a number a row."""

    def build(g: torch.Generator, *mask: int) -> list[Any]:
        return [randn(g, 2, 3, 5, cols), randn(g, 2, 3, 5, cols), randn(g, *mask).sigmoid()]

    return [
        Case("masked_squared_error", f"2x3x5x{cols}-planes", lambda g: build(g, 2, 1, 5, cols), wide=(2,)),
        Case("masked_squared_error", f"2x3x5x{cols}-frames", lambda g: build(g, 2, 3, 5, 1), wide=(2,)),
    ]


OF_DRAWN_NOISE = ("5x123", "2x7x64", "2x70x20", "2x3x5x16")  # laid out in the order of their axes


def _cases() -> Iterator[Case]:
    yield from (case("denoise_step", layout, "two outputs") for layout in LAYOUTS)
    yield from (case("denoise_step", "2x70x20", parts) for parts in PARTS)
    yield from (case("denoise_step", "sliced", parts) for parts in PARTS if "dra" not in parts and parts != "all")
    yield from (case("denoise_step", layout, "drawn") for layout in OF_DRAWN_NOISE)
    yield case("denoise_step", "2x3x5x16", "planes")
    yield from (case("denoise_step", layout, "rescale") for layout in ("one row", "vector"))
    yield from (case("denoise_step", layout, "all") for layout in ("5x123", "3x63"))  # rows begin between counters
    yield from (case("multistep", "2x7x64", parts) for parts in ("plain", "history", "limits"))
    yield from (case("corrected_step", layout, "history") for layout in ("2x7x64", "rows inside", "2x2100"))
    yield from (case("denoise_step", "2x2100", parts) for parts in ("drawn", "known places", "rescale each"))
    yield case("corrected_step", "2x70x20", "all")
    yield from (loss_case(layout) for layout in LAYOUTS)
    yield loss_of_target_out_of_order()
    yield from (
        loss_case(layout, mask) for layout in ("2x70x20", "sliced", "rows inside") for mask in (_frames, _places)
    )


CASES = list(dict.fromkeys(_cases()))


def of_every_kernel() -> list[Case]:
    """In blocks of 16 bytes and one by one, and beside outputs that stay in float32 at least."""
    alike = [case("corrected_step", layout, "all") for layout in ("2x7x64", "5x123")]
    outputs = tuple(_NAMES.index(f"output{i}") for i in range(MAX_OUTPUTS))
    steps = [*alike, replace(alike[0], label=f"{alike[0].label}-wide outputs", wide=(*_WIDE, *outputs))]
    losses = [loss_case(layout, _places) for layout in ("2x7x64", "5x123")]
    return [*steps, *losses, replace(losses[0], label=f"{losses[0].label}-wide target", wide=(1, 2))]


def odd() -> list[Case]:
    """Pieces that do not fill a warp, samples that do not fill a part of them."""
    steps = (("2x70x20", "all"), ("5x123", "all"), ("2x7x64", "rescale each"), ("sliced", "known"))
    losses = [loss_case("2x70x20", _frames), loss_case("sliced", _places), loss_case("5x123")]
    return [*(case("corrected_step", layout, parts) for layout, parts in steps), *losses, *wide_losses(300)]
