"""What is checked of contrastive losses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmkern.kernels import score_tiles
from torch import Tensor

from mmkern.backends import pair_blocks
from mmkern.ops._define import Op
from tests.cases.case import Case
from tests.cases.contrastive import (
    CASES,
    LABELLED,
    LOG_SUMS,
    RETAINED,
    case,
    flags,
    keeping,
    labelled_case,
    labels,
    mask,
    points,
    retained_case,
    sigmoid_case,
)
from tests.cases.hyperbolic import randn
from tests.contract import gradients_for, op_of

from . import patches
from .calls import gradients, hold_to_contract, outputs_of, prepared

_16_BIT = {
    torch.bfloat16: (
        *("123x129x40", "positives", "near", "strided", "kept 70x300x8", "large scale", "loss alone"),
        *("labels", "forgotten"),
    ),
    torch.float16: ("49x300x20", "kept positives", "near", "one forgotten"),
}


_LONG = ("600x33x8", "33x1100x8", "1950x9x4", "kept forgotten", "49x300x20")


@contextmanager
def _small(tile: int, block: int) -> Iterator[None]:
    """Sides of tiles, and of the pairs whose weights are in memory at a time."""
    side, blocks = score_tiles._side, pair_blocks.BLOCK_SIDE
    score_tiles._side, pair_blocks.BLOCK_SIDE = lambda size, largest: tile, block
    try:
        yield
    finally:
        score_tiles._side, pair_blocks.BLOCK_SIDE = side, blocks


def contrastive() -> None:
    """Every case in float32, some in 16 bits too."""
    for each in CASES:
        if each.op in (LABELLED, *RETAINED) and each.label in _LONG:
            continue  # their tiles are those of the others
        hold_to_contract(each, torch.float32)
        for dtype, chosen in _16_BIT.items():
            if each.label in chosen:
                hold_to_contract(each, dtype)
    hold_to_contract(_rather_near(), torch.bfloat16)


def _rather_near() -> Case:
    """Points whose scores cancel by more digits than a float32 result has to spare, and by less than 16 bits have."""

    def build(g: torch.Generator) -> list[Any]:
        center = randn(g, 1, 64, norm=1.2)
        x, y = (center + randn(g, n, 64, norm=0.08) for n in (12, 15))
        curvature, scale = (torch.tensor(value, dtype=torch.float64) for value in (0.7, 20.0))
        return [x, y, curvature, scale, None, False, False]

    return Case("lorentz_pairwise_logsumexp", "rather near", build)


_SEVERAL = (
    *("positives", "positives and the diagonal", "near", "strided", "no positives"),
    *("labels and the diagonal", "forgotten"),
)


def contrastive_in_small_tiles() -> None:
    """Several of both kinds; a diagonal that goes through tiles, and past blocks, of one side."""
    with _small(16, 4096):
        for each in CASES:
            if each.label in (*_SEVERAL, "loss alone", "kept positives"):
                hold_to_contract(each, torch.float32)
    for block in (24, 32):
        with _small(16, block):
            for each in CASES:
                if each.label in _SEVERAL:
                    hold_to_contract(each, torch.float32)
            for each in _of_both_kinds(points(60, 24), points(70, 24)):
                hold_to_contract(each, torch.bfloat16)
    with _small(16, 48):
        for x, y in ((points(20, 24), points(150, 24)), (points(150, 24), points(20, 24))):
            for each in _of_both_kinds(x, y):
                hold_to_contract(each, torch.float32)


def _of_both_kinds(x: Any, y: Any) -> list[Case]:
    n, m = (len(side(torch.Generator())) for side in (x, y))
    return [
        *(case(op, "both kinds", x, y) for op in LOG_SUMS),
        labelled_case("both kinds", x, y, labels(n, 3), labels(m, 3), 1),
        *(retained_case(op, "both kinds", x, y, flags(n), flags(m)) for op in RETAINED),
        sigmoid_case("both kinds", x, y),
    ]


def contrastive_with_rounding_of_a_device() -> None:
    """With quotients and ``rsqrt`` as wrong as a GPU's."""
    with patches.approximate():
        for each in CASES:
            if each.label in ("17x33x64", "near", "positives", "large scale", "labels"):
                hold_to_contract(each, torch.float32)


def positives_of_any_layout() -> None:
    """A mask without a stride along its columns, and one that is part of a wider one."""
    x, y = points(33, 24), points(50, 24)
    with _small(16, 24):
        for op in LOG_SUMS:
            for positives in (
                lambda g: (
                    mask(1, 50)(g).new_ones(1, 50).logical_and(torch.rand(1, 50, generator=g) < 0.5).expand(33, -1)
                ),
                lambda g: mask(33, 90)(g)[:, 7:57],
            ):
                hold_to_contract(case(op, "laid out", x, y, positives=positives), torch.float32)


def nan_stays_in_its_pairs() -> None:
    """Those of a row are in every column."""
    for op_name in LOG_SUMS:
        each = keeping(case(op_name, "nan", points(40, 24), points(50, 24), positives=mask(40, 50), diagonal=False))
        op, args = _call(each)
        expected = outputs_of(op, args)
        args[0][3, 2] = math.nan
        rows, columns, positive_rows, positive_columns, products = outputs_of(op, args)
        others = torch.arange(40) != 3
        for found, clean in zip((rows, positive_rows, products), (expected[0], expected[2], expected[4]), strict=True):
            assert found[3].isnan().all()
            assert torch.equal(found[others], clean[others])
        positive = args[op.names.index("positive_mask")][3]
        assert torch.equal(columns.isnan(), ~positive)
        assert torch.equal(positive_columns.isnan(), positive)
    for op_name in RETAINED:
        each = retained_case(op_name, "nan", points(40, 24), points(50, 24), flags(40), flags(50), diagonal=False)
        op, args = _call(each)
        expected = outputs_of(op, args)
        is_forgotten = args[op.names.index("x_forgotten")]
        for row in (int(is_forgotten.nonzero()[0]), int((~is_forgotten).nonzero()[0])):
            spoilt = [args[0].clone(), *args[1:]]
            spoilt[0][row, 2] = math.nan
            found, others = outputs_of(op, spoilt), torch.arange(40) != row
            for one, clean in zip(found[::4], expected[::4], strict=True):
                assert torch.equal(one[others], clean[others])
            assert found[0][row].isnan()
            assert found[1].isnan().all() != is_forgotten[row]
    op, args = _call(sigmoid_case("nan", points(40, 24), points(50, 24)))
    args[0][3, 2] = math.nan
    loss, dx, dy, dscale, dbias = outputs_of(op, args)
    assert all(x.isnan().all() for x in (loss, dscale, dbias, dy, dx[3]))
    assert dx[torch.arange(40) != 3].isfinite().all()


def _call(each: Case) -> tuple[Op, list[Any]]:
    op = op_of(each.op)
    return op, prepared(op, each.arguments(torch.float32))


def contrastive_same_bits() -> None:
    """Run after run, whatever gradients are wanted, scalars by value or by pointer, gradients without strides."""
    for each in (*_of_both_kinds(points(60, 24), points(70, 24)), *(c for c in CASES if c.label == "kept positives")):
        with _small(32, 48):
            op, args = _call(each)
            outs = outputs_of(op, args)
            by_value = [float(a) if isinstance(a, Tensor) and a.dim() == 0 else a for a in args]
            for again in (args, by_value):
                assert all(torch.equal(a, b) for a, b in zip(outs, outputs_of(op, again), strict=True)), each
            if op.makes_gradients:
                continue
            grads = gradients_for(each, outs)
            before = gradients(op, grads, args, outs)
            for slot, together in enumerate(before):
                alone = gradients(op, grads, args, outs, [i == slot for i in range(len(before))])[slot]
                assert together is not None
                assert alone is not None
                assert torch.equal(alone, together), f"{each}: gradient {slot} alone differs"
            wanted = [True] * len(before)
            expanded = [torch.ones(()).expand(g.shape) for g in grads]
            ones = [torch.ones(g.shape) for g in grads]
            found = gradients(op, expanded, by_value, outs, wanted[:2] + [False] * (len(before) - 2))
            for a, b in zip(found[:2], gradients(op, ones, args, outs)[:2], strict=True):
                assert a is not None
                assert b is not None
                assert torch.equal(a, b), each
