"""What is checked of losses over a vocabulary."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmkern.kernels import score_tiles
from mmkern.kernels import vocabulary as kernels
from torch import Tensor

from mmkern.ops._define import Op
from tests.cases.case import Case
from tests.cases.vocabulary import CASES, IGNORED, NOT_FINITE, loss_case, rows_case, tensors
from tests.contract import gradients_for, op_of

from . import patches
from .calls import gradients, hold_to_contract, outputs_of, prepared

_16_BIT = {
    torch.bfloat16: ("17x33x64", "600x50x8", "strided", "softcap", "weighted sums", "everything"),
    torch.float16: ("49x300x20", "softcap and temperature", "5x1x7"),
}


def vocabulary() -> None:
    """Every case in float32, some in 16 bits too."""
    for each in (*CASES, *NOT_FINITE):
        hold_to_contract(each, torch.float32)
        for dtype, labels in _16_BIT.items():
            if each.label in labels:
                hold_to_contract(each, dtype)


@contextmanager
def _small(programs: int, panel: int) -> Iterator[None]:
    """Tiles of 16, so many programs, so many tokens in a panel."""
    side, before = score_tiles._side, (kernels._PROGRAMS, kernels._PANEL, kernels._NARROWEST)
    score_tiles._side = lambda size, largest: 16
    kernels._PROGRAMS, kernels._PANEL, kernels._NARROWEST = programs, 1, panel
    try:
        yield
    finally:
        score_tiles._side = side
        kernels._PROGRAMS, kernels._PANEL, kernels._NARROWEST = before


def _of_all_kinds(n: int, tokens: int, width: int) -> list[Case]:
    given = tensors(n, tokens, width, bias=True, weighted=True, ignored=0.4)
    return [
        rows_case("all kinds", given, softcap=3.0, inverse_temperature=1.7, sums=True),
        loss_case("all kinds", given, softcap=3.0, smoothing=0.2, z_loss=1e-2),
    ]


def vocabulary_in_small_tiles() -> None:
    """Several shares and several panels, the last of both not whole; tiles of rows of which none is left."""
    for programs, panel in ((12, 48), (40, 32)):
        with _small(programs, panel):
            for each in _of_all_kinds(70, 150, 40):
                for dtype in (torch.float32, torch.bfloat16):
                    hold_to_contract(each, dtype)


def _call(each: Case, dtype: torch.dtype = torch.float32) -> tuple[Op, list[Any]]:
    op = op_of(each.op)
    return op, prepared(op, each.arguments(dtype))


def tokens_that_are_none() -> None:
    """NaN in their rows alone, and no token is left out of the others: beyond the last, or 2³² beside one."""
    each, outside = _of_all_kinds(20, 37, 12)[0], (37, 38, -1, 2**32 + 5, -(2**32) + 5)
    op, args = _call(each)
    target = args[op.names.index("target")]
    rows = (target != IGNORED).nonzero().flatten()[: len(outside)]
    for programs in (1, 40):
        with _small(programs, 16):
            target[rows] = 3
            logs, logits, _ = outputs_of(op, args)
            target[rows] = torch.tensor(outside)
            found, positive, _ = outputs_of(op, args)
        assert positive[rows].isnan().all()
        is_token = torch.ones(20, dtype=torch.bool).index_fill(0, rows, False)
        assert torch.equal(positive[is_token], logits[is_token])
        torch.testing.assert_close(found[rows], torch.logaddexp(logs, logits)[rows])


def tokens_ruled_out() -> None:
    """Where a bias leaves the target alone, the others have no weight; their gradients are 0, not NaN."""
    op, args = _call(rows_case("ruled out", tensors(20, 37, 12, bias=True, ignored=0.0)))
    x, weight, bias, _, target, *_ = args
    target.fill_(5)
    bias[torch.arange(37) != 5] = -math.inf
    others, positive, totals = outputs_of(op, args)
    assert (others == -math.inf).all()
    found = gradients(op, [torch.ones_like(others)] * 3, args, [others, positive, totals])
    for one, expected in zip(found, (weight[5].expand(20, -1), x.sum(0), torch.tensor(20.0)), strict=True):
        assert one is not None
        rows = one if len(one) == 20 else one[5]
        torch.testing.assert_close(rows, expected)
        assert len(one) == 20 or not one[torch.arange(37) != 5].any()


def rows_without_a_target() -> None:
    """They are not read, and cost nothing: a call moves what the others alone would move, and its numbers of rows."""
    for each in _of_all_kinds(200, 70, 24):
        op, args = _call(each)
        x, target = (args[op.names.index(name)] for name in ("input", "target"))
        chosen = torch.arange(200) % 17 == 5
        target[chosen], target[~chosen] = target[chosen].clamp(min=0), IGNORED
        alone = [*args]
        alone[0], alone[op.names.index("target")] = x[chosen], target[chosen]
        moved, found = [], []
        with _small(4, 48):
            for given in (args, alone):
                with patches.counted_traffic() as traffic:
                    found.append(_outputs_and_gradients(each, op, given))
                moved.append(traffic.read + traffic.written)
            x[~chosen] = math.nan
            for one, other in zip(found[0], _outputs_and_gradients(each, op, args), strict=True):
                assert torch.equal(one, other), each
        assert moved[0] <= 1.1 * moved[1], f"{each}: {moved[0]} bytes, those of the rows alone: {moved[1]}"


def _outputs_and_gradients(each: Case, op: Op, args: list[Any]) -> list[Tensor]:
    outs = outputs_of(op, args)
    if op.makes_gradients:
        return outs
    found = gradients(op, [torch.ones_like(out) for out in outs], args, outs)
    return [*outs, *(g for g in found if g is not None)]


def vocabulary_same_bits() -> None:
    """Run after run, whatever gradients are wanted, and with gradients without strides."""
    each = _of_all_kinds(50, 70, 24)[0]
    for dtype in (torch.float32, torch.bfloat16):
        with _small(12, 48):
            op, args = _call(each, dtype)
            outs = outputs_of(op, args)
            assert all(torch.equal(a, b) for a, b in zip(outs, outputs_of(op, args), strict=True))
            grads = gradients_for(each, outs)
            for slot, together in enumerate(gradients(op, grads, args, outs)):
                alone = gradients(op, grads, args, outs, [i == slot for i in range(3)])[slot]
                assert together is not None
                assert alone is not None
                assert torch.equal(alone, together), f"gradient {slot} alone differs"
            expanded = [torch.ones(()).expand(g.shape) for g in grads]
            ones = [torch.ones(g.shape) for g in grads]
            for a, b in zip(gradients(op, expanded, args, outs), gradients(op, ones, args, outs), strict=True):
                assert a is not None
                assert b is not None
                assert torch.equal(a, b)
