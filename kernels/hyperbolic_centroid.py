"""The weighted sums of a Lorentz centroid: of points, and of their times. The rest of it is a radial map of the sum."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from mmkern.kernels.rows import Blocks, merged_stride, scalar
from mmkern.kernels.scalar_math import sqrt
from torch import Tensor

# Programs that fill a GPU: a batch's points are split among them, in whole blocks of this many.
_PROGRAMS, _POINTS_PER_SPLIT = 512, 64


@triton.jit
def centroid_sum_kernel(
    x,  # [batches, points, cols]
    weights,  # [batches, points]
    sums,  # [batches, splits, cols], float32
    times,  # [batches, splits], float32
    curvature,
    x_batch_stride,
    x_point_stride,
    weight_batch_stride,
    weight_point_stride,
    points,
    points_per_split,
    cols,
    BLOCK_POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
):
    """``Σ w x`` and ``Σ w √(1 + c|x|²)`` of one split of one batch's points."""
    batch, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = scalar(curvature)
    place = tl.arange(0, BLOCK_POINTS).to(tl.int64)
    col = tl.arange(0, BLOCK)
    first = split * points_per_split
    last = tl.minimum(first + points_per_split, points)
    x += batch * x_batch_stride
    weights += batch * weight_batch_stride
    sums += (batch * tl.num_programs(1) + split) * cols

    total = tl.zeros([BLOCK_POINTS, BLOCK], tl.float32)
    time = tl.zeros([BLOCK_POINTS], tl.float32)
    for start in range(first, last, BLOCK_POINTS):
        point = start + place
        inside = point < last
        w = tl.load(weights + point * weight_point_stride, inside, 0.0).to(tl.float32)
        square = tl.zeros([BLOCK_POINTS], tl.float32)
        for chunk in range(0, BLOCK if ONE_CHUNK else cols, BLOCK):
            at = x + (point * x_point_stride)[:, None] + (chunk + col)[None, :]
            tile = tl.load(at, inside[:, None] & (chunk + col < cols)[None, :], 0.0).to(tl.float32)
            square += tl.sum(tile * tile, 1)
            if ONE_CHUNK:
                total += w[:, None] * tile
        time += w * sqrt(1 + c * square)
    tl.store(times + batch * tl.num_programs(1) + split, tl.sum(time, 0))

    if ONE_CHUNK:
        tl.store(sums + col, tl.sum(total, 0), col < cols)
    else:
        for chunk in range(0, cols, BLOCK):
            total = tl.zeros([BLOCK_POINTS, BLOCK], tl.float32)
            for start in range(first, last, BLOCK_POINTS):
                point = start + place
                w = tl.load(weights + point * weight_point_stride, point < last, 0.0).to(tl.float32)
                at = x + (point * x_point_stride)[:, None] + (chunk + col)[None, :]
                mask = (point < last)[:, None] & (chunk + col < cols)[None, :]
                total += w[:, None] * tl.load(at, mask, 0.0).to(tl.float32)
            tl.store(sums + chunk + col, tl.sum(total, 0), chunk + col < cols)


def centroid_sums(x: Tensor, weights: Tensor, curvature: float | Tensor) -> tuple[Tensor, Tensor]:
    """``Σ w x`` ``[..., D]`` and ``Σ w √(1 + c|x|²)`` ``[...]`` in float32, for ``x`` ``[..., N, D]`` of unit last stride."""
    *leading, points, cols = x.shape
    x, x_stride = _one_batch_axis(x, leading)
    weights, weight_stride = _one_batch_axis(weights, leading)
    batches = prod(leading)
    splits = min(triton.cdiv(points, _POINTS_PER_SPLIT), triton.cdiv(_PROGRAMS, batches))
    per_split = triton.cdiv(points, splits * _POINTS_PER_SPLIT) * _POINTS_PER_SPLIT
    splits = triton.cdiv(points, per_split)
    sums = x.new_empty(batches, splits, cols, dtype=torch.float32)
    times = x.new_empty(batches, splits, dtype=torch.float32)
    blocks = Blocks.of(cols)
    with torch.cuda.device_of(x):
        centroid_sum_kernel[(batches, splits)](
            x,
            weights,
            sums,
            times,
            curvature if isinstance(curvature, Tensor) else float(curvature),
            x_stride,
            x.stride(-2),
            weight_stride,
            weights.stride(-1),
            points,
            per_split,
            cols,
            BLOCK_POINTS=blocks.rows,
            BLOCK=blocks.cols,
            ONE_CHUNK=blocks.one_chunk,
            num_warps=blocks.warps,
            enable_fp_fusion=False,
        )
    return sums.sum(1).view(*leading, cols), times.sum(1).view(leading)


def _one_batch_axis(x: Tensor, leading: Sequence[int]) -> tuple[Tensor, int]:
    stride = merged_stride(leading, x.stride()[: len(leading)])
    if stride is not None:
        return x, stride
    return x.contiguous(), prod(x.shape[len(leading) :])
