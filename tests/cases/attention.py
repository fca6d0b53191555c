"""Cases of the attention family: shapes, masks, biases, windows, layouts. ``tests/contract.py`` runs them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmkern.reference.attention import BOTTOM_RIGHT, RESAMPLE, TOP_LEFT
from mmkern.reference.philox import philox

from .case import Case


@dataclass(frozen=True)
class Sizes:
    """``[B, Hq, L, D]`` against ``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``."""

    batch: int
    heads: int
    groups: int
    queries: int
    keys: int
    width: int
    value_width: int

    def __str__(self) -> str:
        return "x".join(str(size) for size in vars(self).values())


Build = Callable[[torch.Generator, Sizes], Any]
SMALL = Sizes(2, 2, 1, 9, 21, 16, 16)
GROUPED = Sizes(2, 4, 2, 9, 21, 16, 16)
LONG = Sizes(1, 2, 1, 70, 300, 24, 40)
TAILS = Sizes(1, 2, 1, 18, 37, 72, 80)  # neither width is near a power of two
WIDEST = Sizes(1, 2, 1, 14, 264, 16, 16)  # the most keys that one tile of scores holds, in doubles


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def mask(g: torch.Generator, *shape: int, share: float = 0.6) -> Tensor:
    return torch.rand(*shape, generator=g) < share


def case(label: str, sizes: Sizes, *, heads: Build | None = None, **given: Any) -> Case:
    """``given`` overrides the schema's arguments; a function of (generator, sizes) is called for its value."""

    def build(g: torch.Generator) -> list[Any]:
        n = sizes
        q, k, v = (heads or dense)(g, n)
        full = dict.fromkeys(("key_mask", "attn_mask", "attn_bias", "bias", "prefix_lengths", "seed"))
        full |= {"scale": n.width**-0.5, "softcap": 0.0, "left": -1, "right": -1, "alignment": BOTTOM_RIGHT}
        full |= {"dropout_p": 0.0}
        for name, value in given.items():
            full[name] = value(g, n) if callable(value) else value
        return [q, k, v, *full.values()]

    return Case("cross_attention", f"{label}-{sizes}", build)


def dense(g: torch.Generator, n: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    q = randn(g, n.batch, n.heads, n.queries, n.width)
    k = randn(g, n.batch, n.groups, n.keys, n.width)
    return q, k, randn(g, n.batch, n.groups, n.keys, n.value_width)


def heads_inside(g: torch.Generator, n: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """As a projection leaves them: ``[B, L, H, D]`` in memory, k and v in one."""
    q = randn(g, n.batch, n.queries, n.heads, n.width).transpose(1, 2)
    kv = randn(g, n.batch, n.keys, 2, n.groups, n.width).permute(2, 0, 3, 1, 4)
    return q, kv[0], kv[1]


def sliced(g: torch.Generator, n: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Every second row, a column offset; v transposed, q the same for each of a batch."""
    q = randn(g, 1, n.heads, n.queries, n.width).expand(n.batch, -1, -1, -1)
    k = randn(g, n.batch, n.groups, 2 * n.keys, n.width + 3)[:, :, ::2, 3:]
    return q, k, randn(g, n.batch, n.groups, n.value_width, n.keys).mT


def gapped(g: torch.Generator, n: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """One more number behind each row."""
    q = randn(g, n.batch, n.heads, n.queries, n.width + 1)[..., :-1]
    k, v = (randn(g, n.batch, n.groups, n.keys, width + 1)[..., :-1] for width in (n.width, n.value_width))
    return q, k, v


def extreme(g: torch.Generator, n: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = dense(g, n)
    return 100 * q, 100 * k, v


def scores(*axes: str) -> Build:
    """Random numbers with the axes named of ``[B, H, L, S]``, the others 1."""
    return lambda g, n: randn(g, *_axes(n, axes))


def bits(*axes: str, share: float = 0.6) -> Build:
    return lambda g, n: mask(g, *_axes(n, axes), share=share)


def _axes(n: Sizes, axes: tuple[str, ...]) -> list[int]:
    sizes = {"B": n.batch, "H": n.heads, "L": n.queries, "S": n.keys}
    return [size if axis in axes else 1 for axis, size in sizes.items()]


def key_mask(g: torch.Generator, n: Sizes) -> Tensor:
    return mask(g, n.batch, n.keys)


def right_padded(g: torch.Generator, n: Sizes) -> Tensor:
    """Each of a batch with another length; the first with none."""
    lengths = torch.arange(n.batch) * n.keys // max(n.batch - 1, 1)
    return torch.arange(n.keys) < lengths[:, None]


def left_padded(g: torch.Generator, n: Sizes) -> Tensor:
    return right_padded(g, n).flip(1)


def one_key(g: torch.Generator, n: Sizes) -> Tensor:
    return (torch.arange(n.keys) == n.keys // 4).expand(n.batch, -1)


def with_infinities(g: torch.Generator, n: Sizes) -> Tensor:
    """A floating mask: 0 and −∞, one row of −∞ alone."""
    bias = torch.zeros(1, 1, n.queries, n.keys, dtype=torch.float64)
    return bias.masked_fill(~mask(g, n.queries, n.keys), -math.inf).index_fill(2, torch.tensor([1]), -math.inf)


def seed(g: torch.Generator, n: Sizes) -> Tensor:
    return torch.tensor([2**40 + 7, 2**33 + 5])


def shares_at_a_word(seed: Tensor) -> tuple[float, float]:
    """Shares of dropout: a number drawn for the first row, and just above it; in float32 both are that number."""
    words = philox(seed[0], seed[1] + torch.arange(16)).flatten()
    steps = int(words[words >= 2**31][0]) >> 8
    return steps / 2**24, (steps + 0.4) / 2**24


def prefixes(g: torch.Generator, n: Sizes) -> Tensor:
    """Another one for each of a batch, most of them beyond what the first query sees causally."""
    return n.keys - 1 - 4 * torch.arange(n.batch)


SHAPES = [
    Sizes(1, 1, 1, 1, 1, 1, 1),
    Sizes(2, 3, 3, 5, 1, 4, 3),
    Sizes(1, 2, 2, 7, 5, 1, 9),
    Sizes(2, 2, 1, 33, 17, 40, 40),
    Sizes(1, 6, 2, 13, 50, 72, 24),
    Sizes(1, 2, 2, 50, 77, 64, 64),
    Sizes(1, 1, 1, 123, 129, 80, 16),
    Sizes(1, 1, 1, 20, 257, 128, 128),
    Sizes(1, 2, 1, 17, 18, 80, 72),
    Sizes(1, 1, 1, 5, 19, 96, 40),
    Sizes(1, 1, 1, 6, 17, 40, 160),
    Sizes(1, 1, 1, 4, 18, 160, 96),
    Sizes(1, 1, 1, 100, 272, 8, 8),
    Sizes(1, 2, 1, 60, 113, 200, 24),
    Sizes(1, 2, 1, 100, 700, 32, 20),
    Sizes(2, 4, 1, 1, 300, 64, 64),
    Sizes(3, 4, 4, 1, 77, 24, 40),
    Sizes(1, 2, 2, 4, 520, 16, 8),
    Sizes(1, 1, 1, 11, 9, 256, 256),
    Sizes(2, 12, 3, 12, 3, 96, 96),
    Sizes(0, 2, 2, 3, 4, 8, 8),
    Sizes(2, 2, 2, 0, 4, 8, 8),
    Sizes(2, 2, 2, 3, 0, 8, 8),
    Sizes(2, 2, 2, 3, 4, 8, 0),
]

MASKS: dict[str, dict[str, Any]] = {
    "key mask": {"key_mask": key_mask},
    "right padded": {"key_mask": right_padded},
    "left padded": {"key_mask": left_padded},
    "mask": {"attn_mask": bits("B", "H", "L", "S")},
    "mask LS": {"attn_mask": bits("L", "S", share=0.1)},
    "mask BS": {"attn_mask": bits("B", "S")},
    "mask HL": {"attn_mask": bits("H", "L")},
    "mask expanded": {"attn_mask": lambda g, n: mask(g, n.queries, 1).expand(n.batch, n.heads, n.queries, n.keys)},
    "bias": {"bias": scores("B", "H", "L", "S")},
    "bias HLS": {"bias": scores("H", "L", "S")},
    "bias BS": {"bias": scores("B", "S")},
    "bias BHL": {"bias": scores("B", "H", "L")},
    "bias LS and mask": {"bias": scores("L", "S"), "attn_bias": scores("B", "H", "S"), "key_mask": key_mask},
    "bias transposed": {"bias": lambda g, n: randn(g, n.heads, n.keys, n.queries).mT[None]},
    "bias expanded": {"bias": lambda g, n: randn(g, 1, n.heads, n.queries, 1).expand(n.batch, -1, -1, n.keys)},
    "infinities": {"attn_bias": with_infinities},
    "softcap": {"softcap": 5.0, "scale": 2.0},
    "causal": {"right": 0},
    "causal top left": {"right": 0, "alignment": TOP_LEFT},
    "causal and key mask": {"right": 0, "key_mask": key_mask},
    "prefix": {"right": 0, "prefix_lengths": prefixes},
    "window": {"left": 3, "right": 2},
    "window top left": {"left": 1, "right": -1, "alignment": TOP_LEFT},
    "window behind": {"left": 2, "right": 0},
    "resample": {"left": 2, "right": 2, "alignment": RESAMPLE},
    "resample and bias": {"left": 4, "right": 0, "alignment": RESAMPLE, "bias": scores("H", "L", "S")},
    "dropout": {"seed": seed, "dropout_p": 0.3},
    "all at once": {
        "key_mask": key_mask,
        "attn_mask": bits("L", "S", share=0.9),
        "bias": scores("H", "L", "S"),
        "softcap": 3.0,
        "left": 12,
        "right": 0,
        "seed": seed,
        "dropout_p": 0.1,
    },
}

CASES: list[Case] = [
    *(case("plain", sizes) for sizes in SHAPES),
    *(case(label, sizes, **given) for label, given in MASKS.items() for sizes in (SMALL, LONG, WIDEST)),
    *(case(label, Sizes(3, 2, 1, 13, 77, 16, 16), **MASKS[label]) for label in ("right padded", "left padded")),
    case("prefix top left", Sizes(2, 2, 1, 9, 32, 16, 16), right=0, alignment=TOP_LEFT, prefix_lengths=prefixes),
    *(case(label, TAILS, **MASKS[label]) for label in ("all at once", "bias LS and mask")),
    case("heads inside", replace(TAILS, value_width=72), heads=heads_inside),
    case("more queries causal", Sizes(1, 2, 2, 40, 12, 16, 16), right=0),
    case("more queries resample", Sizes(1, 1, 1, 60, 25, 16, 16), left=1, right=1, alignment=RESAMPLE),
    case("one query key mask", Sizes(3, 4, 2, 1, 90, 32, 32), key_mask=key_mask),
    # Wide values, and one or two keys with all the weight: a gradient that is 0, or what is left of two near numbers.
    case("one key dropout", Sizes(1, 2, 1, 2, 1, 16, 40), seed=seed, dropout_p=0.3),
    case("one key of many dropout", Sizes(1, 2, 1, 3, 600, 8, 40), key_mask=one_key, seed=seed, dropout_p=0.3),
    case("one key each dropout", Sizes(1, 4, 4, 33, 33, 16, 96), left=0, right=0, seed=seed, dropout_p=0.3),
    case("two keys", Sizes(1, 2, 1, 20, 20, 16, 256), left=1, right=0, scale=1.0),
    case("two keys of many", Sizes(1, 2, 1, 60, 600, 16, 256), left=1, right=0, scale=1.0),
    case("few queries", Sizes(1, 2, 1, 2, 2300, 16, 8)),
    case("few queries key mask", Sizes(3, 2, 1, 1, 1500, 8, 8), key_mask=left_padded),
    case("few queries dropout", Sizes(1, 2, 1, 1, 530, 8, 8), seed=seed, dropout_p=0.3),
    case("few queries wide", Sizes(1, 2, 1, 2, 40, 16, 200)),
    case("one query bias", Sizes(2, 4, 2, 1, 530, 16, 16), bias=scores("H", "S"), left=400, right=0),
    case("heads inside", GROUPED, heads=heads_inside),
    case("heads inside", Sizes(1, 2, 2, 50, 300, 64, 64), heads=heads_inside),
    case("sliced", GROUPED, heads=sliced),
    *(case("sliced gapped", Sizes(2, 4, 2, 10, 22, width, 16), heads=gapped) for width in (15, 16)),
    case("extreme", SMALL, heads=extreme),
    case("extreme", LONG, heads=extreme),
]
