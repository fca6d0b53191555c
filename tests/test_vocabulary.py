"""The vocabulary family: the numerics contract, torch's own losses, and use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import mmkern
from mmkern import ops
from mmkern.ops._define import OPS
from mmkern.ops.hyperbolic import Reduction
from mmkern.reference import vocabulary as reference
from tests import contract
from tests.cases.case import Case
from tests.cases.vocabulary import CASES, NOT_FINITE

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
IN_EVERY_DTYPE = ("17x33x64", "600x50x8", "strided", "softcap", "everything", "130x100x20")
RUNS = [
    (case, dtype)
    for case in (*CASES, *NOT_FINITE)
    for dtype in DTYPES
    if dtype == torch.float32
    or (case.label in IN_EVERY_DTYPE and (case.op == "linear_logsumexp" or dtype == torch.float64))
]
REDUCTIONS = ("mean", "sum", "none")


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_forward(case, OPS[case.op], dtype, device)


@pytest.mark.parametrize(("case", "dtype"), [run for run in RUNS if run[0] not in NOT_FINITE], ids=str)
def test_backward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_backward(case, contract.by_autograd(OPS[case.op]), dtype, device)


@pytest.mark.parametrize("case", [c for c in CASES if c.label in ("17x33x64", "everything")], ids=str)
def test_opcheck(case: Case) -> None:
    args = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() and i != 3 else a
        for i, a in enumerate(case.arguments(torch.float32))
    ]
    torch.library.opcheck(getattr(torch.ops.mmkern, case.op).default, tuple(OPS[case.op]._prepare(args)))


# ---- The losses ------------------------------------------------------------------------------------------------------


def problem(
    n: int = 20, tokens: int = 30, width: int = 12, dtype: torch.dtype = torch.float64, ignored: float = 0.2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, linear_weight, linear_bias and target."""
    generator = torch.Generator().manual_seed(n)
    shapes = ((n, width), (tokens, width), (tokens,))
    made = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    target = torch.randint(tokens, (n,), generator=generator)
    target[torch.rand(n, generator=generator) < ignored] = -100
    return *made, target


def check(got: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(got, expected, equal_nan=True)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(0), dtype=got.dtype)
    found, wanted = (torch.autograd.grad(out, inputs, upstream) for out in (got, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("n", [1, 20, 270])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_parity_with_torch(n: int, reduction: Reduction, label_smoothing: float, weighted: bool) -> None:
    x, weight, bias, target = problem(n)
    target[0] = 3
    classes = torch.rand(30, generator=torch.Generator().manual_seed(2), dtype=torch.float64) if weighted else None
    options = {"weight": classes, "reduction": reduction, "label_smoothing": label_smoothing}
    got = ops.linear_cross_entropy(x, weight, target, linear_bias=bias, **options)
    check(got, functional.cross_entropy(functional.linear(x, weight, bias), target, **options), x, weight, bias)


@pytest.mark.skipif(not hasattr(functional, "linear_cross_entropy"), reason="torch before 2.13")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_parity_with_the_op_of_torch(reduction: Reduction) -> None:
    x, weight, bias, target = problem(270)
    own = functional.linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction)
    check(ops.linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction), own, x, weight, bias)


@pytest.mark.parametrize("n", [20, 270])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_softcap_and_z_loss(n: int, reduction: Reduction) -> None:
    """The penalty is of rows with a target, each alike, whatever the weights of tokens."""
    x, weight, bias, target = problem(n)
    classes = torch.rand(30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = ops.linear_cross_entropy(
        x, weight, target, linear_bias=bias, weight=classes, reduction=reduction, z_loss=0.01, softcap=2.0
    )
    logits = 2 * torch.tanh(functional.linear(x, weight, bias) / 2)
    penalty = 0.01 * logits.logsumexp(1).square().where(target >= 0, 0.0)
    penalty = {"none": penalty, "sum": penalty.sum(), "mean": penalty.sum() / (target >= 0).sum()}[reduction]
    check(got, functional.cross_entropy(logits, target, classes, reduction=reduction) + penalty, x, weight, bias)


@pytest.mark.parametrize("sequences", [3, 40])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shift(sequences: int, reduction: Reduction) -> None:
    x, weight, _, target = problem(sequences * 8)
    x, target = x.view(sequences, 8, 12), target.view(sequences, 8)
    got = ops.linear_cross_entropy(x, weight, target, reduction=reduction, shift=True)
    logits = functional.linear(x, weight)[:, :-1].transpose(1, 2)
    check(got, functional.cross_entropy(logits, target[:, 1:], reduction=reduction), x, weight)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 4)])
def test_log_prob(shape: tuple[int, ...]) -> None:
    _, weight, bias, _ = problem()
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(*shape, 12, generator=generator, dtype=torch.float64).requires_grad_()
    tokens = torch.randint(30, shape, generator=generator)
    got = ops.linear_log_prob(h, weight, tokens, linear_bias=bias, softcap=4.0, temperature=0.7)
    logits = 4 * torch.tanh(functional.linear(h, weight, bias) / 4) / 0.7
    check(got, logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1), h, weight, bias)


@pytest.mark.parametrize("n", [0, 20, 300])
def test_no_row_has_a_target(n: int) -> None:
    x, weight, bias, target = problem(n, ignored=2.0)
    for reduction, expected in (("mean", torch.nan), ("sum", 0.0), ("none", [0.0] * n)):
        loss = ops.linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction)
        wanted = functional.cross_entropy(functional.linear(x, weight, bias), target, reduction=reduction)
        for value in (loss, wanted):
            torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), equal_nan=True)
        found = torch.autograd.grad(loss.sum(), (x, weight, bias))
        if reduction != "mean":
            assert not any(g.any() for g in found)


@pytest.mark.parametrize("n", [20, 300])
def test_a_row_without_a_target_is_not_read(n: int) -> None:
    x, weight, _, target = problem(n)
    expected = torch.autograd.grad(ops.linear_cross_entropy(x, weight, target), (x, weight))
    spoilt = x.detach().clone()
    spoilt[target < 0] = torch.nan
    spoilt.requires_grad_()
    found = torch.autograd.grad(ops.linear_cross_entropy(spoilt, weight, target), (spoilt, weight))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_certain_row_keeps_its_digits() -> None:
    """Where the target outweighs the rest by e^30, 1 - softmax is 0 in float32; the loss and its slope are not."""
    weight = torch.eye(16)
    for n in (1, 256):
        x = (30 * weight[:1]).expand(n, 16).contiguous().requires_grad_()
        loss = ops.linear_cross_entropy(x, weight.requires_grad_(), torch.zeros(n, dtype=torch.int64))
        (gradient,) = torch.autograd.grad(loss, x)
        exact = 15 * torch.tensor(-30.0, dtype=torch.float64).exp()
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
        assert gradient[0, 0].item() * n == pytest.approx(-exact.item(), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 300),
    tokens=st.integers(1, 200),
    width=st.integers(1, 40),
    bias=st.booleans(),
    pad=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    reduction=st.sampled_from(REDUCTIONS),
)
def test_any_shape(n: int, tokens: int, width: int, bias: bool, pad: tuple[int, int], reduction: Reduction) -> None:
    x, weight, offsets, target = problem(n, tokens, width)
    rows = torch.nn.functional.pad(x, (0, pad[0])).detach()[:, :width].requires_grad_()
    table = torch.nn.functional.pad(weight, (pad[1], 0)).detach()[:, pad[1] :].requires_grad_()
    got = ops.linear_cross_entropy(rows, table, target, linear_bias=offsets if bias else None, reduction=reduction)
    logits = functional.linear(rows, table, offsets if bias else None)
    check(got, functional.cross_entropy(logits, target, reduction=reduction), rows, table)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction: Reduction) -> None:
    x, weight, bias, target = problem(7, 9, 5)
    torch.autograd.gradcheck(
        lambda *args: ops.linear_cross_entropy(
            *args[:2], target, linear_bias=args[2], reduction=reduction, label_smoothing=0.1, z_loss=0.1, softcap=3.0
        ),
        (x, weight, bias),
    )


def test_gradcheck_of_gradients_that_were_made() -> None:
    x, weight, bias, target = problem(256, 9, 3)
    torch.autograd.gradcheck(
        lambda *args: ops.linear_cross_entropy(
            *args[:2], target, linear_bias=args[2], label_smoothing=0.1, z_loss=0.1, softcap=3.0
        ),
        (x, weight, bias),
        fast_mode=True,
    )


def test_gradients_that_were_made_serve_every_backward() -> None:
    x, weight, _, target = problem(300)
    loss = ops.linear_cross_entropy(x, weight, target)
    found = [
        torch.autograd.grad(loss, (x, weight), upstream, retain_graph=retain)
        for upstream, retain in ((None, True), (torch.tensor(1.0, dtype=torch.float64), True), (None, False))
    ]
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("n", [40, 530])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 3.0}], ids=str)
def test_same_bits_for_any_number_of_threads(n: int, options: dict[str, Any]) -> None:
    x, weight, bias, target = problem(n, 2500, 24, torch.float32)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for reduction in REDUCTIONS:
            loss = ops.linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction, **options)
            found.append([loss, *torch.autograd.grad(loss.sum(), (x, weight, bias))])
    for reduction in range(3):
        first, *rest = found[reduction::3]
        for other in rest:
            assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_logits_are_saved(reduction: Reduction) -> None:
    x, weight, _, target = problem(600, 900, 8, torch.float32)
    saved = contract.saved_bytes(lambda: ops.linear_cross_entropy(x, weight, target, reduction=reduction))
    assert sum(saved) < 600 * 900
    gradients = 0 if reduction == "none" else 2  # and then each of them once
    assert sorted(saved).count(weight.nbytes) <= 1 + gradients // 2


@pytest.mark.parametrize(
    ("n", "reduction", "kernel"),
    [(20, "mean", "linear_logsumexp"), (300, "none", "linear_logsumexp"), (300, "mean", "linear_cross_entropy")],
)
def test_compiles_whole(n: int, reduction: Reduction, kernel: str) -> None:
    x, weight, _, target = problem(n, dtype=torch.float32)

    def run(x: Tensor, w: Tensor) -> Tensor:
        return ops.linear_cross_entropy(x, w, target, label_smoothing=0.1, reduction=reduction)

    assert f"mmkern.{kernel}" in contract.kernels_when_compiled(run, x.detach(), weight.detach())


def test_under_transforms() -> None:
    x, weight, _, target = problem(300)

    def run(x: Tensor, w: Tensor) -> Tensor:
        return ops.linear_cross_entropy(x, w, target)

    found = torch.func.grad(run, argnums=(0, 1))(x, weight)
    for one, other in zip(found, torch.autograd.grad(run(x, weight), (x, weight)), strict=True):
        torch.testing.assert_close(one, other)
    tokens = target.abs() % 30
    rows = torch.func.vmap(lambda x, t: ops.linear_log_prob(x, weight, t))(x.view(3, 100, 12), tokens.view(3, 100))
    torch.testing.assert_close(rows.flatten(), ops.linear_log_prob(x, weight, tokens))


@pytest.mark.parametrize("n", [20, 300])
def test_second_derivatives_are_refused(n: int) -> None:
    x, weight, _, target = problem(n)
    (gradient,) = torch.autograd.grad(ops.linear_cross_entropy(x, weight, target), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), weight)


def test_autocast() -> None:
    x, weight, _, target = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.linear_cross_entropy(x, weight, target)
    assert got.dtype == torch.float32
    lower = ops.linear_cross_entropy(x.bfloat16(), weight.bfloat16(), target)
    check(got, lower, x, weight)


loss, log_prob = ops.linear_cross_entropy, ops.linear_log_prob
REFUSED = (
    (
        lambda x, w, b, t: loss(x, w[:, :5], t),
        ValueError,
        r"linear_weight has shape \[30, 5\], exp",
    ),
    (
        lambda x, w, b, t: loss(x, w[:0], t),
        ValueError,
        r"linear_weight has shape \[0, 12\], expected",
    ),
    (
        lambda x, w, b, t: loss(x, b, t),
        ValueError,
        r"linear_weight has shape \[30\], expected \[V, 12",
    ),
    (lambda x, w, b, t: loss(x, w.float(), t), TypeError, "linear_weight has dtype torch.float32"),
    (lambda x, w, b, t: loss(x, w, t[:3]), ValueError, r"target has shape \[3\], expected \[20\]"),
    (
        lambda x, w, b, t: loss(x, w, t.int()),
        TypeError,
        "target has dtype torch.int32, expected int64",
    ),
    (lambda x, w, b, t: loss(x, w, None), TypeError, "target is NoneType, expected a Tensor"),
    (
        lambda x, w, b, t: loss(x, w, 0 * t + 30),
        ValueError,
        "target has 30, expected a token from 0 to 29, or -100",
    ),
    (
        lambda x, w, b, t: loss(x, w, t, ignore_index=-1),
        ValueError,
        "target has -100, expected a tok",
    ),
    (lambda x, w, b, t: loss(x, w, t, ignore_index=None), TypeError, "ignore_index is NoneType"),
    (
        lambda x, w, b, t: loss(x, w, t, linear_bias=b[:3]),
        ValueError,
        r"linear_bias has shape \[3\]",
    ),
    (lambda x, w, b, t: loss(x, w, t, weight=b[:3]), ValueError, r": weight has shape \[3\]"),
    (lambda x, w, b, t: loss(x, w, t, reduction="max"), ValueError, "reduction is 'max'"),
    (
        lambda x, w, b, t: loss(x, w, t, label_smoothing=2),
        ValueError,
        "label_smoothing is 2, expected",
    ),
    (lambda x, w, b, t: loss(x, w, t, z_loss=-1), ValueError, "z_loss is -1, expected"),
    (
        lambda x, w, b, t: loss(x, w, t, softcap=0.0),
        ValueError,
        "softcap is 0.0, expected a number ab",
    ),
    (lambda x, w, b, t: loss(x, w, t, shift=1), TypeError, "shift is int, expected a bool"),
    (lambda x, w, b, t: loss(x[0], w, t[0], shift=True), ValueError, "target has shape"),
    (
        lambda x, w, b, t: log_prob(x, w[:, :5], t),
        ValueError,
        r"linear_log_prob: weight has shape \[30, 5\]",
    ),
    (
        lambda x, w, b, t: log_prob(x, w, t),
        ValueError,
        "linear_log_prob: tokens has -100, expected a token from",
    ),
    (lambda x, w, b, t: log_prob(x, w, t, temperature=0), ValueError, "temperature is 0, expected"),
)


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input_is_named(call: Callable[..., Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*problem())


def test_a_target_outside_is_found_when_compiled() -> None:
    x, weight, _, target = problem(dtype=torch.float32)
    run = torch.compile(lambda x, w, t: ops.linear_cross_entropy(x, w, t), fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="target has 31, expected a token from 0 to 29"):
        run(x.detach(), weight.detach(), target.where(target >= 0, 31))


def test_a_target_outside_is_nan_where_reading_it_would_wait() -> None:
    """As on a GPU: neither read nor taken for another token."""
    x, weight, w = torch.randn(4, 3), torch.randn(5, 3), torch.rand(5)
    target = torch.tensor([4, 5, -1, -100])
    found = reference.linear_logsumexp(x, weight, None, w, target, 0.0, 1.0, -100, True)
    options: Any = {"vocabulary": 5, "ignore_index": -100, "label_smoothing": 0.1, "z_loss": 0.1, "reduction": "none"}
    losses = reference.cross_entropy(*found, w, target, **options)
    assert losses.isnan().tolist() == [False, True, True, False]
    assert losses[3] == 0


def test_a_target_outside_is_nan_to_the_kernels() -> None:
    """Which find none, since the ops look before they call them."""
    x, weight, w = torch.randn(40, 3), torch.randn(5, 3), torch.rand(5)
    within = torch.randint(5, (40,))
    outside = within.clone()
    outside[:3] = torch.tensor([5, -1, 2**32 + 1])
    found, expected = (
        OPS["linear_logsumexp"].run(x, weight, None, w, target, 0.0, 1.0, -100, True) for target in (outside, within)
    )
    assert found[1][:3].isnan().all()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[3:], other[3:])
    assert OPS["linear_cross_entropy"].run(x, weight, None, w, outside, 0.0, -100, 0.1, 0.1, True)[0].isnan()


@pytest.mark.parametrize("n", [20, 600])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tokens_that_are_ruled_out_have_no_gradient(n: int, reduction: Reduction) -> None:
    """A bias leaves the target alone: 0, not NaN."""
    x, weight = torch.randn(n, 12, requires_grad=True), torch.randn(37, 12, requires_grad=True)
    bias = torch.full((37,), -torch.inf).index_fill(0, torch.tensor(5), 0.5).requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, torch.full((n,), 5), linear_bias=bias, reduction=reduction)
    assert not loss.any()
    assert not any(g.any() for g in torch.autograd.grad(loss.sum(), (x, weight, bias)))


def test_verify_sees_the_kernels() -> None:
    x, weight, bias, target = problem(300)
    with mmkern.verify():
        for reduction in REDUCTIONS:
            loss = ops.linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction)
            torch.autograd.grad(loss.sum(), (x, weight, bias))
