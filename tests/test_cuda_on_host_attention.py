"""Attention on CUDA without a device: what the cases of the family cannot ask. See test_cuda_on_host.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkern import backends
from mmkern.backends import cuda, cuda_attention
from mmkern.ops._define import OPS
from mmkern.reference.attention import BOTTOM_RIGHT, RESAMPLE, TOP_LEFT, kept
from tests import contract
from tests.cases.attention import Sizes, case, key_mask, scores
from tests.cuda_on_host import calls
from tests.cuda_on_host.harness import HostLauncher, Order

pytestmark = pytest.mark.usefixtures("on_host")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = {"scale": 1.0, "softcap": 0.0, "left": -1, "right": -1, "alignment": BOTTOM_RIGHT, "dropout_p": 0.0}


@pytest.fixture(autouse=True)
def no_plans_kept() -> Iterator[None]:
    yield
    cuda_attention.Plan.of.cache_clear()


def split_into(least_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_attention, "_LEAST_KEYS", least_keys)
    cuda_attention.Plan.of.cache_clear()


def attend(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    names = OPS["cross_attention"].names[3:]
    out, lse = calls.forward("cross_attention", q, k, v, *((PLAIN | given).get(name) for name in names))
    return out, lse


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- Dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 2**32 - 5, 2**40 + 3, -7], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(70, 131), (3, 600)])
def test_dropout_keeps_what_philox_says(queries: int, keys: int, offset: int, dtype: torch.dtype) -> None:
    """Uniform scores, and values that are ones of a key each: the weights themselves come out."""
    seed = torch.tensor([-(2**50) + 3, offset])
    q, k = torch.zeros(2, 2, queries, 4, dtype=dtype), torch.zeros(2, 2, keys, 4, dtype=dtype)
    mask = kept(torch.Size((2, 2, queries, keys)), seed, 0.4)
    for first in range(0, keys, 256):
        v = torch.eye(keys, dtype=dtype)[:, first : first + 256].expand(2, 2, -1, -1)
        out, lse = attend(q, k, v, seed=seed, dropout_p=0.4)
        assert torch.equal(out != 0, mask[..., first : first + 256])
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(keys)))


def test_dropout_without_a_seed_or_a_share_is_none() -> None:
    q, k, v = randn(1, 1, 5, 8), randn(1, 1, 9, 8), randn(1, 1, 9, 8)
    for given in ({"dropout_p": 0.5}, {"seed": torch.tensor([1, 2])}):
        assert torch.equal(attend(q, k, v, **given)[0], attend(q, k, v)[0])


# ---- Sizes, layouts, splits ------------------------------------------------------------------------------------------

WIDTHS = [
    Sizes(1, 2, 1, 19, 70, 256, 200),
    Sizes(1, 1, 1, 7, 40, 200, 256),
    Sizes(1, 1, 1, 70, 33, 129, 130),
    Sizes(2, 8, 2, 6, 90, 64, 65),  # 24 rows of grouped heads
    Sizes(1, 1, 1, 65, 128, 16, 64),  # tiles that are full
    Sizes(1, 1, 1, 5, 64, 8, 256),
    Sizes(1, 1, 1, 9, 700, 8, 3),  # neither few queries nor short keys
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", WIDTHS, ids=str)
def test_widths(sizes: Sizes, dtype: torch.dtype) -> None:
    built = case("widths", sizes, key_mask=key_mask, bias=scores("H", "S"))
    contract.check_forward(built, lambda *args: calls.forward("cross_attention", *args), dtype)


@pytest.mark.parametrize("alignment", [TOP_LEFT, BOTTOM_RIGHT, RESAMPLE])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (5, -1), (-1, 3), (2**62, 2**62), (300, 2)])
@pytest.mark.parametrize(("queries", "keys"), [(5, 300), (40, 17), (33, 33)])
def test_windows(queries: int, keys: int, left: int, right: int, alignment: int) -> None:
    if alignment == RESAMPLE:
        left, right = min(left, 2**40), min(right, 2**40)  # what the reference multiplies
    window = {"left": left, "right": right, "alignment": alignment, "prefix_lengths": torch.tensor([0, 9])}
    built = case("window", Sizes(2, 2, 1, queries, keys, 8, 8), **window)
    contract.check_forward(built, lambda *args: calls.forward("cross_attention", *args), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("alignment", "queries", "outside"), [(BOTTOM_RIGHT, 64, slice(0, 320)), (RESAMPLE, 256, slice(128, 400))]
)
def test_tiles_outside_the_band_are_not_read(alignment: int, queries: int, outside: slice, dtype: torch.dtype) -> None:
    """Were they read, weights of 0 would meet what v holds there."""
    q, k, v = (randn(1, 2, n, 16, dtype=dtype, seed=n) for n in (queries, 400, 401))
    band = {"left": 2, "right": 3, "alignment": alignment}
    expected = attend(q, k, v[:, :, :400], **band)[0]
    for x in (k, v):
        x[:, :, outside] = math.nan
    assert torch.equal(attend(q, k, v[:, :, :400], **band)[0][:, :, :64], expected[:, :, :64])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [2, 20])
def test_offsets_beyond_32_bits(queries: int, dtype: torch.dtype) -> None:
    """Heads 2^31 elements apart, in address space that is reserved but hardly touched."""
    near = [randn(1, 2, n, 16, dtype=dtype, seed=n) for n in (queries, 31, 32)]
    near[2] = near[2][:, :, :31]
    stride = (1 << 31) + 8
    far = [
        torch.empty(stride + x.shape[2] * 16, dtype=dtype).as_strided(x.shape, (2 * stride, stride, 16, 1))
        for x in near
    ]
    bias = torch.empty(stride + queries, dtype=dtype).as_strided((1, 2, queries, 1), (0, stride, 1, 1))
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    bias.copy_(randn(1, 2, queries, 1))
    for one, other in zip(attend(*far, bias=bias), attend(*near, bias=bias.contiguous()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_rows_give_the_same_bits(dtype: torch.dtype) -> None:
    dense = [randn(2, 2, n, 24, dtype=dtype, seed=n) for n in (20, 70, 71)]
    dense[2] = dense[2][:, :, :70]
    shifted = []
    for x in dense:
        wide = torch.full((*x.shape[:3], 27), math.nan, dtype=dtype)
        wide[..., 1:25] = x
        shifted.append(wide[..., 1:25])
    for one, other in zip(attend(*dense), attend(*shifted), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_split_keys_agree_with_whole_ones(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, launcher: HostLauncher
) -> None:
    q, k, v = (randn(2, h, n, 32, dtype=dtype, seed=n) for h, n in ((4, 3), (2, 400), (2, 401)))
    v = v[:, :, :400]
    seen = torch.arange(400) < torch.tensor([[0], [130]])  # whole splits see nothing
    seen[1, 300:] = True
    split_into(64, monkeypatch)
    launcher.launched.clear()
    out, lse = attend(q, k, v, key_mask=seen, scale=0.2)
    assert "merge_attention" in launcher.launched
    with launcher.order(Order.random, 3):
        assert torch.equal(out, attend(q, k, v, key_mask=seen, scale=0.2)[0])
    split_into(1 << 20, monkeypatch)
    launcher.launched.clear()
    whole, whole_lse = attend(q, k, v, key_mask=seen, scale=0.2)
    assert "merge_attention" not in launcher.launched
    torch.testing.assert_close(out, whole, rtol=0, atol=4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(lse, whole_lse)
    assert out[0].eq(0).all()
    assert lse[0].eq(-math.inf).all()


# ---- What is not a number --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [40, 600])
def test_a_nan_stays_in_its_row(keys: int, dtype: torch.dtype) -> None:
    q, k, v = randn(1, 2, 7, 16, dtype=dtype), randn(1, 2, keys, 16, dtype=dtype), randn(1, 2, keys, 8, dtype=dtype)
    out, lse = attend(q, k, v)
    q[0, 1, 3, 5] = math.nan
    touched = torch.zeros(1, 2, 7, dtype=torch.bool)
    touched[0, 1, 3] = True
    for got, clean in zip(attend(q, k, v), (out, lse), strict=True):
        assert got[touched].isnan().all()
        assert torch.equal(got[~touched], clean[~touched])


@pytest.mark.parametrize("keys", [40, 600])
def test_infinite_scores_are_the_references(keys: int) -> None:
    q, k, v = randn(1, 1, 4, 8), randn(1, 1, keys, 8), randn(1, 1, keys, 8)
    bias = torch.zeros(1, 1, 4, keys)
    bias[..., 1, 3] = math.inf
    bias[..., 2, :] = -math.inf
    bias[..., 3, 30] = math.nan
    given = [q, k, v, *((PLAIN | {"bias": bias}).get(name) for name in OPS["cross_attention"].names[3:])]
    for got, expected in zip(attend(q, k, v, bias=bias), OPS["cross_attention"].reference(*given), strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


# ---- The choice of a backend -----------------------------------------------------------------------------------------


def test_plans_depend_on_sizes_alone_and_fit() -> None:
    for dtype in DTYPES:
        for width in (1, 40, 64, 128, 256):
            for rows, keys in ((1, 77), (8, 100_000), (4096, 77), (4096, 512)):
                plan = cuda_attention.Plan.of(dtype, 16, rows, keys, width, width)
                assert plan.shared_bytes + 24 <= 99 << 10
                assert plan.splits * plan.split_keys >= keys > (plan.splits - 1) * plan.split_keys
                assert (plan.splits > 1) == (keys == 100_000)
                assert plan.tiles * plan.warps * 16 >= rows


def test_reasons_about_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = backends.Backend("cuda", "cpu", DTYPES, lambda: None, backends._find_cuda, backends._cuda_limits)
    monkeypatch.setattr(backends, "BACKENDS", (on_cpu,))
    op = OPS["cross_attention"]
    monkeypatch.setattr(op, "_kernels", {})
    monkeypatch.setattr(op, "_direct", None)  # the short way asks no backend
    wide, narrow = randn(1, 1, 2, 300), randn(1, 1, 2, 8)

    def answer(*args: Any) -> str:
        return str(backends.choices(op, op.name, args[0], args)[0])

    assert answer(wide, wide, wide) == "cuda: takes up to 256 channels a head, got 300"
    assert answer(narrow, narrow, wide) == "cuda: takes up to 256 channels a head, got 300"
    assert answer(narrow, narrow, narrow) == answer(narrow) == "cuda: chosen"

    called = []
    forward = cuda.KERNELS["cross_attention"]
    monkeypatch.setitem(cuda.KERNELS, "cross_attention", lambda *args: (called.append(1), forward(*args)))
    tail = [PLAIN.get(name) for name in op.names[3:]]
    for x in (narrow, wide, narrow, wide):  # the kernel found for one call is not taken for the next
        expected = op.reference(x, x, x, *tail)
        for one, other in zip(op(x, x, x, *tail), expected, strict=True):
            torch.testing.assert_close(one, other)
    assert len(called) == 2
    with backends.use_backend("cuda"):
        with pytest.raises(ValueError, match="cannot run this call: takes up to 256 channels a head, got 300"):
            op(wide, wide, wide, *tail)
        # No kernel of the backward: that of another backend, or the reference.
        x = narrow.clone().requires_grad_()
        op(x, narrow, narrow, *tail)[0].sum().backward()
    y = narrow.clone().requires_grad_()
    op.reference(y, narrow, narrow, *tail)[0].sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
