"""What is checked of probabilities of tokens."""

from __future__ import annotations

import torch
from mmkern.kernels import probabilities as kernels

from mmkern import testing
from mmkern.ops._define import OPS
from tests.cases.probabilities import BEYOND, CASES

from .buffers import guarded
from .calls import gradients, hold_to_contract, outputs_of

_16_BIT = {torch.bfloat16: ("3x111", "mixed", "both, ties"), torch.float16: ("sliced", "a filter a row")}
_LARGE = ("both, 3x700", "top-p, 3x700", "2x5001")


def token_probabilities() -> None:
    """Nearly every case in float32, some in 16 bits too; tokens that are none."""
    for each in CASES:
        if each.label not in _LARGE:
            hold_to_contract(each, torch.float32)
        for dtype, labels in _16_BIT.items():
            if each.label in labels:
                hold_to_contract(each, dtype)
    op, args = OPS[BEYOND.op], [guarded(a) for a in BEYOND.arguments(torch.float32)]  # the op would refuse them
    outs = outputs_of(op, args)
    testing.verify_forward(op, args, outs)
    grads = [torch.ones_like(outs[0])]
    testing.verify_backward(op, grads, args, gradients(op, grads, args, outs))


def token_probabilities_in_small_tiles() -> None:
    """A row in several tiles, with ties in each."""
    before, kernels._BLOCK = kernels._BLOCK, 32
    try:
        for each in CASES:
            if each.label in ("3x111", "both, ties", "far"):
                hold_to_contract(each, torch.float32)
    finally:
        kernels._BLOCK = before
