"""The attention_rows family on every backend of this machine: the numerics contract, its peers, and use."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import mmkern
from mmkern import ops
from mmkern.ops._define import OPS
from mmkern.reference import attention_rows as reference
from tests import contract
from tests.cases.attention_rows import CASES, merge_case, rotary_case
from tests.cases.case import Case

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Every case in float32; the other dtypes differ in loads and stores alone.
OF_EVERY_DTYPE = ("9x123", "heads inside", "columns", "odd", "part", "sliced")
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


def angles(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angle = 6 * torch.randn(*shape, dtype=dtype)
    return angle.cos(), angle.sin()


# ---- What merging promises -------------------------------------------------------------------------------------------


def qkv(width: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, 4, length, width, dtype=dtype, requires_grad=True) for length in (9, 50, 50)]


@pytest.mark.parametrize("bounds", [(0, 50), (0, 20, 50), (0, 3, 3, 30, 50)], ids=str)
def test_parts_of_the_keys_are_the_whole(bounds: tuple[int, ...]) -> None:
    """Forward and backward; one of the parts may have no key."""
    q, k, v = qkv()
    parts = [
        ops.cross_attention(q, k[:, :, first:last], v[:, :, first:last], return_lse=True)
        for first, last in pairwise(bounds)
    ]
    merged = ops.merge_attention([out for out, _ in parts], [lse for _, lse in parts])
    whole = ops.cross_attention(q, k, v, return_lse=True)
    grads = [torch.randn_like(out) for out in whole]
    for got, expected in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, expected)
    for got, expected in zip(*(torch.autograd.grad(outs, (q, k, v), grads) for outs in (merged, whole)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_one_part_is_the_result() -> None:
    out, lse = torch.randn(3, 4), torch.randn(3)
    merged, merged_lse = ops.merge_attention([out], [lse])
    assert torch.equal(merged, out)
    assert torch.equal(merged_lse, lse)


@pytest.mark.parametrize("empty", ["first", "second", "both"])
def test_a_part_without_keys_is_not_read(empty: str) -> None:
    """Garbage where nothing was attended to comes out nowhere, nor in a gradient."""
    outs = [torch.randn(5, 8), torch.randn(5, 8)]
    lses = [torch.randn(5), torch.randn(5)]
    for i, name in enumerate(("first", "second")):
        if empty in (name, "both"):
            outs[i].fill_(math.nan)
            lses[i].fill_(-math.inf)
    leaves = [x.requires_grad_() for x in (*outs, *lses)]
    out, lse = ops.merge_attention(leaves[:2], leaves[2:])
    gradients = torch.autograd.grad([out, lse], leaves, [torch.ones(5, 8), torch.ones(5)])
    if empty == "both":
        assert out.eq(0).all()
        assert lse.eq(-math.inf).all()
        assert all(gradient.eq(0).all() for gradient in gradients)
        return
    full = 1 if empty == "first" else 0
    assert torch.equal(out, outs[full])
    torch.testing.assert_close(lse, lses[full], rtol=1e-6, atol=1e-6)
    assert torch.equal(gradients[full], torch.ones(5, 8))
    torch.testing.assert_close(gradients[2 + full], torch.ones(5), rtol=1e-6, atol=0)
    assert gradients[1 - full].eq(0).all()
    assert gradients[3 - full].eq(0).all()


# ---- The rotations of transformers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("of_each_batch", [False, True])
def test_equals_transformers_halves(of_each_batch: bool) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = torch.randn(2, 7, 6, 32).transpose(1, 2), torch.randn(2, 2, 7, 32)
    cos, sin = angles(2 if of_each_batch else 1, 7, 16)
    expected = llama.apply_rotary_pos_emb(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    for x, rotated in zip((q, k), expected, strict=True):
        torch.testing.assert_close(ops.rotary_embedding(x, cos[:, None], sin[:, None]), rotated)


def test_equals_transformers_interleaved() -> None:
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    x, (cos, sin) = torch.randn(2, 7, 6, 32), angles(2, 7, 16)
    expected = gptj.apply_rotary_pos_emb(x, sin, cos)
    torch.testing.assert_close(ops.rotary_embedding(x, cos[:, :, None], sin[:, :, None], interleaved=True), expected)
    heads_first = ops.rotary_embedding(x.transpose(1, 2), cos[:, None], sin[:, None], interleaved=True)
    torch.testing.assert_close(heads_first.transpose(1, 2), expected)


def test_norm_and_rotation_equal_those_of_qwen3() -> None:
    qwen = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    q, k, (cos, sin) = torch.randn(2, 6, 7, 32), torch.randn(2, 2, 7, 32), angles(2, 7, 16)
    norms = [qwen.Qwen3RMSNorm(32, eps=1e-6) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight, 1.0)
    full = [torch.cat((x, x), -1) for x in (cos, sin)]
    expected = qwen.apply_rotary_pos_emb(norms[0](q), norms[1](k), *full)
    got = ops.qk_norm_rotary(q, k, norms[0].weight, norms[1].weight, cos[:, None], sin[:, None])
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(interleaved: bool) -> None:
    """What the embedding is for: q·k of rows i and j is a function of i − j."""
    frequencies = 10 ** -torch.linspace(0, 2, 8, dtype=torch.float64)
    angle = torch.arange(12)[:, None] * frequencies
    q, k = (torch.randn(16, dtype=torch.float64).expand(12, 16) for _ in range(2))
    rotated = [ops.rotary_embedding(x, angle.cos(), angle.sin(), interleaved) for x in (q, k)]
    scores = rotated[0] @ rotated[1].T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1])
    torch.testing.assert_close(rotated[0].norm(dim=-1), q.norm(dim=-1))


def test_angles_and_weights_of_another_dtype() -> None:
    """float32 beside bfloat16 loses nothing; bfloat16 is the same as its numbers in float32."""
    q, (cos, sin) = torch.randn(2, 3, 5, 16).bfloat16(), angles(5, 8)
    weight = torch.randn(16)
    exact = reference.rotary_embedding(q.float(), weight, cos, sin, 1e-6, True, False)
    got = ops.qk_norm_rotary(q, q, weight, weight, cos, sin)[0]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), exact, rtol=2**-8, atol=1e-6)
    lower = [x.bfloat16() for x in (weight, cos, sin)]
    one = ops.qk_norm_rotary(q, q, lower[0], lower[0], *lower[1:])[0]
    other = ops.qk_norm_rotary(q, q, lower[0].float(), lower[0].float(), *(x.float() for x in lower[1:]))[0]
    assert torch.equal(one, other)
    leaf = lower[0].requires_grad_()
    ops.qk_norm_rotary(q, q, leaf, None, cos, sin)[0].sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16


# ---- Autograd and the ways of torch ----------------------------------------------------------------------------------


def parts(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Two outs and two lses; one row without keys on each side, one on both."""
    outs = [torch.randn(4, 3, dtype=dtype) for _ in range(2)]
    lses = [torch.randn(4, dtype=dtype) for _ in range(2)]
    lses[0][:2] = lses[1][1:3] = -math.inf
    return [x.requires_grad_() for x in (*outs, *lses)]


def merged(*given: Tensor) -> tuple[Tensor, Tensor]:
    half = len(given) // 2
    return ops.merge_attention(given[:half], given[half:])


def finite(*outs: Tensor) -> list[Tensor]:
    return [out.masked_fill(out == -math.inf, 0.0) for out in outs]


def test_finite_differences_of_a_merge() -> None:
    def of_three(*given: Tensor) -> list[Tensor]:
        return finite(*merged(*given))

    assert torch.autograd.gradcheck(of_three, parts())
    wide = [torch.randn(3, 4, 2, dtype=torch.float64).transpose(0, 1).requires_grad_() for _ in range(3)]
    lses = [torch.randn(4, 3, dtype=torch.float64).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(merged, (*wide, *lses))
    assert torch.autograd.gradgradcheck(merged, (*wide[:2], *lses[:2]))


@pytest.mark.parametrize("interleaved", [False, True])
def test_finite_differences_of_rotations(interleaved: bool) -> None:
    q, k = (torch.randn(n, 3, 7, dtype=torch.float64).requires_grad_() for n in (2, 1))
    weights = [torch.randn(7, dtype=torch.float64).requires_grad_() for _ in range(2)]
    cos, sin = angles(3, 3, dtype=torch.float64)

    def rotate(x: Tensor) -> Tensor:
        return ops.rotary_embedding(x, cos, sin, interleaved)

    def norm(*args: Tensor) -> tuple[Tensor, Tensor]:
        return ops.qk_norm_rotary(*args, cos, sin, interleaved=interleaved)

    assert torch.autograd.gradcheck(rotate, q)
    assert torch.autograd.gradcheck(norm, (q, k, *weights))
    assert torch.autograd.gradgradcheck(norm, (q, k, *weights))


def test_angles_may_need_gradients() -> None:
    """By way of PyTorch, summed over the axes that they were expanded along."""
    q = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = (x.requires_grad_() for x in angles(2, 1, 4, 3, dtype=torch.float64))
    assert torch.autograd.gradcheck(ops.rotary_embedding, (q, cos, sin))
    assert torch.autograd.gradcheck(lambda c: ops.qk_norm_rotary(q, q, None, None, c, sin)[0], cos)
    by_transform = torch.func.grad(lambda c: ops.rotary_embedding(q.detach(), c, sin.detach()).square().sum())(cos)
    (by_autograd,) = torch.autograd.grad(ops.rotary_embedding(q, cos, sin).square().sum(), cos)
    torch.testing.assert_close(by_transform, by_autograd)


def of_op(name: str) -> list[Case]:
    return {
        "merge_attention": [merge_case("heads inside", "some empty"), merge_case("9x123", "near")],
        "rotary_embedding": [rotary_case("heads inside", "weight"), rotary_case("part", "plain", interleaved=True)],
    }[name]


NAMES = ("merge_attention", "rotary_embedding")


def leaves(args: list[Any], tensors: tuple[int, ...]) -> list[Any]:
    return [a.detach().requires_grad_() if i in tensors and isinstance(a, Tensor) else a for i, a in enumerate(args)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    op = OPS[name]
    for case in of_op(name):
        args = op._prepare(leaves(case.arguments(torch.float32), op.tensors))
        torch.library.opcheck(getattr(torch.ops.mmkern, name).default, args)


@pytest.mark.slow
def test_compile_without_graph_breaks() -> None:
    torch._dynamo.reset()
    cos, sin = angles(9, 8)

    def attend(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ops.qk_norm_rotary(q, k[:, :, :9], weight, None, cos, sin)
        k = ops.rotary_embedding(k, cos, sin, interleaved=True)
        near = ops.cross_attention(q, k, v[:, :, :9], return_lse=True)
        far = ops.cross_attention(q, k, v[:, :, 9:18], return_lse=True)
        out, lse = ops.merge_attention([near[0], far[0]], [near[1], far[1]])
        return out * 2, lse

    args = [*qkv(), torch.randn(16, requires_grad=True)]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = [f(*args) for f in (attend, compiled)]
    grads = [torch.autograd.grad([out.sum() + lse.sum()], args) for out, lse in results]
    for mine, other in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        torch.testing.assert_close(mine, other)


def test_func_transforms() -> None:
    cos, sin = angles(3, 2)
    x, weight = torch.randn(2, 4, 3, 5), torch.randn(5)

    def rotate(x: Tensor) -> Tensor:
        return ops.qk_norm_rotary(x, x, weight, None, cos, sin)[0]

    def merge(x: Tensor) -> Tensor:
        return ops.merge_attention([x, 2 * x], [x[..., 0], x[..., 1]])[0]

    for function in (rotate, merge):
        leaf = x.clone().requires_grad_()
        function(leaf).square().sum().backward()
        gradient = torch.func.grad(lambda x, function=function: function(x).square().sum())(x)
        torch.testing.assert_close(gradient, leaf.grad)
        got = torch.func.vmap(function)(x)
        torch.testing.assert_close(got, torch.stack([function(row) for row in x]))
        _, forward_mode = torch.func.jvp(function, (x,), (torch.ones_like(x),))
        step = 1e-3
        torch.testing.assert_close(
            forward_mode, (function(x + step) - function(x - step)) / (2 * step), rtol=1e-2, atol=1e-2
        )


def test_autocast_leaves_them_in_their_dtype() -> None:
    cos, sin = angles(9, 8)
    q, k, v = (x.detach() for x in qkv())
    with torch.autocast("cpu", torch.bfloat16):
        near = ops.cross_attention(q, k, v, return_lse=True)
        out, lse = ops.merge_attention([near[0], near[0]], [near[1], near[1]])
        rotated = ops.rotary_embedding(q, cos, sin)
    assert (out.dtype, lse.dtype, rotated.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(rotated, ops.rotary_embedding(q, cos, sin))


def test_meta_gives_the_shapes() -> None:
    x, lse, cos = (torch.empty(shape, device="meta") for shape in ((2, 4, 9, 16), (2, 4, 9), (9, 8)))
    out, merged_lse = ops.merge_attention([x, x], [lse, lse])
    assert (out.shape, merged_lse.shape, out.device.type) == (x.shape, lse.shape, "meta")
    assert ops.rotary_embedding(x, cos, cos).shape == x.shape


# ---- Promises --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_same_bits_for_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 301, 5, 32).to(dtype).transpose(1, 2).requires_grad_()
    lses = [torch.randn(2, 5, 301, requires_grad=True) for _ in range(2)]
    weight = torch.randn(32, requires_grad=True)
    cos, sin = angles(301, 12)
    grad = torch.randn(2, 5, 301, 32).to(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        if name == "merge_attention":
            out, lse = ops.merge_attention([x, 2 * x], lses)
            found = torch.autograd.grad([out, lse], [x, *lses], [grad, torch.ones_like(lse)])
        else:
            out, lse = ops.qk_norm_rotary(x, x, weight, None, cos, sin)
            found = torch.autograd.grad([out, lse], [x, weight], [grad, grad])
        results.append([out, lse, *found])
    for other in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_stays_in_its_row(name: str) -> None:
    op = OPS[name]
    args = of_op(name)[-1].arguments(torch.float32)
    args[0] = args[0].clone()
    row = (2,) if name == "merge_attention" else (1, 0, 4)
    args[0][(*row, 3)] = math.nan
    out = contract.in_tuple(op(*args))[0]
    touched = out.isnan()
    assert touched[row].any()
    touched[row] = False
    assert not touched.any()


@pytest.mark.parametrize("name", NAMES)
def test_expanded_gradients_are_read_right(name: str) -> None:
    op = OPS[name]
    args = leaves(of_op(name)[0].arguments(torch.float64), op.tensors)
    tensors = [args[i] for i in op.tensors if args[i] is not None]
    outs = finite(*contract.in_tuple(op(*args)))
    by_sum = torch.autograd.grad(sum(out.sum() for out in outs), tensors, retain_graph=True)
    dense = torch.autograd.grad(outs, tensors, [torch.ones_like(out) for out in outs])
    assert all(torch.equal(mine, other) for mine, other in zip(by_sum, dense, strict=True))


def test_sliced_gradients_of_the_lse_are_read_right() -> None:
    """Of rows as long as those of out: neither dense nor with one stride."""
    out, other = torch.randn(2, 6, 4, 4).unbind()
    lses = [x.requires_grad_() for x in torch.randn(2, 6, 4).unbind()]
    wide = torch.randn(6, 9)
    results = []
    for grad in (wide[:, 2:6], wide[:, 2:6].clone(), wide[:, 2:6].T.contiguous().T):
        _, lse = ops.merge_attention([out, other], lses)
        results.append(torch.autograd.grad(lse, lses, grad))
    for found in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, results[0], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_not_written(name: str) -> None:
    op = OPS[name]
    args = leaves(of_op(name)[0].arguments(torch.float32), op.tensors)
    copies = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
    contract.in_tuple(op(*args))[0].sum().backward()
    assert all(not isinstance(a, Tensor) or torch.equal(a.detach(), copy) for a, copy in zip(args, copies, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_verify_accepts_the_kernels(name: str) -> None:
    op = OPS[name]
    with mmkern.verify():
        for case in of_op(name):
            outs = contract.in_tuple(op(*leaves(case.arguments(torch.float32), op.tensors)))
            sum(out.sum() for out in finite(*outs)).backward()


@given(data=st.data())
@hypothesis_settings(max_examples=40, deadline=None)
def test_any_layout_gives_what_a_dense_copy_gives(data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, 4)) for _ in range(data.draw(st.integers(1, 4)))] + [
        data.draw(st.integers(1, 40))
    ]
    order = data.draw(st.permutations(range(len(sizes))))
    torch.manual_seed(data.draw(st.integers(0, 99)))

    def strided(last: int) -> Tensor:
        shape = [*sizes[:-1], last]
        steps = [data.draw(st.sampled_from([1, 2])) for _ in shape]
        big = torch.randn([2 * shape[axis] for axis in order])
        x = big[tuple(slice(0, steps[axis] * shape[axis], steps[axis]) for axis in order)]
        return x.permute(*(order.index(axis) for axis in range(len(shape))))

    out, other = strided(sizes[-1]), strided(sizes[-1])
    lses = [strided(1).squeeze(-1), strided(1).squeeze(-1)]
    got = ops.merge_attention([out, other], lses)
    expected = ops.merge_attention([out.contiguous(), other.contiguous()], [lse.contiguous() for lse in lses])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))
    pairs = data.draw(st.integers(0, sizes[-1] // 2))
    cos, sin = strided(pairs), strided(pairs)
    interleaved = data.draw(st.booleans())
    assert torch.equal(
        ops.rotary_embedding(out, cos, sin, interleaved),
        ops.rotary_embedding(out.contiguous(), cos.contiguous(), sin.contiguous(), interleaved),
    )


# ---- Bad input -------------------------------------------------------------------------------------------------------

_X, _LSE, _COS = torch.zeros(2, 3, 8), torch.zeros(2, 3), torch.zeros(3, 4)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.merge_attention(_X, _LSE), TypeError, "merge_attention: outs is Tensor, expected a sequence"),
    (lambda: ops.merge_attention([], []), ValueError, "got 0 outs and 0 lses, expected one or more"),
    (lambda: ops.merge_attention([_X], [_LSE, _LSE]), ValueError, "got 1 outs and 2 lses"),
    (lambda: ops.merge_attention([_X, None], [_LSE, _LSE]), TypeError, r"outs\[1\] is NoneType"),
    (lambda: ops.merge_attention([_X, _X.half()], [_LSE, _LSE]), TypeError, r"outs\[1\] has dtype torch.float16"),
    (lambda: ops.merge_attention([_X, _X[:1]], [_LSE, _LSE]), ValueError, r"outs\[1\] has shape \[1, 3, 8\], expected"),
    (lambda: ops.merge_attention([_X], [_LSE.double()]), TypeError, r"lses\[0\] has dtype torch.float64, expected tor"),
    (lambda: ops.merge_attention([_X.half()], [_LSE.half()]), TypeError, "expected torch.float32 beside torch.float16"),
    (
        lambda: ops.merge_attention([_X, _X], [_LSE, _X]),
        ValueError,
        r"lses\[1\] has shape \[2, 3, 8\], expected \[2, 3",
    ),
    (lambda: ops.merge_attention([_X], [1.0]), TypeError, r"lses\[0\] is float, expected a Tensor"),
    (lambda: ops.merge_attention([_X], [_LSE.to("meta")]), ValueError, r"lses\[0\] is on meta, expected cpu"),
    (lambda: ops.rotary_embedding(_X.int(), _COS, _COS), TypeError, "rotary_embedding: x has dtype torch.int32"),
    (lambda: ops.rotary_embedding(_X[0, 0], _COS, _COS), ValueError, "x has shape .8., expected at least 2 axes"),
    (lambda: ops.rotary_embedding(_X, 1.0, _COS), TypeError, "cos is float, expected a Tensor"),
    (lambda: ops.rotary_embedding(_X, None, _COS), TypeError, "cos is NoneType, expected a Tensor"),
    (lambda: ops.merge_attention([_X, _X], [_LSE, None]), TypeError, r"lses\[1\] is NoneType, expected a Tensor"),
    (lambda: ops.rotary_embedding(_X, _COS, _COS.long()), TypeError, "sin has dtype torch.int64, expected a floating"),
    (lambda: ops.rotary_embedding(_X, _COS, _COS[:, :3]), ValueError, "sin has shape .3, 3., expected .3, 4. as cos"),
    (
        lambda: ops.rotary_embedding(_X[..., :7], _COS, _COS),
        ValueError,
        "cos has shape .3, 4., expected a last axis of",
    ),
    (lambda: ops.rotary_embedding(_X, _COS[:2], _COS[:2]), ValueError, r"expected to broadcast to \[2, 3, 4\]"),
    (lambda: ops.rotary_embedding(_X, _COS[None, None], _COS[None, None]), ValueError, "cos has shape .1, 1, 3, 4."),
    (lambda: ops.rotary_embedding(_X, _COS, _COS, interleaved=1), TypeError, "interleaved is int, expected a bool"),
    (lambda: ops.qk_norm_rotary(_X, _X[0], None, _LSE, _COS, _COS), ValueError, "k_weight has shape .2, 3., expected"),
    (lambda: ops.qk_norm_rotary(_X, [_X], None, None, _COS, _COS), TypeError, "qk_norm_rotary: k is list, expected a"),
    (lambda: ops.qk_norm_rotary(_X, _X, 1.0, None, _COS, _COS), TypeError, "q_weight is float, expected a Tensor"),
    (lambda: ops.qk_norm_rotary(_X, _X, None, None, _COS, _COS, -1.0), ValueError, "eps is -1.0, expected a number of"),
    (lambda: ops.qk_norm_rotary(_X, _X[:, :2], None, None, _COS, _COS), ValueError, "qk_norm_rotary: cos has shape"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
