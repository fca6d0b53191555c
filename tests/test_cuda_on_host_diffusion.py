"""Steps of denoising samplers on CUDA without a device. See test_cuda_on_host.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkern import testing
from mmkern.backends.cuda_pieces import Axes
from mmkern.ops._define import OPS
from mmkern.ops._outputs import in_tuple
from mmkern.reference.diffusion import MAX_HISTORY, MAX_OUTPUTS, Column, StepArguments
from mmkern.reference.philox import normal
from tests.cases.case import Case
from tests.cases.diffusion import CASES, PARTS, STEPS, case, wide_losses
from tests.cases.modulation import randn
from tests.cuda_on_host import calls, frame

pytestmark = pytest.mark.usefixtures("on_host")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOSS = "masked_squared_error"
# The other dtypes differ in loads and stores alone: in blocks of 16 bytes, and one by one.
OF_16_BITS = ("2x7x64", "2x3x5x16", "rows inside", "5x123", "sliced", "columns")
LOSSES = [case for cols in (16, 300, 1152, 1153, 2100) for case in wide_losses(cols)]
EVERY_PART = [case("corrected_step", layout, parts) for layout in ("2x7x64", "5x123") for parts in PARTS]
RUNS = [
    *((case, torch.float32) for case in (*CASES, *EVERY_PART, *LOSSES)),
    *((case, dtype) for case in CASES for dtype in DTYPES[1:] if case.label.startswith(OF_16_BITS)),
    *((case, dtype) for cols in (1152, 1153) for case in wide_losses(cols) for dtype in DTYPES[1:]),
    *((case, dtype) for case in EVERY_PART for dtype in DTYPES[1:] if case.label.endswith(("all", "places"))),
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_the_contract(case: Case, dtype: torch.dtype) -> None:
    frame.check_contract(case, dtype)


@pytest.mark.parametrize("layout", ["2x7x64", "5x123"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_of_other_dtypes(layout: str, dtype: torch.dtype) -> None:
    """One of each, beside a sample of one of them; in blocks of 16 bytes and one by one."""
    args = case("corrected_step", layout, "all").arguments(dtype)
    for i in range(MAX_OUTPUTS):
        args[1 + i] = args[1 + i].to(DTYPES[i % 3])
    testing.verify_forward(OPS["corrected_step"], args, in_tuple(calls.forward("corrected_step", *args)))


# ---- Numbers of one's own --------------------------------------------------------------------------------------------


def arguments(x: Tensor, columns: dict[Column, float], **given: Any) -> list[Any]:
    """A step by the coefficients that are not 0."""
    coefficients = torch.zeros(1, len(Column))
    for column, value in columns.items():
        coefficients[:, column] = value
    none = dict.fromkeys(StepArguments._fields) | {"outputs": [None] * MAX_OUTPUTS, "history": [None] * MAX_HISTORY}
    a = StepArguments(**(none | given | {"x": x, "coefficients": coefficients}))  # type: ignore[arg-type]
    return [a.x, *a.outputs, a.mask, *a.history, *a[4:]]


@pytest.mark.parametrize("offset", [0, 5, 2**32 - 3, 2**40])
@pytest.mark.parametrize("shape", [(7, 123), (3, 5, 64), (2, 4097)])
def test_noise_is_that_of_the_position(shape: tuple[int, ...], offset: int) -> None:
    """Within a few ulp of √(−2 ln u), the only place where functions of the device enter."""
    seed = torch.tensor([-(2**40) - 7, offset])
    x = torch.zeros(shape)
    found = calls.forward("denoise_step", *arguments(x, {Column.NOISE: 1}, seed=seed))
    expected = normal(seed, x.numel(), torch.float64).view(shape)
    torch.testing.assert_close(found.double(), expected, rtol=4 * 2.0**-23, atol=2.0**-21)
    assert torch.equal(calls.forward("denoise_step", *arguments(x, {Column.NOISE: 1}, seed=seed)), found)


def test_the_rarest_noise() -> None:
    """Of a word of 144, where the last bit of u counts."""
    seed, x = torch.tensor([7, 6107189]), torch.zeros(1, 4)
    found = calls.forward("denoise_step", *arguments(x, {Column.NOISE: 1}, seed=seed))
    torch.testing.assert_close(found.double()[0], normal(seed, 4, torch.float64), rtol=4 * 2.0**-23, atol=2.0**-21)


def test_a_seed_is_read_by_its_stride() -> None:
    x, pair = torch.zeros(4, 16), torch.tensor([3, 99, 8, 99])
    one, other = (
        calls.forward("denoise_step", *arguments(x, {Column.NOISE: 1}, seed=seed))
        for seed in (pair[::2], pair[::2].clone())
    )
    assert torch.equal(one, other)


def test_a_seed_comes_before_noise() -> None:
    x, seed = torch.zeros(4, 16), torch.tensor([3, 8])
    one, other = (
        calls.forward("denoise_step", *arguments(x, {Column.NOISE: 1}, seed=seed, noise=noise))
        for noise in (None, torch.ones_like(x))
    )
    assert torch.equal(one, other)


def test_limits_keep_what_is_no_number() -> None:
    x = torch.tensor([[-3.0, -1.0, 0.5, 3.0, math.nan, math.inf, -math.inf, 2.0]])
    columns = {Column.X0_SAMPLE: 1, Column.X0_SCALE: 1, Column.X0: 1}
    for largest in (2.0, math.nan):
        args = arguments(x, columns, limits=torch.tensor([[largest, 0.5]]))
        expected = OPS["multistep"].reference(*args)
        for mine, other in zip(calls.forward("multistep", *args), expected, strict=True):
            torch.testing.assert_close(mine, other, equal_nan=True)


def test_a_nan_stays_with_its_element() -> None:
    """But for a rescaled sample, of which it spoils all."""
    args = case("corrected_step", "2x70x20", "all").arguments(torch.float32)
    clean = calls.forward("corrected_step", *args)
    args[3][0, 4, 2] = math.nan
    for mine, other in zip(calls.forward("corrected_step", *args), clean, strict=True):
        assert mine[0].isnan().all()
        assert torch.equal(mine[1], other[1])
    args[OPS["corrected_step"].names.index("rescale")] = None
    assert calls.forward("corrected_step", *args)[0].isnan().sum() == 1


def test_rescaling_needs_no_weights() -> None:
    """Nor does it do anything without a second output."""
    g = torch.Generator().manual_seed(0)
    x, *outputs = (randn(g, 3, 5, 24).float() for _ in range(3))
    for given in (outputs, [outputs[0], None]):
        args = arguments(
            x,
            {Column.OUTPUT: 1, Column.SAMPLE: 0.5},
            outputs=[*given, *[None] * 3],
            rescale=torch.tensor([[0.7]]),
        )
        testing.verify_forward(OPS["denoise_step"], args, [calls.forward("denoise_step", *args)])


# ---- The loss --------------------------------------------------------------------------------------------------------


def loss_arguments(*shape: int, mask: tuple[int, ...] | None = None) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    pred, target = (randn(g, *shape).float() for _ in range(2))
    return [pred, target, None if mask is None else randn(g, *mask).sigmoid().float()]


@pytest.mark.parametrize("shape", [(3, 5, 64), (3, 5, 63)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target_dtype", DTYPES)
def test_a_target_of_another_dtype(shape: tuple[int, ...], dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    """In blocks of 16 bytes and one by one."""
    pred, target, mask = loss_arguments(*shape, mask=(1, 5, 1))
    args = [pred.to(dtype), target.to(target_dtype), mask]
    op = OPS[LOSS]
    testing.verify_forward(op, args, [calls.forward(LOSS, *args)])
    grads = [torch.tensor([0.5, -2.0, 3.0])]
    gradients = calls.backward(LOSS, grads, [True, True], args)
    assert [g.dtype for g in gradients if g is not None] == [dtype, target_dtype]
    testing.verify_backward(op, grads, args, gradients)


@pytest.mark.parametrize("shape", [(3, 5, 20), (3, 5, 24)])
def test_what_is_no_number_stays_in_its_sample(shape: tuple[int, ...]) -> None:
    args = loss_arguments(*shape, mask=(3, 5, 1))
    clean = frame.both_ways(LOSS, args)
    args[2][1, 4] = math.inf
    args[0][2, 3, 1] = math.nan
    sums, *gradients = frame.both_ways(LOSS, args, [torch.ones(3)])
    assert sums[0] == clean[0][0]
    assert sums[1] == math.inf
    assert sums[2].isnan()
    for gradient in gradients:
        assert gradient[1, 4].isinf().all()
        assert gradient[2].isnan().sum() == 1
        assert gradient[0].isfinite().all()


# ---- Layouts ---------------------------------------------------------------------------------------------------------


def test_layouts_give_the_same_numbers() -> None:
    args = case("corrected_step", "2x3x5x16", "all").arguments(torch.float32)
    args = [a.repeat(2, 1, 1, 1)[:, :, None] if isinstance(a, Tensor) and a.dim() == 4 else a for a in args]
    args = [a.repeat(2, 1) if isinstance(a, Tensor) and a.dim() == 2 else a for a in args]
    seed = OPS["corrected_step"].names.index("seed")
    args[seed : seed + 1] = [None]
    frame.check_layouts("corrected_step", args)
    frame.check_layouts(LOSS, loss_arguments(2, 3, 4, 5, 16))
    frame.check_layouts(LOSS, loss_arguments(2, 3, 4, 5, 16, mask=(1, 3, 1, 5, 1)))


def test_axes_that_all_walk_over_are_one() -> None:
    assert Axes.of((2, 3, 4), [(12, 4, 1), (12, 4, 1)]).sizes == (1, 1, 1, 24)
    assert Axes.of((2, 3, 4), [(12, 4, 1), (0, 0, 1)]) == Axes((1, 1, 6, 4), ((0, 0, 4, 1), (0, 0, 0, 1)))
    assert Axes.of((2, 1, 4), [(4, 7, 1), (1, 0, 0)]) == Axes((1, 1, 2, 4), ((0, 0, 4, 1), (0, 0, 1, 0)))
    assert Axes.of((2, 3, 4), [(12, 4, 1), (3, 1, 0)]) == Axes((1, 1, 6, 4), ((0, 0, 4, 1), (0, 0, 1, 0)))
    assert Axes.of((1 << 20, 1 << 11), [(1 << 11, 1)]).sizes == (1, 1, 1 << 20, 1 << 11)
    assert len(Axes.of((2, 3, 4, 5, 6), [(2000, 600, 140, 26, 1)]).sizes) == 5


def test_offsets_beyond_32_bits() -> None:
    near = randn(torch.Generator().manual_seed(0), 2, 24).bfloat16()
    far = frame.rows_far_apart(near)
    for sample, output in ((near, far), (far, near)):
        args = arguments(sample, {Column.SAMPLE: 0.5, Column.OUTPUT: 2}, outputs=[output, *[None] * (MAX_OUTPUTS - 1)])
        torch.testing.assert_close(calls.forward("denoise_step", *args), (2.5 * near.float()).bfloat16())
    for args, dense in (
        ([far, near + 1, None], [near, near + 1, None]),
        ([near + 1, far, None], [near + 1, near, None]),
    ):
        for mine, other in zip(frame.both_ways(LOSS, args), frame.both_ways(LOSS, dense), strict=True):
            assert torch.equal(mine, other)


def test_use_backend_serves_the_family() -> None:
    frame.check_served(*STEPS, LOSS)
