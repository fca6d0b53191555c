"""What is checked of the best of all pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmkern.kernels import retrieval as kernels
from mmkern.kernels import score_tiles

from mmkern.ops._define import OPS
from tests.cases.case import Case
from tests.cases.retrieval import CASES, PAIRWISE, case, linear, points, whole

from .calls import hold_to_contract, outputs_of, prepared

_16_BIT = {torch.bfloat16: ("49x600x20, 10", "near", "strided", "bias of 20"), torch.float16: ("5x9x7, 4", "near")}
_LARGE = ("20x900x8, 40", "49x600x20, 10", "97x130x200, 5")


def retrieval() -> None:
    """Every case in float32, some in 16 bits too."""
    for each in CASES:
        if each.label in _LARGE and each.op != "pairwise_topk":
            continue
        hold_to_contract(each, torch.float32)
        for dtype, labels in _16_BIT.items():
            if each.label in labels:
                hold_to_contract(each, dtype)


@contextmanager
def _few_programs(programs: int) -> Iterator[None]:
    """Small tiles, several of them a share."""
    side, before = score_tiles._side, kernels._PROGRAMS
    score_tiles._side, kernels._PROGRAMS = (lambda size, largest: 16), programs
    try:
        yield
    finally:
        score_tiles._side, kernels._PROGRAMS = side, before


def retrieval_in_small_tiles() -> None:
    """Several tiles a share, and several shares; more than a row keeps in registers."""
    for programs in (3, 16):
        with _few_programs(programs):
            for op in PAIRWISE:
                hold_to_contract(case(op, "small tiles", points(20, 24), points(150, 24), 11), torch.float32)
            hold_to_contract(linear("small tiles", points(20, 24), points(150, 24), 11, softcap=3.0), torch.float32)
    hold_to_contract(linear("many", points(20, 24), points(150, 24), 140), torch.float32)


def order_of_ties_and_nan() -> None:
    """Bit for bit that of the reference, where scores have no rounding."""
    _check_order(case("pairwise_topk", "ties", whole(20, 5), whole(300, 5), 40))
    _check_order(linear("ties", whole(3, 5), whole(90, 5), 9))
    with _few_programs(2):
        _check_order(case("pairwise_topk", "ties", whole(20, 5), whole(300, 5), 12))
    for op_name in ("l2_pairwise_topk", "lorentz_pairwise_topk"):
        each = case(op_name, "nan", points(20, 8), points(40, 8), 39)
        op = OPS[op_name]
        args = prepared(op, each.arguments(torch.float32))
        args[0][1, 2] = args[1][30, 1] = args[1][7, 3] = math.nan
        values, indices = outputs_of(op, args)
        assert values[1].isnan().all()
        assert torch.equal(indices[1], torch.arange(39))
        assert values.isnan().sum() == 39 + 19
        assert (indices[torch.arange(20) != 1, -1] == 7).all()


def _check_order(each: Case) -> None:
    for broken in (False, True):
        op = OPS[each.op]
        args = prepared(op, each.arguments(torch.float32))
        if broken:
            args[0][1, 2] = args[1][40, 1] = args[1][7, 3] = math.nan
        for found, expected in zip(outputs_of(op, args)[:2], op.reference(*args), strict=False):
            assert torch.equal(found.nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9)), each
