"""What is checked of masked iterative decoding."""

from __future__ import annotations

import torch
from mmkern.kernels import masked_decode as kernels

from mmkern.ops._define import OPS
from mmkern.reference import masked_decode as reference
from tests.cases.case import Case
from tests.cases.masked_decode import CASES, STEP

from .calls import hold_to_contract, outputs_of, prepared

_16_BIT = {torch.bfloat16: ("2x3x7x111, MaskGCT", "odd"), torch.float16: ("sliced",)}
# Walked over by thousands of programs, or tens of times; what these show, smaller ones do.
_LARGE = ("several stretches of positions", "several stretches, ties", "1x2x5000, MaskGCT", "all again", "all masked")
_TOO_MANY = ("cold", "hot", "noisy", "top-1", "top-k of many")


def masked_decoding() -> None:
    """Nearly every case in float32, some in 16 bits too; tokens and masks are those of the reference."""
    for each in CASES:
        if each.label not in _LARGE and not each.label.startswith(_TOO_MANY):
            _check(each, torch.float32)
        for dtype, labels in _16_BIT.items():
            if each.label in labels:
                _check(each, dtype)


def masked_decoding_in_small_tiles() -> None:
    """A row, and the positions of a sample, in several tiles, with ties in each."""
    before, kernels._BLOCK = kernels._BLOCK, 16
    try:
        for each in CASES:
            if each.label in ("3x9x40, MaskGCT", "2x3x7x111", "odd, most again"):
                _check(each, torch.float32)
    finally:
        kernels._BLOCK = before


def _check(each: Case, dtype: torch.dtype) -> None:
    hold_to_contract(each, dtype)
    args = prepared(OPS[STEP], each.arguments(dtype))
    for mine, theirs in zip(outputs_of(OPS[STEP], args)[1:], reference.masked_decode_step(*args)[1:], strict=True):
        assert torch.equal(mine, theirs), each
