"""Codebooks that follow their rows: moving averages, and k-means."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mmkern.reference.philox import philox

from ._checks import (
    FLOATING,
    LARGEST,
    accumulation_dtype,
    check_number,
    check_tensor,
    floating_rows,
    non_negative_number,
)
from ._random import seed_tensor
from .quantization import Metric, _code_sums, _integers, nearest_code

_WORD = 2.0**-32


class EmaCodebook(NamedTuple):
    """What ``ema_codebook_update`` returns."""

    codebook: Tensor  # [K, D]
    cluster_size: Tensor  # [K]
    embed_avg: Tensor  # [K, D]


class KMeans(NamedTuple):
    """What ``kmeans`` returns."""

    centers: Tensor  # [k, D]
    codes: Tensor  # [N], int64: of the centre that is nearest to each row
    inertia: Tensor  # [iterations], float64: Σ|x − c|² before each step, and in the end


def ema_codebook_update(
    x: Tensor, codes: Tensor, cluster_size: Tensor, embed_avg: Tensor, decay: float = 0.8, eps: float = 1e-5
) -> EmaCodebook:
    """A codebook as the moving average of the rows that have its codes: ``c = m / n̂``.

    ``n ← decay·n + (1 − decay)·count``, ``m ← decay·m + (1 − decay)·Σx``, and with ``s = Σn`` n smoothed,
    ``n̂ = (n + eps)·s / (s + K·eps)``, so that a code without rows does not divide by zero.

    Args:
        x: ``[..., D]``, in any floating dtype; what has a gradient gives none here.
        codes: integers ``[...]``; what is below 0 or from K on counts nowhere.
        cluster_size: n, ``[K]``, float32 or float64.
        embed_avg: m, ``[K, D]``, of that dtype.
        decay: from 0 to 1.
        eps: at least 0.
    Returns: codebook, cluster_size and embed_avg, new tensors.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: van den Oord et al. 2017, Neural Discrete Representation Learning, eq. 6 to 8; the smoothing is that of its
        published code.
    """
    op = "ema_codebook_update"
    floating_rows("x")(op, {"x": x})
    check_number(op, "decay", decay, "a number from 0 to 1", 0.0, 1.0)
    non_negative_number("eps")(op, {"eps": eps})
    for name, given in (("cluster_size", cluster_size), ("embed_avg", embed_avg)):
        if given is None:
            raise TypeError(f"{op}: {name} is NoneType, expected a Tensor")
    count, width = cluster_size.numel(), x.shape[-1]
    check_tensor(op, "cluster_size", cluster_size, x, (torch.float32, torch.float64), (max(count, 1),), "x")
    check_tensor(op, "embed_avg", embed_avg, x, (cluster_size.dtype,), (count, width), "x")
    codes = _integers(op, "codes", codes, x, "x")
    if codes.shape != x.shape[:-1]:
        raise ValueError(f"{op}: codes has shape {list(codes.shape)}, expected {list(x.shape[:-1])}")
    with torch.no_grad():
        sums, counts = _code_sums(x.detach(), codes, count)
        cluster_size = decay * cluster_size + (1 - decay) * counts.to(cluster_size.dtype)
        embed_avg = decay * embed_avg + (1 - decay) * sums.to(embed_avg.dtype)
        total = cluster_size.sum()
        smoothed = (cluster_size + eps) * (total / (total + count * eps))
        return EmaCodebook(embed_avg / smoothed[:, None], cluster_size, embed_avg)


def kmeans(
    x: Tensor,
    k: int,
    seed: int | Tensor | None = None,
    *,
    iterations: int = 100,
    tol: float = 1e-4,
    init: Literal["k-means++"] | Tensor = "k-means++",
    metric: Metric = "l2",
    generator: torch.Generator | None = None,
) -> KMeans:
    """k centres of the rows of x by Lloyd's algorithm: each the mean of the rows that are nearest to it.

    Distances are never a matrix in memory. A centre without rows takes the row that is furthest from its own, as in
    scikit-learn. The same seed gives the same bits, for any number of threads.

    Args:
        x: ``[..., D]``, finite; N rows in all.
        k: from 1 to N.
        seed, generator: where random numbers come from, as in ``cross_attention``.
        iterations: at most so many steps, at least 1.
        tol: stop where the centres move by less than this share of the channels' mean variance, ``Σ|Δc|² ≤ tol·var``;
            in any case where no row changes its centre.
        init: "k-means++", or centres ``[k, D]`` to begin with, in the dtype of x or of its sums.
        metric: "l2"; "cosine" is k-means of the directions of rows, with centres of length 1.
    Returns: centers in float32 (float64 beside that), codes, inertia. No gradient; not for compiled graphs, since how
        many steps it takes hangs on the numbers.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Lloyd 1982; Arthur and Vassilvitskii 2007, k-means++, §2.2.
    """
    op = "kmeans"
    floating_rows("x")(op, {"x": x})
    rows = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1]).to(accumulation_dtype(x.dtype))
    for name, value, most in (("k", k, len(rows)), ("iterations", iterations, 2**31)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{op}: {name} is {type(value).__name__}, expected an int")
        if not 1 <= value <= most:
            raise ValueError(f"{op}: {name} is {value}, expected an int from 1 to {most}")
    check_number(op, "tol", tol, "a number of at least 0", 0.0, LARGEST)
    if metric not in ("l2", "cosine"):
        raise ValueError(f"{op}: metric is {metric!r}, expected 'l2', 'cosine'")
    if not rows.isfinite().all():
        raise ValueError(f"{op}: x has NaN or an infinite number, expected finite ones")
    with torch.no_grad():
        if metric == "cosine":
            rows = functional.normalize(rows, dim=-1)
        if isinstance(init, Tensor):
            check_tensor(op, "init", init, x, FLOATING, (k, x.shape[-1]), "x")
            centers = init.detach().to(rows.dtype)
        elif init == "k-means++":
            centers = _spread(rows, k, seed_tensor(op, rows, generator, seed, 0))
        else:
            raise ValueError(f"{op}: init is {init!r}, expected 'k-means++' or a Tensor")
        return _lloyd(rows, centers, iterations, tol * float(rows.var(0, correction=0).mean()), metric == "cosine")


def _lloyd(rows: Tensor, centers: Tensor, iterations: int, least: float, has_length_1: bool) -> KMeans:
    codes, distances = _assign(rows, centers)
    inertia = [distances.double().square().sum()]
    for _ in range(iterations):
        moved = _means(rows, centers, codes, distances)
        if has_length_1:
            moved = functional.normalize(moved, dim=-1)
        shift = (moved - centers).double().square().sum()
        before, centers = codes, moved
        codes, distances = _assign(rows, centers)
        inertia.append(distances.double().square().sum())
        if torch.equal(codes, before) or shift <= least:
            break
    return KMeans(centers, codes, torch.stack(inertia))


def _assign(rows: Tensor, centers: Tensor) -> tuple[Tensor, ...]:
    return tuple(nearest_code(rows, centers, return_distance=True))


def _means(rows: Tensor, centers: Tensor, codes: Tensor, distances: Tensor) -> Tensor:
    sums, counts = _code_sums(rows, codes, len(centers))
    empty = torch.nonzero(counts == 0).flatten()
    if len(empty):
        furthest = distances.sort(descending=True, stable=True).indices[: len(empty)]
        left = codes[furthest]
        sums = sums.index_add(0, left, rows[furthest], alpha=-1).index_copy(0, empty, rows[furthest])
        counts = counts.index_add(0, left, torch.ones_like(left), alpha=-1).index_fill(0, empty, 1)
    # A centre whose only rows have left it stays where it was.
    return torch.where((counts > 0)[:, None], sums / counts.clamp_min(1)[:, None], centers)


def _spread(rows: Tensor, k: int, seed: Tensor) -> Tensor:
    """Rows, each drawn with a probability in proportion to its squared distance from those before it."""
    words = philox(seed[0], seed[1] + torch.arange(k, device=rows.device))[:, 0]
    uniform = (words.double() + 0.5) * _WORD
    squares = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
    chosen: list[Tensor] = []
    for j in range(k):
        mass = squares.cumsum(0)
        is_spread = mass[-1] > 0
        mass = mass.where(is_spread, torch.arange(1, len(rows) + 1, device=rows.device, dtype=torch.float64))
        at = torch.searchsorted(mass, (uniform[j] * mass[-1])[None], right=True).clamp_max(len(rows) - 1)
        chosen.append(rows[at])
        nearer = _assign(rows, chosen[-1])[1].double().square()
        squares = nearer if j == 0 else torch.minimum(squares, nearer)
    return torch.cat(chosen)
