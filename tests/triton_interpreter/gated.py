"""What is checked of activations beside a scale, a shift or a gate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmkern.kernels import gated as kernels
from torch import Tensor

from mmkern import testing
from mmkern.reference.activations import Activation
from tests.cases.case import Case
from tests.cases.gated import CASES, affine_case, gated_case
from tests.contract import gradients_for, op_of

from . import patches
from .buffers import guarded
from .calls import forward, gradients, hold_to_contract, outputs_of, prepared


@contextmanager
def _constants(**others: int) -> Iterator[None]:
    before = {name: getattr(kernels, name) for name in others}
    for name, value in others.items():
        setattr(kernels, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(kernels, name, value)


def gated() -> None:
    """Every case in float32, some layouts in 16 bits too."""
    for case in CASES:
        hold_to_contract(case, torch.float32)
        if case.label.startswith(("rows inside", "sliced-shared", "2x7x64")):
            hold_to_contract(case, torch.bfloat16)
    for case in (affine_case("2x70x20", "channels"), gated_case("2x70x20")):
        hold_to_contract(case, torch.float16)


def gated_in_small_tiles() -> None:
    """Several along a row and down the rows that share one, in walks of some tiles or one, the last of them fewer."""
    for layout, tile, programs in (("2x70x20", 256, 5), ("sliced", 64, 5), ("sliced", 64, 100)):
        with _constants(_TILE=tile, _ROWS_OF_WALK=1, _PROGRAMS=programs):
            for case in CASES:
                if case.label.startswith(layout) and case.op == "affine_activation":
                    hold_to_contract(case, torch.float32)
    with _constants(_TILE=64):
        hold_to_contract(gated_case("2x70x20"), torch.float32)


def gated_with_rounding_of_a_device() -> None:
    """With quotients as wrong as a GPU's."""
    with patches.approximate():
        for activation in Activation:
            hold_to_contract(affine_case("2x7x64", "channels", activation), torch.float32)
            hold_to_contract(gated_case("2x70x20", activation), torch.float32)


def _far(activation: Activation, *numbers: float) -> Case:
    """A row of each number, so that each has to have digits of its own."""
    x, one = torch.tensor(numbers, dtype=torch.float64)[:, None], torch.ones(1, 1, dtype=torch.float64)
    return Case("affine_activation", f"far-{activation.name}", lambda g: [x, one, None, 0.0, int(activation)])


def far_arguments() -> None:
    """No activation overflows on the way to a number, nor loses the digits of a small one."""
    numbers = (88.5, 60.0, 20.0, 9.0, 4.3, 2.0, 1.0, 0.3, 1e-3, 1e-30, 0.0)
    for activation in Activation:
        hold_to_contract(_far(activation, *numbers, *(-n for n in numbers), 1e4, -1e4), torch.float32)
        case = _far(activation, math.nan, math.inf)
        op = op_of(case.op)
        found = forward(op, prepared(op, case.arguments(torch.float32)))
        assert found[1] == math.inf, activation
        assert found[0].isnan(), activation
    for number in (-20.0, -80.0, -88.5):
        hold_to_contract(_far(Activation.SILU, number), torch.float32)


def nan_stays_in_its_element() -> None:
    """And in the sums that it is in."""
    case = affine_case("2x70x20", "channels")
    op = op_of(case.op)
    args = prepared(op, case.arguments(torch.float32))
    args[0][1, 33, 7] = math.nan
    outs = outputs_of(op, args)
    assert outs[0].isnan().nonzero().tolist() == [[1, 33, 7]]
    dx, dscale, dshift = gradients(op, gradients_for(case, outs), args, [])
    assert dx is not None
    assert dx.isnan().nonzero().tolist() == [[1, 33, 7]]
    for sums in (dscale, dshift):
        assert sums is not None
        assert sums.isnan().nonzero().tolist() == [[1, 0, 7]]


def _whole_scale_out_of_order() -> Case:
    """Its gradient lies in another order than x, whose axes are then fewer without it."""

    def build(g: torch.Generator) -> list[Any]:
        x, scale = (torch.randn(40, 3, 20, generator=g, dtype=torch.float64).transpose(0, 1) for _ in range(2))
        return [x, scale, torch.randn(1, 40, 1, generator=g, dtype=torch.float64), 0.75, int(Activation.SILU)]

    return Case("affine_activation", "whole scale out of order", build)


def gated_same_bits() -> None:
    """Run after run, whatever gradients are wanted."""
    layouts = [case for case in CASES if case.label.startswith(("2x70x20", "rows inside"))]
    with _constants(_PROGRAMS=5, _ROWS_OF_WALK=1):
        for case in (_whole_scale_out_of_order(), *(case for case in layouts if case.op == "affine_activation")):
            op = op_of(case.op)
            args = prepared(op, case.arguments(torch.float32))
            outs = outputs_of(op, args)
            assert torch.equal(outs[0], forward(op, args))
            before = gradients(op, [torch.ones_like(outs[0])], args, [])
            given = [isinstance(args[i], Tensor) for i in op.tensors]
            for slot, found in enumerate(before):
                if found is not None:
                    wanted = [is_given and i == slot for i, is_given in enumerate(given)]
                    alone = gradients(op, [torch.ones_like(outs[0])], args, [], wanted)[slot]
                    assert alone is not None
                    assert torch.equal(alone, found), f"{case}: gradient {slot} alone differs"


def gated_expanded_gradient() -> None:
    """What ``y.sum(1).backward()`` sends: rows without a stride."""
    for case in (affine_case("2x70x20", "channels"), affine_case("2x70x20", "one number"), gated_case("2x70x20")):
        op = op_of(case.op)
        args = prepared(op, case.arguments(torch.float32))
        grad = guarded(torch.randn(2, 1, op.empty_outputs(args)[0].shape[-1]).expand(-1, 70, -1))
        testing.verify_backward(op, [grad], args, gradients(op, [grad], args, []))
