"""What is checked of absorbing-state diffusion."""

from __future__ import annotations

import torch
from mmkern.kernels import absorbing as kernels

from mmkern.ops._define import OPS
from mmkern.reference import absorbing as reference
from tests.cases.absorbing import CASES, LOSS, STEP
from tests.cases.case import Case

from .calls import hold_to_contract, outputs_of, prepared

_16_BIT = {
    torch.bfloat16: ("2x3x2x2x111, guided", "2x3x4x64", "last, odd, guided", "rows inside", "near by 0.3"),
    torch.float16: ("sliced", "beyond 1, odd"),
}


def absorbing() -> None:
    """Every case in float32, some in 16 bits too; the tokens are those of the reference."""
    for each in CASES:
        if each.op != LOSS:
            _check(each, torch.float32)
            for dtype, labels in _16_BIT.items():
                if each.label.startswith(labels):
                    _check(each, dtype)


def absorbing_in_small_tiles() -> None:
    """A row in several tiles."""
    before, kernels._BLOCK = kernels._BLOCK, 32
    try:
        for each in CASES:
            if each.op != LOSS and each.label.startswith(
                ("3x2x65", "last, odd, guided", "beyond 1, 12", "near by", "far")
            ):
                _check(each, torch.float32)
    finally:
        kernels._BLOCK = before


def _check(each: Case, dtype: torch.dtype) -> None:
    hold_to_contract(each, dtype)
    if each.op == STEP:
        args = prepared(OPS[STEP], each.arguments(dtype))
        assert torch.equal(outputs_of(OPS[STEP], args)[1], reference.absorbing_step(*args)[1]), each
