"""What is checked of group norms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmkern.kernels import group_norm as kernels
from torch import Tensor

from mmkern import testing
from tests.cases.group_norm import CASES, case
from tests.contract import gradients_for, op_of

from . import patches
from .buffers import guarded
from .calls import backward, forward, gradients, hold_to_contract, outputs_of, prepared


@contextmanager
def _tiles_of(elements: int) -> Iterator[None]:
    before, kernels._TILE = kernels._TILE, elements
    try:
        yield
    finally:
        kernels._TILE = before


def group_norm() -> None:
    """Every case in float32, some layouts in 16 bits too."""
    for each in CASES:
        hold_to_contract(each, torch.float32)
        if each.label.startswith(("samples inside", "sliced")):
            hold_to_contract(each, torch.bfloat16)
    hold_to_contract(case("2x3x4x25", "all"), torch.float16)


def group_norm_in_small_tiles() -> None:
    """Several along a channel, or of several channels, the last of them fewer."""
    for elements in (16, 64):
        with _tiles_of(elements):
            for each in CASES:
                if not each.label.startswith("1x2x3x1300"):
                    hold_to_contract(each, torch.float32)
            hold_to_contract(case("sliced", "all"), torch.bfloat16)
    with _tiles_of(1024), patches.approximate():
        hold_to_contract(case("1x2x3x1300", "all", mean=1e4), torch.float32)


def group_norm_gradients_alone() -> None:
    """The same bits as of all, run after run; that of the result may be expanded."""
    op = op_of("group_norm_act")
    for elements in (64, 4096):
        with _tiles_of(elements):
            args = prepared(op, case("2x3x4x25", "all").arguments(torch.float32))
            outs = outputs_of(op, args)
            assert torch.equal(outs[0], forward(op, args))
            grads = gradients_for(case("2x3x4x25", "all"), outs)
            before = gradients(op, grads, args, outs)
            for slot, together in enumerate(before):
                alone = gradients(op, grads, args, outs, [i == slot for i in range(len(before))])[slot]
                assert isinstance(alone, Tensor)
                assert isinstance(together, Tensor)
                assert torch.equal(alone, together), f"gradient {slot} alone differs"
            one = torch.tensor(0.5).expand_as(outs[0])
            testing.verify_backward(op, [one], args, backward(op, one, args))


def nan_stays_in_its_group() -> None:
    op = op_of("group_norm_act")
    x, *others = case("2x3x4x25", "affine").arguments(torch.float32)
    for elements in (64, 4096):
        with _tiles_of(elements):
            expected = forward(op, prepared(op, [x, *others]))
            broken = x.clone()
            broken[1, 2, 3, 24] = torch.nan
            out = forward(op, prepared(op, [guarded(broken), *others]))
            assert out[1, 2].isnan().all()
            out[1, 2] = expected[1, 2]
            assert torch.equal(out, expected)
