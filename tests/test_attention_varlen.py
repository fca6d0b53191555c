"""cross_attention of packed sequences: the numerics contract, and what it has in common with that of padded ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mmkern
from mmkern import ops
from mmkern.ops._define import OPS
from mmkern.reference import attention as reference
from tests import contract
from tests.cases.attention_varlen import CASES, LENGTHS, ends
from tests.cases.case import Case

OP = "cross_attention_varlen"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RUNS = [
    (case, dtype)
    for case in CASES
    for dtype in DTYPES
    if dtype == torch.float32 or case.label.startswith(("plain-three", "in one", "dropout-three"))
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_forward(case, OPS[OP], dtype, device)


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_backward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_backward(case, contract.by_autograd(OPS[OP]), dtype, device)


def packed(lengths: str = "three", dtype: torch.dtype = torch.float32, width: int = 16) -> tuple[Any, ...]:
    """q, k, v with gradients, where segments begin, and the longest."""
    queries, keys = LENGTHS[lengths]
    g = torch.Generator().manual_seed(0)
    sizes = ((sum(queries), 4, width), (sum(keys), 2, width), (sum(keys), 2, width))
    tensors = [torch.randn(size, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]
    return *tensors, ends(queries), ends(keys), max(queries), max(keys)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal top left": {"is_causal": True, "causal_alignment": "top_left"},
    "window": {"window_size": (3, 1)},
    "resample": {"window_size": (2, 2), "window_alignment": "resample"},
    "softcap": {"softcap": 2.0, "scale": 0.7},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_each_segment_alone(name: str) -> None:
    """Bits and all: a segment is computed as if it were alone."""
    q, k, v, begin_q, begin_k, *longest = packed()
    out, lse = ops.cross_attention_varlen(q, k, v, begin_q, begin_k, *longest, **OPTIONS[name], return_lse=True)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad((out, lse), (q, k, v), (grad, lse.detach().nan_to_num(0, 0, 0)))
    for b in range(len(begin_q) - 1):
        rows, keys = (slice(int(begin[b]), int(begin[b + 1])) for begin in (begin_q, begin_k))
        alone = [x.detach()[at].transpose(0, 1)[None].requires_grad_() for x, at in ((q, rows), (k, keys), (v, keys))]
        one, one_lse = ops.cross_attention(*alone, **OPTIONS[name], return_lse=True)
        assert torch.equal(out[rows], one[0].transpose(0, 1))
        assert torch.equal(lse[:, rows], one_lse[0])
        found = torch.autograd.grad(
            (one, one_lse), alone, (grad[rows].transpose(0, 1)[None], one_lse.detach().nan_to_num(0, 0, 0))
        )
        for whole, part, at in zip(grads, found, (rows, keys, keys), strict=True):
            assert torch.equal(whole[at], part[0].transpose(0, 1))


def test_dropout_differs_between_segments_and_replays() -> None:
    q, k, _, begin_q, begin_k, *longest = packed("eight")
    v = torch.eye(9).expand(2, 9, 9).transpose(0, 1)  # a row of v shows one weight
    v = torch.cat([v[:n] for n in LENGTHS["eight"][1]])
    options = {"dropout_p": 0.5, "seed": 3, "offset": 11}
    out = ops.cross_attention_varlen(q, k, v, begin_q, begin_k, *longest, **options)
    assert torch.equal(out, ops.cross_attention_varlen(q, k, v, begin_q, begin_k, *longest, **options))
    for b, (queries, keys) in enumerate(zip(*LENGTHS["eight"], strict=True)):
        seed = torch.tensor([3, 11 + int(begin_q[b]) * 4 * 3])
        kept = reference.kept(torch.Size([1, 4, queries, keys]), seed, 0.5)[0]
        rows = slice(int(begin_q[b]), int(begin_q[b + 1]))
        assert torch.equal(out[rows].transpose(0, 1)[..., :keys] != 0, kept)


def test_same_bits_for_any_number_of_threads() -> None:
    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        q, k, v, *rest = packed("eight", width=64)
        out = ops.cross_attention_varlen(q, k, v, *rest)
        return [out, *torch.autograd.grad(out.sum(), (q, k, v))]

    before = torch.get_num_threads()
    try:
        alone = run(1)
        for threads in (2, 3):
            assert all(torch.equal(a, b) for a, b in zip(alone, run(threads), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("segments", [0, 2])
def test_nothing_packed(segments: int) -> None:
    q, k, v = (torch.randn(0, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    begin = torch.zeros(segments + 1, dtype=torch.int64)
    for backend in (None, "reference"):
        with mmkern.use_backend(backend):
            out, lse = ops.cross_attention_varlen(q, k, v, begin, begin, 0, 0, return_lse=True)
            assert (out.shape, lse.shape) == ((0, 4, 16), (4, 0))
            assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [x.shape for x in (q, k, v)]


def test_gradcheck() -> None:
    q, k, v, *rest = packed("no key", torch.float64, width=3)
    assert torch.autograd.gradcheck(lambda *x: ops.cross_attention_varlen(*x, *rest, softcap=3.0), (q, k, v))


def test_opcheck() -> None:
    case = next(case for case in CASES if case.label == "dropout-three")
    args = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in case.arguments(torch.float32)
    ]
    torch.library.opcheck(torch.ops.mmkern.cross_attention_varlen.default, args)


def test_compiles_whole_and_runs_under_autocast() -> None:
    q, k, v, *rest = packed()
    compiled = torch.compile(ops.cross_attention_varlen, fullgraph=True, backend="aot_eager")
    out = compiled(q, k, v, *rest)
    assert torch.equal(out, ops.cross_attention_varlen(q, k, v, *rest))
    found = torch.autograd.grad(out.sum(), q)[0]
    assert torch.equal(found, torch.autograd.grad(ops.cross_attention_varlen(q, k, v, *rest).sum(), q)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.cross_attention_varlen(q, k, v, *rest).dtype == torch.bfloat16


def test_lengths_of_int32() -> None:
    q, k, v, begin_q, begin_k, *longest = packed()
    found = ops.cross_attention_varlen(q, k, v, begin_q.int(), begin_k.int(), *longest)
    assert torch.equal(found, ops.cross_attention_varlen(q, k, v, begin_q, begin_k, *longest))


def changed(**given: Any) -> list[Any]:
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return list((dict(zip(names, packed(), strict=True)) | given).values())


@pytest.mark.parametrize(
    ("error", "message", "args"),
    [
        (ValueError, r"q has shape \[1, 24, 4, 16\], expected \[length, heads", changed(q=torch.randn(1, 24, 4, 16))),
        (ValueError, r"k has shape \[43, 2, 8\], expected \[Tk, Hkv, 16\]", changed(k=torch.randn(43, 2, 8))),
        (ValueError, r"v has shape \[42, 2, 16\], expected \[43, 2\]", changed(v=torch.randn(42, 2, 16))),
        (TypeError, "cu_seqlens_q is list, expected a Tensor", changed(cu_seqlens_q=[0, 24])),
        (TypeError, "cu_seqlens_q has dtype torch.float32", changed(cu_seqlens_q=torch.tensor([0.0, 24.0]))),
        (ValueError, r"cu_seqlens_q has shape \[1, 2\]", changed(cu_seqlens_q=torch.tensor([[0, 24]]))),
        (ValueError, r"cu_seqlens_q is \[1, 5, 22, 24\]", changed(cu_seqlens_q=torch.tensor([1, 5, 22, 24]))),
        (ValueError, r"cu_seqlens_k is \[0, 50, 40, 43\]", changed(cu_seqlens_k=torch.tensor([0, 50, 40, 43]))),
        (ValueError, r"cu_seqlens_k is \[0, 9, 13, 44\]", changed(cu_seqlens_k=torch.tensor([0, 9, 13, 44]))),
        (ValueError, r"cu_seqlens_k has shape \[3\], expected \[4\]", changed(cu_seqlens_k=torch.tensor([0, 13, 43]))),
        (ValueError, "max_seqlen_q is 16, expected at least 17", changed(max_seqlen_q=16)),
        (TypeError, "max_seqlen_q is float, expected an int", changed(max_seqlen_q=17.0)),
        (TypeError, "max_seqlen_k is NoneType, expected an int", changed(max_seqlen_k=None)),
        (ValueError, "max_seqlen_k is 29, expected at least 30", changed(max_seqlen_k=29)),
    ],
)
def test_bad_input(error: type[Exception], message: str, args: list[Any]) -> None:
    if isinstance(args[3], Tensor) and args[3].shape == (4,) and "cu_seqlens_k has shape" in message:
        args[6] = 43
    with pytest.raises(error, match=f"{OP}: {message}"):
        ops.cross_attention_varlen(*args)


def test_bad_options() -> None:
    args = packed()
    with pytest.raises(ValueError, match=rf"{OP}: prefix_lengths has shape \[2\], expected \[3\]"):
        ops.cross_attention_varlen(*args, is_causal=True, prefix_lengths=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=f"{OP}: dropout_p is 1, expected a number"):
        ops.cross_attention_varlen(*args, dropout_p=1)
