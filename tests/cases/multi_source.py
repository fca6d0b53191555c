"""Cases of multi_source_attention in one launch: how many sources, gates, masks, heads, lengths, layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkern.reference.attention import MAX_SOURCES, Source

from .attention import LONG, SMALL, TAILS, Build, Sizes, dense, gapped, heads_inside, key_mask, mask, randn, seed
from .case import Case

Gate = Callable[[torch.Generator, Sizes], Tensor]
FEW = Sizes(2, 4, 2, 2, 40, 16, 16)  # queries: every key is read where it lies
WIDE = Sizes(1, 2, 2, 20, 21, 250, 200)
TALL = Sizes(1, 2, 2, 1, 1100, 16, 24)
MANY = Sizes(2, 4, 4, 65, 30, 12, 20)  # more than a block of queries


def gate(*axes: int) -> Gate:
    """One for each of these axes of ``[B, Hq, L, 1]``."""
    return lambda g, n: randn(
        g, *(size if axis in axes else 1 for axis, size in enumerate((n.batch, n.heads, n.queries, 1)))
    )


def source(
    g: torch.Generator,
    n: Sizes,
    *,
    keys: int | None = None,
    groups: int | None = None,
    gated: Gate | None = None,
    masked: bool = False,
    hidden: bool = False,
    biased: bool = False,
    heads: Build = dense,
) -> Source:
    n = Sizes(
        n.batch, n.heads, n.groups if groups is None else groups, n.queries, keys or n.keys, n.width, n.value_width
    )
    _, k, v = heads(g, n)
    seen = key_mask(g, n) if masked else None
    if hidden:  # from all of the first of the batch
        seen = mask(g, n.batch, n.keys) & (torch.arange(n.batch) > 0)[:, None]
    bias = randn(g, n.heads, n.queries, n.keys)[None] if biased else None
    return Source(k, v, gated(g, n) if gated else None, seen, bias)


def case(label: str, n: Sizes, sources: list[dict[str, Any]], joint: bool, **given: Any) -> Case:
    options: dict[str, Any] = {"seed": None, "scale": n.width**-0.5, "softcap": 0.0, "joint": joint, "dropout_p": 0.0}

    def build(g: torch.Generator) -> list[Any]:
        q = sources[0].get("heads", dense)(g, n)[0]
        places = [x for each in sources for x in source(g, n, **each)]
        rest = {name: given.get(name, value) for name, value in options.items()}
        if callable(rest["seed"]):
            rest["seed"] = rest["seed"](g, n)
        absent = [None] * (MAX_SOURCES * len(Source._fields) - len(places))
        return [q, *places, *absent, *rest.values()]

    return Case("multi_source_attention", f"{label}-{n}-{'joint' if joint else 'sum'}", build)


KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one": ([{"gated": gate(0)}], {}),
    "two": ([{}, {"keys": 5}], {}),
    "four": ([{}, {"keys": 300}, {"keys": 1}, {"keys": 17, "gated": gate(0, 1, 2)}], {}),
    "gates": ([{"gated": gate(1)}, {"keys": 33, "gated": gate(0, 2)}, {"gated": gate()}], {}),
    "groups": ([{"groups": 1, "keys": 7}, {}, {"groups": 2, "gated": gate(1)}], {}),
    "masks": ([{"masked": True}, {"keys": 40, "hidden": True, "gated": gate(2)}], {}),
    "all hidden": ([{"hidden": True}, {"keys": 6, "hidden": True}], {}),
    "biases": ([{"biased": True}, {"keys": 18, "biased": True, "masked": True}], {"softcap": 2.0}),
    "inside": ([{"heads": heads_inside}, {"heads": heads_inside, "keys": 11}], {}),
    "inside and gapped": ([{"heads": heads_inside}, {"heads": gapped, "keys": 19}], {}),
    "dropout": ([{}, {"keys": 23, "gated": gate(0)}], {"seed": seed, "dropout_p": 0.3}),
}

CASES: list[Case] = [
    *(
        case(label, sizes, sources, joint, **given)
        for label, (sources, given) in KINDS.items()
        for sizes in ((SMALL, FEW) if label != "groups" else (FEW, MANY))
        for joint in (False, True)
    ),
    *(
        case(label, sizes, KINDS[label][0], joint)
        for label, sizes in (("gates", MANY), ("gates", WIDE), ("gates", TAILS), ("masks", TALL), ("two", LONG))
        for joint in (False, True)
    ),
    case("no query", Sizes(2, 2, 2, 0, 4, 8, 8), KINDS["two"][0], False),
    case("no batch", Sizes(0, 2, 2, 3, 4, 8, 8), KINDS["two"][0], True),
]
