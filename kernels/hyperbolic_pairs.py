"""All-pairs hyperbolic ops, ``[N, D], [M, D] -> [N, M]``, from tiles of S = X Yᵀ.

A distance is a function of ``s = sinh²(θ/2)``, and s follows from the score, ``|x|²`` and ``|y|²``. Where that would
cancel, the tile is taken from the differences instead, forward and backward, by a second launch that leaves all other
tiles alone. Backward: a first kernel turns scores into weights W with ``gx_i = Σ_j W_ij (y_j - x_i) + (...) x_i``, then
two products follow.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from mmkern.kernels import rows
from mmkern.kernels.hyperbolic_scalars import (
    ball_gap,
    distance,
    distance_slopes,
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
from torch import Tensor

_TILES_TALL = 8


@triton.jit
def _square_sums(tiles):
    return (tl.sum(tiles[0] * tiles[0], 1),)


_NORMS = Flavour(_square_sums)

# A point enters a score through one number, its term. Functions of terms take them as a column and a row.

# Lorentz: the term is e = x_t - 1 without its cancellation, x_t = √(1 + c|x|²). Then c|x|² = e(2 + e).


@triton.jit
def lorentz_term(FUNCTION: tl.constexpr, sums, scalars, c, option):
    z = c * sums[0]
    return (), (div(z, 1 + sqrt(1 + z)),)


@triton.jit
def lorentz_inner(score, e_x, e_y, c):
    value = score - (1 + e_x) * div(1 + e_y, c)
    return value, value


@triton.jit
def lorentz_s(score, e_x, e_y, c):
    """``2s = x_t y_t - 1 - c x·y``, and what it is the difference of."""
    scale = 0.5 * (e_x + e_y + e_x * e_y)
    return scale - 0.5 * c * score, scale


@triton.jit
def lorentz_near_s(dd, e_x, e_y, c):
    """``4s = c|x-y|² - (x_t - y_t)²``."""
    gap = e_y - e_x
    return clamp_min(c * dd - gap * gap, 0.0) / 4


# ∂s/∂x = -c/2 (d - gap x/x_t), gap = y_t - x_t; ∂s/∂c - s/c = -gap²/(4c x_t y_t) = gap (1/y_t - 1/x_t)/4c
@triton.jit
def lorentz_weights(s_bar, s, e_x, e_y, c):
    w = -0.5 * c * s_bar
    return w, w * (e_y - e_x)


@triton.jit
def lorentz_rates(e, c, SIDE: tl.constexpr):
    inverse_time = SIDE * div(1.0, 1 + e)
    return inverse_time, inverse_time * div(0.5, c * c)


# Poincaré: the term is z = c|x|²; s = c|x-y|²/(gap_x gap_y)


@triton.jit
def poincare_term(FUNCTION: tl.constexpr, sums, scalars, c, option):
    return (), (c * sums[0],)


@triton.jit
def _inverse_gap(z):
    gap, _ = ball_gap(z)
    return div(1.0, gap)


@triton.jit
def poincare_s(score, z_x, z_y, c):
    h_x, h_y = _inverse_gap(z_x), _inverse_gap(z_y)
    scale = z_x + z_y
    return h_x * h_y * (scale - 2 * c * score), h_x * h_y * scale


@triton.jit
def poincare_near_s(dd, z_x, z_y, c):
    return _inverse_gap(z_x) * _inverse_gap(z_y) * (c * dd)


# ∂s/∂x = -2c h_x h_y d + 2c s h_x x (no second term where the gap is held); ∂s/∂c - s/c = s (z_x h_x + z_y h_y)/c
@triton.jit
def poincare_weights(s_bar, s, z_x, z_y, c):
    h_x, h_y = _inverse_gap(z_x), _inverse_gap(z_y)
    return (-2 * c * h_x) * h_y * s_bar, s_bar * s


@triton.jit
def poincare_rates(z, c, SIDE: tl.constexpr):
    gap, slope = ball_gap(z)
    rate = slope * div(1.0, gap)
    return 2 * c * rate, -rate * div(z, c)


@dataclass(frozen=True)
class Pair:
    """Functions of one op.

    ``weights`` gives W and V from ``∂loss/∂s``, ``rates`` the (k, l) of a point's term: ``gx_i = Σ_j W (y_j - x_i) - k Σ_j V x_i``,
    curvature's adjoint ``Σ l Σ V`` over both sides. ``near``, ``value`` and ``weights`` are None for the inner product.
    """

    term: Any
    score: Any
    near: Any
    value: Any
    weights: Any
    rates: Any


@triton.jit
def _pair_s(
    x, y, x_stride, y_stride, i, j, x_term, y_term, near_tile, c, n, m, depth,
    SCORE: tl.constexpr, NEAR: tl.constexpr, NEARNESS: tl.constexpr, DIFFERENCES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """s of a tile of pairs: from differences, or from scores, with a note where that has cancelled."""
    if DIFFERENCES:
        return NEAR(squared_difference_tile(x, y, x_stride, y_stride, i, j, n, m, depth), x_term, y_term, c)
    else:
        s, scale = SCORE(score_tile(x, y, x_stride, y_stride, i, j, n, m, depth, BLOCK_K), x_term, y_term, c)
        if NEAR is not None:
            near = (s < NEARNESS * scale).to(tl.int32)
            tl.store(near_tile, tl.max(tl.max(near, 1), 0))
        return s


@triton.jit
def pair_kernel(
    x,  # [n, depth]
    y,  # [m, depth]
    x_terms,  # [n], float32
    y_terms,  # [m], float32
    out,  # [n, m], contiguous
    near_tiles,  # [tiles_i, tiles_j], int32; None for the inner product
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
    DIFFERENCES: tl.constexpr,
    TILES_TALL: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program takes one tile of pairs. With DIFFERENCES it does a near tile once more, and leaves the others."""
    tile_i, tile_j = tile_position(TILES_TALL, tiles_i, tiles_j)
    near_tile = near_tiles
    if near_tiles is not None:
        near_tile = near_tiles + tile_i * tiles_j + tile_j
    if DIFFERENCES:
        if tl.load(near_tile) == 0:
            return
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
    c = scalar(curvature)
    x_term = tl.load(x_terms + i, i < n, 0.0)[:, None]
    y_term = tl.load(y_terms + j, j < m, 0.0)[None, :]
    value = _pair_s(
        x, y, x_stride, y_stride, i, j, x_term, y_term, near_tile, c, n, m, depth,
        SCORE, NEAR, NEARNESS, DIFFERENCES, BLOCK_K,
    )  # fmt: skip
    if VALUE is not None:
        value = VALUE(value, c)
    tl.store(out + i[:, None] * m + j[None, :], value.to(out.dtype.element_ty), (i < n)[:, None] & (j < m)[None, :])


@triton.jit
def _rounded_to_tf32(weight):
    """The weight that a TF32 product multiplies: the shares must sum the same ones."""
    bits = (weight.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(tl.abs(weight) < 1e38, bits.to(tl.float32, bitcast=True), weight)


@triton.jit
def weight_kernel(
    grad,  # [n, m]
    x,  # [n, depth]
    y,  # [m, depth]
    x_terms,  # [n], float32
    y_terms,  # [m], float32
    weights,  # [n, m], float32, contiguous; None for the inner product, whose weights are grad
    near_tiles,  # [tiles_i, tiles_j], int32; None for the inner product
    x_shares,  # [tiles_j, n], float32
    y_shares,  # [tiles_i, m], float32
    curvature_parts,  # [tiles_i * tiles_j], float32; None is not wanted
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
    WEIGHTS: tl.constexpr,
    RATES: tl.constexpr,
    NEARNESS: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    TF32: tl.constexpr,
    TILES_TALL: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W and its sums over a tile: ``gx_i = Σ_j W_ij y_j + share_i x_i``; in a near tile with ``y_j - x_i`` for ``y_j``."""
    tile_i, tile_j = tile_position(TILES_TALL, tiles_i, tiles_j)
    tile = tile_i * tiles_j + tile_j
    near_tile = near_tiles
    if near_tiles is not None:
        near_tile = near_tiles + tile
    if DIFFERENCES:
        if tl.load(near_tile) == 0:
            return
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
    mask = (i < n)[:, None] & (j < m)[None, :]
    c = scalar(curvature)
    x_term = tl.load(x_terms + i, i < n, 0.0)[:, None]
    y_term = tl.load(y_terms + j, j < m, 0.0)[None, :]
    at_grad = grad + i[:, None] * grad_row_stride + j[None, :] * grad_column_stride
    w = tl.load(at_grad, mask, 0.0).to(tl.float32)
    v = w * (y_term - x_term)
    part = tl.zeros([1], tl.float32)
    if NEAR is not None:
        s = _pair_s(
            x, y, x_stride, y_stride, i, j, x_term, y_term, near_tile, c, n, m, depth,
            SCORE, NEAR, NEARNESS, DIFFERENCES, BLOCK_K,
        )  # fmt: skip
        slope, slope_c = distance_slopes(s, c)
        if curvature_parts is not None:
            part += tl.sum(tl.sum(tl.where(mask, w * slope_c, 0.0), 1), 0)
        w, v = WEIGHTS(w * slope, s, x_term, y_term, c)
        if TF32:
            w = _rounded_to_tf32(w)
        tl.store(weights + i[:, None] * m + j[None, :], w, mask)
    # In a near tile the product itself takes differences, so that Σ W is none of the share.
    w = tl.where(mask, w, 0.0)
    v = tl.where(mask, v, 0.0)
    v_i, v_j = tl.sum(v, 1), tl.sum(v, 0)
    k_i, l_i = RATES(tl.load(x_terms + i, i < n, 0.0), c, 1)
    k_j, l_j = RATES(tl.load(y_terms + j, j < m, 0.0), c, -1)
    x_share, y_share = -k_i * v_i, -k_j * v_j
    if not DIFFERENCES:
        x_share -= tl.sum(w, 1)
        y_share -= tl.sum(w, 0)
    tl.store(x_shares + tile_j * n + i, x_share, i < n)
    tl.store(y_shares + tile_i * m + j, y_share, j < m)
    if curvature_parts is not None:
        part += tl.sum(l_i * v_i, 0) + tl.sum(l_j * v_j, 0)
        tl.store(curvature_parts + tile + tl.arange(0, 1), part)


def _nearness(dtype: torch.dtype) -> float:
    """Below this part of its terms a difference is taken again: it has lost more digits than the result has to spare."""
    return 2.0**-6 if dtype.itemsize == 4 else 2.0**-10


def _terms(pair: Pair, x: Tensor, curvature: float | Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], dtype=torch.float32)
    rows.launch(_NORMS, pair.term, (x,), (), curvature, scalar_outputs=(out,))
    return out


def _float_or_tensor(curvature: float | Tensor) -> float | Tensor:
    return curvature if isinstance(curvature, Tensor) else float(curvature)


def forward(pair: Pair, x: Tensor, y: Tensor, curvature: float | Tensor, out: Tensor) -> None:
    x, y = unit_stride(x), unit_stride(y)
    n, m = out.shape
    tiling = Tiling.of(n, m, x.dtype)
    tiles = tiling.grid(n, m)
    x_terms, y_terms = _terms(pair, x, curvature), _terms(pair, y, curvature)
    near = None if pair.near is None else x.new_empty(tiles, dtype=torch.int32)
    with torch.cuda.device_of(x):
        for differences in (False,) if near is None else (False, True):
            pair_kernel[(tiles[0] * tiles[1],)](
                x,
                y,
                x_terms,
                y_terms,
                out,
                near,
                _float_or_tensor(curvature),
                x.stride(0),
                y.stride(0),
                n,
                m,
                x.shape[1],
                *tiles,
                VALUE=pair.value,
                **_constants(pair, x, tiling, differences),
            )


def _constants(pair: Pair, x: Tensor, tiling: Tiling, differences: bool) -> dict[str, Any]:
    return {
        "SCORE": pair.score,
        "NEAR": pair.near,
        "NEARNESS": _nearness(x.dtype),
        "DIFFERENCES": differences,
        "TILES_TALL": _TILES_TALL,
        "BLOCK_I": tiling.rows,
        "BLOCK_J": tiling.columns,
        "BLOCK_K": tiling.depth,
        "num_warps": tiling.warps,
        "enable_fp_fusion": False,
    }


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
    x_terms, y_terms = _terms(pair, x, curvature), _terms(pair, y, curvature)
    x_shares = x.new_empty(tiles[1], n, dtype=torch.float32)
    y_shares = x.new_empty(tiles[0], m, dtype=torch.float32)
    weights, near, curvature_parts = Weights(grad, None, tiling), None, None
    if pair.near is not None:
        near = x.new_empty(tiles, dtype=torch.int32)
        weights = Weights(x.new_empty(n, m, dtype=torch.float32), near, tiling)
        if curvature_grad is not None:
            curvature_parts = x.new_empty(tiles[0] * tiles[1], dtype=torch.float32)
    with torch.cuda.device_of(x):
        for differences in (False,) if near is None else (False, True):
            weight_kernel[(tiles[0] * tiles[1],)](
                grad,
                x,
                y,
                x_terms,
                y_terms,
                None if near is None else weights.values,
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
                WEIGHTS=pair.weights,
                RATES=pair.rates,
                TF32=x.element_size() == 2,
                **_constants(pair, x, tiling, differences),
            )
        x_share, y_share = x_shares.sum(0), y_shares.sum(0)
        if x_grad is not None:
            launch_product(weights, y, x, x_share, x_grad)
        if y_grad is not None:
            launch_product(weights.T, x, y, y_share, y_grad)
    if curvature_grad is None:
        return
    if curvature_parts is not None:
        torch.sum(curvature_parts, 0, out=curvature_grad)
    else:  # ∂/∂c of -x_t y_t/c is (y_t/x_t + x_t/y_t)/2c²
        curvature_grad.copy_(-(x_share.sum() + y_share.sum()) / (2 * curvature * curvature))


LORENTZ_INNER = Pair(lorentz_term, lorentz_inner, None, None, None, lorentz_rates)
LORENTZ_DISTANCE = Pair(lorentz_term, lorentz_s, lorentz_near_s, distance, lorentz_weights, lorentz_rates)
POINCARE_DISTANCE = Pair(poincare_term, poincare_s, poincare_near_s, distance, poincare_weights, poincare_rates)
