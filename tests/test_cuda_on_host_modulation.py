"""Norms and their modulation on CUDA without a device. See test_cuda_on_host.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkern import backends
from mmkern.backends import cuda, cuda_modulation
from mmkern.backends.cuda_modulation import Plan
from mmkern.ops._define import OPS, in_tuple
from tests import contract
from tests.cases.case import Case
from tests.cases.modulation import CASES, randn, wide
from tests.cuda_on_host import calls
from tests.cuda_on_host.harness import HostLauncher, Order

pytestmark = pytest.mark.usefixtures("on_host")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The other dtypes differ in loads and stores alone: in blocks of 16 bytes, and one by one.
OF_16_BITS = ("2x7x64", "2x3x5x16", "rows inside", "5x123", "sliced", "columns")
# Whole warps that are no power of two, two chunks, and more than registers hold; in blocks and one by one.
WIDE = [case for cols in (300, 1152, 1153, 4104, 5120, 4101, 8200) for case in wide(cols)]
RUNS = [
    *((case, torch.float32) for case in (*CASES, *WIDE)),
    *((case, dtype) for case in CASES for dtype in DTYPES[1:] if case.label.startswith(OF_16_BITS)),
    *((case, dtype) for cols in (1152, 4104, 8200) for case in wide(cols) for dtype in DTYPES[1:]),
    *((case, torch.float32) for case in wide(1152, 40, centered=False)),
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_the_contract(case: Case, dtype: torch.dtype) -> None:
    contract.check_forward(case, lambda *args: calls.forward(case.op, *args), dtype)
    contract.check_backward(case, lambda grads, wanted, args: calls.backward(case.op, grads, wanted, args), dtype)


# Several rows to a warp, to a block; runs that do not fill one; parts of a run; every kind of sharing.
ODD = [
    case
    for case in CASES
    if case.label
    in ("5x123-affine", "2x70x20-all frames", "2x70x20-each-shared gate", "rows inside-frames-one gate-rms")
    or case.label.startswith(("2x70x20-shared and affine", "sliced-shared"))
] + [*wide(300, 9), *wide(4104), *wide(8200)]


@pytest.mark.parametrize("case", ODD, ids=str)
def test_the_order_of_threads_changes_nothing(
    case: Case, launcher: HostLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that take several rows, too."""
    for limit in ("_MAX_BLOCKS", "_MAX_BLOCKS_OF_SUMS"):
        monkeypatch.setattr(cuda_modulation, limit, 3)
    contract.check_forward(case, lambda *args: calls.forward(case.op, *args), torch.float32)
    contract.check_backward(
        case, lambda grads, wanted, args: calls.backward(case.op, grads, wanted, args), torch.float32
    )
    expected = calls.both(case, torch.float32)
    for order, seed in ((Order.reverse, 0), (Order.random, 1)):
        with launcher.order(order, seed):
            for one, other in zip(expected, calls.both(case, torch.float32), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("case", ODD, ids=str)
def test_outputs_lie_as_inputs_do(case: Case) -> None:
    op = OPS[case.op]
    args = op._prepare(case.arguments(torch.float32))
    outs = op.empty_outputs(args)
    getattr(cuda, case.op)(*args, *outs)
    for mine, dense in zip(outs, in_tuple(calls.forward(case.op, *args)), strict=True):
        assert torch.equal(mine, dense)


@pytest.mark.parametrize("case", ODD, ids=str)
def test_a_gradient_alone_is_the_same(case: Case) -> None:
    op = OPS[case.op]
    args = case.arguments(torch.float32)
    grads = contract.gradients_for(case, in_tuple(calls.forward(case.op, *args)))
    there = [isinstance(args[i], Tensor) for i in op.tensors]
    together = calls.backward(case.op, grads, there, args)
    for slot in (slot for slot, tensor in enumerate(there) if tensor):
        alone = calls.backward(case.op, grads, [i == slot for i in range(len(there))], args)[slot]
        assert alone is not None
        assert torch.equal(alone, together[slot])


def gated(g: torch.Generator, *shape: int) -> list[Any]:
    """Arguments that all are there, each row with its own scale, all with one gate."""
    x, residual, scale, shift = (randn(g, *shape).float() for _ in range(4))
    ones = [1] * (len(shape) - 1)
    gate, weight, bias = (randn(g, *size, shape[-1]).float() for size in (ones, (), ()))
    return [x, residual, gate, weight, bias, scale, shift, randn(g, *shape[:-1], 1).float(), 1e-6, True]


def both_ways(args: list[Any], grads: list[Tensor] | None = None) -> list[Tensor]:
    outs = in_tuple(calls.forward("residual_ada_layer_norm", *args))
    found = calls.backward("residual_ada_layer_norm", grads or [*outs], [True] * 8, args)
    return [*outs, *(gradient for gradient in found if gradient is not None)]


def test_layouts_give_the_same_numbers() -> None:
    """Rows that are not aligned; more axes than four, in an order that does not collapse; gradients that repeat."""
    dense = gated(torch.Generator().manual_seed(0), 2, 3, 2, 5, 64)
    expected = both_ways(dense)

    def unaligned(x: Tensor) -> Tensor:
        room = torch.full((*x.shape[:-1], x.shape[-1] + 3), math.nan)
        room[..., 1:-2] = x
        return room[..., 1:-2]

    def turned(x: Tensor) -> Tensor:
        return x.permute(3, 1, 4, 0, 2).contiguous().permute(3, 1, 4, 0, 2)

    for lay in (unaligned, turned):
        lying = [lay(a) if isinstance(a, Tensor) and a.shape == dense[0].shape else a for a in dense]
        for one, other in zip(both_ways(lying, [lay(out) for out in expected[:2]]), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    repeated = [expected[0][..., 3:4].expand(expected[0].shape)] * 2
    for one, other in zip(
        both_ways(dense, repeated), both_ways(dense, [each.contiguous() for each in repeated]), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("eps", [1e-6, 0.0])
@pytest.mark.parametrize("name", ["x", "residual", "scale", "frame_scale"])
def test_a_nan_stays_in_its_row(name: str, eps: float) -> None:
    """In gradients of rows, too; those of what rows share have it."""
    args = gated(torch.Generator().manual_seed(0), 9, 20)
    args[8] = eps
    names = OPS["residual_ada_layer_norm"].names
    grads = [torch.ones(9, 20)] * 2
    clean = both_ways(args, grads)
    args[names.index(name)][4, 0] = math.nan
    got = both_ways(args, grads)
    others = torch.arange(9) != 4
    assert got[0][4].isnan().any()
    for one, other in zip(got, clean, strict=True):
        if one.shape[:1] == (9,):
            assert torch.equal(one[others], other[others])


def test_rows_of_zeros_and_no_eps() -> None:
    """What torch gives, and nothing of it in the sums of a block's other rows, which are not there."""
    args = gated(torch.Generator().manual_seed(0), 5, 20)
    args[8] = 0.0
    assert all(found.isfinite().all() for found in both_ways(args))


def test_a_far_mean_costs_no_digits() -> None:
    for cols in (1153, 4104, 8200):
        x = 1e4 + torch.randn(3, cols, generator=torch.Generator().manual_seed(0))
        args = [x, None, None, None, None, None, 1e-5, True]
        oracle = OPS["ada_layer_norm"].reference(x.double(), *args[1:])
        torch.testing.assert_close(calls.forward("ada_layer_norm", *args).double(), oracle, rtol=0, atol=4e-3)


def test_offsets_beyond_32_bits() -> None:
    """Rows 2^31 elements apart, in address space that is reserved but hardly touched."""
    stride, cols = (1 << 31) + 8, 24
    near = randn(torch.Generator().manual_seed(0), 2, cols).bfloat16()
    far = torch.empty(stride + cols, dtype=torch.bfloat16).as_strided((2, cols), (stride, 1))
    far.copy_(near)
    options = [None] * 5 + [1e-6, True]
    assert torch.equal(calls.forward("ada_layer_norm", far, *options), calls.forward("ada_layer_norm", near, *options))


@pytest.mark.parametrize("in_vectors", [False, True])
@pytest.mark.parametrize("cols", [1, 8, 9, 64, 257, 1152, 4096, 4104, 8192, 8200, 1 << 20])
@pytest.mark.parametrize(("rows", "run"), [(1, 1), (6, 3), (40, 40), (4096, 256), (100_000, 1), (8192, 8192)])
def test_every_row_has_its_lanes(rows: int, run: int, cols: int, in_vectors: bool) -> None:
    plan = Plan.of(rows, cols, run, in_vectors, 512)
    held = plan.lanes * cuda_modulation.COLUMNS * plan.chunks
    assert held >= cols or (plan.chunks == 0 and cols > (8192 if in_vectors else 4096))
    assert plan.lanes & (plan.lanes - 1) == 0 if plan.lanes < 32 else plan.lanes % 32 == 0
    assert plan.threads % 32 == plan.threads % plan.lanes == 0
    assert plan.threads <= 512
    blocks_a_run = -(-run // plan.rows_a_block)
    assert plan.blocks == rows // run * blocks_a_run <= max(512 + rows // run, rows)


def test_use_backend_serves_the_family() -> None:
    on_device = next(backend for backend in backends.BACKENDS if backend.name == "cuda")
    for name in ("ada_layer_norm", "residual_ada_layer_norm"):
        for kernel in (name, f"{name}_backward"):
            assert on_device.has(OPS[name], kernel)
            assert on_device.limits(kernel) is None
