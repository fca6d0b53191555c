"""Hyperbolic space of curvature −c, in plain PyTorch: what every kernel of this family means.

A Lorentz point is its space part ``x``; its time part is ``x_t = √(1/c + |x|²)``. A Poincaré point lies in the ball of
radius ``1/√c``. Formulas are written in the difference ``y − x`` wherever two points meet, so that coinciding and
near points keep their digits. Sources: Desai et al. 2023 (MERU) for Lorentz maps, distance and cones; Ganea et al.
2018, §2, for the ball. docs/hyperbolic.md derives them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .smooth import asinhc, atanhc, cosh_sqrt, safe_sqrt, sinhc, tanhc

Scalar = float | Tensor


def _accumulate_in_float32(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Run ``formula`` in float32 on 16-bit inputs and round the result once."""

    @functools.wraps(formula)
    def wrapper(*args: Scalar) -> Tensor:
        dtype = next(a.dtype for a in args if isinstance(a, Tensor) and a.dim() > 0)
        if dtype.itemsize != 2:
            return formula(*args)
        return formula(*(a.float() if isinstance(a, Tensor) else a for a in args)).to(dtype)

    return wrapper


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)


def _time(xx: Tensor, c: Scalar) -> Tensor:
    """Time part times √c: ``√(1 + c|x|²)``."""
    return (1 + c * xx).sqrt()


class _Pair(NamedTuple):
    """The inner products from which every function of two points follows; ``d = y − x``."""

    xx: Tensor
    yy: Tensor
    xd: Tensor
    dd: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> _Pair:
        d = y - x
        return cls(_dot(x, x), _dot(y, y), _dot(x, d), _dot(d, d))


def _half_sinh_squared(p: _Pair, c: Scalar) -> Tensor:
    """``sinh²(√c·distance/2) = c/4 (|y − x|² − (y_t − x_t)²)`` of two Lorentz points."""
    time_gap = c * (2 * p.xd + p.dd) / (_time(p.xx, c) + _time(p.yy, c))
    return (c * p.dd - time_gap.square()).clamp_min(0) / 4


# Radial maps: y = φ(c|x|²) x


@_accumulate_in_float32
def lorentz_exp_map0(v: Tensor, curvature: Scalar) -> Tensor:
    return sinhc(curvature * _dot(v, v))[..., None] * v


@_accumulate_in_float32
def lorentz_log_map0(x: Tensor, curvature: Scalar) -> Tensor:
    return asinhc(curvature * _dot(x, x))[..., None] * x


@_accumulate_in_float32
def poincare_exp_map0(v: Tensor, curvature: Scalar) -> Tensor:
    return tanhc(curvature * _dot(v, v))[..., None] * v


@_accumulate_in_float32
def poincare_log_map0(x: Tensor, curvature: Scalar) -> Tensor:
    return atanhc(curvature * _dot(x, x))[..., None] * x


@_accumulate_in_float32
def lorentz_to_poincare(x: Tensor, curvature: Scalar) -> Tensor:
    return x / (1 + _time(_dot(x, x), curvature))[..., None]


@_accumulate_in_float32
def poincare_to_lorentz(x: Tensor, curvature: Scalar) -> Tensor:
    return 2 * x / _ball_gap(_dot(x, x), curvature)[..., None]


@_accumulate_in_float32
def mobius_scalar_mul(r: Tensor, x: Tensor, curvature: Scalar) -> Tensor:
    """``tanh(r·atanh(√c|x|)) x / (√c|x|)``; ``r`` has one entry a row."""
    z = curvature * _dot(x, x)
    ratio = atanhc(z)
    scale = r * ratio
    return (scale * tanhc(scale.square() * z))[..., None] * x


# Maps of two points: out = a x + b y


@_accumulate_in_float32
def lorentz_exp_map(x: Tensor, u: Tensor, curvature: Scalar) -> Tensor:
    """``cosh(r) x + sinh(r)/r u``, ``r² = c(|u|² − u_t²)``, ``u_t = x·u/x_t``."""
    xx, xu, uu = _dot(x, x), _dot(x, u), _dot(u, u)
    z = (curvature * (uu - curvature * xu.square() / (1 + curvature * xx))).clamp_min(0)
    return cosh_sqrt(z)[..., None] * x + sinhc(z)[..., None] * u


@_accumulate_in_float32
def lorentz_log_map(x: Tensor, y: Tensor, curvature: Scalar) -> Tensor:
    """``θ/sinh(θ) (y − cosh(θ) x)``, θ = √c·distance; with ``s = sinh²(θ/2)``, ``cosh θ = 1 + 2s``."""
    s = _half_sinh_squared(_Pair.of(x, y), curvature)
    scale = asinhc(s) / (1 + s).sqrt()
    return scale[..., None] * ((y - x) - 2 * s[..., None] * x)


@_accumulate_in_float32
def mobius_add(x: Tensor, y: Tensor, curvature: Scalar) -> Tensor:
    xx, xy, yy = curvature * _dot(x, x), curvature * _dot(x, y), curvature * _dot(y, y)
    numerator = (1 + 2 * xy + yy)[..., None] * x + (1 - xx)[..., None] * y
    return numerator / (1 + 2 * xy + xx * yy)[..., None]


@_accumulate_in_float32
def poincare_exp_map(x: Tensor, u: Tensor, curvature: Scalar) -> Tensor:
    """``x ⊕ tanh(√c λ|u|/2) u/(√c|u|)``, conformal factor ``λ = 2/(1 − c|x|²)``."""
    half_factor = 1 / _ball_gap(_dot(x, x), curvature)
    step = half_factor * tanhc(curvature * half_factor.square() * _dot(u, u))
    return mobius_add(x, step[..., None] * u, curvature)


@_accumulate_in_float32
def poincare_log_map(x: Tensor, y: Tensor, curvature: Scalar) -> Tensor:
    """``2/(√c λ) atanh(√c|m|) m/|m|``, ``m = (−x) ⊕ y``; with ``s = sinh²(√c·distance/2)``."""
    p = _Pair.of(x, y)
    gap_x, gap_y = _ball_gap(p.xx, curvature), _ball_gap(p.yy, curvature)
    s = curvature * p.dd / (gap_x * gap_y)
    scale = asinhc(s) / ((1 + s).sqrt() * gap_y)
    return scale[..., None] * (gap_x[..., None] * (y - x) - (curvature * p.dd)[..., None] * x)


def _ball_gap(xx: Tensor, c: Scalar) -> Tensor:
    """``1 − c|x|²``, held above zero: a rounded point may lie on the rim."""
    return (1 - c * xx).clamp_min(torch.finfo(xx.dtype).eps / 2)


# Functions of two points


@_accumulate_in_float32
def lorentz_distance(x: Tensor, y: Tensor, curvature: Scalar) -> Tensor:
    """``acosh(−c⟨x, y⟩)/√c = 2/√c asinh(√c/2 √(|x−y|² − (x_t−y_t)²))``."""
    s = _half_sinh_squared(_Pair.of(x, y), curvature)
    return 2 * safe_sqrt(s / curvature) * asinhc(s)


@_accumulate_in_float32
def poincare_distance(x: Tensor, y: Tensor, curvature: Scalar) -> Tensor:
    p = _Pair.of(x, y)
    s = curvature * p.dd / (_ball_gap(p.xx, curvature) * _ball_gap(p.yy, curvature))
    return 2 * safe_sqrt(s / curvature) * asinhc(s)


@_accumulate_in_float32
def lorentz_half_aperture(x: Tensor, curvature: Scalar, min_radius: float) -> Tensor:
    """``asin(2K/(√c|x|))``; π/2 where the point is nearer to the root than ``2K/√c``."""
    z = curvature * _dot(x, x) - 4 * min_radius**2
    outside = ~(z <= 0)  # NaN stays NaN
    opposite = torch.full_like(z, 2 * min_radius)
    return torch.where(outside, torch.atan2(opposite, torch.where(outside, z, 1.0).sqrt()), math.pi / 2)


@_accumulate_in_float32
def lorentz_exterior_angle(x: Tensor, y: Tensor, curvature: Scalar) -> Tensor:
    """Angle at ``x`` between the ray from the root through ``x`` and the geodesic from ``x`` to ``y``.

    MERU's ``acos((y_t + s x_t)/(|x|√(s²−1)))`` with both legs of the right triangle, so that no digits are lost near
    0 and π. Where the points coincide 0, at the root π/2.
    """
    p = _Pair.of(x, y)
    xx, xd, dd = curvature * p.xx, curvature * p.xd, curvature * p.dd
    x_t, y_t = _time(p.xx, curvature), _time(p.yy, curvature)
    along = x_t * xd - xx * (2 * xd + dd) / (x_t + y_t)
    across = (xx * dd - xd.square()).clamp_min(0)
    at_root = (xx == 0) & (dd > 0)
    angle = torch.atan2(safe_sqrt(across), torch.where((along == 0) & (across == 0), 1.0, along))
    return torch.where(at_root, math.pi / 2, angle)


@_accumulate_in_float32
def lorentz_entailment_loss(x: Tensor, y: Tensor, curvature: Scalar, min_radius: float) -> Tensor:
    """``max(0, exterior_angle(x, y) − half_aperture(x))``, one value a row."""
    angle = lorentz_exterior_angle(x, y, curvature)
    return (angle - lorentz_half_aperture(x, curvature, min_radius)).clamp_min(0)


# Three vectors, many vectors


@_accumulate_in_float32
def lorentz_parallel_transport(x: Tensor, y: Tensor, u: Tensor, curvature: Scalar) -> Tensor:
    """``u + c⟨y, u⟩/(1 − c⟨x, y⟩) (x + y)``, with ``⟨y, u⟩ = (y−x)·u − (x·u)(y_t−x_t)/x_t``."""
    p = _Pair.of(x, y)
    x_t, y_t = _time(p.xx, curvature), _time(p.yy, curvature)
    time_gap = curvature * (2 * p.xd + p.dd) / (x_t + y_t)
    inner = _dot(y - x, u) - _dot(x, u) * time_gap / x_t
    scale = curvature * inner / (2 + 2 * _half_sinh_squared(p, curvature))
    return u + scale[..., None] * (x + y)


@_accumulate_in_float32
def lorentz_centroid(x: Tensor, weights: Tensor, curvature: Scalar) -> Tensor:
    """``m / √(−c⟨m, m⟩)``, ``m = Σ weights_n x_n`` with its time part (Law et al. 2019, §3)."""
    space = (weights[..., None] * x).sum(-2)
    time = (weights * _time(_dot(x, x), curvature)).sum(-1)
    return space / (time.square() - curvature * _dot(space, space)).sqrt()[..., None]


# All pairs: [N, D], [M, D] -> [N, M]


@_accumulate_in_float32
def lorentz_pairwise_inner(x: Tensor, y: Tensor, curvature: Scalar) -> Tensor:
    x_t, y_t = _time(_dot(x, x), curvature), _time(_dot(y, y), curvature)
    return x @ y.T - x_t[:, None] * y_t / curvature


@_accumulate_in_float32
def lorentz_pairwise_distance(x: Tensor, y: Tensor, curvature: Scalar) -> Tensor:
    xx, yy = _dot(x, x), _dot(y, y)
    x_t, y_t = _time(xx, curvature), _time(yy, curvature)
    time_gap = curvature * (xx[:, None] - yy) / (x_t[:, None] + y_t)
    s = (curvature * _squared_differences(x, y) - time_gap.square()).clamp_min(0) / 4
    return 2 * safe_sqrt(s / curvature) * asinhc(s)


@_accumulate_in_float32
def poincare_pairwise_distance(x: Tensor, y: Tensor, curvature: Scalar) -> Tensor:
    gaps = _ball_gap(_dot(x, x), curvature)[:, None] * _ball_gap(_dot(y, y), curvature)
    s = curvature * _squared_differences(x, y) / gaps
    return 2 * safe_sqrt(s / curvature) * asinhc(s)


def _squared_differences(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i − y_j|²`` from the differences themselves, which ``|x|² + |y|² − 2 x·y`` would cancel."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
