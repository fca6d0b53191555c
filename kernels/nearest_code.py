"""The nearest code, in two kernels.

In the first a program walks along a share of the codes with tiles of products; each row keeps its best key, larger where a
code is nearer, the one behind it, and where it was. The second looks at what the shares have left: where rounding could hide
in the best key the distance to the next one, it holds the row against all codes in float64. See ``csrc/cpu/nearest_code.h``.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from mmkern.kernels.rows import unit_stride
from mmkern.kernels.scalar_math import INFINITY
from mmkern.kernels.score_tiles import ALL_REGISTERS, Tiling, are_copied, score_tile
from torch import Tensor

from mmkern.reference.quantization import SHORTEST

_PROGRAMS = 512  # about so many share the work
ROWS = 16  # of a program of the second kernel
AT_ONCE = 32  # codes, and columns
LONGEST = 2.0**63  # where products may overflow
LEAST = 2.0**-123  # of a term that is below all numbers
_LARGEST = tl.constexpr(torch.finfo(torch.float64).max)
_SHORTEST = tl.constexpr(SHORTEST)
EPS = torch.finfo(torch.float32).eps


@triton.jit
def meet(key, first, column, best, second, at):
    """Rows that have met codes ``first + column`` with these keys."""
    top, place = tl.max(key, 1, return_indices=True)
    behind = tl.max(tl.where(column[None, :] == place[:, None], -INFINITY, key), 1)
    second = tl.maximum(tl.maximum(second, behind), tl.minimum(best, top))
    at = tl.where(top > best, first + place, at)
    return tl.maximum(best, top), second, at


@triton.jit
def leaders_kernel(
    x,  # [n, depth]
    codebook,  # [m, depth]
    scales,  # [m], float32: of products; or None
    offsets,  # [m], float32: what is then taken from them; or None
    bests,  # [shares, n], float32
    seconds,  # [shares, n], float32
    places,  # [shares, n], int32
    x_stride,
    codebook_stride,
    n,
    m,
    depth,
    tiles_of_share,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The best key of each row in a share of the codes, the one behind it, and the code of the best."""
    blocks = tl.cdiv(n, BLOCK_I)
    share = tl.program_id(0) // blocks
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    column = tl.arange(0, BLOCK_J)
    best = tl.zeros([BLOCK_I], tl.float32) - INFINITY
    second = best
    at = tl.zeros([BLOCK_I], tl.int32)
    for tile in range(share * tiles_of_share, tl.minimum((share + 1) * tiles_of_share, tl.cdiv(m, BLOCK_J))):
        j = (tile * BLOCK_J + column).to(tl.int64)
        key = score_tile(x, codebook, x_stride, codebook_stride, i, j, n, m, depth, BLOCK_K)
        if scales is not None:
            key = key * tl.load(scales + j, j < m, 0.0)[None, :]
        if offsets is not None:
            key = key - tl.load(offsets + j, j < m, 0.0)[None, :]
        key = tl.where((j < m)[None, :] & (key == key), key, -INFINITY)
        best, second, at = meet(key, tile * BLOCK_J, column, best, second, at)
    tl.store(bests + share * n + i, best, i < n)
    tl.store(seconds + share * n + i, second, i < n)
    tl.store(places + share * n + i, at, i < n)


@triton.jit
def _wide(pointers, mask):
    return tl.load(pointers, mask, 0.0).to(tl.float32).to(tl.float64)


@triton.jit
def _rank(total, squares):
    """Less for a nearer code; ``squares``, |c|² of it, is None for Euclidean distances, of which ``total`` is the square."""
    rank = total
    if squares is not None:
        rank = -total * tl.abs(total) / squares
    return rank


@triton.jit
def _term(a, b, IS_COSINE: tl.constexpr):
    return a * b if IS_COSINE else (a - b) * (a - b)


@triton.jit
def search(row, codebook, squares, codebook_stride, m, depth, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr):
    """The first code of the least rank, NaN behind all, by differences or products in float64."""
    least, found = tl.full([1], INFINITY, tl.float64), tl.zeros([1], tl.int32)
    k = tl.arange(0, BLOCK_K)
    for start in range(0, m, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J).to(tl.int64)
        total = tl.zeros([BLOCK_J, BLOCK_K], tl.float64)
        for first in range(0, depth, BLOCK_K):
            a = _wide(row + first + k, first + k < depth)[None, :]
            mask = (j < m)[:, None] & (first + k < depth)[None, :]
            b = _wide(codebook + j[:, None] * codebook_stride + (first + k)[None, :], mask)
            total += tl.where(mask, _term(a, b, squares is not None), 0.0)
        of_codes = None
        if squares is not None:
            of_codes = tl.load(squares + j, j < m, 1.0)
        rank = _rank(tl.sum(total, 1), of_codes)
        rank = tl.where((j < m) & (rank == rank), tl.where(rank == INFINITY, _LARGEST, rank), INFINITY)
        top, at = tl.min(rank, 0), tl.argmin(rank, 0, tie_break_left=True)
        found = tl.where(top < least, start + at, found)
        least = tl.where(top < least, top, least)
    return tl.max(found, 0)


@triton.jit
def settle_kernel(
    x,  # [n, depth]
    codebook,  # [m, depth]
    squares,  # [m], float64: of the codes, for cosines; else None
    lengths,  # [n], float64: of the rows
    slacks,  # [n], float32: how far ahead a best key has to be; NaN: keys say nothing
    bests,  # [shares, n]
    seconds,  # [shares, n]
    places,  # [shares, n]
    distances,  # [n], float32
    codes,  # [n], int64
    x_stride,
    codebook_stride,
    n,
    m,
    depth,
    shares,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.arange(0, BLOCK_I)
    begin = tl.program_id(0).to(tl.int64) * BLOCK_I
    i = begin + row
    best = tl.load(bests + i, i < n, 0.0)
    second = tl.load(seconds + i, i < n, 0.0)
    code = tl.load(places + i, i < n, 0)
    for share in range(1, shares):
        top = tl.load(bests + share * n + i, i < n, 0.0)
        second = tl.maximum(tl.maximum(second, tl.load(seconds + share * n + i, i < n, 0.0)), tl.minimum(best, top))
        code = tl.where(top > best, tl.load(places + share * n + i, i < n, 0), code)
        best = tl.maximum(best, top)
    is_known = (best - second > tl.load(slacks + i, i < n, 0.0)).to(tl.int32)
    for r in range(0, BLOCK_I):
        if tl.max(tl.where((row == r) & (i < n), 1 - is_known, 0), 0) != 0:
            here = x + (begin + r) * x_stride
            found = search(here, codebook, squares, codebook_stride, m, depth, BLOCK_J, BLOCK_K)
            code = tl.where(row == r, found, code)
    at = code.to(tl.int64)
    total = tl.zeros([BLOCK_I, BLOCK_K], tl.float64)
    k = tl.arange(0, BLOCK_K)
    for first in range(0, depth, BLOCK_K):
        mask = (i < n)[:, None] & (first + k < depth)[None, :]
        a = _wide(x + i[:, None] * x_stride + (first + k)[None, :], mask)
        b = _wide(codebook + at[:, None] * codebook_stride + (first + k)[None, :], mask)
        total += tl.where(mask, _term(a, b, squares is not None), 0.0)
    distance = tl.sum(total, 1)
    if squares is None:
        distance = tl.sqrt(distance)
    else:
        length = tl.load(lengths + i, i < n, 1.0)
        rank = _rank(distance, tl.load(squares + at, i < n, 1.0))
        projection = tl.sqrt(tl.abs(rank)) / tl.where(length < _SHORTEST, _SHORTEST, length)
        distance = 1 + tl.where(rank < 0, -projection, projection)
        distance = tl.where(distance < 0, 0.0, distance)
    tl.store(distances + i, distance.to(tl.float32), i < n)
    tl.store(codes + i, at, i < n)


def nearest_code(x: Tensor, codebook: Tensor, distances: Tensor, codes: Tensor) -> None:
    nearest(x, codebook, distances, codes, is_cosine=False)


def cosine_nearest_code(x: Tensor, codebook: Tensor, distances: Tensor, codes: Tensor) -> None:
    nearest(x, codebook, distances, codes, is_cosine=True)


class Facts(NamedTuple):
    """What keys need of codes ``[..., m, depth]``."""

    longest: Tensor  # [...], float64
    squares: Tensor | None  # [..., m], float64
    scales: Tensor | None  # [..., m]
    offsets: Tensor | None  # [..., m]

    @classmethod
    def of(cls, codes: Tensor, *, is_cosine: bool) -> Facts:
        lengths = torch.linalg.vector_norm(codes, dim=-1, dtype=torch.float64)
        if not is_cosine:
            return cls(lengths.amax(-1), None, None, (0.5 * lengths.square()).float())
        squares = codes.double().square().sum(-1).clamp_min(SHORTEST * SHORTEST)
        return cls(lengths.amax(-1), squares, lengths.clamp_min(SHORTEST).reciprocal().float(), None)


def nearest(x: Tensor, codebook: Tensor, distances: Tensor, codes: Tensor, *, is_cosine: bool) -> None:
    codebook = unit_stride(codebook)
    m, depth = codebook.shape
    x = unit_stride(x.reshape(codes.numel(), depth))
    n = x.shape[0]
    if n == 0:
        return
    facts = Facts.of(codebook, is_cosine=is_cosine)
    lengths = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)

    tiling = Tiling.of(n, m, x.dtype, is_copied=are_copied(x, codebook), is_heavy=True)
    # Beside a float32 product a row has fewer registers, and more of them spill.
    tall, per_warp = (64, 512) if x.dtype.itemsize == 2 else (32, 256)
    tall = min(tiling.rows, tall)
    blocks, tiles = triton.cdiv(n, tall), triton.cdiv(m, tiling.columns)
    tiles_of_share = triton.cdiv(tiles, max(min(_PROGRAMS // blocks, tiles), 1))
    shares = triton.cdiv(tiles, tiles_of_share)
    bests, seconds = x.new_empty((2, shares, n), dtype=torch.float32)
    places = x.new_empty((shares, n), dtype=torch.int32)
    strides = x.stride(0), codebook.stride(0)
    with torch.cuda.device_of(x):
        leaders_kernel[(blocks * shares,)](
            x,
            codebook,
            facts.scales,
            facts.offsets,
            bests,
            seconds,
            places,
            *strides,
            n,
            m,
            depth,
            tiles_of_share,
            BLOCK_I=tall,
            BLOCK_J=tiling.columns,
            BLOCK_K=tiling.depth,
            num_warps=max(tall * tiling.columns // per_warp, 1),
            enable_fp_fusion=False,
            **ALL_REGISTERS,
        )
        settle_kernel[(triton.cdiv(n, ROWS),)](
            x,
            codebook,
            facts.squares,
            lengths,
            _slacks(lengths, facts.longest, depth, is_cosine=is_cosine),
            bests,
            seconds,
            places,
            distances,
            codes,
            *strides,
            n,
            m,
            depth,
            shares,
            BLOCK_I=ROWS,
            BLOCK_J=AT_ONCE,
            BLOCK_K=AT_ONCE,
            num_warps=4,
            enable_fp_fusion=False,
        )


def _slacks(lengths: Tensor, longest: Tensor, depth: int, *, is_cosine: bool) -> Tensor:
    """Twice what ``depth`` roundings of two keys lose, of numbers that add up to ``size``."""
    size = lengths if is_cosine else (lengths + 0.5 * longest) * longest
    slacks = (depth + 8) * (2 * EPS * size + LEAST)
    return slacks.where((lengths < LONGEST) & (longest < LONGEST), torch.nan).float()
