"""The modulation family on every backend of this machine: the numerics contract, its peers, and use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from mmkern import ops
from mmkern.ops._define import OPS
from mmkern.reference import modulation as reference
from tests import contract
from tests.cases.case import Case
from tests.cases.modulation import CASES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Every case in float32; the other dtypes differ in loads and stores alone.
OF_EVERY_DTYPE = ("2x70x20", "rows inside", "columns", "sliced")
RUNS = [
    (case, dtype)
    for case in CASES
    for dtype in DTYPES
    if dtype == torch.float32 or case.label.startswith(OF_EVERY_DTYPE)
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_forward(case, OPS[case.op], dtype, device)


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_backward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_backward(case, contract.by_autograd(OPS[case.op]), dtype, device)


# ---- PyTorch's own ---------------------------------------------------------------------------------------------------


def test_equals_layer_norm_and_rms_norm() -> None:
    x, weight, bias = torch.randn(3, 5, 40), torch.randn(40), torch.randn(40)
    torch.testing.assert_close(ops.layer_norm(x, weight, bias), functional.layer_norm(x, (40,), weight, bias))
    torch.testing.assert_close(ops.layer_norm(x), functional.layer_norm(x, (40,)))
    torch.testing.assert_close(ops.rms_norm(x, weight), functional.rms_norm(x, (40,), weight, 1e-6))
    torch.testing.assert_close(
        ops.rms_norm(x, weight, weight_offset=1.0), functional.rms_norm(x, (40,), 1 + weight, 1e-6)
    )
    y, total = ops.layer_norm(x, weight, bias, residual=x.flip(0))
    torch.testing.assert_close(total, x + x.flip(0))
    torch.testing.assert_close(y, functional.layer_norm(total, (40,), weight, bias))


def dit(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """As facebookresearch/DiT has it."""
    total = residual + gate[:, None] * x
    return functional.layer_norm(total, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None], total


def test_equals_the_halves_of_a_dit_block() -> None:
    x, residual = torch.randn(2, 3, 6, 32, requires_grad=True).unbind()
    gate, scale, shift = torch.randn(3, 3, 32, requires_grad=True).unbind()
    expected = dit(x, residual, gate, scale, shift)
    got = ops.ada_layer_norm(x, scale=scale, shift=shift, gate=gate, residual=residual)
    grads = [torch.randn_like(out) for out in expected]
    inputs = (x, residual, gate, scale, shift)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*(torch.autograd.grad(outs, inputs, grads) for outs in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_frames_share_their_number() -> None:
    """The last of them are fewer."""
    x, scale, shift, frames = torch.randn(2, 11, 24), torch.randn(2, 24), torch.randn(2, 24), torch.randn(2, 3)
    frames.requires_grad_()
    expected = functional.layer_norm(x, (24,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    expected = expected * frames[:, torch.arange(11) // 4, None]
    got = ops.dual_ada_layer_norm(x, scale, shift, frames, 4)
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(x)
    torch.testing.assert_close(
        torch.autograd.grad(got, frames, grad)[0], torch.autograd.grad(expected, frames, grad)[0]
    )


@hypothesis_settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_shape_and_sharing_equals_pytorch(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3), "leading")
    x = torch.randn(*sizes, data.draw(st.integers(1, 70), "channels"), dtype=torch.float64).requires_grad_()
    given: dict[str, Tensor] = {}
    for name in ("scale", "shift", "gate"):
        if data.draw(st.booleans(), name):
            shape = [data.draw(st.sampled_from([1, n])) for n in sizes]
            given[name] = torch.randn(*shape, x.shape[-1], dtype=torch.float64).requires_grad_()
    if "gate" in given or data.draw(st.booleans(), "has residual"):
        given["residual"] = torch.randn_like(x).requires_grad_()
    got = ops.ada_layer_norm(x, **given)
    total = x
    if "residual" in given:
        got, _ = got
        total = given["residual"] + given.get("gate", 1.0) * x
    expected = functional.layer_norm(total, x.shape[-1:], eps=1e-6) * (1 + given.get("scale", 0.0))
    expected = expected + given.get("shift", 0.0)
    torch.testing.assert_close(got, expected)
    inputs, grad = [x, *given.values()], torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(out, inputs, grad) for out in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


# ---- Use -------------------------------------------------------------------------------------------------------------


def leaves(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shapes = {"x": (2, 3, 6), "residual": (2, 3, 6), "gate": (2, 6), "scale": (2, 6), "shift": (2, 3, 6)}
    return {name: torch.randn(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


def test_finite_differences() -> None:
    tensors = leaves()

    def run(*given: Tensor) -> Any:
        return ops.ada_layer_norm(**dict(zip(tensors, given, strict=True)))

    assert torch.autograd.gradcheck(run, tuple(tensors.values()))
    assert torch.autograd.gradgradcheck(run, tuple(tensors.values()))


@pytest.mark.parametrize("case", [case for case in CASES if case.label.startswith(("rows inside", "sliced"))], ids=str)
def test_opcheck(case: Case) -> None:
    args = [a.requires_grad_() if isinstance(a, Tensor) else a for a in case.arguments(torch.float32)]
    torch.library.opcheck(getattr(torch.ops.mmkern, case.op).default, tuple(OPS[case.op]._prepare(args)))


def test_compiled_once_for_sizes_of_any_kind() -> None:
    """After the second number of axes, sizes are symbols, those of a modulator others than those of x."""
    weight = torch.randn(24, 10)

    def run(x: Tensor, condition: Tensor, shift: Tensor) -> Tensor:
        made = functional.linear(condition, weight)
        out: Tensor = ops.ada_layer_norm(x, scale=made, shift=shift, residual=x, gate=made)[0]
        return out

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for of_x, of_condition, of_shift in (
        ((3, 5), (3,), (3,)),
        ((3, 4, 2), (3,), (3, 4, 2)),
        ((3, 4, 2), (3, 1, 2), (3, 4, 1)),
        ((3, 6, 5), (3, 1, 5), (3, 6, 1)),
    ):
        args = torch.randn(*of_x, 24), torch.randn(*of_condition, 10), torch.randn(*of_shift, 24)
        torch.testing.assert_close(compiled(*args), run(*args))


def test_compile_without_graph_breaks() -> None:
    tensors = leaves(torch.float32)
    x = tensors.pop("x")
    compiled = torch.compile(lambda x: ops.ada_layer_norm(x, **tensors), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x), ops.ada_layer_norm(x, **tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("of_each_row", [False, True])
def test_same_bits_for_any_number_of_threads(of_each_row: bool) -> None:
    shape = (3, 150, 180)
    x, residual = torch.randn(2, *shape, requires_grad=True).unbind()
    gate, scale, shift = torch.randn(3, *(shape if of_each_row else (3, 180)), requires_grad=True).unbind()
    weight, bias = torch.randn(2, 180, requires_grad=True).unbind()
    given = {"residual": residual, "gate": gate, "scale": scale, "shift": shift, "weight": weight, "bias": bias}
    threads, found = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        outs = ops.ada_layer_norm(x, **given)
        grads = torch.autograd.grad(outs, (x, *given.values()), [torch.ones_like(out) for out in outs])
        found.append([*outs, *grads])
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_results_lie_as_their_arguments_do() -> None:
    x = torch.randn(2, 5, 3, 8).transpose(1, 2)
    for out in ops.layer_norm(x, residual=x):
        assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("has_residual", [False, True])
def test_what_no_cache_holds(has_residual: bool) -> None:
    """Its results are stored past the caches."""
    x = torch.randn(2, 4200, 1024)
    scale, shift = torch.randn(2, 2, 1024)
    got = ops.ada_layer_norm(x, scale=scale, shift=shift, residual=x if has_residual else None)
    y, total = got if has_residual else (got, x)
    if has_residual:
        torch.testing.assert_close(total, 2 * x)
    expected = functional.layer_norm(total, (1024,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(y, expected)


def test_a_far_mean_costs_no_digits() -> None:
    x = 1e4 + torch.randn(7, 1153)
    oracle = reference.ada_layer_norm(x.double(), None, None, None, None, None, 1e-5, True)
    torch.testing.assert_close(ops.layer_norm(x).double(), oracle, rtol=0, atol=4e-3)  # of a mean's rounding: 1e-3


def test_modulators_of_another_dtype() -> None:
    """Weights stay in float32 beside activations of 16 bits."""
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(64, requires_grad=True)
    out = ops.rms_norm(x, weight)
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.sum(), weight)
    assert grad.dtype == torch.float32
    expected = functional.rms_norm(x.float(), (64,), weight, 1e-6)
    torch.testing.assert_close(out, expected.bfloat16(), rtol=1e-2, atol=1e-2)


def test_a_module_swapped_for_its_function() -> None:
    norm = nn.LayerNorm(24)
    nn.init.normal_(norm.weight)
    x = torch.randn(4, 24)
    torch.testing.assert_close(ops.layer_norm(x, norm.weight, norm.bias, eps=norm.eps), norm(x))


_X = torch.randn(2, 3, 8)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.ada_layer_norm(_X.int()), TypeError, "ada_layer_norm: x has dtype torch.int32"),
    (lambda: ops.ada_layer_norm(None), TypeError, "ada_layer_norm: x is NoneType, expected a Tensor"),  # type: ignore[arg-type]
    (lambda: ops.ada_layer_norm(_X, norm="group"), ValueError, "norm is 'group', expected 'layer' or 'rms'"),  # type: ignore[arg-type]
    (lambda: ops.ada_layer_norm(_X, gate=_X), ValueError, "gate came without residual"),
    (lambda: ops.ada_layer_norm(_X, scale=torch.ones(3, 8)), ValueError, "scale has shape .3, 8., expected to broadca"),
    (lambda: ops.ada_layer_norm(_X, shift=torch.ones(2, 7)), ValueError, "shift has shape .2, 7., expected to broadca"),
    (lambda: ops.ada_layer_norm(_X, scale=[1.0]), TypeError, "scale is list, expected a Tensor"),  # type: ignore[arg-type]
    (lambda: ops.ada_layer_norm(_X, weight=torch.ones(2, 8)), ValueError, r"weight has shape .2, 8., expected \[8\]"),
    (lambda: ops.ada_layer_norm(_X, residual=_X[:1]), ValueError, "residual has shape .1, 3, 8., expected .2, 3, 8."),
    (lambda: ops.ada_layer_norm(_X, eps=-1.0), ValueError, "eps is -1.0, expected a number of at least 0"),
    (lambda: ops.layer_norm(_X, torch.ones(8, dtype=torch.int)), TypeError, "weight has dtype torch.int32, expected a"),
    (lambda: ops.layer_norm(_X, torch.ones(8, device="meta")), ValueError, "weight is on meta, expected cpu as x"),
    (lambda: ops.rms_norm(_X, weight_offset="a"), TypeError, "weight_offset is str, expected a finite number"),  # type: ignore[arg-type]
    (
        lambda: ops.dual_ada_layer_norm(_X, _X[:, 0], _X[:, 0], torch.ones(2, 2), 2.0),  # type: ignore[arg-type]
        ValueError,
        "frames_per_scale is 2.0, expected an int",
    ),
    (
        lambda: ops.dual_ada_layer_norm(_X, _X[:, 0], _X[:, 0], torch.ones(2, 3), 2),
        ValueError,
        r"frame_scale has shape \[2, 3\], expected \[2, 2\]",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
