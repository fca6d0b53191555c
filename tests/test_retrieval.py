"""The retrieval family: the numerics contract, the order of ties and of NaN, gradients, and use."""

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
from mmkern.ops.retrieval import Metric
from tests import contract
from tests.cases.case import Case
from tests.cases.retrieval import CASES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
METRICS: tuple[Metric, ...] = ("dot", "cosine", "l2", "lorentz")
RUNS = [
    (case, dtype)
    for case in CASES
    for dtype in DTYPES
    if dtype == torch.float32 or case.label in ("5x9x7, 4", "49x600x20, 10", "ties", "strided", "near", "bias of 3")
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_forward(case, OPS[case.op], dtype, device)


@pytest.mark.parametrize(("case", "dtype"), [run for run in RUNS if run[0].label != "4x0x8, 0"], ids=str)
def test_backward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_backward(case, contract.by_autograd(OPS[case.op]), dtype, device)


@pytest.mark.parametrize("case", [c for c in CASES if c.label in ("5x9x7, 4", "bias of 20")], ids=str)
def test_opcheck(case: Case) -> None:
    args = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() and a.dim() != 1 else a
        for a in case.arguments(torch.float32)
    ]
    torch.library.opcheck(getattr(torch.ops.mmkern, case.op).default, tuple(OPS[case.op]._prepare(args)))


def rows(n: int, m: int, width: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(count, width, generator=generator, dtype=dtype) for count in (n, m))
    return x.requires_grad_(), y.requires_grad_()


def topk(x: Tensor, y: Tensor, k: int, metric: Metric) -> tuple[Tensor, Tensor]:
    return ops.pairwise_topk(x, y, k, metric, curvature=0.7 if metric == "lorentz" else None)


def all_values(x: Tensor, y: Tensor, metric: Metric) -> Tensor:
    if metric == "cosine":
        x, y = functional.normalize(x, dim=-1), functional.normalize(y, dim=-1)
    if metric == "l2":
        return torch.cdist(x, y)
    return ops.lorentz_pairwise_distance(x, y, 0.7) if metric == "lorentz" else x @ y.T


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [3, 40])
def test_is_topk_of_the_matrix(n: int, metric: Metric) -> None:
    x, y = rows(n, 300)
    values, indices = topk(x, y, 7, metric)
    expected = torch.topk(all_values(x, y, metric), 7, largest=metric in ("dot", "cosine"))
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(values, expected.values)
    assert values.requires_grad
    assert not indices.requires_grad
    upstream = torch.randn(n, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, wanted = (torch.autograd.grad(out, (x, y), upstream) for out in (values, expected.values))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 30),
    m=st.integers(0, 90),
    width=st.integers(1, 20),
    metric=st.sampled_from(METRICS),
    data=st.data(),
)
def test_any_shape(n: int, m: int, width: int, metric: Metric, data: st.DataObject) -> None:
    """Of whole numbers, whose ties are many and whose scores have no rounding."""
    k = data.draw(st.integers(0, m))
    generator = torch.Generator().manual_seed(n + m)
    x, y = (torch.randint(-2, 3, (count, 2 * width), generator=generator).float()[:, ::2] for count in (n, m))
    found = topk(x, y, k, metric)
    with mmkern.use_backend("reference"):
        values, indices = topk(x, y, k, metric)
    torch.testing.assert_close(found[0], values)
    if metric == "dot":
        assert torch.equal(found[1], indices)
    assert all(len(row.unique()) == k for row in found[1])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [3, 40])
def test_equal_rows_come_in_their_order(n: int, metric: Metric) -> None:
    x, y = rows(n, 5, dtype=torch.float32)
    _, indices = topk(x, y.repeat(200, 1), 150, metric)
    assert torch.equal(indices, indices[:, :1] + 5 * torch.arange(150))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [3, 40])
def test_nan_is_the_largest(n: int, metric: Metric) -> None:
    """In a row of x it is in all its values, and in no other row's; in rows of y before or behind all others."""
    x, y = (v.detach() for v in rows(n, 300, dtype=torch.float32))
    clean, _ = topk(x, y, 299, metric)
    broken = x.clone()
    broken[1, 3] = torch.nan
    values, indices = topk(broken, y, 299, metric)
    assert values[1].isnan().all()
    assert torch.equal(indices[1], torch.arange(299))
    others = torch.arange(n) != 1
    assert torch.equal(values[others], clean[others])
    y[[7, 270], 2] = torch.nan
    values, indices = topk(x, y, 299, metric)
    assert values.isnan().sum() == n * (2 if metric in ("dot", "cosine") else 1)
    if metric in ("dot", "cosine"):
        assert torch.equal(indices[:, :2], torch.tensor([[7, 270]]).expand(n, 2))
    else:
        assert (indices[:, -1] == 7).all()


def test_infinite_scores() -> None:
    x = torch.tensor([[1.0], [-1.0]])
    y = torch.tensor([[torch.inf], [2.0], [-torch.inf], [torch.inf]])
    values, indices = ops.pairwise_topk(x, y, 3)
    assert values.tolist() == [[torch.inf, torch.inf, 2.0], [torch.inf, -2.0, -torch.inf]]
    assert indices.tolist() == [[0, 3, 1], [2, 1, 0]]


@pytest.mark.parametrize("metric", ["l2", "lorentz"])
def test_neighbours_are_told_apart(metric: Metric) -> None:
    """Far from the origin, where scores of products have lost what tells them apart."""
    base = torch.full((1, 32), 3.0)
    y = (base + torch.arange(1, 201)[:, None] * 2.0**-20).flip(0)
    for n in (1, 20):
        values, indices = topk(base.expand(n, 32), y, 200, metric)
        assert torch.equal(indices, torch.arange(199, -1, -1).expand(n, 200))
        assert (values.diff() > 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(metric: Metric) -> None:
    x, y = rows(5, 9, 4)
    torch.autograd.gradcheck(lambda x, y: topk(x, y, 3, metric)[0], (x, y))
    torch.autograd.gradgradcheck(lambda x, y: topk(x, y, 3, metric)[0], (x, y))


def test_curvature_has_a_gradient() -> None:
    x, y = rows(5, 9, 4)
    curvature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda c: ops.pairwise_topk(x, y, 3, "lorentz", curvature=c)[0], curvature)


@pytest.mark.parametrize("metric", METRICS)
def test_vmap_and_grad(metric: Metric) -> None:
    x = torch.stack([rows(n, 1)[0][:4].detach() for n in (4, 5)])
    y = rows(3, 9)[1].detach()
    values, indices = torch.func.vmap(lambda x: topk(x, y, 3, metric))(x)
    for at in range(2):
        expected = topk(x[at], y, 3, metric)
        torch.testing.assert_close((values[at], indices[at]), expected)
    leaf = x[0].clone().requires_grad_()
    (expected_grad,) = torch.autograd.grad(topk(leaf, y, 3, metric)[0].sum(), leaf)
    found = torch.func.grad(lambda x: topk(x, y, 3, metric)[0].sum())(x[0])
    torch.testing.assert_close(found, expected_grad)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [5, 300])
def test_same_bits_for_any_number_of_threads(n: int, metric: Metric) -> None:
    x, y = (v.detach() for v in rows(n, 3000, 40, torch.float32))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append((*topk(x, y, 20, metric), *ops.linear_topk(x, y, 20, log_prob=True)))
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_nothing_of_all_pairs_is_saved() -> None:
    x, y = rows(600, 600, 8, torch.float32)
    saved = contract.saved_bytes(lambda: ops.pairwise_topk(x, y, 3))
    assert sum(saved) < 600 * 600


def test_compiles_whole() -> None:
    x, y = (v.detach() for v in rows(6, 30, dtype=torch.float32))
    for metric, expected in (("dot", "mmkern.pairwise_topk"), ("lorentz", "mmkern.lorentz_pairwise_topk")):
        kernels = contract.kernels_when_compiled(lambda x, y, m=metric: topk(x, y, 3, m)[0], x, y)
        assert any(expected in kernel for kernel in kernels)
    compiled = torch.compile(ops.linear_topk, fullgraph=True, backend="aot_eager")
    for found, expected_out in zip(
        compiled(x, y, 4, log_prob=True), ops.linear_topk(x, y, 4, log_prob=True), strict=True
    ):
        torch.testing.assert_close(found, expected_out)


# ---- Logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_prob", [False, True])
@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 11, 12), (0, 12)])
def test_linear_topk_is_linear_and_topk(shape: tuple[int, ...], log_prob: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(shape, generator=generator, requires_grad=True)
    weight, bias = torch.randn(700, 12, generator=generator), torch.randn(700, generator=generator)
    values, indices = ops.linear_topk(h, weight, 9, linear_bias=bias, softcap=4.0, log_prob=log_prob)
    logits = 4 * (functional.linear(h, weight, bias) / 4).tanh()
    expected = torch.topk(logits.log_softmax(-1) if log_prob else logits, 9)
    torch.testing.assert_close(values, expected.values.detach())
    assert torch.equal(indices, expected.indices)
    assert not values.requires_grad


def test_probabilities_of_all_sum_to_one() -> None:
    h, weight = (v.detach() for v in rows(20, 600, dtype=torch.float32))
    values, _ = ops.linear_topk(h, weight, 600, log_prob=True)
    torch.testing.assert_close(values.exp().sum(1), torch.ones(20))


# ---- Refused ---------------------------------------------------------------------------------------------------------

REFUSED = (
    (
        lambda x, y: ops.pairwise_topk(x, y, 10),
        ValueError,
        "pairwise_topk: k is 10, expected an int from 0 to 9, the rows",
    ),
    (lambda x, y: ops.pairwise_topk(x, y, -1, "l2"), ValueError, "pairwise_topk: k is -1, expected"),
    (lambda x, y: ops.pairwise_topk(x, y, 2.0), TypeError, "pairwise_topk: k is float, expected an int"),
    (lambda x, y: ops.pairwise_topk(x, y[:, :3], 2), ValueError, r"pairwise_topk: y has shape \[9, 3\]"),
    (lambda x, y: ops.pairwise_topk(x, y.float(), 2, "cosine"), TypeError, "pairwise_topk: y has dtype torch.float32"),
    (lambda x, y: ops.pairwise_topk(x, y, 2, "cos"), ValueError, "pairwise_topk: metric is 'cos', expected 'dot', "),
    (
        lambda x, y: ops.pairwise_topk(x, y, 2, "lorentz"),
        TypeError,
        "pairwise_topk: curvature is NoneType, expected a fl",
    ),
    (
        lambda x, y: ops.pairwise_topk(x, y, 2, curvature=1.0),
        TypeError,
        "pairwise_topk: curvature is float, expected None",
    ),
    (
        lambda x, y: ops.pairwise_topk(x, y, 2, "lorentz", curvature=-1.0),
        ValueError,
        "pairwise_topk: curvature is -1.0, expected a number above 0",
    ),
    (lambda x, y: ops.linear_topk(x, y, 10), ValueError, "linear_topk: k is 10, expected an int from 0 to 9"),
    (lambda x, y: ops.linear_topk(x, y[:, :3], 1), ValueError, r"linear_topk: weight has shape \[9, 3\]"),
    (lambda x, y: ops.linear_topk(x, None, 1), TypeError, "linear_topk: weight is NoneType"),
    (lambda x, y: ops.linear_topk(x, y, 1, linear_bias=x[0]), ValueError, r"linear_topk: linear_bias has shape \[4\]"),
    (
        lambda x, y: ops.linear_topk(x, y, 1, softcap=0.0),
        ValueError,
        "linear_topk: softcap is 0.0, expected a number above",
    ),
    (lambda x, y: ops.linear_topk(x, y, 1, log_prob=1), TypeError, "linear_topk: log_prob is int, expected a bool"),
)


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input_is_named(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*rows(5, 9, 4))
