"""The attention family on every backend of this machine: the numerics contract, PyTorch's own attention, and use."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import mmkern
from mmkern import ops
from mmkern.ops._define import OPS
from mmkern.reference.attention import kept
from tests import contract
from tests.cases.attention import CASES, shares_at_a_word
from tests.cases.case import Case

Heads = tuple[Tensor, Tensor, Tensor]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Every case in float32; the other dtypes differ in loads and stores alone, and in what they keep of `out`.
RUNS = [
    (case, dtype)
    for case in CASES
    for dtype in DTYPES
    if dtype == torch.float32
    or case.label.startswith(("plain", "heads inside", "sliced", "all at once", "bias LS", "one key"))
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_forward(case, OPS[case.op], dtype, device)


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_backward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_backward(case, contract.by_autograd(OPS[case.op]), dtype, device)


# ---- PyTorch's own ---------------------------------------------------------------------------------------------------


def qkv(batch: int = 2, heads: int = 4, groups: int = 4, queries: int = 33, keys: int = 77, width: int = 16) -> Heads:
    q = torch.randn(batch, heads, queries, width)
    k, v = torch.randn(2, batch, groups, keys, width)
    return q, k, v


_MASK = torch.rand(1, 1, 2, 77, generator=torch.Generator().manual_seed(1)) < 0.7
_FLOATING = torch.randn(4, 33, 77, generator=torch.Generator().manual_seed(2))
SAME_AS_SDPA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "scale": ({"scale": 0.3}, {"scale": 0.3}),
    "causal": ({"is_causal": True, "causal_alignment": "top_left"}, {"is_causal": True}),
    "mask": ({"attn_mask": _MASK[:, :, :1]}, {"attn_mask": _MASK[:, :, :1]}),
    "floating mask": ({"attn_mask": _FLOATING}, {"attn_mask": _FLOATING}),
    "bias": ({"bias": _FLOATING}, {"attn_mask": _FLOATING}),
    "key mask": ({"key_mask": _MASK[0, 0]}, {"attn_mask": _MASK[0, 0][:, None, None]}),
}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", SAME_AS_SDPA)
def test_equals_scaled_dot_product_attention(name: str, groups: int) -> None:
    ours, theirs = SAME_AS_SDPA[name]
    q, k, v = (x.requires_grad_() for x in qkv(groups=groups))
    out = ops.cross_attention(q, k, v, **ours)
    expected = scaled_dot_product_attention(q, k, v, enable_gqa=True, **theirs)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for mine, other in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@given(data=st.data())
@hypothesis_settings(max_examples=60, deadline=None)
def test_any_shape_mask_and_layout_equals_pytorch(data: st.DataObject) -> None:
    size = st.integers(1, 20)
    batch, groups, repeats = (data.draw(st.integers(1, 3)) for _ in range(3))
    queries, keys, width, value_width = (
        data.draw(size),
        data.draw(st.integers(1, 300)),
        data.draw(size),
        data.draw(size),
    )
    torch.manual_seed(data.draw(st.integers(0, 99)))

    def heads(count: int, length: int, channels: int) -> Tensor:
        order = data.draw(st.permutations([0, 1, 2]))
        shape = [batch, count, length]
        x = torch.randn(*(shape[axis] for axis in order), channels)
        return x.permute(*(order.index(axis) for axis in range(3)), 3)[..., : channels - data.draw(st.integers(0, 1))]

    q = heads(groups * repeats, queries, width + 1)[..., :width]
    k, v = heads(groups, keys, width + 1)[..., :width], heads(groups, keys, value_width + 1)
    broadcast = [data.draw(st.booleans()) for _ in range(4)]
    full = (batch, groups * repeats, queries, keys)
    mask = torch.rand([1 if one else n for one, n in zip(broadcast, full, strict=True)]) < 0.8
    if data.draw(st.booleans()):
        mask = mask.expand(full)
    out = ops.cross_attention(q, k, v, attn_mask=mask)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out, expected.where(mask.expand(full).any(-1, keepdim=True), 0.0))


# ---- Autograd and the ways of torch ----------------------------------------------------------------------------------


def small_heads(**sizes: int) -> list[Tensor]:
    small = {"batch": 1, "heads": 2, "groups": 1, "queries": 3, "keys": 5, "width": 3} | sizes
    return [x.double().requires_grad_() for x in qkv(**small)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 2.0, "is_causal": True},
        {"key_mask": torch.tensor([[True, False, True, True, False]])},
        {"seed": 3, "dropout_p": 0.4},
        {"window_size": (1, 1), "window_alignment": "resample"},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_finite_differences(options: dict[str, Any]) -> None:
    q, k, v = small_heads()
    bias = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)

    def run(*args: Tensor) -> Any:
        *heads, added = args
        return ops.cross_attention(*heads, bias=added, return_lse=True, **options)

    assert torch.autograd.gradcheck(run, (q, k, v, bias))


def test_second_derivatives_are_refused() -> None:
    q, k, v = small_heads()
    (gradient,) = torch.autograd.grad(ops.cross_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="cross_attention has no second derivative"):
        gradient.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("label", ["plain", "all at once", "bias HLS", "heads inside", "prefix"])
def test_opcheck(label: str) -> None:
    found = next(case for case in CASES if case.label.startswith(f"{label}-") and "x0" not in case.label)
    args = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in found.arguments(torch.float32)
    ]
    torch.library.opcheck(torch.ops.mmkern.cross_attention.default, OPS["cross_attention"]._prepare(args))


@pytest.mark.slow
def test_compile_without_graph_breaks() -> None:
    torch._dynamo.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = ops.cross_attention(q, k, v, key_mask=key_mask, bias=bias, is_causal=True, return_lse=True)
        return out * 2, lse

    args = [x.requires_grad_() for x in (*qkv(), torch.randn(4, 1, 77))]
    key_mask = torch.rand(2, 77) < 0.7
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = [f(*args[:3], key_mask, args[3]) for f in (attend, compiled)]
    grads = [torch.autograd.grad([out.sum() + lse.nan_to_num(neginf=0).sum()], args) for out, lse in results]
    for mine, other in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        torch.testing.assert_close(mine, other)


def test_func_transforms() -> None:
    q, k, v = (x.detach() for x in small_heads())
    gradient = torch.func.grad(lambda x: ops.cross_attention(x, k, v).sum())(q)
    leaf = q.clone().requires_grad_()
    ops.cross_attention(leaf, k, v).sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)
    batch = torch.stack([q, 2 * q])
    got = torch.func.vmap(lambda x: ops.cross_attention(x, k, v))(batch)
    torch.testing.assert_close(got, torch.stack([ops.cross_attention(x, k, v) for x in batch]))


def test_autocast_runs_in_its_dtype() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.cross_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, ops.cross_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))


_ALONE = {"batch": 1, "heads": 1, "groups": 1, "queries": 200, "keys": 600}  # so that threads share its keys


@pytest.mark.parametrize(
    ("seen", "sizes", "threads"),
    [((3, 77), {}, 1), ((77, 77), {}, 1), ((70, 530), _ALONE, 3), ((600, 600), _ALONE, 3)],
    ids=str,
)
def test_what_an_earlier_call_left_in_memory_does_not_matter(
    seen: tuple[int, int], sizes: dict[str, int], threads: int
) -> None:
    """Keys hidden at the beginning, so that a tile begins before the first one that is seen; at both ends; and all."""
    torch.set_num_threads(threads)
    q, k, v = (x.requires_grad_() for x in qkv(**sizes))
    keys = torch.arange(k.shape[2])[None].expand(k.shape[0], -1)
    mask = (keys >= seen[0]) & (keys < seen[1])
    everything = torch.ones_like(mask)

    def run(key_mask: Tensor, factor: float) -> list[Tensor]:
        out = ops.cross_attention(q, factor * k, factor * v, key_mask=key_mask)
        return [out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))]

    expected = run(mask, 1.0)
    run(everything, math.nan)
    assert all(torch.equal(a, b) for a, b in zip(run(mask, 1.0), expected, strict=True))


def test_meta_gives_the_shapes() -> None:
    q, k, v = (x.to("meta") for x in qkv())
    out, lse = ops.cross_attention(q, k, v, return_lse=True)
    assert (out.shape, lse.shape, out.device.type) == (q.shape, q.shape[:3], "meta")


# ---- Promises --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((2, 4, 2, 130, 300), {}),
        ((1, 2, 1, 200, 600), {}),
        ((1, 3, 1, 2, 2500), {}),
        ((1, 2, 1, 600, 600), {"window_size": (3, 0)}),  # the keys of most rows in one block, some at the edge of two
    ],
    ids=str,
)
def test_same_bits_for_any_number_of_threads(sizes: tuple[int, ...], options: dict[str, Any]) -> None:
    heads = [x.requires_grad_() for x in qkv(*sizes)]
    biases = [torch.randn(shape).requires_grad_() for shape in ((sizes[0], sizes[1], 1, sizes[4]), (sizes[3], 1))]
    grad = torch.randn(*sizes[:2], sizes[3], 16)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = ops.cross_attention(*heads, attn_mask=biases[0], bias=biases[1], **options)
        results.append([out, *torch.autograd.grad(out, [*heads, *biases], grad)])
    for other in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], other, strict=True))


def test_inputs_are_not_written() -> None:
    heads = [x.requires_grad_() for x in qkv()]
    masks = [torch.rand(2, 77) < 0.5, torch.rand(33, 77) < 0.5]
    copies = [x.detach().clone() for x in (*heads, *masks)]
    ops.cross_attention(*heads, key_mask=masks[0], attn_mask=masks[1]).sum().backward()
    assert all(torch.equal(x.detach(), copy) for x, copy in zip((*heads, *masks), copies, strict=True))


def test_dropout_is_drawn_from_the_generator_and_keeps_the_mean() -> None:
    q, k, v = qkv(queries=64)
    draws = [
        ops.cross_attention(q, k, v, dropout_p=0.5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    many = torch.stack([ops.cross_attention(q, k, v, dropout_p=0.5, seed=seed) for seed in range(400)])
    gap = (many.mean(0) - ops.cross_attention(q, k, v)).abs()
    assert (gap / (many.std(0) / 400**0.5)).max() < 6


def test_dropout_draws_the_mask_of_the_reference() -> None:
    """Bit by bit: v of ones on a diagonal shows the weights. The shares are a word of the draw, and just above it."""
    seed = torch.tensor([2**63 - 9, 2**32 - 601])  # that word ends in a byte of 0: the least one that is kept
    q, k, v = torch.zeros(2, 4, 20, 4), torch.zeros(2, 4, 70, 4), torch.eye(70).expand(2, 4, 70, 70)
    for share in shares_at_a_word(seed):
        out, _ = OPS["cross_attention"](q, k, v, *[None] * 5, seed, 1.0, 0.0, -1, -1, 0, share)  # type: ignore[misc]
        assert torch.equal(out != 0, kept(out.shape, seed, share))


def test_dropout_of_nearly_everything() -> None:
    """No word of Philox is as large as a share beyond 1 − 2⁻²⁴ asks for."""
    q, k, v = qkv()
    assert (ops.cross_attention(q, k, v, dropout_p=1 - 2**-30, seed=0) == 0).all()
    assert (ops.cross_attention(q[:, :, :1], k, v, dropout_p=1 - 2**-30, seed=0) == 0).all()


@pytest.mark.parametrize("alignment", ["index", "resample"])
def test_a_window_beyond_all_keys_is_none(alignment: Any) -> None:
    q, k, v = qkv()
    for window in ((2**62, 2**62), (2**62, -1)):
        out = ops.cross_attention(q, k, v, window_size=window, window_alignment=alignment)
        with mmkern.use_backend("reference"):
            expected = ops.cross_attention(q, k, v, window_size=window, window_alignment=alignment)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(out, ops.cross_attention(q, k, v))


def test_dropout_of_a_checkpointed_call_is_the_same_again() -> None:
    heads = [x.requires_grad_() for x in qkv()]
    seed = torch.tensor(5)
    attend = lambda *args: ops.cross_attention(*args, dropout_p=0.3, seed=seed)  # noqa: E731
    plain = torch.autograd.grad(attend(*heads).sum(), heads)
    again = torch.autograd.grad(checkpoint(attend, *heads, use_reentrant=False).sum(), heads)
    assert all(torch.equal(mine, other) for mine, other in zip(plain, again, strict=True))


def test_a_row_that_sees_nothing_gives_zero_and_no_gradient() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = torch.ones(33, 77, dtype=torch.bool)
    mask[4] = False
    out, lse = ops.cross_attention(q, k, v, attn_mask=mask, return_lse=True)
    assert (out[:, :, 4] == 0).all()
    assert (lse[:, :, 4] == -math.inf).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert (grads[0][:, :, 4] == 0).all()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("keys", "width"), [(33, 3), (33, 200), (600, 400)])
@pytest.mark.parametrize(
    "options", [{}, {"bias": torch.zeros(1)}, {"dropout_p": 0.3, "seed": 1}], ids=["plain", "bias", "dropout"]
)
def test_a_row_that_sees_one_key_has_no_gradient(
    keys: int, width: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """To the last bit, whatever the rounding of `out`."""
    q, k = (x.to(dtype).requires_grad_() for x in qkv(keys=keys)[:2])
    v = torch.randn(2, 4, keys, width).to(dtype)
    out = ops.cross_attention(q, k, v, window_size=(0, 0), **options)
    assert all((g == 0).all() for g in torch.autograd.grad(out, (q, k), torch.randn_like(out)))


@pytest.mark.parametrize("masking", ["plain", "bias", "shared bias", "causal", "key mask"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 300), (3, 50), (8, 50), (40, 50), (40, 514), (9, 600)])
@pytest.mark.parametrize("size", [1e3, 1e5])
def test_far_scores_are_the_same_forward_and_backward(size: float, queries: int, keys: int, masking: str) -> None:
    """One weight is 1 and the others 0, and backward finds just these: a score's rounding is far more than 1."""
    q, k = size * torch.randn(2, 2, queries, 80), size * torch.randn(2, 2, keys, 80)
    v = torch.randn(2, 2, keys, 16, requires_grad=True)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    options: dict[str, Any] = {}
    if masking == "bias":
        options["bias"] = torch.zeros(2, 2, queries, keys, requires_grad=True)
    if masking == "shared bias":
        options["bias"] = torch.zeros(keys, requires_grad=True)
    if masking == "causal":
        seen, options["is_causal"] = seen.tril(keys - queries), True
    if masking == "key mask":  # which ends two keys behind whole vectors
        seen, options["key_mask"] = seen & (torch.arange(keys) < 34), (torch.arange(keys) < 34).expand(2, -1)
    out, lse = ops.cross_attention(q, k, v, **options, return_lse=True)
    chosen = (q.double() @ k.double().mT).masked_fill(~seen, -math.inf).argmax(-1)
    expected = torch.nn.functional.one_hot(chosen, keys).float()
    torch.testing.assert_close(out, expected @ v)
    wanted = [x for x in (v, options.get("bias")) if x is not None]
    grads = torch.autograd.grad(out.sum() + lse.sum(), wanted)
    torch.testing.assert_close(grads[0], expected.sum(-2)[..., None].expand_as(v))
    if "bias" in options:
        torch.testing.assert_close(grads[1], expected.sum_to_size(options["bias"].shape))


@pytest.mark.parametrize(
    ("queries", "keys", "first", "hidden"),
    [(2, 45, 0, 0), (40, 47, 0, 2), (40, 50, 48, 0)],
    ids=["few", "many", "last"],
)
def test_a_score_has_the_same_bits_wherever_its_key_stands(queries: int, keys: int, first: int, hidden: int) -> None:
    """Else backward, which cuts the keys in other places, would not find the weights of forward.

    Many queries have one or two keys behind whole vectors added up in another order: these among themselves.
    """
    q, k, v = qkv(batch=1, queries=queries, keys=keys, width=80)

    def log_sums(bias: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_of_each, k, v = (x.expand(keys, -1, -1, -1) for x in (q, k, v))
        return ops.cross_attention(q_of_each, k, v, bias=bias.log(), return_lse=True)[1][first:]

    among = log_sums(torch.eye(keys)[:, None, None], k, v)
    alone = log_sums(torch.eye(1, 1 + hidden), *(x.permute(2, 1, 0, 3).repeat(1, 1, 1 + hidden, 1) for x in (k, v)))
    assert torch.equal(among, alone)


def test_a_nan_stays_in_its_row() -> None:
    q, k, v = qkv()
    q[0, 1, 7, 3] = math.nan
    out = ops.cross_attention(q, k, v)
    assert out[0, 1, 7].isnan().all()
    out[0, 1, 7] = 0
    assert not out.isnan().any()


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}], ids=["plain", "softcap"])
def test_keys_that_a_mask_hides_may_hold_anything(queries: int, options: dict[str, Any]) -> None:
    q, k, v = qkv(queries=queries)
    seen = torch.rand(2, 77) < 0.7
    expected = ops.cross_attention(q, k, v, key_mask=seen, **options)
    k[~seen[:, None].expand(-1, 4, -1)] = math.nan
    assert torch.equal(ops.cross_attention(q, k, v, key_mask=seen, **options), expected)


@pytest.mark.parametrize("queries", [2, 40])
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}], ids=["plain", "softcap"])
def test_no_gradient_depends_on_what_lies_in_the_padding(queries: int, options: dict[str, Any]) -> None:
    q, k, v = qkv(queries=queries)
    seen = (torch.arange(77) < 61).expand(2, -1)

    def gradients(padding: float) -> tuple[Tensor, ...]:
        heads = [q, *(x.masked_fill(~seen[:, None, :, None], padding) for x in (k, v))]
        out = ops.cross_attention(*(x.requires_grad_() for x in heads), key_mask=seen, **options)
        return torch.autograd.grad(out, heads, torch.ones_like(out))

    assert all(torch.equal(a, b) for a, b in zip(gradients(math.nan), gradients(0.0), strict=True))


def test_results_lie_as_their_arguments_do() -> None:
    """Of [B, L, H, D] seen as [B, H, L, D]: a module's next view is no copy."""
    q, k, v = (torch.randn(2, n, 4, 8).transpose(1, 2).requires_grad_() for n in (5, 7, 7))
    out = ops.cross_attention(q, k, v)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    for x in (out, *grads):
        assert x.transpose(1, 2).is_contiguous()
    compiled = torch.compile(ops.cross_attention, fullgraph=True, backend="aot_eager")
    assert compiled(q, k, v).stride() == out.stride()


def test_memory_beyond_the_output_does_not_grow_with_the_scores() -> None:
    """A mebibyte or two a thread of packed k and tiles, where the scores alone are 128 MiB."""
    code = (
        "import resource, torch; from mmkern.ops import cross_attention; torch.set_num_threads(1);"
        "q, k, v = torch.randn(3, 1, 2, 4096, 16).requires_grad_();"
        "cross_attention(q[:, :, :64], k[:, :, :64], v[:, :, :64]).sum().backward();"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak();"
        "cross_attention(q, k, v).sum().backward(); grown = peak() - before;"
        "assert grown < 24 << 10, grown"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _options(error: type[Exception], message: str, **options: Any) -> tuple[Any, type[Exception], str]:
    return lambda q, k, v: ops.cross_attention(q, k, v, **options), error, message


BAD: list[tuple[Callable[[Tensor, Tensor, Tensor], Any], type[Exception], str]] = [
    _options(TypeError, "scale is Tensor, expected a finite number", scale=torch.tensor(0.5, requires_grad=True)),
    _options(TypeError, "scale is str, expected a finite number", scale="a"),
    _options(ValueError, "scale is nan, expected a finite number", scale=math.nan),
    _options(ValueError, "scale is 10+, expected a finite number", scale=10**400),
    _options(ValueError, "softcap is inf, expected a finite number above 0", softcap=math.inf),
    _options(TypeError, "softcap is list, expected a finite number above 0", softcap=[1.0]),
    _options(TypeError, "dropout_p is str, expected a number in", dropout_p="a"),
    _options(ValueError, "window_size is 3, expected two integers", window_size=3),
    _options(ValueError, "window_size is .True, False., expected two integers", window_size=(True, False)),
    _options(TypeError, "is_causal is str, expected a bool", is_causal="no"),
    _options(ValueError, "attn_mask has shape .3, 1, 1., expected to broadcast", attn_mask=torch.zeros(3, 1, 1)),
    _options(TypeError, "seed is float, expected an int", dropout_p=0.1, seed=1.5),
    _options(ValueError, "seed is 1180591620717411303424, expected a number", dropout_p=0.1, seed=2**70),
    _options(ValueError, "offset is -1, expected a number from 0", dropout_p=0.1, offset=-1),
    _options(TypeError, "generator is str, expected a torch.Generator", dropout_p=0.1, generator="g"),
    _options(
        ValueError,
        "window_size is .-1, 1., expected .left, -1. beside prefix_lengths",
        is_causal=True,
        prefix_lengths=torch.ones(2).long(),
        window_size=(-1, 1),
    ),
    (lambda q, k, v: ops.cross_attention(None, k, v, dropout_p=0.1), TypeError, "q is NoneType, expected a Tensor"),
    (lambda q, k, v: ops.cross_attention(q.to_sparse(), k, v), TypeError, "q has layout torch.sparse_coo"),
    (lambda q, k, v: ops.cross_attention(q[0], k, v), ValueError, "q has shape .4, 33, 16., expected .batch, heads"),
    (lambda q, k, v: ops.cross_attention(q.int(), k, v), TypeError, "q has dtype torch.int32"),
    (lambda q, k, v: ops.cross_attention(q, k.double(), v), TypeError, "k has dtype torch.float64, expected"),
    (lambda q, k, v: ops.cross_attention(q, None, v), TypeError, "k is NoneType, expected a Tensor"),
    (lambda q, k, v: ops.cross_attention(q, k[..., :8], v), ValueError, "k has shape .2, 4, 77, 8., expected"),
    (lambda q, k, v: ops.cross_attention(q, k, v[:, :, :8]), ValueError, "v has shape .2, 4, 8, 16., expected"),
    (lambda q, k, v: ops.cross_attention(q, k[:, :3], v[:, :3]), ValueError, "q has 4 heads, expected a multiple of"),
    (lambda q, k, v: ops.cross_attention(q, k, v, key_mask=torch.ones(2, 77)), TypeError, "key_mask has dtype"),
    (
        lambda q, k, v: ops.cross_attention(q, k, v, key_mask=torch.ones(2, 76, dtype=torch.bool)),
        ValueError,
        "key_mask has shape .2, 76., expected .2, 77.",
    ),
    (lambda q, k, v: ops.cross_attention(q, k, v, bias=torch.ones(3, 1, 1)), ValueError, "bias has shape .3, 1, 1."),
    (lambda q, k, v: ops.cross_attention(q, k, v, attn_mask=[True]), TypeError, "attn_mask is list"),
    (lambda q, k, v: ops.cross_attention(q, k, v, dropout_p=1.0), ValueError, "dropout_p is 1.0"),
    (lambda q, k, v: ops.cross_attention(q, k, v, softcap=0.0), ValueError, "softcap is 0.0"),
    (lambda q, k, v: ops.cross_attention(q, k, v, window_size=(-2, 0)), ValueError, "window_size is .-2, 0."),
    (lambda q, k, v: ops.cross_attention(q, k, v, window_alignment="x"), ValueError, "window_alignment is 'x'"),
    (
        lambda q, k, v: ops.cross_attention(q, k, v, prefix_lengths=torch.ones(2).long()),
        ValueError,
        "expected is_causal=True",
    ),
    (
        lambda q, k, v: ops.cross_attention(q, k, v, dropout_p=0.1, seed=1, generator=torch.Generator()),
        ValueError,
        "got generator and seed",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(
    call: Callable[[Tensor, Tensor, Tensor], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"cross_attention: .*{message}"):
        call(*qkv())
