"""Activations beside a scale, a shift or a gate on CUDA without a device. See test_cuda_on_host.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from mmkern import testing
from mmkern.backends.cuda_gated import Plan
from mmkern.backends.cuda_pieces import Pieces
from mmkern.ops._define import OPS
from mmkern.reference.activations import FUNCTIONS, Activation
from tests.cases.case import Case
from tests.cases.gated import CASES, FAR, wide
from tests.cases.modulation import randn
from tests.cuda_on_host import calls, frame

pytestmark = pytest.mark.usefixtures("on_host")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The other dtypes differ in loads and stores alone: in blocks of 16 bytes, and one by one.
OF_16_BITS = ("2x7x64", "2x3x5x16", "rows inside", "5x123", "sliced", "columns")
WIDE = [case for cols in (300, 1152, 1153, 2100) for case in wide(cols)]
RUNS = [
    *((case, torch.float32) for case in (*CASES, *WIDE)),
    *((case, dtype) for case in CASES for dtype in DTYPES[1:] if case.label.startswith(OF_16_BITS)),
    *((case, dtype) for cols in (1152, 1153) for case in wide(cols) for dtype in DTYPES[1:]),
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_the_contract(case: Case, dtype: torch.dtype) -> None:
    frame.check_contract(case, dtype)


# ---- Numbers of one's own --------------------------------------------------------------------------------------------


def arguments(shape: tuple[int, ...], *modulators: tuple[int, ...] | None) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    x, *given = (None if size is None else randn(g, *size).float() for size in (shape, *modulators))
    return [x, *given, 0.75, int(Activation.SILU)]


@pytest.mark.parametrize("shared", ["by none", "by row", "by run"])
@pytest.mark.parametrize("cols", [64, 63])
@pytest.mark.parametrize("dtype", DTYPES)
def test_modulators_of_other_dtypes(cols: int, shared: str, dtype: torch.dtype) -> None:
    """In blocks of 16 bytes and one by one."""
    op = OPS["affine_activation"]
    shape = {"by none": (2, 5, cols), "by row": (2, 5, 1), "by run": (2, 1, cols)}[shared]
    x, scale, shift, *options = arguments((2, 5, cols), shape, shape)
    for scale_dtype, shift_dtype in zip(DTYPES, (*DTYPES[1:], DTYPES[0]), strict=True):
        args = [x.to(dtype), scale.to(scale_dtype), shift.to(shift_dtype), *options]
        out = calls.forward(op.name, *args)
        testing.verify_forward(op, args, [out])
        testing.verify_backward(op, [out], args, calls.backward(op.name, out, [True] * 3, args))


@pytest.mark.parametrize("activation", Activation)
def test_far_arguments(activation: Activation) -> None:
    """No activation overflows on the way to a number that is in range."""
    x = torch.tensor([[*FAR, math.nan]])
    args = [x, None, None, 1.0, int(activation)]
    found = frame.both_ways("affine_activation", args, [torch.ones_like(x)])
    leaf = x.clone().requires_grad_()
    expected = FUNCTIONS[activation](leaf)
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(found[0], expected, equal_nan=True)
    torch.testing.assert_close(found[1][slope.isfinite()], slope[slope.isfinite()])


@pytest.mark.parametrize("shared", [(1, 20), (9, 1), (9, 20)])
def test_a_nan_stays_with_its_element(shared: tuple[int, int]) -> None:
    """But for gradients of what others share."""
    args = arguments((9, 20), shared, shared)
    grads = [torch.ones(9, 20)]
    clean = frame.both_ways("affine_activation", args, grads)
    args[0][4, 3] = math.nan
    out, *gradients = frame.both_ways("affine_activation", args, grads)
    assert out.isnan().sum() == 1
    for mine, other in zip((out, *gradients), clean, strict=True):
        rows, cols = (
            (torch.arange(n) != place) if n > 1 else torch.zeros(1, dtype=torch.bool)
            for n, place in zip(mine.shape, (4, 3), strict=True)
        )
        others = rows[:, None] | cols
        assert mine[~others].isnan().all()
        assert torch.equal(mine[others], other[others])


@pytest.mark.parametrize("last", [64, 1])
def test_what_shares_is_summed_where_modulators_are_expanded(last: int) -> None:
    """The gradient of an expanded one has a number for each that is expanded."""
    x, scale, shift, *options = arguments((3, 5, 64), (1, 1, last), (1, 1, last))
    whole = [x, *(m.expand(3, 1, last) for m in (scale, shift)), *options]
    copied = [x, *(m.contiguous() for m in whole[1:3]), *options]
    for mine, other in zip(
        frame.both_ways("affine_activation", whole), frame.both_ways("affine_activation", copied), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_halves() -> None:
    x = arguments((3, 5, 40))[0]
    hidden, gate = x.chunk(2, -1)
    got = calls.forward("gated_activation", x, int(Activation.SILU))
    torch.testing.assert_close(got, hidden * functional.silu(gate))


# ---- Layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [(2, 1, 1, 1, 64), (1, 3, 1, 5, 1), (2, 3, 2, 5, 64), (64,)])
def test_layouts_give_the_same_numbers(shared: tuple[int, ...]) -> None:
    frame.check_layouts("affine_activation", arguments((2, 3, 2, 5, 64), shared, shared))


def test_layouts_of_halves_give_the_same_numbers() -> None:
    x = arguments((2, 3, 2, 5, 64))[0]
    frame.check_layouts("gated_activation", [x, int(Activation.GELU)])


@pytest.mark.parametrize("shared", [(24,), (2, 1), (2, 24)])
def test_offsets_beyond_32_bits(shared: tuple[int, ...]) -> None:
    x, scale, shift, *options = arguments((2, 24), shared, shared)
    calls_of = [([frame.rows_far_apart(x), scale, shift], [x, scale, shift])]
    if scale.shape == x.shape:
        calls_of.append(([x, frame.rows_far_apart(scale), shift], [x, scale, shift]))
    for far, near in calls_of:
        found, expected = (frame.both_ways("affine_activation", [*args, *options]) for args in (far, near))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_offsets_of_halves_beyond_32_bits() -> None:
    x = arguments((2, 24))[0]
    found, expected = (frame.both_ways("gated_activation", [y, 1]) for y in (frame.rows_far_apart(x), x))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("cols", [1, 8, 9, 64, 257, 1024, 1025, 1152, 1 << 20])
@pytest.mark.parametrize(("rows", "runs"), [(1, 1), (6, 2), (40, 1), (4096, 16), (8192, 8192)])
@pytest.mark.parametrize("most", [3, 2048])
def test_every_row_has_its_block(rows: int, runs: int, cols: int, most: int) -> None:
    x = torch.empty(1, device="meta").expand(rows, cols)
    pieces = Pieces(x.shape, [x], (1, 0))
    assert pieces.lanes * 8 * (pieces.pieces - 1) < cols <= pieces.lanes * 8 * pieces.pieces
    assert pieces.lanes & (pieces.lanes - 1) == 0 if pieces.lanes < 32 else pieces.lanes % 32 == 0
    plan = Plan.of(pieces, runs, most)
    assert plan.threads % 32 == plan.threads % pieces.lanes == 0
    assert plan.threads <= 128
    blocks_a_run = -(-plan.run // plan.rows_a_block)
    assert plan.blocks == runs * blocks_a_run * pieces.pieces < most + 2 * runs * pieces.pieces
    assert plan.parts == runs * blocks_a_run * (plan.threads // max(pieces.lanes, 32))


def test_use_backend_serves_the_family() -> None:
    frame.check_served("affine_activation", "gated_activation")
