"""What is checked of tokens that are drawn."""

from __future__ import annotations

import torch
from mmkern.kernels import decoding as kernels

from mmkern.ops._define import OPS
from mmkern.reference import decoding as reference
from tests.cases.case import Case
from tests.cases.decoding import CASES

from .calls import hold_to_contract, outputs_of, prepared

_16_BIT = {torch.bfloat16: ("3x111, all", "all, mixed"), torch.float16: ("a request a row",)}

# Walked over a hundred times.
_LARGE = ("2x1000, all", "2x5001, all", "all, 3x700", "typical, 3x700")


def decoding() -> None:
    """Nearly every case in float32, some in 16 bits too; the tokens are those of the reference."""
    for each in CASES:
        if each.label not in _LARGE:
            _check(each, torch.float32)
        for dtype, labels in _16_BIT.items():
            if each.label in labels:
                _check(each, dtype)


def decoding_in_small_tiles() -> None:
    """A row in several tiles, with ties in each."""
    before, kernels._BLOCK = kernels._BLOCK, 32
    try:
        for each in CASES:
            if each.label in ("3x111, all", "typical, ties", "top-p, ties"):
                _check(each, torch.float32)
    finally:
        kernels._BLOCK = before


def _check(each: Case, dtype: torch.dtype) -> None:
    hold_to_contract(each, dtype)
    op = OPS[each.op]
    args = prepared(op, each.arguments(dtype))
    _, expected = reference.sample_tokens(*args)
    assert torch.equal(outputs_of(op, args)[1], expected), each
