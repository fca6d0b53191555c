"""Cases of cross_attention over packed sequences: lengths, what a query sees, how the packed tensors lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkern.reference.attention import BOTTOM_RIGHT, RESAMPLE, TOP_LEFT

from .attention import randn
from .case import Case

Lengths = tuple[tuple[int, ...], tuple[int, ...]]  # queries and keys of each segment
Heads = tuple[Tensor, Tensor, Tensor]
Build = Callable[[torch.Generator, int, int], Heads]

LENGTHS: dict[str, Lengths] = {
    "one": ((13,), (21,)),
    "three": ((5, 17, 2), (9, 4, 30)),
    "eight": ((3, 1, 4, 1, 5, 9, 2, 6), (5, 3, 5, 8, 9, 7, 9, 3)),
    "decode": ((1, 1, 1), (40, 7, 129)),
    "long": ((70, 33), (150, 300)),
    "no query": ((4, 0, 3), (6, 5, 7)),
    "no key": ((4, 5, 3), (6, 0, 7)),
}

Q_HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 4, 2, 16, 24


def dense(g: torch.Generator, queries: int, keys: int) -> Heads:
    sizes = ((queries, Q_HEADS, WIDTH), (keys, KV_HEADS, WIDTH), (keys, KV_HEADS, VALUE_WIDTH))
    q, k, v = (randn(g, *size) for size in sizes)
    return q, k, v


def in_tails(g: torch.Generator, queries: int, keys: int) -> Heads:
    """Widths of 72 and 40."""
    return randn(g, queries, Q_HEADS, 72), randn(g, keys, KV_HEADS, 72), randn(g, keys, KV_HEADS, 40)


def in_one(g: torch.Generator, queries: int, keys: int) -> Heads:
    """Keys and values of one projection; heads of the queries before their rows."""
    kv = randn(g, keys, 2, KV_HEADS, WIDTH)
    return randn(g, Q_HEADS, queries, WIDTH).transpose(0, 1), kv[:, 0], kv[:, 1]


def ends(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def case(label: str, of: str, heads: Build = dense, **given: Any) -> Case:
    queries, keys = LENGTHS[of]
    options = {"scale": 0.25, "softcap": 0.0, "left": -1, "right": -1, "alignment": BOTTOM_RIGHT, "dropout_p": 0.0}

    def build(g: torch.Generator) -> list[Any]:
        packed = heads(g, sum(queries), sum(keys))
        tensors = [given.get("prefix_lengths"), given.get("seed")]
        longest = [max(lengths) for lengths in (queries, keys)]
        numbers = [given.get(name, value) for name, value in options.items()]
        return [*packed, ends(queries), ends(keys), *tensors, *longest, *numbers]

    return Case("cross_attention_varlen", f"{label}-{of}", build)


SEED = torch.tensor([2**40 + 7, 2**33 + 5])

CASES: list[Case] = [
    *(case("plain", of) for of in LENGTHS),
    case("softcap", "three", softcap=2.0),
    *(case("causal", of, right=0) for of in ("three", "no key", "long")),
    case("causal top left", "three", right=0, alignment=TOP_LEFT),
    case("prefix", "three", right=0, prefix_lengths=torch.tensor([3, 1, 28])),
    case("window", "long", left=20, right=3),
    case("resample", "long", left=4, right=4, alignment=RESAMPLE),
    *(case("dropout", of, seed=SEED, dropout_p=0.3) for of in ("three", "decode", "no query")),
    case("in tails", "three", in_tails, right=0),
    *(case("in one", of, in_one) for of in ("three", "decode", "long")),
]
