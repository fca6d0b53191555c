"""What is checked of codes of codebooks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmkern.kernels import nearest_code as kernels
from mmkern.kernels import score_tiles

from mmkern.ops._define import OPS
from mmkern.ops._outputs import in_tuple
from tests.cases.case import Case
from tests.cases.quantization import CASES, EMBEDDING, NEAREST, RESIDUAL, SUMS, case, clustered
from tests.cases.retrieval import points, whole

from .calls import hold_to_contract, outputs_of, prepared

_16_BIT = {
    torch.bfloat16: (
        "49x600x20",
        "clustered, 20",
        "axes",
        "strided",
        "100x24, 4x37x8",
        "2x5x12, mean",
        "none, 40x20, 6",
    ),
    torch.float16: ("5x9x7", "ties of 20", "5x7, 3x9", "none"),
}
_LARGE = ("2x700x40", "97x130x200", "49x270, 2x300", "49x270, 2x300, cosine")


def nearest_code() -> None:
    _check_all(NEAREST)


def residual_quantize() -> None:
    _check_all((RESIDUAL,))


def residual_quantize_of_clustered_codes() -> None:
    """Of which keys do not tell: rows are held against all codes of a level in float64."""
    for narrow in (8, 100):
        for normalize in (False, True):
            x, codebook = clustered(20, narrow), clustered(90, narrow)
            each = Case(
                RESIDUAL, "clustered", lambda g, x=x, c=codebook, n=normalize: [x(g), c(g)[None], *[None] * 4, n]
            )
            _check(each, torch.float32)


def code_tables() -> None:
    _check_all((EMBEDDING, SUMS))


def _check_all(ops: tuple[str, ...]) -> None:
    """Nearly every case in float32, some in 16 bits too."""
    for each in CASES:
        if each.op not in ops:
            continue
        if each.label not in _LARGE:
            _check(each, torch.float32)
        for dtype, labels in _16_BIT.items():
            if each.label in labels:
                _check(each, dtype)


def nearest_code_in_small_tiles() -> None:
    """Several tiles a share, and several shares."""
    for programs in (3, 40):
        with _few_programs(programs):
            for op in NEAREST:
                _check(case(op, "small tiles", points(20, 24), points(150, 24)), torch.float32)
                _check(case(op, "small tiles, ties", whole(20, 4), whole(150, 4)), torch.float32)
                _check(case(op, "small tiles, clustered", clustered(20, 24), clustered(150, 24)), torch.float32)


def two_codes_that_float32_takes_for_one() -> None:
    """In one tile, in one share, or in two, with all others far away: each is nearest to itself."""
    g = torch.Generator().manual_seed(3)
    far, near = -100 - torch.rand(150, 24, generator=g), 100 + torch.randint(-64, 65, (2, 24), generator=g) / 1024
    for programs in (3, 40):
        with _few_programs(programs):
            for first, other in ((0, 1), (5, 17), (130, 133), (20, 149)):
                codebook = far.clone()
                codebook[[first, other]] = near
                for op in NEAREST:
                    args = prepared(OPS[op], [near.repeat(9, 1), codebook])
                    assert outputs_of(OPS[op], args)[1].tolist() == [first, other] * 9, (op, first, other)


def nearest_code_of_odd_numbers() -> None:
    """NaN, what is infinite, and what has no square in float32: the codes are those of the reference."""
    for op in NEAREST:
        for scale in (1e-30, 1.0, 1e25):
            args = _arguments(case(op, "odd", points(20, 8), points(40, 8)))
            args[0] *= scale
            args[1] *= 1.0 if scale < 1 and op.startswith("cosine") else scale
            _hold_to_reference(op, args)
            args[0][1, 2] = args[1][0, 1] = args[1][7, 3] = math.nan
            args[0][2, 2] = args[1][3, 3] = math.inf
            _hold_to_reference(op, args)
        args[1].fill_(math.nan)
        _hold_to_reference(op, args)


@contextmanager
def _few_programs(programs: int) -> Iterator[None]:
    side, before = score_tiles._side, kernels._PROGRAMS
    score_tiles._side, kernels._PROGRAMS = (lambda size, largest: 16), programs
    try:
        yield
    finally:
        score_tiles._side, kernels._PROGRAMS = side, before


def _check(each: Case, dtype: torch.dtype) -> None:
    hold_to_contract(each, dtype)
    _hold_to_reference(each.op, _arguments(each, dtype))


def _arguments(each: Case, dtype: torch.dtype = torch.float32) -> list[Any]:
    return prepared(OPS[each.op], each.arguments(dtype))


def _hold_to_reference(name: str, args: list[Any]) -> None:
    """Codes are the same, and NaN is where it is there."""
    found, expected = outputs_of(OPS[name], args), in_tuple(OPS[name].reference(*args))
    for one, other in zip(found, expected, strict=True):
        same = torch.equal(one.isnan(), other.isnan()) if one.is_floating_point() else torch.equal(one, other)
        assert same, (name, one, other)
