"""Launchers of the quantization family; the nearest code's are in ``nearest_code.py``, those of tables in ``code_tables.py``.

Levels of narrow codes take one kernel: a program has some rows, whose z stays in registers. What is left of a row lies in
memory between levels, since a row may be of any width.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from mmkern.kernels.code_tables import code_sums, codes_embedding, codes_embedding_backward
from mmkern.kernels.nearest_code import (
    AT_ONCE,
    EPS,
    LEAST,
    LONGEST,
    ROWS,
    Facts,
    cosine_nearest_code,
    meet,
    nearest,
    nearest_code,
    search,
)
from mmkern.kernels.scalar_math import INFINITY
from mmkern.kernels.score_tiles import ALL_REGISTERS
from torch import Tensor
from torch.nn.functional import linear

__all__ = [
    "code_sums",
    "codes_embedding",
    "codes_embedding_backward",
    "cosine_nearest_code",
    "nearest_code",
    "residual_quantize",
]

_WIDEST = 32  # codes whose levels take one kernel


@triton.jit
def residual_kernel(
    codebooks,  # [levels, m, narrow], contiguous
    scales,  # [levels, m], float32; or None: see leaders_kernel
    offsets,  # [levels, m], float32; or None
    squares,  # [levels, m], float64; or None
    longest,  # [levels], float64: the longest code
    in_weight,  # [levels, narrow, width], contiguous; or None
    in_bias,  # [levels, narrow], contiguous; or None
    out_weight,  # [levels, width, narrow], contiguous; or None
    out_bias,  # [levels, width], contiguous; or None
    left,  # [n, width], float32: x, and what is left of it
    total,  # [n, width], float32: what has been taken
    z_rows,  # [n, narrow], float32: room
    losses,  # [programs, levels], float32: sums of (z − e)²
    codes,  # [n, levels], int64
    n,
    m,
    width,
    narrow,
    levels,
    slack_of_size,
    least_slack,
    most,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row = tl.arange(0, BLOCK_I)
    begin = tl.program_id(0).to(tl.int64) * BLOCK_I
    i = begin + row
    c = tl.arange(0, BLOCK_C)
    column = tl.arange(0, BLOCK_J)
    here = (i < n)[:, None] & (c < narrow)[None, :]
    for level in range(0, levels):
        deep = tl.zeros([], tl.int64) + level
        # z
        if in_weight is not None:
            z = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)
            for first in range(0, width, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                rest = tl.load(left + i[:, None] * width + d[None, :], (i < n)[:, None] & (d < width)[None, :], 0.0)
                at_weight = in_weight + (deep * narrow + c)[None, :] * width + d[:, None]
                w = tl.load(at_weight, (c < narrow)[None, :] & (d < width)[:, None], 0.0).to(tl.float32)
                z = tl.dot(rest, w, z, input_precision="ieee")
            if in_bias is not None:
                z += tl.load(in_bias + deep * narrow + c, c < narrow, 0.0).to(tl.float32)[None, :]
        else:
            z = tl.load(left + i[:, None] * width + c[None, :], here, 0.0)
        tl.store(z_rows + i[:, None] * narrow + c[None, :], z, here)

        # The codes
        best = tl.zeros([BLOCK_I], tl.float32) - INFINITY
        second = best
        code = tl.zeros([BLOCK_I], tl.int32)
        of_level = codebooks + deep * m * narrow
        for first in range(0, m, BLOCK_J):
            j = (first + column).to(tl.int64)
            mask = (j < m)[None, :] & (c < narrow)[:, None]
            factors = tl.load(of_level + j[None, :] * narrow + c[:, None], mask, 0.0).to(tl.float32)
            key = tl.dot(z, factors, input_precision="ieee")
            if scales is not None:
                key = key * tl.load(scales + deep * m + j, j < m, 0.0)[None, :]
            if offsets is not None:
                key = key - tl.load(offsets + deep * m + j, j < m, 0.0)[None, :]
            key = tl.where((j < m)[None, :] & (key == key), key, -INFINITY)
            best, second, code = meet(key, first, column, best, second, code)
        wide = z.to(tl.float64)
        length = tl.sqrt(tl.sum(wide * wide, 1))
        size = length
        far = tl.load(longest + level)
        if squares is None:
            size = (length + 0.5 * far) * far
        slack = (slack_of_size * size + least_slack).to(tl.float32)
        is_known = (best - second > slack) & (length < most) & (far < most)
        tl.debug_barrier()  # z_rows are there
        of_codes = None
        if squares is not None:
            of_codes = squares + deep * m
        unknown = tl.where((i < n) & ~is_known, 1, 0)
        for r in range(0, BLOCK_I):
            if tl.max(tl.where(row == r, unknown, 0), 0) != 0:
                found = search(z_rows + (begin + r) * narrow, of_level, of_codes, narrow, m, narrow, BLOCK_S, BLOCK_C)
                code = tl.where(row == r, found, code)
        tl.store(codes + i * levels + level, code.to(tl.int64), i < n)

        # What they take
        e = tl.load(of_level + code.to(tl.int64)[:, None] * narrow + c[None, :], here, 0.0).to(tl.float32)
        error = tl.where(here, z - e, 0.0)
        tl.store(losses + tl.program_id(0) * levels + level, tl.sum(tl.sum(error * error, 1), 0))
        e += z - z  # NaN where z is
        if out_weight is not None:
            for first in range(0, width, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                at_weight = out_weight + (deep * width + d)[None, :] * narrow + c[:, None]
                w = tl.load(at_weight, (c < narrow)[:, None] & (d < width)[None, :], 0.0).to(tl.float32)
                y = tl.dot(e, w, input_precision="ieee")
                if out_bias is not None:
                    y += tl.load(out_bias + deep * width + d, d < width, 0.0).to(tl.float32)[None, :]
                _take(left, total, y, i, d, n, width)
        else:
            _take(left, total, e, i, c, n, width)
        tl.debug_barrier()  # and what is left


@triton.jit
def _take(left, total, y, i, d, n, width):
    at = i[:, None] * width + d[None, :]
    mask = (i < n)[:, None] & (d < width)[None, :]
    tl.store(left + at, tl.load(left + at, mask, 0.0) - y, mask)
    tl.store(total + at, tl.load(total + at, mask, 0.0) + y, mask)


def residual_quantize(
    x: Tensor,
    codebooks: Tensor,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    normalize: bool,
    reconstruction: Tensor,
    commitment: Tensor,
    of_codes: Tensor,
    codes: Tensor,
) -> None:
    levels, _, narrow = codebooks.shape
    n, width = codes.numel() // levels, x.shape[-1]
    if n == 0:
        commitment.fill_(torch.nan)
        of_codes.fill_(torch.nan)
        return
    weights = in_weight, in_bias, out_weight, out_bias
    left = x.reshape(n, width).to(torch.float32, copy=True)
    run = _narrow_levels if narrow <= _WIDEST else _wide_levels
    total, squares = run(left, codebooks, weights, normalize, codes.view(n, levels))
    torch.div(squares, n * narrow, out=commitment)
    of_codes.copy_(commitment)
    reconstruction.copy_(total.view(x.shape))


def _narrow_levels(
    left: Tensor, codebooks: Tensor, weights: tuple[Tensor | None, ...], normalize: bool, codes: Tensor
) -> tuple[Tensor, Tensor]:
    """What has been taken from the rows, and for each level the sum of ``(z − e)²``. Uses up ``left``."""
    (n, width), (levels, m, narrow) = left.shape, codebooks.shape
    facts = Facts.of(codebooks, is_cosine=normalize)
    total = torch.zeros_like(left)
    programs = triton.cdiv(n, ROWS)
    losses = left.new_empty(programs, levels)
    with torch.cuda.device_of(left):
        residual_kernel[(programs,)](
            codebooks.contiguous(),
            facts.scales,
            facts.offsets,
            facts.squares,
            facts.longest,
            *(None if w is None else w.contiguous() for w in weights),
            left,
            total,
            left.new_empty(n, narrow),
            losses,
            codes,
            n,
            m,
            width,
            narrow,
            levels,
            (narrow + 8) * 2 * EPS,
            (narrow + 8) * LEAST,
            LONGEST,
            BLOCK_I=ROWS,
            BLOCK_J=32,
            BLOCK_C=max(triton.next_power_of_2(narrow), 16),
            BLOCK_D=16,
            BLOCK_S=AT_ONCE,
            num_warps=4,
            enable_fp_fusion=False,
            **ALL_REGISTERS,
        )
    return total, losses.sum(0, dtype=torch.float64)


def _wide_levels(
    left: Tensor, codebooks: Tensor, weights: tuple[Tensor | None, ...], normalize: bool, codes: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, a level after the other."""
    in_weight, in_bias, out_weight, out_bias = (None if w is None else w.float() for w in weights)
    total, squares = torch.zeros_like(left), []
    for q, codebook in enumerate(codebooks.float()):
        z = left if in_weight is None else linear(left, in_weight[q], None if in_bias is None else in_bias[q])
        of_level = torch.empty_like(codes[:, q])
        nearest(z, codebook, torch.empty_like(z[:, 0]), of_level, is_cosine=normalize)
        codes[:, q] = of_level
        e = codebook[of_level]
        squares.append((z - e).square().sum(dtype=torch.float64))
        step = e + (z - z)
        if out_weight is not None:
            step = linear(step, out_weight[q], None if out_bias is None else out_bias[q])
        left, total = left - step, total + step
    return total, torch.stack(squares)
