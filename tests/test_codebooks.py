"""Codebooks that follow their rows: moving averages held to their formula, k-means to scikit-learn's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mmkern
from mmkern import ops
from mmkern.ops import codebooks


def blobs(n: int = 1200, k: int = 9, width: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(n)
    centers = 4 * torch.randn(k, width, generator=g, dtype=torch.float64)
    noise = torch.randn(n, width, generator=g, dtype=torch.float64)
    return (centers[torch.randint(0, k, (n,), generator=g)] + noise).to(dtype)


# ---- Moving averages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ema_is_its_formula(dtype: torch.dtype) -> None:
    """As vector-quantize-pytorch has it, with a matrix of ones and zeros."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, codes = torch.randn(3, 40, 7).to(dtype), torch.randint(0, 12, (3, 40))
    size, average = torch.rand(12, dtype=wide) * 5, torch.randn(12, 7, dtype=wide)
    before = size.clone(), average.clone()
    found = ops.ema_codebook_update(x, codes, size, average, decay=0.9, eps=1e-3)
    one_hot = torch.nn.functional.one_hot(codes.flatten(), 12).to(wide)
    expected_size = size.lerp(one_hot.sum(0), 0.1)
    expected_average = average.lerp(one_hot.T @ x.flatten(0, 1).to(wide), 0.1)
    smoothed = (expected_size + 1e-3) / (expected_size.sum() + 12e-3) * expected_size.sum()
    torch.testing.assert_close(found.cluster_size, expected_size)
    torch.testing.assert_close(found.embed_avg, expected_average)
    torch.testing.assert_close(found.codebook, expected_average / smoothed[:, None])
    assert torch.equal(size, before[0])
    assert torch.equal(average, before[1])


def test_ema_of_all_is_the_mean_of_each_code() -> None:
    x, codes = torch.randn(500, 5), torch.randint(0, 7, (500,))
    found = ops.ema_codebook_update(x, codes, torch.zeros(7), torch.zeros(7, 5), decay=0.0, eps=0.0)
    expected = torch.stack([x[codes == k].mean(0) for k in range(7)])
    torch.testing.assert_close(found.codebook, expected)
    assert torch.equal(found.cluster_size, torch.bincount(codes).float())


def test_ema_without_rows_fades() -> None:
    size, average = torch.ones(4), torch.randn(4, 3)
    for x, codes in ((torch.randn(0, 3), torch.zeros(0).long()), (torch.randn(5, 3), torch.tensor([-1, 4, 9, -7, 5]))):
        found = ops.ema_codebook_update(x, codes, size, average, decay=0.5, eps=0.0)
        assert torch.equal(found.cluster_size, size / 2)
        torch.testing.assert_close(found.codebook, average)


def test_ema_gives_no_gradient_and_compiles_whole() -> None:
    x, codes = torch.randn(20, 3, requires_grad=True), torch.randint(0, 4, (20,))
    size, average = torch.ones(4), torch.randn(4, 3)
    expected = ops.ema_codebook_update(x, codes, size, average)
    assert not any(out.requires_grad for out in expected)
    found = torch.compile(ops.ema_codebook_update, fullgraph=True, backend="aot_eager")(x, codes, size, average)
    torch.testing.assert_close(found, expected)


# ---- k-means ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 9, 40])
def test_kmeans_is_that_of_scikit_learn(k: int) -> None:
    """From the same centres: each step the same, until no row changes its centre."""
    cluster = pytest.importorskip("sklearn.cluster")
    x = blobs()
    for tol in (0.0, 1e-3):
        theirs = cluster.KMeans(k, init=x[:k].numpy(), n_init=1, max_iter=200, tol=tol, algorithm="lloyd").fit(
            x.numpy()
        )
        ours = ops.kmeans(x, k, init=x[:k], iterations=200, tol=tol)
        assert len(ours.inertia) in (theirs.n_iter_, theirs.n_iter_ + 1)
        torch.testing.assert_close(ours.centers, torch.from_numpy(theirs.cluster_centers_))
        assert torch.equal(ours.codes, torch.from_numpy(theirs.labels_).long())
        assert ours.inertia[-1].item() == pytest.approx(theirs.inertia_)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_kmeans_lowers_its_inertia(metric: Any, dtype: torch.dtype) -> None:
    x = blobs(dtype=dtype)
    found = ops.kmeans(x, 9, 5, tol=0.0, metric=metric)
    slack = 1e-5 if dtype != torch.float64 else 1e-12
    if metric == "l2":  # the mean direction, brought to the length 1, is the best centre too, but for rounding
        assert (found.inertia.diff() <= slack * found.inertia[0]).all()
    assert found.inertia[-1] < found.inertia[0]
    assert found.centers.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rows = x.to(found.centers.dtype)
    if metric == "cosine":
        rows = torch.nn.functional.normalize(rows, dim=-1)
        torch.testing.assert_close(found.centers.norm(dim=-1), torch.ones(9, dtype=found.centers.dtype))
    codes, distances = ops.nearest_code(rows, found.centers, return_distance=True)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.inertia[-1], distances.double().square().sum())
    means = torch.stack([rows[codes == k].mean(0) for k in range(9)])
    if metric == "cosine":
        means = torch.nn.functional.normalize(means, dim=-1)
    torch.testing.assert_close(found.centers, means, rtol=1e-4, atol=1e-5)


def test_kmeans_is_the_same_for_a_seed() -> None:
    x = blobs(dtype=torch.float32)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ops.kmeans(x, 30, 11, iterations=5))
        found.append(ops.kmeans(x, 30, torch.tensor(11), iterations=5))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    with mmkern.use_backend("reference"):
        formula = ops.kmeans(x, 30, 11, iterations=5)
    assert torch.equal(formula.codes, found[0].codes)
    assert not torch.equal(ops.kmeans(x, 30, 12, iterations=5).centers, found[0].centers)
    drawn = [ops.kmeans(x, 30, generator=torch.Generator().manual_seed(s), iterations=5).centers for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_kmeans_begins_with_rows_that_are_spread() -> None:
    """Of well separated blobs k-means++ takes one row each far more often than k rows at random do."""
    corners = 100.0 * torch.tensor([[i, j] for i in (0, 1) for j in (0, 1, 2)])
    x = corners.repeat_interleave(50, 0) + torch.randn(300, 2)
    hits = 0
    for seed in range(40):
        found = ops.kmeans(x, 6, seed, iterations=1)
        hits += int(len((found.codes.reshape(6, 50)[:, 0]).unique()) == 6)
    assert hits >= 36  # rows at random: 6!/6⁶, 1.5 %


def test_each_row_is_drawn_as_often_as_its_square_says() -> None:
    """The second of two centres, where the first can be told: a chi-square test."""
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    counts = torch.zeros(4, 4)
    for seed in range(3000):
        first, second = codebooks._spread(x, 2, torch.tensor([seed, 0])).flatten().long().tolist()
        counts[first, second] += 1
    torch.testing.assert_close(counts.sum(1) / 3000, torch.full((4,), 0.25), rtol=0, atol=0.04)
    squares = (x - x.T).square()
    expected = squares / squares.sum(1, keepdim=True) * counts.sum(1, keepdim=True)
    possible = expected > 0
    assert (counts[~possible] == 0).all()
    chi_square = ((counts - expected).square() / expected)[possible].sum()
    assert chi_square < 26.1  # 8 degrees of freedom, one in a thousand


def test_a_centre_without_rows_takes_the_row_that_is_furthest() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    x = blobs()
    init = torch.cat([x[:7], torch.full((2, 6), 1e3, dtype=torch.float64)])
    theirs = cluster.KMeans(9, init=init.numpy(), n_init=1, max_iter=200, tol=0, algorithm="lloyd").fit(x.numpy())
    ours = ops.kmeans(x, 9, init=init, iterations=200, tol=0.0)
    assert len(ours.codes.unique()) == 9
    torch.testing.assert_close(ours.centers, torch.from_numpy(theirs.cluster_centers_))
    assert torch.equal(ours.codes, torch.from_numpy(theirs.labels_).long())


def test_fewer_different_rows_than_centres() -> None:
    for x in (torch.zeros(5, 3), torch.tensor([[1.0], [1.0], [2.0]])):
        found = ops.kmeans(x, len(x), 0)
        assert found.centers.isfinite().all()
        assert found.inertia[-1] == 0
    alone = ops.kmeans(torch.randn(1, 2, 3), 1, 0)
    assert alone.codes.tolist() == [0, 0]


# ---- Refused ---------------------------------------------------------------------------------------------------------

E = "ema_codebook_update"
REFUSED: tuple[tuple[Callable[..., Any], type[Exception], str], ...] = (
    (
        lambda x, i, n, m: ops.ema_codebook_update(x, i, n, m, 1.5),
        ValueError,
        f"{E}: decay is 1.5, expected a number from 0",
    ),
    (lambda x, i, n, m: ops.ema_codebook_update(x, i, n, m, eps=-1), ValueError, f"{E}: eps is -1, expected"),
    (
        lambda x, i, n, m: ops.ema_codebook_update(x, i[1:], n, m),
        ValueError,
        rf"{E}: codes has shape \[19\], expected \[20\]",
    ),
    (lambda x, i, n, m: ops.ema_codebook_update(x, x[:, 0], n, m), TypeError, f"{E}: codes has dtype torch.float32"),
    (
        lambda x, i, n, m: ops.ema_codebook_update(x, i, n[None], m),
        ValueError,
        rf"{E}: cluster_size has shape \[1, 4\], expected \[4\]",
    ),
    (
        lambda x, i, n, m: ops.ema_codebook_update(x, i, n.half(), m),
        TypeError,
        f"{E}: cluster_size has dtype torch.float16",
    ),
    (
        lambda x, i, n, m: ops.ema_codebook_update(x, i, n, m[:, 1:]),
        ValueError,
        rf"{E}: embed_avg has shape \[4, 2\], expected \[4, 3\]",
    ),
    (
        lambda x, i, n, m: ops.ema_codebook_update(x, i, n, m.double()),
        TypeError,
        f"{E}: embed_avg has dtype torch.float64",
    ),
    (lambda x, i, n, m: ops.ema_codebook_update(x, i, None, m), TypeError, f"{E}: cluster_size is NoneType"),
    (lambda x, i, n, m: ops.kmeans(x, 21), ValueError, "kmeans: k is 21, expected an int from 1 to 20"),
    (lambda x, i, n, m: ops.kmeans(x, 2.0), TypeError, "kmeans: k is float, expected an int"),
    (lambda x, i, n, m: ops.kmeans(x, 2, "a"), TypeError, "kmeans: seed is str, expected an int"),
    (lambda x, i, n, m: ops.kmeans(x, 2, iterations=0), ValueError, "kmeans: iterations is 0, expected an int from 1"),
    (lambda x, i, n, m: ops.kmeans(x, 2, tol=-1.0), ValueError, "kmeans: tol is -1.0, expected a number of at least 0"),
    (lambda x, i, n, m: ops.kmeans(x, 2, init="random"), ValueError, "kmeans: init is 'random', expected 'k-means"),
    (lambda x, i, n, m: ops.kmeans(x, 2, init=m), ValueError, r"kmeans: init has shape \[4, 3\], expected \[2, 3\]"),
    (lambda x, i, n, m: ops.kmeans(x, 2, metric="dot"), ValueError, "kmeans: metric is 'dot', expected 'l2', 'cosine'"),
    (lambda x, i, n, m: ops.kmeans(x.long(), 2), TypeError, "kmeans: x has dtype torch.int64"),
    (lambda x, i, n, m: ops.kmeans(x * torch.nan, 2), ValueError, "kmeans: x has NaN or an infinite number"),
)


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input_is_named(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    g = torch.Generator().manual_seed(0)
    with pytest.raises(error, match=message):
        call(torch.randn(20, 3, generator=g), torch.randint(0, 4, (20,)), torch.ones(4), torch.randn(4, 3))
