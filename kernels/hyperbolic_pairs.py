"""All-pairs hyperbolic ops, ``[N, D], [M, D] -> [N, M]``, from tiles of S = X Yᵀ.

A distance is a function of ``s = sinh²(θ/2)``, and s follows from the score, ``|x|²`` and ``|y|²``. Where that would
cancel, the tile is taken from the differences instead, forward and backward, by a second launch that leaves all other
tiles alone. Backward: a first kernel turns scores into weights W with ``gx_i = Σ_j W_ij (y_j - x_i) + (...) x_i``, then
two products follow.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
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
    ALL_REGISTERS,
    Tiling,
    Weights,
    are_copied,
    launch_product,
    rounded_to_tf32,
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
    curvature's adjoint ``Σ l Σ V`` over both sides. ``near``, ``value`` and ``weights`` are None for an inner product;
    ``term`` and ``rates`` too where the score is all.
    """

    term: Any
    score: Any
    near: Any
    value: Any
    weights: Any
    rates: Any


@triton.jit
def _pair_s(
    x, y, x_stride, y_stride, i, j, x_term, y_term, products, near_tile, c, n, m, depth,
    SCORE: tl.constexpr, NEAR: tl.constexpr, NEARNESS: tl.constexpr, DIFFERENCES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """s of a tile of pairs: from differences, or from scores, with a note where that has cancelled."""
    if DIFFERENCES:
        return NEAR(squared_difference_tile(x, y, x_stride, y_stride, i, j, n, m, depth), x_term, y_term, c)
    else:
        score = score_tile(x, y, x_stride, y_stride, i, j, n, m, depth, BLOCK_K)
        if products is not None:
            tl.store(products + i[:, None] * m + j[None, :], score, (i < n)[:, None] & (j < m)[None, :])
        s, scale = SCORE(score, x_term, y_term, c)
        if NEAR is not None:
            near = (s < NEARNESS * scale).to(tl.int32)
            tl.store(near_tile, tl.max(tl.max(near, 1), 0))
        return s


@triton.jit
def pair_kernel(
    x,  # [n, depth]
    y,  # [m, depth]
    x_terms,  # [n], float32; or None
    y_terms,  # [m], float32; or None
    given,  # what REDUCE takes
    products,  # [n, m], float32, contiguous: for the inner products; or None
    near_tiles,  # [tiles_i, tiles_j], int32; None for an inner product
    curvature,
    x_stride,
    y_stride,
    n,
    m,
    depth,
    tiles_i,
    tiles_j,
    REDUCE: tl.constexpr,
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
    x_term, y_term = 0.0, 0.0
    if x_terms is not None:
        x_term = tl.load(x_terms + i, i < n, 0.0)[:, None]
        y_term = tl.load(y_terms + j, j < m, 0.0)[None, :]
    value = _pair_s(
        x, y, x_stride, y_stride, i, j, x_term, y_term, products, near_tile, c, n, m, depth,
        SCORE, NEAR, NEARNESS, DIFFERENCES, BLOCK_K,
    )  # fmt: skip
    if VALUE is not None:
        value = VALUE(value, c)
    REDUCE(given, value, i, j, n, m, tile_i, tile_j, tiles_j)


@triton.jit
def _store_values(given, value, i, j, n, m, tile_i, tile_j, tiles_j):
    """``given``: out [n, m], contiguous."""
    out = given[0]
    tl.store(out + i[:, None] * m + j[None, :], value.to(out.dtype.element_ty), (i < n)[:, None] & (j < m)[None, :])


@triton.jit
def weight_kernel(
    x,  # [n, depth]
    y,  # [m, depth]
    x_terms,  # [n], float32; or None
    y_terms,  # [m], float32; or None
    given,  # what UPSTREAM takes
    weights,  # [n, m], float32, contiguous; None where they are the gradient that came
    near_tiles,  # [tiles_i, tiles_j], int32; None for an inner product
    x_shares,  # [tiles_j, n], float32; None without RATES
    y_shares,  # [tiles_i, m], float32; None without RATES
    curvature_parts,  # [tiles_i * tiles_j], float32; None is not wanted
    curvature,
    x_stride,
    y_stride,
    n,
    m,
    depth,
    tiles_i,
    tiles_j,
    UPSTREAM: tl.constexpr,
    SCORE: tl.constexpr,
    NEAR: tl.constexpr,
    VALUE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    RATES: tl.constexpr,
    NEARNESS: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    TF32: tl.constexpr,
    HEAVY: tl.constexpr,
    TILES_TALL: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W and its sums over a tile: ``gx_i = Σ_j W_ij y_j + share_i x_i``; in a near tile with ``y_j - x_i`` for ``y_j``.

    UPSTREAM gives the gradient of the values, which VALUE makes of s.
    """
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
    x_term, y_term = 0.0, 0.0
    if x_terms is not None:
        x_term = tl.load(x_terms + i, i < n, 0.0)[:, None]
        y_term = tl.load(y_terms + j, j < m, 0.0)[None, :]
    s = 0.0
    if weights is not None:
        s = _pair_s(
            x, y, x_stride, y_stride, i, j, x_term, y_term, None, near_tile, c, n, m, depth,
            SCORE, NEAR, NEARNESS, DIFFERENCES, BLOCK_K,
        )  # fmt: skip
    if WEIGHTS is not None and HEAVY:  # before UPSTREAM, which would hold what they are made of
        slope, slope_c = distance_slopes(s, c)
    w = UPSTREAM(given, s, c, i, j, n, m, tile, VALUE)
    part = tl.zeros([1], tl.float32)
    if WEIGHTS is not None:
        if not HEAVY:
            slope, slope_c = distance_slopes(s, c)
        if curvature_parts is not None:
            part += tl.sum(tl.sum(tl.where(mask, w * slope_c, 0.0), 1), 0)
        w, v = WEIGHTS(w * slope, s, x_term, y_term, c)
    elif RATES is not None:
        v = w * (y_term - x_term)
    if weights is not None:
        if TF32:  # the shares must sum the weights that the product multiplies
            w = rounded_to_tf32(w)
        tl.store(weights + i[:, None] * m + j[None, :], w, mask)
    if RATES is not None:
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


@triton.jit
def _load_gradient(given, s, c, i, j, n, m, tile, VALUE: tl.constexpr):
    """``given``: the gradient [n, m] and its strides."""
    grad, row_stride, column_stride = given
    at_grad = grad + i[:, None] * row_stride + j[None, :] * column_stride
    return tl.load(at_grad, (i < n)[:, None] & (j < m)[None, :], 0.0).to(tl.float32)


def _nearness(dtype: torch.dtype) -> float:
    """Below this part of its terms a difference is taken again: it has lost more digits than the result has to spare.

    With 2⁻⁶ in float32, of thousands of rows in few dimensions some that one close pair outweighs miss the contract.
    """
    return 2.0**-3 if dtype.itemsize == 4 else 2.0**-10


def float_or_tensor(value: float | Tensor) -> float | Tensor:
    return value if isinstance(value, Tensor) else float(value)


@dataclass(frozen=True)
class AllPairs:
    """``[n, D]`` and ``[m, D]`` points, what a kernel takes of them, and the tiles of their pairs.

    ``results`` is the dtype of what the values become.
    """

    pair: Pair
    x: Tensor
    y: Tensor
    x_terms: Tensor | None
    y_terms: Tensor | None
    curvature: float | Tensor
    results: torch.dtype
    is_heavy: bool = False  # what becomes of them holds many numbers beside

    @classmethod
    def of(cls, pair: Pair, x: Tensor, y: Tensor, curvature: float | Tensor, results: torch.dtype) -> AllPairs:
        x, y = unit_stride(x), unit_stride(y)
        terms = [_terms(pair, points, curvature) for points in (x, y)]
        return cls(pair, x, y, *terms, float_or_tensor(curvature), results)

    def part(self, rows: slice, columns: slice) -> AllPairs:
        x_terms = None if self.x_terms is None else self.x_terms[rows]
        y_terms = None if self.y_terms is None else self.y_terms[columns]
        return replace(self, x=self.x[rows], y=self.y[columns], x_terms=x_terms, y_terms=y_terms)

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.y.shape[0]

    @property
    def tiling(self) -> Tiling:
        return Tiling.of(*self.shape, self.x.dtype, is_copied=are_copied(self.x, self.y), is_heavy=self.is_heavy)

    @property
    def tiles(self) -> tuple[int, int]:
        return self.tiling.grid(*self.shape)

    def room(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype)

    def room_for_near_tiles(self) -> Tensor | None:
        return None if self.pair.near is None else self.room(*self.tiles, dtype=torch.int32)

    def room_for_weights(self, *, is_exact: bool = False) -> Weights:
        return Weights(self.room(*self.shape), self.room_for_near_tiles(), self.tiling, is_exact)

    def reduce(self, function: Any, given: tuple[Any, ...], products: Tensor | None = None) -> None:
        """Run ``pair_kernel``; ``function`` takes ``given`` beside the values of a tile."""
        near = self.room_for_near_tiles()
        with torch.cuda.device_of(self.x):
            for differences in (False,) if near is None else (False, True):
                pair_kernel[(prod(self.tiles),)](
                    self.x,
                    self.y,
                    self.x_terms,
                    self.y_terms,
                    given,
                    products,
                    near,
                    self.curvature,
                    *self._sizes(),
                    REDUCE=function,
                    **self._constants(differences),
                )

    def differentiate(
        self,
        function: Any,
        given: tuple[Any, ...],
        weights: Weights,
        gradients: tuple[Tensor | None, Tensor | None],
        curvature_parts: Tensor | None,
        adds: tuple[bool, bool] = (False, False),
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of x and y, or what is added to them; returns the shares.

        ``function`` finds, from ``given`` and s of a tile, the gradients of its values.
        """
        shares: list[Tensor | None] = [None, None]
        if self.pair.rates is not None:
            shares = [self.room(tiles, points) for tiles, points in zip(self.tiles[::-1], self.shape, strict=True)]
        with torch.cuda.device_of(self.x):
            for differences in (False,) if weights.near is None else (False, True):
                weight_kernel[(prod(self.tiles),)](
                    self.x,
                    self.y,
                    self.x_terms,
                    self.y_terms,
                    given,
                    None if weights.values is given[0] else weights.values,
                    weights.near,
                    *shares,
                    curvature_parts,
                    self.curvature,
                    *self._sizes(),
                    UPSTREAM=function,
                    WEIGHTS=self.pair.weights,
                    RATES=self.pair.rates,
                    TF32=self.x.element_size() == 2 and not weights.is_exact,
                    HEAVY=self.is_heavy,
                    **(ALL_REGISTERS if self.is_heavy and differences else {}),
                    **self._constants(differences),
                )
            x_share, y_share = (None if parts is None else parts.sum(0) for parts in shares)
            if gradients[0] is not None:
                launch_product(weights, self.y, self.x, x_share, gradients[0], adds=adds[0])
            if gradients[1] is not None:
                launch_product(weights.T, self.x, self.y, y_share, gradients[1], adds=adds[1])
        return x_share, y_share

    def _sizes(self) -> tuple[int, ...]:
        return self.x.stride(0), self.y.stride(0), *self.shape, self.x.shape[1], *self.tiles

    def _constants(self, differences: bool) -> dict[str, Any]:
        tiling = self.tiling
        return {
            "SCORE": self.pair.score,
            "NEAR": self.pair.near,
            "VALUE": self.pair.value,
            "NEARNESS": _nearness(self.results),
            "DIFFERENCES": differences,
            "TILES_TALL": _TILES_TALL,
            "BLOCK_I": tiling.rows,
            "BLOCK_J": tiling.columns,
            "BLOCK_K": tiling.depth,
            "num_warps": tiling.warps,
            "enable_fp_fusion": False,
        }


def _terms(pair: Pair, x: Tensor, curvature: float | Tensor) -> Tensor | None:
    if pair.term is None:
        return None
    out = x.new_empty(x.shape[0], dtype=torch.float32)
    rows.launch(_NORMS, pair.term, (x,), (), curvature, scalar_outputs=(out,))
    return out


def forward(pair: Pair, x: Tensor, y: Tensor, curvature: float | Tensor, out: Tensor) -> None:
    AllPairs.of(pair, x, y, curvature, x.dtype).reduce(_store_values, (out,))


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
    pairs = AllPairs.of(pair, x, y, curvature, x.dtype)
    is_inner = pair.near is None
    weights = Weights(grad, None, pairs.tiling) if is_inner else pairs.room_for_weights()
    curvature_parts = None if is_inner or curvature_grad is None else pairs.room(prod(pairs.tiles))
    given = (grad, *grad.stride())
    x_share, y_share = pairs.differentiate(_load_gradient, given, weights, (x_grad, y_grad), curvature_parts)
    if curvature_grad is None:
        return
    if curvature_parts is not None:
        torch.sum(curvature_parts, 0, out=curvature_grad)
    else:  # ∂/∂c of -x_t y_t/c is (y_t/x_t + x_t/y_t)/2c²
        curvature_grad.copy_(-(x_share.sum() + y_share.sum()) / (2 * curvature * curvature))


LORENTZ_INNER = Pair(lorentz_term, lorentz_inner, None, None, None, lorentz_rates)
LORENTZ_DISTANCE = Pair(lorentz_term, lorentz_s, lorentz_near_s, distance, lorentz_weights, lorentz_rates)
POINCARE_DISTANCE = Pair(poincare_term, poincare_s, poincare_near_s, distance, poincare_weights, poincare_rates)
