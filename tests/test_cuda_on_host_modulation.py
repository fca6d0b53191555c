"""Norms and their modulation on CUDA without a device. See test_cuda_on_host.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mmkern.backends import cuda_modulation
from mmkern.backends.cuda_modulation import Plan
from mmkern.ops._define import OPS
from tests.cases.case import Case
from tests.cases.modulation import CASES, randn, wide
from tests.cuda_on_host import calls, frame

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
    frame.check_contract(case, dtype)


def gated(g: torch.Generator, *shape: int) -> list[Any]:
    """Arguments that all are there, each row with its own scale, all with one gate."""
    x, residual, scale, shift = (randn(g, *shape).float() for _ in range(4))
    ones = [1] * (len(shape) - 1)
    gate, weight, bias = (randn(g, *size, shape[-1]).float() for size in (ones, (), ()))
    return [x, residual, gate, weight, bias, scale, shift, randn(g, *shape[:-1], 1).float(), 1e-6, True]


def test_layouts_give_the_same_numbers() -> None:
    frame.check_layouts("residual_ada_layer_norm", gated(torch.Generator().manual_seed(0), 2, 3, 2, 5, 64))


@pytest.mark.parametrize("eps", [1e-6, 0.0])
@pytest.mark.parametrize("name", ["x", "residual", "scale", "frame_scale"])
def test_a_nan_stays_in_its_row(name: str, eps: float) -> None:
    """In gradients of rows, too; those of what rows share have it."""
    args = gated(torch.Generator().manual_seed(0), 9, 20)
    args[8] = eps
    names = OPS["residual_ada_layer_norm"].names
    grads = [torch.ones(9, 20)] * 2
    clean = frame.both_ways("residual_ada_layer_norm", args, grads)
    args[names.index(name)][4, 0] = math.nan
    got = frame.both_ways("residual_ada_layer_norm", args, grads)
    others = torch.arange(9) != 4
    assert got[0][4].isnan().any()
    for one, other in zip(got, clean, strict=True):
        if one.shape[:1] == (9,):
            assert torch.equal(one[others], other[others])


def test_rows_of_zeros_and_no_eps() -> None:
    """What torch gives, and nothing of it in the sums of a block's other rows, which are not there."""
    args = gated(torch.Generator().manual_seed(0), 5, 20)
    args[8] = 0.0
    assert all(found.isfinite().all() for found in frame.both_ways("residual_ada_layer_norm", args))


def test_a_far_mean_costs_no_digits() -> None:
    for cols in (1153, 4104, 8200):
        x = 1e4 + torch.randn(3, cols, generator=torch.Generator().manual_seed(0))
        args = [x, None, None, None, None, None, 1e-5, True]
        oracle = OPS["ada_layer_norm"].reference(x.double(), *args[1:])
        torch.testing.assert_close(calls.forward("ada_layer_norm", *args).double(), oracle, rtol=0, atol=4e-3)


def test_offsets_beyond_32_bits() -> None:
    near = randn(torch.Generator().manual_seed(0), 2, 24).bfloat16()
    far = frame.rows_far_apart(near)
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
    frame.check_served("ada_layer_norm", "residual_ada_layer_norm")
