"""Group norms on CUDA without a device. See test_cuda_on_host.py."""

from __future__ import annotations

import math

import pytest
import torch

from mmkern.backends.cuda_group_norm import Plan
from mmkern.ops._define import OPS
from mmkern.reference.activations import Activation
from tests.cases.case import Case
from tests.cases.group_norm import CASES, large, of_every_kernel
from tests.cuda_on_host import calls, frame

pytestmark = pytest.mark.usefixtures("on_host")
OP = "group_norm_act"
# The other dtypes differ in loads and stores alone: in blocks of 16 bytes, and one by one.
OF_16_BITS = ("2x2x5x64", "2x3x4x25-all", "samples inside", "sliced")
LARGE = [*of_every_kernel(), large(70, 20), large(3, 300), large(24, 1024), large(3, 1153)]
RUNS = [
    *((case, torch.float32) for case in (*CASES, *LARGE)),
    *(
        (case, dtype)
        for case in (*CASES, *LARGE)
        for dtype in (torch.bfloat16, torch.float16)
        if case in LARGE or (case.label.startswith(OF_16_BITS) and not case.label.endswith("far"))
    ),
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_the_contract(case: Case, dtype: torch.dtype) -> None:
    frame.check_contract(case, dtype)


@pytest.mark.parametrize("positions", [1000, 5000, 5001])
def test_a_far_mean_costs_no_digits(positions: int) -> None:
    x = 1e4 + torch.randn(1, 2, 5, positions, generator=torch.Generator().manual_seed(0))
    args = [x, None, None, None, None, 1e-5, int(Activation.NONE)]
    oracle = OPS[OP].reference(x.double(), *args[1:])
    torch.testing.assert_close(calls.forward(OP, *args).double(), oracle, rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", [20, 9001])
def test_a_nan_stays_in_its_group(positions: int) -> None:
    """Gradients of what samples share have it, too."""
    args = large(3, positions).arguments(torch.float32)
    grads = [torch.ones_like(args[0])]
    clean = frame.both_ways(OP, args, grads)
    args[0][1, 0, 2, 5] = math.nan
    got = frame.both_ways(OP, args, grads)
    others = torch.tensor([[True, True], [False, True]])
    for one, other in zip(got, clean, strict=True):
        mine = others if one.shape[:2] == (2, 2) and one.dim() > 2 else others.all(0)
        assert one[~mine].isnan().any()
        assert torch.equal(one[mine], other[mine])


def test_layouts_give_the_same_numbers() -> None:
    frame.check_layouts(OP, large(5, 64).arguments(torch.float32))


def test_offsets_beyond_32_bits() -> None:
    near = large(1, 24).arguments(torch.float32)[0][:, :1].reshape(2, 24)
    found, expected = (
        frame.both_ways(OP, [x.view(2, 1, 1, 24), None, None, None, None, 1e-5, int(Activation.SILU)])
        for x in (frame.rows_far_apart(near), near)
    )
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("lanes", [1, 2, 8, 32, 96, 128])
@pytest.mark.parametrize("pieces", [1, 3, 40, 64, 100, 5000])
@pytest.mark.parametrize("held", [(5,), (5, 10)])
def test_every_piece_has_its_threads(lanes: int, pieces: int, held: tuple[int, ...]) -> None:
    plan = Plan.of(lanes, pieces, held)
    assert plan.threads % 32 == plan.threads % lanes == 0
    assert 0 < plan.threads <= 512
    taken = plan.threads // lanes
    assert taken < pieces + 32
    assert taken * plan.held >= pieces if plan.held else taken * held[-1] < pieces


def test_use_backend_serves_the_family() -> None:
    frame.check_served(OP)
