"""The CUDA backend without a device: its kernels compiled as C++ and run by tests/cuda_on_host.

What concerns one family alone: test_cuda_on_host_attention.py, and here the hyperbolic family's.
"""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkern.backends import cuda, cuda_launch
from tests import contract
from tests.cases import (
    absorbing,
    attention,
    attention_rows,
    contrastive,
    ctc,
    decoding,
    diffusion,
    gated,
    group_norm,
    masked_decode,
    modulation,
    probabilities,
)
from tests.cases.hyperbolic import CASES, OPS, PAIRWISE, Case, in_ball, randn
from tests.cuda_on_host import calls, frame
from tests.cuda_on_host.harness import REPOSITORY, HostLauncher, Order, sanitizer_environment

pytestmark = pytest.mark.usefixtures("on_host")
# float32 takes every layout; the other dtypes differ in loads and stores alone.
LABELS_OF_EVERY_DTYPE = ("9x123", "2x3x40", "5x33", "2x8", "17x33x64")
# A row to a part of a warp, to several warps, in two chunks; the chunks in 16-byte accesses and without.
TIMES = {"3x64": (5, 16), "1x5": (900, 901), "2x8": (100, 600), "5x33": (125,)}
WIDE = [calls.widened(case, times) for case in CASES for times in TIMES.get(case.label, ())]
RUNS = [
    *((case, torch.float32) for case in (*CASES, *WIDE)),
    *(
        (case, dtype)
        for case in CASES
        for dtype in (torch.bfloat16, torch.float16)
        if case.label in LABELS_OF_EVERY_DTYPE
    ),
    *((case, torch.bfloat16) for case in WIDE if "3x64" in case.label),
]
RUNS = [run for run in RUNS if run[0].label not in ("empty", "0x4x8", "4x0x8")]  # the dispatcher's business

# Attention has products of its own for 16-bit types; what lies between them is the same for all.
ATTENTION_OF_EVERY_DTYPE = (
    "plain",
    "heads inside",
    "sliced",
    "extreme",
    "all at once",
    "bias LS",
    "one query",
    "dropout",
)
FORWARD_RUNS = [
    *RUNS,
    *((case, torch.float32) for case in attention.CASES),
    *(
        (case, dtype)
        for case in attention.CASES
        for dtype in (torch.bfloat16, torch.float16)
        if case.label.startswith(ATTENTION_OF_EVERY_DTYPE)
    ),
]
# Several warps and blocks, tiles that are not full, split keys.
ATTENTION_IN_ANY_ORDER = [
    (case, dtype)
    for case in attention.CASES
    for dtype in (torch.float32, torch.bfloat16)
    if case.label.startswith(("all at once", "one query bias", "heads inside"))
]


def case_of(op: str, *labels: str) -> Case:
    return next(case for case in CASES if case.op == op and case.label in labels)


def small(op: str) -> Case:
    """Odd sizes, several blocks' worth of everything."""
    return case_of(op, "17x129", "2x3x7x24", "123x129x40")


# ---- The numerics contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "dtype"), FORWARD_RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype) -> None:
    contract.check_forward(case, lambda *args: calls.forward(case.op, *args), dtype)


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_backward(case: Case, dtype: torch.dtype) -> None:
    contract.check_backward(case, lambda grads, wanted, args: calls.backward(case.op, *grads, wanted, args), dtype)


@pytest.mark.parametrize("op", [op for op in OPS if op not in (*PAIRWISE, "lorentz_centroid")])
def test_a_nan_stays_in_its_row(op: str) -> None:
    args = case_of(op, "9x123").arguments(torch.float32)
    clean = calls.forward(op, *args)
    lead = contract.op_of(op).lead
    args[lead] = args[lead].clone()
    args[lead][2, 5] = math.nan
    out = calls.forward(op, *args)
    others = torch.arange(9) != 2
    assert out[2].isnan().all()
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("op", PAIRWISE)
def test_a_nan_stays_in_its_row_of_pairs(op: str) -> None:
    x, y, c = case_of(op, "17x33x64").arguments(torch.float32)
    clean = calls.forward(op, x, y, c)
    x[3, 1] = y[7, 2] = math.nan
    out = calls.forward(op, x, y, c)
    touched = (torch.arange(17) == 3)[:, None] | (torch.arange(33) == 7)
    assert out[touched].isnan().all()
    assert torch.equal(out[~touched], clean[~touched])


@pytest.mark.parametrize("op", ["lorentz_distance", "poincare_distance"])
@pytest.mark.parametrize("pairs", [False, True])
def test_coinciding_points(op: str, pairs: bool) -> None:
    x = in_ball(torch.Generator().manual_seed(0), 5, 70).float()
    name = op.replace("_", "_pairwise_") if pairs else op
    c = torch.tensor(1.0)
    out = calls.forward(name, x, x.clone(), c)
    assert (out.diagonal() if pairs else out).eq(0).all()
    gradients = calls.backward(name, torch.ones_like(out), [True] * 3, [x, x.clone(), c])
    assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(
    "op", ["lorentz_log_map0", "lorentz_distance", "lorentz_pairwise_distance", "lorentz_centroid"]
)
def test_offsets_beyond_32_bits(op: str) -> None:
    near = randn(torch.Generator().manual_seed(0), 2, 24, norm=1.0).bfloat16()
    far = frame.rows_far_apart(near)
    others = {
        "lorentz_distance": [near.flip(0)],
        "lorentz_pairwise_distance": [near.flip(0)],
        "lorentz_centroid": [near[:, 0].abs()],
    }.get(op, [])
    assert torch.equal(calls.forward(op, far, *others, 1.0), calls.forward(op, near, *others, 1.0))


def test_near_pairs_keep_five_digits() -> None:
    g = torch.Generator().manual_seed(0)
    x = randn(g, 70, 64, norm=1.0).float()
    y = (x.double() + 1e-6 * randn(g, 70, 64, norm=1.0)).float()
    exact = contract.op_of("lorentz_distance").reference(x.double(), y.double(), 1.0)
    got = calls.forward("lorentz_pairwise_distance", x, y, 1.0).diagonal()
    assert ((got - exact).abs() / exact).max() < 1e-5


# ---- Same inputs, same bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((small(op), torch.float32) for op in OPS),
        *((case, torch.float32) for case in WIDE if "3x64" in case.label or "2x8" in case.label),
        *ATTENTION_IN_ANY_ORDER,
    ],
    ids=str,
)
def test_the_order_of_threads_does_not_matter(case: Case, dtype: torch.dtype, launcher: HostLauncher) -> None:
    expected = calls.both(case, dtype)
    for order, seed in ((Order.reverse, 0), (Order.random, 1), (Order.random, 2)):
        with launcher.order(order, seed):
            for one, other in zip(expected, calls.both(case, dtype), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("op", OPS)
def test_gradients_may_be_asked_for_one_by_one(op: str) -> None:
    case = small(op)
    args = case.arguments(torch.float32)
    out = calls.forward(op, *args)
    grad = torch.linspace(-1, 1, out.numel()).view(out.shape)
    everything = calls.both(case, torch.float32, grad)[1:]
    for slot, expected in enumerate(everything):
        wanted = [i == slot for i in range(len(everything))]
        gradients = calls.backward(op, grad, wanted, args)
        assert [g is not None for g in gradients] == wanted
        assert torch.equal(gradients[slot], expected)


@pytest.mark.parametrize("op", OPS)
def test_a_curvature_by_value_and_by_pointer(op: str) -> None:
    args = small(op).arguments(torch.float32)
    slot = contract.op_of(op).names.index("curvature")
    by_value = [*args[:slot], args[slot].item(), *args[slot + 1 :]]
    assert torch.equal(calls.forward(op, *args), calls.forward(op, *by_value))


def spread(x: Tensor) -> list[Tensor]:
    """``x`` in layouts that do not collapse, are not aligned, or repeat."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), math.nan, dtype=x.dtype)
    wide[..., 1:-2] = x
    turned = x.movedim(0, -1).contiguous().movedim(-1, 0)  # the last axis is not dense
    return [wide[..., 1:-2], turned]


@pytest.mark.parametrize("op", OPS)
def test_strides(op: str) -> None:
    case = case_of(op, "2x3x40", "2x3x7x24", "17x33x64")
    args = case.arguments(torch.float32)
    info = contract.op_of(op)
    grad = torch.linspace(-1, 1, math.prod(info.outputs[0](args))).view(*info.outputs[0](args))
    wanted = [True] * len(info.tensors)
    dense = calls.backward(op, grad, wanted, args)
    for layout in range(2):
        others = [spread(a)[layout] if isinstance(a, Tensor) and a.dim() > 1 else a for a in args]
        torch.testing.assert_close(calls.forward(op, *others), calls.forward(op, *args))
        for one, other in zip(dense, calls.backward(op, spread(grad)[layout], wanted, others), strict=True):
            torch.testing.assert_close(one, other)
    expanded = calls.backward(op, grad.flatten()[3].expand(grad.shape), wanted, args)
    copied = calls.backward(op, grad.flatten()[3].expand(grad.shape).contiguous(), wanted, args)
    for one, other in zip(expanded, copied, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("times", "copies"), [(1, 9), (9, 1)])
@pytest.mark.parametrize("op", ["lorentz_log_map", "mobius_scalar_mul", "lorentz_distance", "lorentz_centroid"])
def test_blocks_walk_on_where_there_are_more_rows(
    op: str, times: int, copies: int, launcher: HostLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_MAX_BLOCKS", 2)
    case = calls.widened(case_of(op, "17x129", "2x3x7x24"), times)
    many = dataclasses.replace(case, build=lambda g: [_repeated(a, copies) for a in case.build(g)])
    contract.check_forward(many, lambda *args: calls.forward(op, *args), torch.float32)
    contract.check_backward(many, lambda grads, wanted, args: calls.backward(op, *grads, wanted, args), torch.float32)
    expected = calls.both(many, torch.float32)
    with launcher.order(Order.reverse):
        for one, other in zip(expected, calls.both(many, torch.float32), strict=True):
            assert torch.equal(one, other)


def _repeated(value: Any, times: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value.repeat(times, *[1] * (value.dim() - 1))


# ---- The table, and the sanitizers -----------------------------------------------------------------------------------


def test_every_kernel_belongs_to_an_op(launcher: HostLauncher) -> None:
    ops = {name for name, op in contract.OPS.items() if op.family in (*cuda_launch.FAMILIES, "ctc", "ctc_beam")}
    elsewhere = {"cross_attention_varlen", "multi_source_attention", "timestep_embedding"}
    elsewhere |= {contrastive.LOG_SUMS[0], contrastive.LABELLED, contrastive.RETAINED[0], "sigmoid_loss"}
    elsewhere |= {absorbing.ENTROPY, absorbing.LOSS, probabilities.LOG_PROB, probabilities.RENORMALIZE}
    assert {name.removesuffix("_backward") for name in cuda.KERNELS} == ops - elsewhere
    launcher.launched.clear()
    for op in OPS:
        calls.both(case_of(op, "9x123", "5x33", "5x3x5"), torch.float32)
    for case in attention.CASES:
        if case.label.endswith(("4x520x16x8", "x128x128", "x256x256")):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                calls.both(case, dtype)
    of_ctc = (case for case in (*ctc.CASES, *ctc.BEAMS) if case.label == "strided")
    for case in (decoding.CASES[0], absorbing.STEPS[0], masked_decode.CASES[0], *of_ctc):
        calls.both(case, torch.float32)
    for case in attention_rows.CASES:
        if case.label in ("9x123-near", "odd-plain", "1x2x9x128-plain"):
            calls.both(case, torch.float32)
    for case in contrastive.CASES:
        if (case.op, case.label) in contrastive.OF_EVERY_CUDA_KERNEL:
            calls.both(case, torch.float32)
    for case in (case for family in (modulation, gated, group_norm, diffusion) for case in family.of_every_kernel()):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            calls.both(case, dtype)
    assert launcher.launched == set(launcher.kernels)


def test_structs_of_another_size_are_refused(launcher: HostLauncher) -> None:
    with pytest.raises(RuntimeError, match=r"centroid: takes \d+ bytes, got 24"):
        launcher(cuda_launch.Launch("centroid", (1, 1), 128, bytes(24)), torch.device("cpu"))


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers() -> None:
    command = [sys.executable, "-m", "tests.cuda_on_host.sanitized"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, env=sanitizer_environment(), check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "clean\n"
