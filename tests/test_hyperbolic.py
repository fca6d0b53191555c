"""The hyperbolic family on every backend of this machine: the numerics contract, and what the geometry promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmkern
from mmkern import ops
from mmkern.reference import hyperbolic as reference
from tests import contract
from tests.cases.case import Case
from tests.cases.hyperbolic import CASES, OPS, PAIRWISE, in_ball, randn

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Every layout in float32; the other dtypes differ in loads and stores alone and take the layouts that stress those.
LAYOUTS_OF_EVERY_DTYPE = ("1x5", "9x123", "strided", "expanded", "5x33", "17x33x64", "near", "far")
RUNS = [
    (case, dtype)
    for case in CASES
    for dtype in DTYPES
    if dtype == torch.float32 or case.label in LAYOUTS_OF_EVERY_DTYPE
]


def public(name: str) -> Callable[..., Tensor]:
    """The function that users call, with the arguments of the schema."""
    function: Callable[..., Tensor] = getattr(ops, name)
    if name == "lorentz_entailment_loss":
        return lambda x, y, c, k: function(x, y, c, k, reduction="none")
    if name == "mobius_scalar_mul":
        return lambda r, x, c: function(r[..., None], x, c)
    return function


def one_of_each(label: str = "") -> list[Case]:
    """A case of every op, of odd sizes."""
    found: dict[str, Case] = {}
    for case in CASES:
        if case.label in (label, "9x123", "17x33x64", "5x33"):
            found.setdefault(case.op, case)
    assert tuple(found) == OPS or set(found) == set(OPS)
    return list(found.values())


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_forward(case, public(case.op), dtype, device)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_backward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_backward(case, contract.by_autograd(public(case.op)), dtype, device)


def leaves(args: list[Any]) -> list[Any]:
    return [a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for a in args]


@pytest.mark.parametrize("case", one_of_each(), ids=str)
def test_finite_differences(case: Case) -> None:
    """Every gradient, the curvature's too, against finite differences in float64."""
    args = [a[:4, ..., :6] if isinstance(a, Tensor) and a.dim() > 1 else a for a in case.arguments(torch.float64)]
    if case.op == "lorentz_centroid":
        args[1] = torch.rand(4, dtype=torch.float64) + 0.2
    if case.op == "mobius_scalar_mul":
        args[0] = args[0][:4]
    assert torch.autograd.gradcheck(public(case.op), leaves(args))


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in one_of_each() if c.op not in PAIRWISE], ids=str)
def test_second_derivatives(case: Case) -> None:
    args = [a[:2, ..., :3] if isinstance(a, Tensor) and a.dim() > 1 else a for a in case.arguments(torch.float64)]
    if case.op in ("lorentz_centroid", "mobius_scalar_mul"):
        i = 1 if case.op == "lorentz_centroid" else 0
        args[i] = torch.rand(2, dtype=torch.float64) + 0.2
    assert torch.autograd.gradgradcheck(public(case.op), leaves(args))


@pytest.mark.parametrize("op", PAIRWISE)
def test_pairwise_refuses_a_second_derivative(op: str) -> None:
    x, y = torch.rand(3, 4).requires_grad_(), torch.rand(2, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(getattr(ops, op)(x / 4, y / 4, 1.0).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{op} has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", one_of_each(), ids=str)
def test_same_bits_for_any_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    args = case.arguments(dtype)
    lead = contract.op_of(case.op).lead
    if case.op not in PAIRWISE:  # enough rows for several threads
        rows = 700
        args = [a.repeat(rows, *[1] * (a.dim() - 1)) if isinstance(a, Tensor) and a.dim() else a for a in args]
        if case.op == "lorentz_centroid":
            args[:2] = [a.expand(40, *a.shape).contiguous() for a in args[:2]]
        args[lead] = (args[lead].float() * (1 + 0.1 * torch.rand(args[lead].shape, generator=generator))).to(dtype)
    else:
        args[:2] = [a.repeat(12, 1) for a in args[:2]]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        given_args = leaves(args)
        out = public(case.op)(*given_args)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype)).sum().backward()
        results.append([out, *(a.grad for a in given_args if isinstance(a, Tensor))])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first.nan_to_num(), second.nan_to_num())


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 512), (torch.float32, 500), (torch.bfloat16, 512)], ids=str
)
@pytest.mark.parametrize("op", ["lorentz_exp_map0", "lorentz_log_map", "lorentz_parallel_transport"])
def test_outputs_beyond_the_caches_have_the_bits_of_small_ones(
    op: str, dtype: torch.dtype, width: int, threads: int
) -> None:
    """Stores past the caches, rows that do not begin at a line, and a last block that is not full."""
    rows, g = (33 << 20) // (width * dtype.itemsize) + 3, generator()
    vectors = {"lorentz_exp_map0": 1, "lorentz_log_map": 2, "lorentz_parallel_transport": 3}[op]
    args = [(torch.randn(rows, width, generator=g) / width**0.5).to(dtype).requires_grad_() for _ in range(vectors)]
    grad = torch.randn(rows, width, generator=g).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = getattr(ops, op)(*args, 0.7)
        gradients = torch.autograd.grad(out, args, grad)
        for first in range(0, rows, 1000):
            part = [a.detach()[first : first + 1000].requires_grad_() for a in args]
            small = getattr(ops, op)(*part, 0.7)
            assert torch.equal(out[first : first + 1000], small)
            of_part = torch.autograd.grad(small, part, grad[first : first + 1000])
            for whole, piece in zip(gradients, of_part, strict=True):
                assert torch.equal(whole[first : first + 1000], piece)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [3008, 3001])
def test_all_pairs_beyond_the_caches_have_the_bits_of_small_ones(columns: int) -> None:
    g = generator()
    x, y = (randn(g, rows, 24, norm=1.0).float() for rows in (2900, columns))
    out = ops.lorentz_pairwise_distance(x, y, 0.7)
    for first in range(0, 2900, 480):
        assert torch.equal(out[first : first + 480], ops.lorentz_pairwise_distance(x[first : first + 480], y, 0.7))


@pytest.mark.parametrize("case", [c for c in one_of_each() if c.op not in PAIRWISE], ids=str)
def test_a_nan_stays_in_its_row(case: Case) -> None:
    args = case.arguments(torch.float32)
    lead = contract.op_of(case.op).lead
    args[lead] = args[lead].clone()
    args[lead][2, ..., 1] = math.nan
    out = public(case.op)(*args)
    if case.op == "lorentz_centroid":
        assert out.isnan().all()
        return
    assert out[2].isnan().all()
    assert not out[torch.arange(9) != 2].isnan().any()


def test_inputs_are_not_written() -> None:
    for case in one_of_each():
        args = case.arguments(torch.float32)
        copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
        given_args = [a.requires_grad_() if isinstance(a, Tensor) else a for a in args]
        public(case.op)(*given_args).sum().backward()
        for arg, copy in zip(args, copies, strict=True):
            assert not isinstance(arg, Tensor) or torch.equal(arg.detach(), copy)


# ---- What the geometry promises ------------------------------------------------------------------------------------

CURVATURES = pytest.mark.parametrize("c", [0.1, 1.0, 10.0])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@CURVATURES
def test_logarithm_undoes_the_exponential(c: float) -> None:
    g = generator()
    v = randn(g, 8, 32, norm=2 / c**0.5)
    x, y = randn(g, 8, 32, norm=1 / c**0.5), randn(g, 8, 32, norm=1 / c**0.5)
    p, q = in_ball(g, 8, 32, curvature=c), in_ball(g, 8, 32, curvature=c)
    torch.testing.assert_close(ops.lorentz_log_map0(ops.lorentz_exp_map0(v, c), c), v)
    torch.testing.assert_close(ops.poincare_log_map0(ops.poincare_exp_map0(v, c), c), v)
    torch.testing.assert_close(ops.lorentz_exp_map(x, ops.lorentz_log_map(x, y, c), c), y)
    torch.testing.assert_close(ops.poincare_exp_map(p, ops.poincare_log_map(p, q, c), c), q)
    torch.testing.assert_close(ops.poincare_to_lorentz(ops.lorentz_to_poincare(x, c), c), x)


@CURVATURES
def test_both_models_measure_the_same_distance(c: float) -> None:
    g = generator()
    x, y = randn(g, 8, 32, norm=1 / c**0.5), randn(g, 8, 32, norm=1 / c**0.5)
    p, q = ops.lorentz_to_poincare(x, c), ops.lorentz_to_poincare(y, c)
    torch.testing.assert_close(ops.lorentz_distance(x, y, c), ops.poincare_distance(p, q, c))
    torch.testing.assert_close(ops.lorentz_pairwise_distance(x, y, c), ops.poincare_pairwise_distance(p, q, c))
    torch.testing.assert_close(ops.lorentz_pairwise_distance(x, y, c).diagonal(), ops.lorentz_distance(x, y, c))
    inner = torch.acosh(-c * ops.lorentz_pairwise_inner(x, y, c)) / c**0.5
    torch.testing.assert_close(ops.lorentz_pairwise_distance(x, y, c), inner)


@CURVATURES
def test_transport_keeps_angles_and_moves_the_geodesic_along(c: float) -> None:
    g = generator()
    x, y = randn(g, 8, 32, norm=1 / c**0.5), randn(g, 8, 32, norm=1 / c**0.5)
    u = randn(g, 8, 32)

    def squared_length(at: Tensor, w: Tensor) -> Tensor:
        time = (at * w).sum(-1).square() / (1 / c + at.square().sum(-1))
        return w.square().sum(-1) - time

    carried = ops.lorentz_parallel_transport(x, y, u, c)
    torch.testing.assert_close(squared_length(y, carried), squared_length(x, u))
    forth, back = ops.lorentz_log_map(x, y, c), ops.lorentz_log_map(y, x, c)
    torch.testing.assert_close(ops.lorentz_parallel_transport(x, y, forth, c), -back)


@CURVATURES
def test_centroid_of_two_is_the_midpoint(c: float) -> None:
    x = randn(generator(), 5, 2, 16, norm=1 / c**0.5)
    middle = ops.lorentz_centroid(x, torch.ones(5, 2, dtype=torch.float64), c)
    torch.testing.assert_close(ops.lorentz_distance(middle, x[:, 0], c), ops.lorentz_distance(middle, x[:, 1], c))
    half = ops.lorentz_exp_map(x[:, 0], 0.5 * ops.lorentz_log_map(x[:, 0], x[:, 1], c), c)
    torch.testing.assert_close(middle, half)


@CURVATURES
def test_mobius_identities(c: float) -> None:
    g = generator()
    x, y = in_ball(g, 8, 16, curvature=c), in_ball(g, 8, 16, curvature=c)
    torch.testing.assert_close(ops.mobius_add(-x, ops.mobius_add(x, y, c), c), y)
    torch.testing.assert_close(ops.mobius_scalar_mul(2.0, x, c), ops.mobius_add(x, x, c))
    torch.testing.assert_close(ops.mobius_scalar_mul(torch.tensor(0.5), ops.mobius_add(x, x, c), c), x)
    torch.testing.assert_close(ops.mobius_scalar_mul(torch.full((8, 1), 3.0), x, c), ops.mobius_scalar_mul(3.0, x, c))


def test_the_cone_of_a_point_holds_what_lies_behind_it() -> None:
    x = randn(generator(), 6, 12, norm=1.0)
    behind, before = 2 * x, 0.5 * x
    assert (ops.lorentz_exterior_angle(x, behind, 1.0) < 1e-6).all()
    torch.testing.assert_close(ops.lorentz_exterior_angle(x, before, 1.0), torch.full((6,), math.pi).double())
    assert ops.lorentz_entailment_loss(x, behind, 1.0) == 0
    assert ops.lorentz_entailment_loss(x, before, 1.0) > 1
    total = ops.lorentz_entailment_loss(x, before, 1.0, reduction="sum")
    torch.testing.assert_close(total, ops.lorentz_entailment_loss(x, before, 1.0, reduction="none").sum())


def test_an_empty_batch_has_a_mean_of_nan() -> None:
    x = torch.zeros(0, 4)
    assert ops.lorentz_entailment_loss(x, x, 1.0).isnan()


# ---- Where the usual formulas break --------------------------------------------------------------------------------


def exact_distance(x: Tensor, y: Tensor, c: float) -> float:
    """In 50 digits, by the textbook formula."""
    with mpmath.workdps(50):
        a, b = ([mpmath.mpf(float(v)) for v in row] for row in (x, y))
        k = mpmath.mpf(c)
        a_t = mpmath.sqrt(1 / k + mpmath.fsum(v * v for v in a))
        b_t = mpmath.sqrt(1 / k + mpmath.fsum(v * v for v in b))
        inner = mpmath.fsum(p * q for p, q in zip(a, b, strict=True)) - a_t * b_t
        return float(mpmath.acosh(-k * inner) / mpmath.sqrt(k))


@pytest.mark.parametrize("gap", [1e-6, 1e-4, 1e-2])
@CURVATURES
def test_near_points_keep_five_digits_in_float32(gap: float, c: float) -> None:
    g = generator()
    x = randn(g, 4, 64, norm=1.0).float()
    y = (x.double() + gap * randn(g, 4, 64, norm=1.0)).float()
    exact = torch.tensor([exact_distance(a, b, c) for a, b in zip(x, y, strict=True)])
    for got in (ops.lorentz_distance(x, y, c), ops.lorentz_pairwise_distance(x, y, c).diagonal()):
        assert ((got - exact).abs() / exact).max() < 1e-5


@pytest.mark.parametrize("distance", ["lorentz_distance", "poincare_distance"])
def test_coinciding_points_have_distance_zero_and_a_finite_gradient(distance: str) -> None:
    x = in_ball(generator(), 5, 16).float().requires_grad_()
    out = getattr(ops, distance)(x, x.detach().clone(), 1.0)
    pairs = getattr(ops, distance.replace("_", "_pairwise_"))(x, x.detach().clone(), 1.0)
    assert (out == 0).all()
    assert (pairs.diagonal() == 0).all()
    assert torch.autograd.grad(out.sum(), x, retain_graph=True)[0].isfinite().all()
    assert torch.autograd.grad(pairs.sum(), x)[0].isfinite().all()


def test_exp_map0_holds_to_the_range_of_float32() -> None:
    direction = torch.nn.functional.normalize(randn(generator(), 1, 32), dim=-1).float()
    length = torch.tensor([5.0, 11.0, 11.5, 20.0, 44.0, 60.0, 85.0])
    x = ops.lorentz_exp_map0(length[:, None] * direction, 1.0)
    assert x.isfinite().all()
    torch.testing.assert_close(x.double().norm(dim=-1), length.double().sinh(), rtol=1e-5, atol=0)
    torch.testing.assert_close(ops.lorentz_log_map0(x, 1.0).norm(dim=-1), length, rtol=1e-5, atol=0)


def test_log_map0_is_the_identity_near_zero() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-20, 0.0], [3e-5, -4e-5]], requires_grad=True)
    out = ops.lorentz_log_map0(x, 1.0)
    torch.testing.assert_close(out, x, rtol=1e-7, atol=0)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 2), rtol=1e-7, atol=0)


@pytest.mark.parametrize(("length", "tolerance"), [(2.0, 1e-6), (4.0, 1e-4), (6.0, 2e-3), (8.0, 5e-2)])
def test_the_poincare_round_trip_does_not_saturate(length: float, tolerance: float) -> None:
    v = torch.nn.functional.normalize(randn(generator(), 16, 64), dim=-1).float() * length
    back = ops.poincare_log_map0(ops.poincare_exp_map0(v, 1.0), 1.0).norm(dim=-1)
    assert ((back - length).abs() / length).max() < tolerance


# ---- How it is called ----------------------------------------------------------------------------------------------


@given(
    leading=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    width=st.integers(1, 40),
    seed=st.integers(0, 100),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_layout_gives_what_a_dense_copy_gives(
    leading: list[int], width: int, seed: int, data: st.DataObject
) -> None:
    g = torch.Generator().manual_seed(seed)
    shape = [*leading, width]
    order = data.draw(st.permutations(range(len(shape))))
    big = torch.randn(*(2 * s for s in shape), generator=g)
    x = big[tuple(slice(0, 2 * s, data.draw(st.sampled_from([1, 2]))) for s in shape)][
        tuple(slice(0, s) for s in shape)
    ].permute(*order)
    y = torch.randn(x.shape, generator=g)
    torch.testing.assert_close(
        ops.lorentz_log_map(x, y, 0.7), ops.lorentz_log_map(x.contiguous(), y, 0.7), rtol=0, atol=0
    )


def test_points_broadcast() -> None:
    g = generator()
    x, y = randn(g, 5, 1, 8, norm=1.0).requires_grad_(), randn(g, 3, 8, norm=1.0).requires_grad_()
    out = ops.lorentz_distance(x, y, 1.0)
    assert out.shape == (5, 3)
    torch.testing.assert_close(out, ops.lorentz_pairwise_distance(x[:, 0], y, 1.0))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_expanded_gradients_are_read_right() -> None:
    x = randn(generator(), 6, 8, norm=1.0).requires_grad_()
    y = randn(generator(), 6, 8, norm=2.0)
    (by_sum,) = torch.autograd.grad(ops.lorentz_log_map(x, y, 1.0).sum(), x)
    (dense,) = torch.autograd.grad(ops.lorentz_log_map(x, y, 1.0), x, torch.ones(6, 8, dtype=torch.float64))
    assert torch.equal(by_sum, dense)


def test_one_point_as_both_arguments_gets_both_gradients() -> None:
    x = in_ball(generator(), 4, 8).requires_grad_()
    (both,) = torch.autograd.grad(ops.mobius_add(x, x, 1.0).sum(), x)
    (twice,) = torch.autograd.grad(reference.mobius_add(x, x, 1.0).sum(), x)
    torch.testing.assert_close(both, twice)


BAD = [
    (lambda x: ops.lorentz_exp_map0(x.int(), 1.0), TypeError, "lorentz_exp_map0: v has dtype torch.int32"),
    (lambda x: ops.lorentz_exp_map0([1.0], 1.0), TypeError, "v is list, expected a Tensor"),
    (lambda x: ops.lorentz_exp_map0(x, 0.0), ValueError, "curvature is 0.0, expected a number above 0"),
    (lambda x: ops.lorentz_exp_map0(x, math.nan), ValueError, "curvature is nan"),
    (lambda x: ops.lorentz_exp_map0(x, torch.tensor(-1.0)), ValueError, "curvature is -1.0"),
    (lambda x: ops.lorentz_exp_map0(x, torch.ones(2)), ValueError, r"curvature has shape \[2\]"),
    (lambda x: ops.lorentz_exp_map0(x, "1"), TypeError, "curvature is str"),
    (lambda x: ops.lorentz_exp_map0(torch.tensor(1.0), 1.0), ValueError, "at least 1 axes"),
    (
        lambda x: ops.lorentz_distance(x, x.double(), 1.0),
        TypeError,
        "y has dtype torch.float64, expected torch.float32",
    ),
    (lambda x: ops.lorentz_distance(x, x[:, :2], 1.0), ValueError, "y has shape .4, 2., expected a last axis of 3"),
    (lambda x: ops.lorentz_distance(x, x[:3], 1.0), ValueError, "does not broadcast"),
    (lambda x: ops.lorentz_pairwise_distance(x, x[0], 1.0), ValueError, "y has shape .3., expected at least 2 axes"),
    (lambda x: ops.lorentz_pairwise_distance(x, x[:, :2], 1.0), ValueError, "lorentz_pairwise_distance: y has shape"),
    (lambda x: ops.lorentz_half_aperture(x, 1.0, -1.0), ValueError, "min_radius is -1.0"),
    (lambda x: ops.lorentz_entailment_loss(x, x, 1.0, reduction="max"), ValueError, "reduction is 'max'"),
    (lambda x: ops.lorentz_centroid(x, torch.ones(3), 1.0), ValueError, "weights has shape .3., expected .4."),
    (lambda x: ops.mobius_scalar_mul(torch.ones(7), x, 1.0), ValueError, "r has shape .7."),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(call: Callable[[Tensor], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.rand(4, 3))


@pytest.mark.parametrize("case", one_of_each(), ids=str)
def test_verify_accepts_the_kernels(case: Case) -> None:
    with mmkern.verify():
        public(case.op)(*leaves(case.arguments(torch.float32))).sum().backward()
