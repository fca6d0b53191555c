"""All-pairs hyperbolic ops, ``[N, D], [M, D] -> [N, M]``, from tiles of S = X Yᵀ.

A distance is a function of ``s = sinh²(θ/2)``, and s follows from the score, ``|x|²`` and ``|y|²``. Where that would cancel the
pair is taken from the differences instead, forward and backward. Backward: a first kernel turns scores into weights
W with ``gx_i = Σ_j W_ij (y_j - x_i) + (...) x_i``, then two products follow.
"""
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkern.kernels import rows
from mmkern.kernels.hyperbolic_scalars import (
    ball_gap,
    distance,
    distance_curvature_slope,
    distance_slope,
)
from mmkern.kernels.rows import Flavour, scalar, unit_stride
from mmkern.kernels.scalar_math import clamp_min, div, sqrt
from mmkern.kernels.score_tiles import (
    Tiling,
    Weights,
    launch_product,
    score_tile,
    squared_difference_tile,
    tile_position,
)

_TILES_TALL = 8


@triton.jit
def _square_sums(tiles):
    return (tl.sum(tiles[0] * tiles[0], 1),)


@triton.jit
def _first_sum(FUNCTION: tl.constexpr, sums, scalars, c, option):
    return (), (sums[0],)


_NORMS = Flavour(_square_sums)


# Lorentz: x_t = √(1 + c|x|²) = 1 + e


@triton.jit
def _excess(xx, c):
    """``e = x_t - 1`` without its cancellation, and x_t."""
    time = sqrt(1 + c * xx)
    return div(c * xx, 1 + time), time


@triton.jit
def lorentz_inner(score, xx, yy, c):
    return score - sqrt(1 + c * xx) * div(sqrt(1 + c * yy), c), xx


@triton.jit
def lorentz_s(score, xx, yy, c):
    """``2s = x_t y_t - 1 - c x·y``, and what it is the difference of."""
    e_x, _ = _excess(xx, c)
    e_y, _ = _excess(yy, c)
    scale = 0.5 * (e_x + e_y + e_x * e_y)
    return scale - 0.5 * c * score, scale


@triton.jit
def lorentz_near_s(dd, xx, yy, c):
    """``4s = c|x-y|² - (x_t - y_t)²``."""
    e_x, _ = _excess(xx, c)
    e_y, _ = _excess(yy, c)
    gap = e_y - e_x
    return clamp_min(c * dd - gap * gap, 0.0) / 4


# With gap = y_t - x_t: gx = ∂D/∂s (-c/2)(d - gap x/x_t), and ∂s/∂c - s/c = gap (m_y - m_x)/4, m = -|x|²/(x_t(1 + x_t))
@triton.jit
def lorentz_adjoint(s, xx, yy, c):
    """``-2 ∂s/∂|x-y|²``, the shares α of ``gx = W (d - α_x x)`` and ``gy = W (-d - α_y y)``, and ``∂s/∂c - s/c``."""
    e_x, x_t = _excess(xx, c)
    e_y, y_t = _excess(yy, c)
    gap = e_y - e_x
    m_x = div(xx, x_t * (1 + x_t))
    m_y = div(yy, y_t * (1 + y_t))
    return -0.5 * c, gap * div(1.0, x_t), -gap * div(1.0, y_t), 0.25 * gap * (m_x - m_y)


# Poincaré: s = c|x-y|²/(gap_x gap_y)


@triton.jit
def poincare_s(score, xx, yy, c):
    gap_x, _ = ball_gap(c * xx)
    gap_y, _ = ball_gap(c * yy)
    factor = div(c, gap_x) * div(1.0, gap_y)
    return factor * (xx + yy - 2 * score), factor * (xx + yy)


@triton.jit
def poincare_near_s(dd, xx, yy, c):
    gap_x, _ = ball_gap(c * xx)
    gap_y, _ = ball_gap(c * yy)
    return div(c, gap_x) * div(1.0, gap_y) * dd


@triton.jit
def poincare_adjoint(s, xx, yy, c):
    gap_x, slope_x = ball_gap(c * xx)
    gap_y, slope_y = ball_gap(c * yy)
    factor = div(-2 * c, gap_x) * div(1.0, gap_y)
    ratio = -slope_x * div(xx, gap_x) - slope_y * div(yy, gap_y)
    return factor, -slope_x * gap_y * s, -slope_y * gap_x * s, s * ratio


@dataclass(frozen=True)
class Pair:
    """Functions of one op. ``near`` and ``adjoint`` are None for the inner product, which does not cancel."""

    score: Any
    near: Any = None
    value: Any = None
    adjoint: Any = None


@triton.jit
def _pair_s(
    x, y, x_stride, y_stride, i, j, xx, yy, c, n, m, depth,
    SCORE: tl.constexpr, NEAR: tl.constexpr, NEARNESS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """s of a tile of pairs, and whether any was near."""
    score = score_tile(x, y, x_stride, y_stride, i, j, n, m, depth, BLOCK_K)
    s, scale = SCORE(score, xx, yy, c)
    any_near = False
    if NEAR is not None:
        near = s < NEARNESS * scale
        any_near = tl.max(tl.max(near.to(tl.int32), 1), 0) > 0
        if any_near:
            dd = squared_difference_tile(x, y, x_stride, y_stride, i, j, n, m, depth)
            s = tl.where(near, NEAR(dd, xx, yy, c), s)
    return s, any_near


@triton.jit
def pair_kernel(
    x,  # [n, depth]
    y,  # [m, depth]
    xx,  # [n], float32
    yy,  # [m], float32
    out,  # [n, m], contiguous
    curvature,
    x_stride,
    y_stride,
    n,
    m,
    depth,
    tiles_i,
    tiles_j,
    SCORE: tl.constexpr,
    NEAR: tl.constexpr,
    VALUE: tl.constexpr,
    NEARNESS: tl.constexpr,
    TILES_TALL: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program takes one tile of pairs."""
    tile_i, tile_j = tile_position(TILES_TALL, tiles_i, tiles_j)
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
    c = scalar(curvature)
    xx_i = tl.load(xx + i, i < n, 0.0)[:, None]
    yy_j = tl.load(yy + j, j < m, 0.0)[None, :]
    value, _ = _pair_s(x, y, x_stride, y_stride, i, j, xx_i, yy_j, c, n, m, depth, SCORE, NEAR, NEARNESS, BLOCK_K)
    if VALUE is not None:
        value = VALUE(value, c)
    tl.store(out + i[:, None] * m + j[None, :], value.to(out.dtype.element_ty), (i < n)[:, None] & (j < m)[None, :])


@triton.jit
def _rounded(weight, like):
    """Weights in the type of the product, back in float32: what is summed must be what is multiplied."""
    if like.dtype.element_ty == tl.bfloat16:
        return weight.to(tl.bfloat16).to(tl.float32)
    return weight


@triton.jit
def _rounded_to_tf32(weight):
    bits = (weight.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(tl.abs(weight) < 1e38, bits.to(tl.float32, bitcast=True), weight)


@triton.jit
def weight_kernel(
    grad,  # [n, m]
    x,  # [n, depth]
    y,  # [m, depth]
    xx,  # [n], float32
    yy,  # [m], float32
    weights,  # [n, m], contiguous; None for the inner product, whose weights are grad
    near_tiles,  # [tiles_i, tiles_j], int32
    x_shares,  # [tiles_j, n], float32
    y_shares,  # [tiles_i, m], float32
    curvature_parts,  # [tiles_i * tiles_j], float32
    curvature,
    grad_row_stride,
    grad_column_stride,
    x_stride,
    y_stride,
    n,
    m,
    depth,
    tiles_i,
    tiles_j,
    SCORE: tl.constexpr,
    NEAR: tl.constexpr,
    ADJOINT: tl.constexpr,
    NEARNESS: tl.constexpr,
    TF32: tl.constexpr,
    TILES_TALL: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W and its sums over a tile: ``gx_i = Σ_j W_ij y_j + share_i x_i``; in a near tile with ``y_j - x_i`` for ``y_j``."""
    tile_i, tile_j = tile_position(TILES_TALL, tiles_i, tiles_j)
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
    mask = (i < n)[:, None] & (j < m)[None, :]
    c = scalar(curvature)
    xx_i = tl.load(xx + i, i < n, 0.0)[:, None]
    yy_j = tl.load(yy + j, j < m, 0.0)[None, :]
    at_grad = grad + i[:, None] * grad_row_stride + j[None, :] * grad_column_stride
    if NEAR is None:
        w = tl.load(at_grad, mask, 0.0).to(tl.float32)
        _, alpha_x, alpha_y, _ = ADJOINT(w, xx_i, yy_j, c)
        whole = 1.0
    else:
        s, near = _pair_s(x, y, x_stride, y_stride, i, j, xx_i, yy_j, c, n, m, depth, SCORE, NEAR, NEARNESS, BLOCK_K)
        g = tl.load(at_grad, mask, 0.0).to(tl.float32)
        factor, alpha_x, alpha_y, s_c = ADJOINT(s, xx_i, yy_j, c)
        s_bar = g * distance_slope(s, c)
        part = s_bar * s_c + g * distance_curvature_slope(s, c)
        part = tl.sum(tl.sum(tl.where(mask, part, 0.0), 1), 0)
        tl.store(curvature_parts + tile_i * tiles_j + tile_j, part)
        w = s_bar * factor
        if TF32:
            w = _rounded_to_tf32(w)
        w = _rounded(w, weights)
        tl.store(weights + i[:, None] * m + j[None, :], w.to(weights.dtype.element_ty), mask)
        tl.store(near_tiles + tile_i * tiles_j + tile_j, near.to(tl.int32))
        whole = 1.0 - near.to(tl.float32)
    x_share = tl.sum(tl.where(mask, -w * (whole + alpha_x), 0.0), 1)
    y_share = tl.sum(tl.where(mask, -w * (whole + alpha_y), 0.0), 0)
    tl.store(x_shares + tile_j * n + i, x_share, i < n)
    tl.store(y_shares + tile_i * m + j, y_share, j < m)


def _nearness(dtype: torch.dtype) -> float:
    """Below this part of its terms a difference is taken again: it has lost more digits than the result has to spare."""
    return 2.0**-6 if dtype.itemsize == 4 else 2.0**-10


def _norms(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], dtype=torch.float32)
    rows.launch(_NORMS, _first_sum, (x,), (), 1.0, scalar_outputs=(out,))
    return out


def _float_or_tensor(curvature: float | Tensor) -> float | Tensor:
    return curvature if isinstance(curvature, Tensor) else float(curvature)


def forward(pair: Pair, x: Tensor, y: Tensor, curvature: float | Tensor, out: Tensor) -> None:
    x, y = unit_stride(x), unit_stride(y)
    n, m = out.shape
    tiling = Tiling.of(n, m, x.dtype)
    tiles = tiling.grid(n, m)
    with torch.cuda.device_of(x):
        pair_kernel[(tiles[0] * tiles[1],)](
            x,
            y,
            _norms(x),
            _norms(y),
            out,
            _float_or_tensor(curvature),
            x.stride(0),
            y.stride(0),
            n,
            m,
            x.shape[1],
            *tiles,
            SCORE=pair.score,
            NEAR=pair.near,
            VALUE=pair.value,
            NEARNESS=_nearness(x.dtype),
            TILES_TALL=_TILES_TALL,
            BLOCK_I=tiling.rows,
            BLOCK_J=tiling.columns,
            BLOCK_K=tiling.depth,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            enable_fp_fusion=False,
        )


def backward(
    pair: Pair,
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    curvature: float | Tensor,
    x_grad: Tensor | None,
    y_grad: Tensor | None,
    curvature_grad: Tensor | None,
) -> None:
    x, y = unit_stride(x), unit_stride(y)
    n, m = grad.shape
    tiling = Tiling.of(n, m, x.dtype)
    tiles = tiling.grid(n, m)
    is_distance = pair.near is not None
    weights = near = None
    if is_distance:
        weights = x.new_empty(n, m, dtype=torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)
        near = x.new_empty(tiles, dtype=torch.int32)
    x_shares = x.new_empty(tiles[1], n, dtype=torch.float32)
    y_shares = x.new_empty(tiles[0], m, dtype=torch.float32)
    curvature_parts = x.new_empty(tiles[0] * tiles[1], dtype=torch.float32)
    with torch.cuda.device_of(x):
        weight_kernel[(tiles[0] * tiles[1],)](
            grad,
            x,
            y,
            _norms(x),
            _norms(y),
            weights,
            near,
            x_shares,
            y_shares,
            curvature_parts,
            _float_or_tensor(curvature),
            *grad.stride(),
            x.stride(0),
            y.stride(0),
            n,
            m,
            x.shape[1],
            *tiles,
            SCORE=pair.score,
            NEAR=pair.near,
            ADJOINT=pair.adjoint,
            NEARNESS=_nearness(x.dtype),
            TF32=x.dtype == torch.float16,
            TILES_TALL=_TILES_TALL,
            BLOCK_I=tiling.rows,
            BLOCK_J=tiling.columns,
            BLOCK_K=tiling.depth,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            enable_fp_fusion=False,
        )
        x_share, y_share = x_shares.sum(0), y_shares.sum(0)
        used = Weights(grad if weights is None else weights, near, tiling)
        if x_grad is not None:
            launch_product(used, y, x, x_share, x_grad)
        if y_grad is not None:
            launch_product(used.T, x, y, y_share, y_grad)
    if curvature_grad is not None and is_distance:
        torch.sum(curvature_parts, 0, out=curvature_grad)
    elif curvature_grad is not None:  # ∂/∂c of -x_t y_t/c is (y_t/x_t + x_t/y_t)/2c²
        curvature_grad.copy_(-(x_share.sum() + y_share.sum()) / (2 * curvature * curvature))


LORENTZ_INNER = Pair(lorentz_inner, adjoint=lorentz_adjoint)
LORENTZ_DISTANCE = Pair(lorentz_s, lorentz_near_s, distance, lorentz_adjoint)
POINCARE_DISTANCE = Pair(poincare_s, poincare_near_s, distance, poincare_adjoint)
