"""Activations beside a scale, a shift or a gate: the numerics contract, their peers, and use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mmkern import ops
from mmkern.ops._define import OPS
from mmkern.reference.activations import FUNCTIONS, Activation
from tests import contract
from tests.cases.case import Case
from tests.cases.gated import CASES, FAR, wide

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RUNS = [
    (case, dtype)
    for case in CASES
    for dtype in DTYPES
    if dtype == torch.float32 or case.label.startswith(("2x7x64", "rows inside", "sliced-channels"))
]
# In several stretches of a row, with a last one that is not whole.
RUNS += [(case, dtype) for case in wide(2100) for dtype in DTYPES]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_forward(case, OPS[case.op], dtype, device)


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_backward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_backward(case, contract.by_autograd(OPS[case.op]), dtype, device)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.label.startswith(("rows inside-rows", "2x70x20-gelu"))], ids=str
)
def test_opcheck(case: Case) -> None:
    args = [a.requires_grad_() if isinstance(a, Tensor) else a for a in case.arguments(torch.float32)]
    torch.library.opcheck(getattr(torch.ops.mmkern, case.op).default, tuple(OPS[case.op]._prepare(args)))


def grads(out: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.autograd.grad(out, inputs, torch.randn(out.shape, generator=generator)))


def check(got: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(got, expected)
    for a, b in zip(grads(got, inputs), grads(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def test_film_of_images_and_of_sequences() -> None:
    x, gamma, beta = leaves((2, 6, 8, 8), (2, 6, 1, 1), (2, 6, 1, 1))
    got = ops.film(x, gamma, beta, gamma_offset=1.0, activation="silu")
    check(got, functional.silu((1 + gamma) * x + beta), x, gamma, beta)
    x, gamma, beta = leaves((2, 90, 24), (2, 24), (2, 24))
    check(ops.film(x, gamma, beta), gamma[:, None] * x + beta[:, None], x, gamma, beta)


def test_gated_residual() -> None:
    residual, x, gate = leaves((3, 70, 20), (3, 70, 20), (3, 20))
    check(ops.gated_residual(residual, x, gate), residual + gate[:, None] * x, residual, x, gate)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_bias_gelu_and_geglu(approximate: Any) -> None:
    x, bias = leaves((3, 5, 20), (20,))
    expected = functional.gelu(x + bias, approximate=approximate)
    check(ops.bias_gelu(x, bias, approximate=approximate), expected, x, bias)
    hidden, gate = x.chunk(2, -1)
    check(ops.geglu(x, approximate=approximate), hidden * functional.gelu(gate, approximate=approximate), x)


def test_swiglu() -> None:
    (x,) = leaves((3, 5, 20))
    hidden, gate = x.chunk(2, -1)
    check(ops.swiglu(x), hidden * functional.silu(gate), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_far_arguments(activation: Any, dtype: torch.dtype) -> None:
    """No activation overflows on the way to a number that is in range."""
    x = torch.tensor([[*FAR, torch.nan]], dtype=dtype, requires_grad=True)
    one = torch.ones(1, dtype=dtype)
    got, expected = ops.film(x, one, 0 * one, activation=activation), FUNCTIONS[Activation[activation.upper()]](x)
    torch.testing.assert_close(got, expected, equal_nan=True)
    a, b = (torch.autograd.grad(y.sum(), x)[0] for y in (got, expected))
    torch.testing.assert_close(a[b.isfinite()], b[b.isfinite()])


def test_finite_differences() -> None:
    x, gamma, beta = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (2, 4), (1, 3, 4))
    )

    def run(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return ops.film(x, gamma, beta, activation="gelu")

    assert torch.autograd.gradcheck(run, (x, gamma, beta))
    assert torch.autograd.gradgradcheck(run, (x, gamma, beta))
    assert torch.autograd.gradcheck(ops.geglu, (x,))
    assert torch.autograd.gradgradcheck(ops.geglu, (x,))


def test_compiled_once_for_sizes_of_any_kind() -> None:
    """After the second number of axes, sizes are symbols, those of a modulator others than those of x."""
    weight = torch.randn(24, 10)

    def run(x: Tensor, condition: Tensor) -> Tensor:
        made = functional.linear(condition, weight)
        return ops.film(x, made, made, activation="silu")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for of_x, of_condition in (((3, 5), (3, 5)), ((3, 4, 2), (3, 1, 2)), ((3, 6, 5), (3, 6, 1))):
        args = torch.randn(*of_x, 24), torch.randn(*of_condition, 10)
        torch.testing.assert_close(compiled(*args), run(*args))


def test_compile_without_graph_breaks() -> None:
    x, gamma = torch.randn(2, 3, 8), torch.randn(2, 8)

    def run(x: Tensor) -> Tensor:
        return ops.geglu(ops.film(x, gamma, gamma, activation="gelu_tanh"))

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


def test_a_compiler_sees_into_what_has_no_activation() -> None:
    """And can fuse it with what stands beside it."""

    def run(x: Tensor, gamma: Tensor, gate: Tensor) -> Tensor:
        return ops.film(ops.gated_residual(x, ops.film(x, gamma, gamma), gate), gamma, gamma, activation="silu")

    found = contract.kernels_when_compiled(run, torch.randn(2, 5, 8), torch.randn(2, 8), torch.randn(2, 8))
    assert found == ["mmkern.affine_activation"]


@pytest.mark.parametrize("shape", [(2, 1, 700), (1, 300, 1), (1, 1, 1)])
def test_same_bits_for_any_number_of_threads(shape: tuple[int, ...]) -> None:
    x, gamma, beta = leaves((2, 300, 700), shape, shape)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = ops.film(x, gamma, beta, activation="silu")
        found.append([out, *torch.autograd.grad(out.sum(), (x, gamma, beta))])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


_X = torch.randn(2, 3, 8)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.film(_X.int(), _X, _X), TypeError, "film: x has dtype torch.int32"),
    (lambda: ops.film(_X, torch.ones(7), _X), ValueError, r"film: gamma has shape \[7\], expected to broadcast to"),
    (lambda: ops.film(_X, _X, torch.ones(3)), ValueError, r"film: beta has shape \[3\], expected to broadcast to"),
    (lambda: ops.film(_X, _X, _X, gamma_offset="1"), TypeError, "film: gamma_offset is str, expected a finite number"),  # type: ignore[arg-type]
    (lambda: ops.film(_X, _X, _X, activation="tanh"), ValueError, "activation is 'tanh', expected None, 'silu'"),  # type: ignore[arg-type]
    (
        lambda: ops.gated_residual(_X, _X[:1], _X),
        ValueError,
        r"gated_residual: residual has shape \[2, 3, 8\], expected \[1, 3, 8\]",
    ),
    (lambda: ops.gated_residual(_X, _X, torch.ones(7)), ValueError, r"gated_residual: gate has shape \[7\]"),
    (lambda: ops.bias_gelu(_X, [1.0]), TypeError, "bias_gelu: bias is list, expected a Tensor"),  # type: ignore[arg-type]
    (lambda: ops.bias_gelu(_X, _X, approximate="erf"), ValueError, "approximate is 'erf', expected 'none' or 'tanh'"),  # type: ignore[arg-type]
    (lambda: ops.geglu(_X[..., :7]), ValueError, "geglu: x has 7 channels, expected an even number"),
    (lambda: ops.swiglu(None), TypeError, "swiglu: x is NoneType, expected a Tensor"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
