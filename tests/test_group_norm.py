"""Group norms and the activation behind them: the numerics contract, their peers, and use."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from mmkern import backends, ops
from mmkern.ops._define import OPS
from tests import contract
from tests.cases.case import Case
from tests.cases.group_norm import CASES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Every case in float32; the other dtypes differ in loads and stores alone.
OF_EVERY_DTYPE = ("2x2x5x64", "2x3x4x25-all", "samples inside", "sliced")
RUNS = [
    (case, dtype)
    for case in CASES
    for dtype in DTYPES
    if dtype == torch.float32 or (case.label.startswith(OF_EVERY_DTYPE) and not case.label.endswith("far"))
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_forward(case, OPS[case.op], dtype, device)


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_backward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_backward(case, contract.by_autograd(OPS[case.op]), dtype, device)


# ---- PyTorch's own ---------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda u: u,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda u: functional.gelu(u, approximate="tanh"),
    "relu": functional.relu,
}


def check(got: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(out, inputs, grad) for out in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_equals_group_norm_then_the_activation(act: Any) -> None:
    x, weight, bias = leaf(2, 12, 5, 7), leaf(12), leaf(12)
    expected = ACTIVATIONS[act](functional.group_norm(x, 3, weight, bias, 1e-3))
    check(ops.group_norm_act(x, 3, weight, bias, 1e-3, act), expected, x, weight, bias)


def test_the_default_is_silu_with_the_eps_of_pytorch() -> None:
    x = leaf(2, 6, 9)
    check(ops.group_norm_act(1e-3 * x, 2), functional.silu(functional.group_norm(1e-3 * x, 2)), x)


@pytest.mark.parametrize("ones", [(), (1, 1)])
def test_equals_the_scale_and_shift_of_a_resnet_block(ones: tuple[int, ...]) -> None:
    """As diffusers' ResnetBlock2D has it with time_embedding_norm="scale_shift"."""
    norm = nn.GroupNorm(4, 8, eps=1e-6, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, embedding = leaf(3, 8, 4, 6), leaf(3, 16)
    scale, shift = embedding[:, :, None, None].chunk(2, 1)
    expected = functional.silu(norm(x) * (1 + scale) + shift)
    pair = tuple(m.reshape(3, 8, *ones) for m in (scale, shift))
    got = ops.group_norm_act(x, 4, norm.weight, norm.bias, norm.eps, scale_shift=pair)  # type: ignore[arg-type]
    check(got, expected, x, embedding, norm.weight, norm.bias)


@hypothesis_settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_shape_equals_pytorch(data: st.DataObject) -> None:
    draw = data.draw
    groups, each = draw(st.integers(1, 4), "groups"), draw(st.integers(1, 5), "channels of each")
    spatial = draw(st.lists(st.integers(1, 9), max_size=3), "spatial")
    samples, channels = draw(st.integers(1, 3), "samples"), groups * each
    shape = [samples, channels, *spatial]
    order = draw(st.permutations(range(len(shape))), "order in memory")
    x = torch.randn([shape[axis] for axis in order], dtype=torch.float64)
    x = x.permute([order.index(axis) for axis in range(len(shape))]).requires_grad_()
    axes = [1] * len(spatial)
    weight, bias, scale, shift = leaf(channels), leaf(channels), leaf(samples, channels), leaf(samples, channels)
    normal = x.reshape(samples, groups, -1)
    normal = functional.layer_norm(normal, normal.shape[-1:], eps=1e-2).reshape(shape)
    expected = normal * weight.view(1, -1, *axes) + bias.view(1, -1, *axes)
    expected = expected * (1 + scale.view(samples, channels, *axes)) + shift.view(samples, channels, *axes)
    got = ops.group_norm_act(x, groups, weight, bias, 1e-2, None, (scale, shift))
    check(got, expected, x, weight, bias, scale, shift)


# ---- Use -------------------------------------------------------------------------------------------------------------


def test_finite_differences() -> None:
    tensors = leaf(2, 6, 3), leaf(6), leaf(6), leaf(2, 6), leaf(2, 6)

    def run(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return ops.group_norm_act(x, 2, weight, bias, scale_shift=(scale, shift))

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.label.startswith(("samples inside", "sliced", "2x3x4x25"))], ids=str
)
def test_opcheck(case: Case) -> None:
    args = [a.requires_grad_() if isinstance(a, Tensor) else a for a in case.arguments(torch.float32)]
    torch.library.opcheck(getattr(torch.ops.mmkern, case.op).default, tuple(OPS[case.op]._prepare(args)))


def test_compile_without_graph_breaks() -> None:
    x, weight, scale, shift = torch.randn(2, 6, 5, 4), torch.randn(6), torch.randn(2, 6), torch.randn(2, 6)

    def run(x: Tensor) -> Tensor:
        return ops.group_norm_act(ops.group_norm_act(x, 2, weight), 3, act="gelu", scale_shift=(scale, shift))

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


def test_same_bits_for_any_number_of_threads() -> None:
    x, weight, bias, scale, shift = (
        torch.randn(shape, requires_grad=True) for shape in ((3, 10, 40, 41), (10,), (10,), (3, 10), (3, 10))
    )
    found = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        out = ops.group_norm_act(x, 5, weight, bias, scale_shift=(scale, shift))
        found.append([out, *torch.autograd.grad(out.square().sum(), (x, weight, bias, scale, shift))])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_gradients_one_by_one_are_those_of_all() -> None:
    x, weight, bias, scale, shift = (
        torch.randn(shape, requires_grad=True) for shape in ((2, 6, 37), (6,), (6,), (2, 6), (2, 6))
    )
    inputs = x, weight, bias, scale, shift

    def found(wanted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given = [t if any(t is w for w in wanted) else t.detach() for t in inputs]
        out = ops.group_norm_act(given[0], 3, given[1], given[2], scale_shift=(given[3], given[4]))
        return torch.autograd.grad(out.square().sum(), wanted)

    for slot, gradient in enumerate(found(inputs)):
        assert torch.equal(found((inputs[slot],))[0], gradient)


def test_channels_last() -> None:
    x = torch.randn(2, 8, 4, 6).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8)
    out = ops.group_norm_act(x, 4, weight)
    torch.testing.assert_close(out, functional.silu(functional.group_norm(x, 4, weight)))
    assert out.is_contiguous()


def test_what_no_cache_holds() -> None:
    """Its results are stored past the caches."""
    x = torch.randn(2, 64, 256, 272)
    weight, bias = torch.randn(2, 64)
    expected = functional.silu(functional.group_norm(x, 32, weight, bias))
    torch.testing.assert_close(ops.group_norm_act(x, 32, weight, bias), expected)


def test_a_far_mean_costs_no_digits() -> None:
    x, grad = (1e4 + torch.randn(1, 6, 300, 350)).requires_grad_(), torch.randn(1, 6, 300, 350)
    wide = x.detach().double().requires_grad_()
    oracle, got = functional.silu(functional.group_norm(wide, 2)), ops.group_norm_act(x, 2)
    (expected,), (found,) = torch.autograd.grad(oracle, wide, grad.double()), torch.autograd.grad(got, x, grad)
    # Kernels make good what the rounding of the mean left, of which PyTorch has 1e-3.
    allowed = 1e-2
    if backends.has_kernel(OPS["group_norm_act"], x):
        isa = importlib.import_module("mmkern._C").isa
        allowed = 1e-5 if isa == "avx512" else 3e-5  # a narrower register's sums are longer
    torch.testing.assert_close(got.double(), oracle, rtol=0, atol=allowed)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=allowed)


def test_nan_stays_in_its_group() -> None:
    x = torch.randn(2, 6, 20)
    expected = ops.group_norm_act(x, 3)
    x[1, 2, 5] = torch.nan
    out = ops.group_norm_act(x, 3)
    assert out[1, 2:4].isnan().all()
    out[1, 2:4] = expected[1, 2:4]
    assert torch.equal(out, expected)


def test_a_group_of_equal_numbers_is_zero() -> None:
    x = torch.full((1, 4, 300), 1e4 / 3)
    torch.testing.assert_close(ops.group_norm_act(x, 2, act=None), torch.zeros_like(x), rtol=0, atol=1e-1)


def test_modulators_of_another_dtype() -> None:
    """Weights stay in float32 beside activations of 16 bits."""
    x, weight, shift = torch.randn(3, 8, 10).bfloat16(), torch.randn(8, requires_grad=True), torch.randn(3, 8).half()
    out = ops.group_norm_act(x, 2, weight, scale_shift=(shift, shift))
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.sum(), weight)
    assert grad.dtype == torch.float32
    wide = shift.float()[..., None]
    expected = functional.silu(functional.group_norm(x.float(), 2, weight) * (1 + wide) + wide)
    torch.testing.assert_close(out, expected.bfloat16(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4), (2, 6)])
def test_without_samples_or_positions(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(6, requires_grad=True)
    out = ops.group_norm_act(x, 3, weight)
    assert out.shape == x.shape
    grads = torch.autograd.grad(out.sum(), (x, weight))
    assert grads[0].shape == x.shape
    assert x.numel() or not grads[1].any()


_X, _C = torch.randn(2, 6, 5), torch.randn(6)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.group_norm_act(_X.int(), 2), TypeError, "group_norm_act: x has dtype torch.int32"),
    (lambda: ops.group_norm_act(None, 2), TypeError, "group_norm_act: x is NoneType, expected a Tensor"),  # type: ignore[arg-type]
    (lambda: ops.group_norm_act(_C, 2), ValueError, r"x has shape \[6\], expected at least 2 axes"),
    (lambda: ops.group_norm_act(_X, 4), ValueError, "num_groups is 4, expected a divisor of the 6 channels of x"),
    (lambda: ops.group_norm_act(_X, 0), ValueError, "num_groups is 0, expected a divisor of the 6 channels of x"),
    (lambda: ops.group_norm_act(_X, 2.0), TypeError, "num_groups is float, expected an int"),  # type: ignore[arg-type]
    (lambda: ops.group_norm_act(_X, 2, _C[:5]), ValueError, r"weight has shape \[5\], expected \[6\]"),
    (lambda: ops.group_norm_act(_X, 2, _C.view(2, 3)), ValueError, r"weight has shape \[2, 3\], expected \[6\]"),
    (lambda: ops.group_norm_act(_X, 2, bias=_C.int()), TypeError, "bias has dtype torch.int32, expected float32 or"),
    (lambda: ops.group_norm_act(_X, 2, _C.to("meta")), ValueError, "weight is on meta, expected cpu as x"),
    (lambda: ops.group_norm_act(_X, 2, eps=-1.0), ValueError, "eps is -1.0, expected a number of at least 0"),
    (lambda: ops.group_norm_act(_X, 2, eps=None), TypeError, "eps is NoneType, expected a number of at least 0"),  # type: ignore[arg-type]
    (lambda: ops.group_norm_act(_X, 2, act="tanh"), ValueError, "act is 'tanh', expected None, 'silu', 'gelu'"),  # type: ignore[arg-type]
    (lambda: ops.group_norm_act(_X, 2, scale_shift=_C), TypeError, "scale_shift is Tensor, expected .scale, shift. or"),  # type: ignore[arg-type]
    (
        lambda: ops.group_norm_act(_X, 2, scale_shift=(_X[..., 0], _C)),
        ValueError,
        r"shift has shape \[6\], expected \[2, 6\]",
    ),
    (
        lambda: ops.group_norm_act(_X, 2, scale_shift=(_X, _X)),
        ValueError,
        r"scale has shape \[2, 6, 5\], expected \[2, 6\]",
    ),
    (
        lambda: torch.ops.mmkern.group_norm_act(_X, None, None, None, None, 1e-5, 0),
        ValueError,
        r"x has shape \[2, 6, 5\], expected \[samples, groups",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
