"""Cases of the attention_rows family: layouts, parts that saw no key, angles that broadcast."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .case import Case

Make = Callable[..., Tensor]


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


# ---- Merging ---------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Make], Tensor]] = {
    "1x1": lambda make: make(1, 1),
    "5x1": lambda make: make(5, 1),
    "9x123": lambda make: make(9, 123),
    "2x2x5x40": lambda make: make(2, 2, 5, 40),
    "heads inside": lambda make: make(2, 5, 3, 16).transpose(1, 2),
    "vector": lambda make: make(33),
    "columns": lambda make: make(24, 7).T,
    "sliced": lambda make: make(8, 80)[::2, 5:70],
    "expanded": lambda make: make(1, 3, 48).expand(3, 3, 48),
    "five axes": lambda make: make(2, 3, 2, 2, 8).permute(3, 0, 2, 1, 4),
    "no row": lambda make: make(0, 16),
    "no channel": lambda make: make(4, 0),
}


def some_empty(lse: Tensor, first: int) -> Tensor:
    """−∞ in every third row from ``first`` on."""
    return lse.masked_fill((torch.arange(lse.numel()).view(lse.shape) - first) % 3 == 0, -math.inf)


LSES: dict[str, Callable[[torch.Generator, Tensor], list[Tensor]]] = {
    "near": lambda g, rows: [randn(g, *rows.shape), randn(g, *rows.shape)],
    "first empty": lambda g, rows: [torch.full_like(rows, -math.inf), randn(g, *rows.shape)],
    "other empty": lambda g, rows: [randn(g, *rows.shape), torch.full_like(rows, -math.inf)],
    # One side, both sides and none in turn.
    "some empty": lambda g, rows: [some_empty(randn(g, *rows.shape), 0), some_empty(some_empty(rows, 0), 1)],
    "far apart": lambda g, rows: [300 * randn(g, *rows.shape), 300 * randn(g, *rows.shape)],
    "large": lambda g, rows: [1e4 + randn(g, *rows.shape), 1e4 + randn(g, *rows.shape)],
}


def merge_case(layout: str, lses: str) -> Case:
    def build(g: torch.Generator) -> list[Any]:
        out, other = (LAYOUTS[layout](lambda *shape: randn(g, *shape)) for _ in range(2))
        lse, other_lse = LSES[lses](g, out.new_zeros(out.shape[:-1]))
        return [out, lse, other, other_lse]

    return Case("merge_attention", f"{layout}-{lses}", build, wide=(1, 3))


def _merge_cases() -> Iterator[Case]:
    yield from (merge_case(layout, "near") for layout in LAYOUTS)
    yield from (merge_case(layout, lses) for layout in ("9x123", "heads inside") for lses in LSES if lses != "near")


# ---- Rotary embeddings -----------------------------------------------------------------------------------------------


def packed(g: torch.Generator) -> Tensor:
    """The keys of a projection to ``[B, L, (q, k, v), H, D]``."""
    return randn(g, 2, 5, 3, 2, 24).permute(2, 0, 3, 1, 4)[1]


# x, and the shape of cos and sin.
ROWS: dict[str, tuple[Callable[[torch.Generator], Tensor], tuple[int, ...]]] = {
    "2x3x5x16": (lambda g: randn(g, 2, 3, 5, 16), (5, 8)),
    "1x2x9x128": (lambda g: randn(g, 1, 2, 9, 128), (9, 64)),
    "7x2": (lambda g: randn(g, 7, 2), (7, 1)),
    "part": (lambda g: randn(g, 2, 2, 5, 40), (5, 11)),
    "part in blocks": (lambda g: randn(g, 2, 5, 48), (5, 8)),
    "odd": (lambda g: randn(g, 3, 9, 123), (9, 61)),
    "no pair": (lambda g: randn(g, 3, 4, 7), (4, 0)),
    "of each batch": (lambda g: randn(g, 3, 2, 4, 20), (3, 1, 4, 10)),
    "of each head": (lambda g: randn(g, 2, 3, 4, 20), (3, 1, 6)),
    "one angle": (lambda g: randn(g, 3, 4, 12), (1,)),
    "heads inside": (lambda g: randn(g, 2, 5, 3, 32).transpose(1, 2), (5, 16)),
    "heads last": (lambda g: randn(g, 2, 5, 3, 32), (2, 5, 1, 16)),
    "packed": (packed, (5, 9)),
    "columns": (lambda g: randn(g, 2, 20, 9).mT, (9, 8)),
    "expanded": (lambda g: randn(g, 1, 2, 5, 16).expand(3, -1, -1, -1), (5, 8)),
    "five axes": (lambda g: randn(g, 2, 3, 2, 4, 8).permute(2, 0, 1, 3, 4), (2, 1, 1, 4, 4)),
    "many rows": (lambda g: randn(g, 2, 70, 8), (70, 4)),
    "no row": (lambda g: randn(g, 2, 3, 0, 16), (0, 8)),
    "no channel": (lambda g: randn(g, 3, 4, 0), (4, 0)),
}
OPTIONS: dict[str, dict[str, bool]] = {
    "plain": {"weight": False, "normalize": False},
    "norm": {"weight": False, "normalize": True},
    "weight": {"weight": True, "normalize": True},
}


def rotary_case(
    rows: str, options: str, interleaved: bool = False, eps: float = 1e-6, scale: float | None = None
) -> Case:
    """``scale`` multiplies every second row of the channels, so that rows are not of one size."""
    make, angles = ROWS[rows]
    given = OPTIONS[options]

    def build(g: torch.Generator) -> list[Any]:
        x = make(g)
        if scale is not None:
            x[..., 1::2, :] *= scale
        angle = 6 * randn(g, *angles)
        weight = 1 + 0.3 * randn(g, x.shape[-1]) if given["weight"] else None
        return [x, weight, angle.cos(), angle.sin(), eps, given["normalize"], interleaved]

    label = f"{rows}-{options}" + "-interleaved" * interleaved + ("" if scale is None else f"-x{scale:g}")
    return Case("rotary_embedding", label, build, wide=(1, 2, 3))


def _rotary_cases() -> Iterator[Case]:
    for rows in ROWS:
        yield rotary_case(rows, "plain", interleaved=rows in ("part", "columns"))
        yield rotary_case(rows, "weight", interleaved=rows in ("odd", "heads inside", "packed"))
    for rows in ("2x3x5x16", "part", "heads inside"):
        yield rotary_case(rows, "norm")
        yield rotary_case(rows, "norm", interleaved=True)
    for scale in (0.0, 1e-4, 1e4):
        yield rotary_case("2x3x5x16", "weight", scale=scale)


CASES: list[Case] = [*_merge_cases(), *_rotary_cases()]


def _wide_rotary(width: int, pairs: int, interleaved: bool) -> Case:
    """A row for several warps."""

    def build(g: torch.Generator) -> list[Any]:
        angle = randn(g, 9, pairs)
        return [randn(g, 9, width), randn(g, width), angle.cos(), angle.sin(), 1e-6, True, interleaved]

    return Case("rotary_embedding", f"{width} of {2 * pairs}{', interleaved' * interleaved}", build, wide=(1, 2, 3))


def _wide_merge(width: int) -> Case:
    def build(g: torch.Generator) -> list[Any]:
        return [randn(g, 3, width), randn(g, 3), randn(g, 3, width), randn(g, 3)]

    return Case("merge_attention", str(width), build, wide=(1, 3))


def wide() -> list[Case]:
    return [
        _wide_rotary(1280, 640, False),
        _wide_rotary(1280, 320, True),
        _wide_rotary(1111, 500, False),
        _wide_merge(1000),
        _wide_merge(4999),
    ]


def odd() -> list[Case]:
    """Rows that do not fill a warp or a block."""
    labels = "heads inside-some empty", "9x123-near", "many rows-weight", "odd-weight-interleaved", "part-plain"
    return [*(case for case in CASES if case.label.startswith(labels)), _wide_rotary(1280, 640, False)]
