"""Rows of tables that codes name, and sums of rows that have one code.

For sums codes are sorted first, so that a program has the rows of one code, in their order: the same bits run after run.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from mmkern.kernels.rows import unit_stride
from torch import Tensor

_WIDEST = 512  # columns of a program
_ROWS_AT_ONCE = 8


@triton.jit
def embedding_kernel(
    tables,  # [levels, count, width], contiguous
    codes,  # [n, levels], int64, contiguous
    out,  # [n, width], contiguous
    n,
    levels,
    count,
    width,
    divisor,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)
    for level in range(0, levels):
        code = tl.load(codes + i * levels + level, i < n, -1)
        is_code = (code >= 0) & (code < count)
        row = tl.where(is_code, code, 0) + (tl.zeros([], tl.int64) + level) * count
        mask = is_code[:, None] & (c < width)[None, :]
        total += tl.load(tables + row[:, None] * width + c[None, :], mask, 0.0).to(tl.float32)
    mask = (i < n)[:, None] & (c < width)[None, :]
    tl.store(out + i[:, None] * width + c[None, :], (total / divisor).to(out.dtype.element_ty), mask)


@triton.jit
def sums_kernel(
    x,  # [n, width]
    rows,  # [levels, n], int64: sorted by their codes
    starts,  # [levels, count + 1], int64: where those of a code begin among them
    out,  # [levels, count, width], contiguous
    x_stride,
    n,
    count,
    width,
    divisor,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program has one code of one level, and adds up in float64."""
    program = tl.program_id(0).to(tl.int64)
    level = program // count
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.load(starts + program + level)
    end = tl.load(starts + program + level + 1)
    total = tl.zeros([BLOCK_C], tl.float64)
    for first in range(begin, end, BLOCK_R):
        at = first + tl.arange(0, BLOCK_R)
        row = tl.load(rows + level * n + at, at < end, 0)
        mask = (at < end)[:, None] & (c < width)[None, :]
        tile = tl.load(x + row[:, None] * x_stride + c[None, :], mask, 0.0).to(tl.float32)
        total += tl.sum(tile.to(tl.float64), 0)
    tl.store(out + program * width + c, (total / divisor).to(out.dtype.element_ty), c < width)


def codes_embedding(tables: Tensor, codes: Tensor, averages: bool, out: Tensor) -> None:
    levels, count, width = tables.shape
    n = codes.numel() // levels
    if n == 0 or width == 0:
        return
    wide = _columns(width)
    tall = max(1024 // wide, 1)
    with torch.cuda.device_of(tables):
        embedding_kernel[(triton.cdiv(n, tall), triton.cdiv(width, wide))](
            tables.contiguous(),
            codes,
            out,
            n,
            levels,
            count,
            width,
            float(levels if averages else 1),
            BLOCK_I=tall,
            BLOCK_C=wide,
            num_warps=4,
        )


def codes_embedding_backward(grad: Tensor, tables: Tensor, codes: Tensor, averages: bool, of_tables: Tensor) -> None:
    levels, _, width = tables.shape
    rows = codes.reshape(-1, levels)
    _add_up(grad.reshape(len(rows), width), rows, levels if averages else 1, of_tables)


def code_sums(x: Tensor, codes: Tensor, count: int, sums: Tensor, counts: Tensor) -> None:
    starts = _add_up(x.reshape(codes.numel(), x.shape[-1]), codes.reshape(-1, 1), 1, sums[None])
    torch.sub(starts[0, 1:], starts[0, :-1], out=counts)


def _add_up(x: Tensor, codes: Tensor, divisor: int, out: Tensor) -> Tensor:
    """``out[q, k]``: the sum of the rows of x whose code of level q is k. Where each code's rows begin, sorted."""
    levels, count, width = out.shape
    of_levels = codes.T
    of_levels = of_levels.where((of_levels >= 0) & (of_levels < count), count)
    in_order, rows = of_levels.sort(dim=1, stable=True)
    bounds = torch.arange(count + 1, device=codes.device).repeat(levels, 1)
    starts = torch.searchsorted(in_order.contiguous(), bounds)
    x, wide = unit_stride(x), _columns(width)
    if count and width:
        with torch.cuda.device_of(x):
            sums_kernel[(levels * count, triton.cdiv(width, wide))](
                x,
                rows.contiguous(),
                starts,
                out,
                x.stride(0),
                x.shape[0],
                count,
                width,
                float(divisor),
                BLOCK_R=_ROWS_AT_ONCE,
                BLOCK_C=wide,
                num_warps=max(wide // 128, 1),
                enable_fp_fusion=False,
            )
    return starts


def _columns(width: int) -> int:
    return min(max(int(triton.next_power_of_2(width)), 16), _WIDEST)
