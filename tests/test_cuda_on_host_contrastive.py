"""Contrastive losses on CUDA without a device. See test_cuda_on_host.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkern.backends import pair_blocks
from mmkern.ops._define import OPS
from mmkern.ops._outputs import in_tuple
from tests.cases.case import Case
from tests.cases.contrastive import CASES, LOG_SUMS, RETAINED, case, flags, mask, points, retained_case
from tests.cuda_on_host import calls, frame
from tests.cuda_on_host.harness import HostLauncher

pytestmark = pytest.mark.usefixtures("on_host")
SERVED = MASKED, FORGETTING = LOG_SUMS[1], RETAINED[1]
# The other dtypes differ in loads and stores alone: in accesses of 16 bytes, and one by one.
OF_16_BITS = ("17x33x64", "49x300x20", "positives", "forgotten", "kept positives")
RUNS = [
    *((case, torch.float32) for case in CASES if case.op in SERVED),
    *(
        (case, dtype)
        for case in CASES
        for dtype in (torch.bfloat16, torch.float16)
        if case.op in SERVED and case.label in OF_16_BITS
    ),
]


def case_of(op: str, label: str) -> Case:
    return next(case for case in CASES if (case.op, case.label) == (op, label))


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_the_contract(case: Case, dtype: torch.dtype) -> None:
    frame.check_contract(case, dtype)


# ---- Blocks of pairs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", SERVED)
def test_several_blocks_of_pairs(op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A diagonal that goes through them, gradients that add up over them."""
    monkeypatch.setattr(pair_blocks, "BLOCK_SIDE", 70)
    x, y = points(150, 24), points(170, 24)
    made = case(op, "blocks", x, y) if op == MASKED else retained_case(op, "blocks", x, y, flags(150), flags(170))
    frame.check_contract(made, dtype)


@pytest.mark.parametrize(("n", "m"), [(20, 150), (150, 20)])
def test_blocks_of_a_short_side(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_blocks, "BLOCK_SIDE", 48)
    frame.check_contract(case(MASKED, "short", points(n, 24), points(m, 24), positives=mask(n, m)), torch.float32)


# ---- Same inputs, same bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "label"),
    [(MASKED, "123x129x40"), (MASKED, "kept positives"), (MASKED, "near"), (FORGETTING, "forgotten")],
)
def test_the_order_of_threads_does_not_matter(op: str, label: str, launcher: HostLauncher) -> None:
    frame.check_any_order(case_of(op, label), launcher)


@pytest.mark.parametrize(("op", "label"), [(MASKED, "positives"), (FORGETTING, "forgotten")])
def test_gradients_may_be_asked_for_one_by_one(op: str, label: str) -> None:
    frame.check_gradients_one_by_one(case_of(op, label))


@pytest.mark.parametrize("op", SERVED)
def test_numbers_by_value_and_by_pointer(op: str) -> None:
    args = case_of(op, "17x33x64").arguments(torch.float32)
    by_value = [*args[:2], args[2].item(), args[3].item(), *args[4:]]
    for one, other in zip(calls.forward(op, *args), calls.forward(op, *by_value), strict=True):
        assert torch.equal(one, other)


# ---- Layouts ---------------------------------------------------------------------------------------------------------


def test_layouts_give_the_same_numbers() -> None:
    for label in ("17x33x64", "positives"):
        args = case_of(MASKED, label).arguments(torch.float32)
        expected = frame.both_ways(MASKED, args, gradients(MASKED, args))
        for lay in (frame.unaligned, lambda x: x.T.contiguous().T, frame.spread):
            others = [lay(args[0]), lay(args[1]), *args[2:]]
            for one, other in zip(frame.both_ways(MASKED, others, gradients(MASKED, args)), expected, strict=True):
                torch.testing.assert_close(one, other)


def gradients(op: str, args: list[Any]) -> list[Tensor]:
    outs = in_tuple(calls.forward(op, *args))[: OPS[op].differentiable]
    return [torch.linspace(-1, 1, out.numel()) for out in outs]


def test_a_mask_that_is_part_of_a_wider_one() -> None:
    args = case_of(MASKED, "positives").arguments(torch.float32)
    expected = frame.both_ways(MASKED, args, gradients(MASKED, args))
    wide = torch.ones(75, 99, dtype=torch.bool)
    wide[2:72, 5:95] = args[4]
    for given in (wide[2:72, 5:95], args[4].T.contiguous().T):
        args[4] = given
        for one, other in zip(frame.both_ways(MASKED, args, gradients(MASKED, args)), expected, strict=True):
            assert torch.equal(one, other)


def test_offsets_beyond_32_bits() -> None:
    near = torch.randn(2, 24, generator=torch.Generator().manual_seed(0)).bfloat16() / 5
    others = near.flip(0), 1.0, 3.0, torch.tensor([[True, False], [False, False]]), False, False
    far = frame.rows_far_apart(near)
    for one, other in zip(calls.forward(MASKED, far, *others), calls.forward(MASKED, near, *others), strict=True):
        assert torch.equal(one, other)


# ---- Points that are not ordinary ------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", SERVED)
def test_a_nan_stays_in_its_row(op: str) -> None:
    label = "123x129x40" if op == MASKED else "forgotten"
    args = case_of(op, label).arguments(torch.float32)
    clean = calls.forward(op, *args)
    for row in (65, 3):
        spoilt = [args[0].clone(), *args[1:]]
        spoilt[0][row, 1] = math.nan
        found = calls.forward(op, *spoilt)
        others = torch.arange(len(args[0])) != row
        assert found[0][row].isnan()
        counts = op == MASKED or not args[4][row]  # for the columns
        assert found[1].isnan().any() == counts
        for one, other in zip(found[:-1:2], clean[:-1:2], strict=True):
            assert torch.equal(one[others], other[others])
        grads = [
            torch.ones_like(out) if slot % 2 == 0 else torch.zeros_like(out) for slot, out in enumerate(clean[:-1])
        ]
        x_grad = calls.backward(op, grads, [True] * 4, spoilt)[0]
        assert x_grad is not None
        assert x_grad[row].isnan().all()


def test_coinciding_points() -> None:
    x = torch.randn(70, 30, generator=torch.Generator().manual_seed(0)) / 5
    args = [x, x.clone(), torch.tensor(1.0), torch.tensor(100.0), None, True, True]
    outs = calls.forward(MASKED, *args)
    assert outs[2].eq(0).all()
    assert outs[3].eq(0).all()
    found = calls.backward(MASKED, [torch.ones_like(out) for out in outs[:-1]], [True] * 4, args)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found)


def test_use_backend_serves_both() -> None:
    frame.check_served(*SERVED)
