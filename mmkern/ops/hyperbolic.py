"""Hyperbolic space of curvature −c: Lorentz and Poincaré maps, distances and cones, forward and backward.

A Lorentz point is given by its space part ``x``; its time part is ``x_t = √(1/c + |x|²)``. geoopt's ``k`` is ``1/c``
for its Lorentz manifold, whose points carry their time part first, and ``−c`` for its ball. Every ``curvature`` is a
float or a 0-d tensor above 0 and may need a gradient. Points of a pair broadcast over their leading axes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmkern.reference import hyperbolic as reference

from ._checks import (
    Arguments,
    accumulation_dtype,
    broadcastable,
    floating_rows,
    matrices,
    non_negative_number,
    positive,
    trailing,
)
from ._define import Op, define
from ._outputs import like, pairs_of, rows_of

Reduction = Literal["mean", "sum", "none"]

_CURVATURE: dict[str, Literal["scalar", "row_scalar"]] = {"curvature": "scalar"}


def _broadcast(*names: str):  # type: ignore[no-untyped-def]
    def arrange(args: Arguments) -> Arguments:
        if any(args[name].shape != args[names[0]].shape for name in names):
            args |= dict(zip(names, torch.broadcast_tensors(*(args[name] for name in names)), strict=True))
        return args

    return arrange


def _radial(name: str, vector: str) -> Op:
    return define(
        f"{name}(Tensor {vector}, Tensor curvature) -> Tensor",
        family="hyperbolic",
        reference=getattr(reference, name),
        output=like(0),
        requires=[floating_rows(vector), positive("curvature", beside=vector)],
        kinds=_CURVATURE,
    )


def _pair(name: str, second: str, *, to_rows: bool, option: str | None = None) -> Op:
    return define(
        f"{name}(Tensor x, Tensor {second}, Tensor curvature{f', float {option}' if option else ''}) -> Tensor",
        family="hyperbolic",
        reference=getattr(reference, name),
        output=rows_of(0) if to_rows else like(0),
        requires=[
            floating_rows("x", second),
            broadcastable("x", second),
            positive("curvature", beside="x"),
            *([non_negative_number(option)] if option else []),
        ],
        kinds=_CURVATURE,
        arrange=_broadcast("x", second),
    )


def _pairwise(name: str) -> Op:
    return define(
        f"{name}(Tensor x, Tensor y, Tensor curvature) -> Tensor",
        family="hyperbolic",
        reference=getattr(reference, name),
        output=pairs_of(0, 1),
        requires=[floating_rows("x", "y", axes=2), matrices("x", "y"), positive("curvature", beside="x")],
        kinds=_CURVATURE,
        second_derivative=False,
    )


_lorentz_exp_map0 = _radial("lorentz_exp_map0", "v")
_lorentz_log_map0 = _radial("lorentz_log_map0", "x")
_poincare_exp_map0 = _radial("poincare_exp_map0", "v")
_poincare_log_map0 = _radial("poincare_log_map0", "x")
_lorentz_to_poincare = _radial("lorentz_to_poincare", "x")
_poincare_to_lorentz = _radial("poincare_to_lorentz", "x")
_mobius_scalar_mul = define(
    "mobius_scalar_mul(Tensor r, Tensor x, Tensor curvature) -> Tensor",
    family="hyperbolic",
    reference=reference.mobius_scalar_mul,
    output=like(1),
    requires=[floating_rows("x"), trailing("r", of="x", drop=1), positive("curvature", beside="x")],
    kinds=_CURVATURE | {"r": "row_scalar"},
)
_lorentz_exp_map = _pair("lorentz_exp_map", "u", to_rows=False)
_lorentz_log_map = _pair("lorentz_log_map", "y", to_rows=False)
_mobius_add = _pair("mobius_add", "y", to_rows=False)
_poincare_exp_map = _pair("poincare_exp_map", "u", to_rows=False)
_poincare_log_map = _pair("poincare_log_map", "y", to_rows=False)
_lorentz_distance = _pair("lorentz_distance", "y", to_rows=True)
_poincare_distance = _pair("poincare_distance", "y", to_rows=True)
_lorentz_exterior_angle = _pair("lorentz_exterior_angle", "y", to_rows=True)
_lorentz_entailment_loss = _pair("lorentz_entailment_loss", "y", to_rows=True, option="min_radius")
_lorentz_half_aperture = define(
    "lorentz_half_aperture(Tensor x, Tensor curvature, float min_radius) -> Tensor",
    family="hyperbolic",
    reference=reference.lorentz_half_aperture,
    output=rows_of(0),
    requires=[floating_rows("x"), positive("curvature", beside="x"), non_negative_number("min_radius")],
    kinds=_CURVATURE,
)
_lorentz_parallel_transport = define(
    "lorentz_parallel_transport(Tensor x, Tensor y, Tensor u, Tensor curvature) -> Tensor",
    family="hyperbolic",
    reference=reference.lorentz_parallel_transport,
    output=like(0),
    requires=[floating_rows("x", "y", "u"), broadcastable("x", "y", "u"), positive("curvature", beside="x")],
    kinds=_CURVATURE,
    arrange=_broadcast("x", "y", "u"),
)
_lorentz_centroid = define(
    "lorentz_centroid(Tensor x, Tensor weights, Tensor curvature) -> Tensor",
    family="hyperbolic",
    reference=reference.lorentz_centroid,
    output=lambda args: (*args[0].shape[:-2], args[0].shape[-1]),
    requires=[
        floating_rows("x", axes=2),
        floating_rows("x", "weights"),
        trailing("weights", of="x", drop=1),
        positive("curvature", beside="x"),
    ],
    kinds=_CURVATURE | {"weights": "row_scalar"},
)
_lorentz_pairwise_inner = _pairwise("lorentz_pairwise_inner")
_lorentz_pairwise_distance = _pairwise("lorentz_pairwise_distance")
_poincare_pairwise_distance = _pairwise("poincare_pairwise_distance")


# ---- Maps at the origin --------------------------------------------------------------------------------------------


def lorentz_exp_map0(v: Tensor, curvature: float | Tensor) -> Tensor:
    """Exponential map at the root: ``sinh(√c|v|)/(√c|v|) v``.

    Args:
        v: tangent vectors ``[..., D]``.
        curvature: c.
    Returns: points ``[..., D]``. Holds to the range of the dtype (√c|v| to 88 in float32); nothing is clipped.
    Raises: ValueError or TypeError for a curvature not above 0 or a dtype without kernels.
    Source: Desai et al. 2023 (MERU), §2.
    """
    return _lorentz_exp_map0(v, curvature)


def lorentz_log_map0(x: Tensor, curvature: float | Tensor) -> Tensor:
    """Logarithmic map at the root: ``asinh(√c|x|)/(√c|x|) x``; near 0 the identity, with a finite gradient.

    Args:
        x: points ``[..., D]``.
        curvature: c.
    Returns: tangent vectors ``[..., D]``.
    Raises: as ``lorentz_exp_map0``.
    Source: inverse of Desai et al. 2023 (MERU), §2.
    """
    return _lorentz_log_map0(x, curvature)


def poincare_exp_map0(v: Tensor, curvature: float | Tensor) -> Tensor:
    """Exponential map at the centre of the ball: ``tanh(√c|v|)/(√c|v|) v``.

    In float32 a point keeps its distance to the rim while √c|v| is below about 8; beyond it rounds to the rim.

    Args:
        v: tangent vectors ``[..., D]``.
        curvature: c.
    Returns: points ``[..., D]``.
    Raises: as ``lorentz_exp_map0``.
    Source: Ganea et al. 2018, §2.
    """
    return _poincare_exp_map0(v, curvature)


def poincare_log_map0(x: Tensor, curvature: float | Tensor) -> Tensor:
    """Logarithmic map at the centre of the ball: ``atanh(√c|x|)/(√c|x|) x``.

    A point on or beyond the rim counts as half an ulp inside it: the longest result is 8.7/√c in float32, 18.4/√c in
    float64. The error grows as ``ε exp(2√c|v|)``: at √c|v| = 4, 4 digits remain in float32.

    Args:
        x: points ``[..., D]`` of the ball.
        curvature: c.
    Returns: tangent vectors ``[..., D]``.
    Raises: as ``lorentz_exp_map0``.
    Source: Ganea et al. 2018, §2.
    """
    return _poincare_log_map0(x, curvature)


# ---- Maps at a point -------------------------------------------------------------------------------------------------


def lorentz_exp_map(x: Tensor, u: Tensor, curvature: float | Tensor) -> Tensor:
    """Exponential map at ``x``: ``cosh(r) x + sinh(r)/r u``, ``r² = c(|u|² − u_t²)``, ``u_t = x·u/x_t``.

    Args:
        x: points ``[..., D]``.
        u: space parts of tangent vectors at ``x``, ``[..., D]``.
        curvature: c.
    Returns: points ``[..., D]``.
    Raises: as ``lorentz_exp_map0``; ValueError where the shapes do not broadcast.
    Source: Desai et al. 2023 (MERU), §2.
    """
    return _lorentz_exp_map(x, u, curvature)


def lorentz_log_map(x: Tensor, y: Tensor, curvature: float | Tensor) -> Tensor:
    """Logarithmic map at ``x``: ``θ/sinh(θ) (y − cosh(θ) x)``, θ = √c·distance.

    Args:
        x: points ``[..., D]``.
        y: points ``[..., D]``.
        curvature: c.
    Returns: space parts of tangent vectors at ``x``, ``[..., D]``.
    Raises: as ``lorentz_exp_map``.
    Source: inverse of Desai et al. 2023 (MERU), §2.
    """
    return _lorentz_log_map(x, y, curvature)


def poincare_exp_map(x: Tensor, u: Tensor, curvature: float | Tensor) -> Tensor:
    """Exponential map at ``x``: ``x ⊕ tanh(√c λ|u|/2) u/(√c|u|)``, ``λ = 2/(1 − c|x|²)``.

    Args:
        x: points ``[..., D]`` of the ball.
        u: tangent vectors at ``x``, ``[..., D]``.
        curvature: c.
    Returns: points ``[..., D]``.
    Raises: as ``lorentz_exp_map``.
    Source: Ganea et al. 2018, §2.
    """
    return _poincare_exp_map(x, u, curvature)


def poincare_log_map(x: Tensor, y: Tensor, curvature: float | Tensor) -> Tensor:
    """Logarithmic map at ``x``: ``2/(√c λ) atanh(√c|m|) m/|m|``, ``m = (−x) ⊕ y``, ``λ = 2/(1 − c|x|²)``.

    Args:
        x: points ``[..., D]`` of the ball.
        y: points ``[..., D]`` of the ball.
        curvature: c.
    Returns: tangent vectors at ``x``, ``[..., D]``.
    Raises: as ``lorentz_exp_map``.
    Source: Ganea et al. 2018, §2.
    """
    return _poincare_log_map(x, y, curvature)


def lorentz_parallel_transport(x: Tensor, y: Tensor, u: Tensor, curvature: float | Tensor) -> Tensor:
    """Carry ``u`` from ``x`` to ``y`` along the geodesic: ``u + c⟨y, u⟩/(1 − c⟨x, y⟩) (x + y)``.

    Args:
        x: points ``[..., D]``, where ``u`` is tangent.
        y: points ``[..., D]``, where the result is tangent.
        u: space parts of tangent vectors at ``x``, ``[..., D]``.
        curvature: c.
    Returns: space parts of tangent vectors at ``y``, ``[..., D]``.
    Raises: as ``lorentz_exp_map``.
    Source: Law et al. 2019 and Nickel and Kiela 2018, in space parts.
    """
    return _lorentz_parallel_transport(x, y, u, curvature)


def lorentz_centroid(x: Tensor, weights: Tensor, curvature: float | Tensor) -> Tensor:
    """Weighted centroid: ``m / √(−c⟨m, m⟩)``, ``m = Σ weights_n x_n`` with its time part.

    Args:
        x: points ``[..., N, D]``.
        weights: ``[..., N]``, dtype of ``x``, not negative; they need not sum to 1.
        curvature: c.
    Returns: points ``[..., D]``. NaN where all weights are 0.
    Raises: as ``lorentz_exp_map0``; ValueError where ``weights`` is not ``[..., N]``.
    Source: Law et al. 2019, §3.
    """
    return _lorentz_centroid(x, weights, curvature)


# ---- The ball --------------------------------------------------------------------------------------------------------


def mobius_add(x: Tensor, y: Tensor, curvature: float | Tensor) -> Tensor:
    """Möbius addition: ``((1 + 2c x·y + c|y|²) x + (1 − c|x|²) y) / (1 + 2c x·y + c²|x|²|y|²)``.

    Args:
        x: points ``[..., D]`` of the ball.
        y: points ``[..., D]`` of the ball.
        curvature: c.
    Returns: points ``[..., D]``.
    Raises: as ``lorentz_exp_map``.
    Source: Ganea et al. 2018, §2.
    """
    return _mobius_add(x, y, curvature)


def mobius_scalar_mul(r: float | Tensor, x: Tensor, curvature: float | Tensor) -> Tensor:
    """Möbius multiplication by a number: ``tanh(r atanh(√c|x|)) x/(√c|x|)``.

    Args:
        r: float, 0-d tensor, or tensor that broadcasts to ``[..., 1]``.
        x: points ``[..., D]`` of the ball.
        curvature: c.
    Returns: points ``[..., D]``.
    Raises: as ``lorentz_exp_map0``; ValueError where ``r`` does not broadcast to ``[..., 1]``.
    Source: Ganea et al. 2018, §2.
    """
    dtype = accumulation_dtype(x.dtype)
    factor = r.to(dtype) if isinstance(r, Tensor) else torch.ones((), dtype=dtype, device=x.device) * r
    try:
        rows = factor.expand(x.shape[:-1]) if factor.dim() == 0 else factor.expand(*x.shape[:-1], 1).squeeze(-1)
    except RuntimeError:
        raise ValueError(
            f"mobius_scalar_mul: r has shape {list(factor.shape)}, expected one that broadcasts to {[*x.shape[:-1], 1]}"
        ) from None
    return _mobius_scalar_mul(rows, x, curvature)


def lorentz_to_poincare(x: Tensor, curvature: float | Tensor) -> Tensor:
    """Stereographic projection to the ball: ``x / (1 + √c x_t)``.

    Args:
        x: Lorentz points ``[..., D]``.
        curvature: c.
    Returns: points ``[..., D]`` of the ball.
    Raises: as ``lorentz_exp_map0``.
    Source: Nickel and Kiela 2018, §3.
    """
    return _lorentz_to_poincare(x, curvature)


def poincare_to_lorentz(x: Tensor, curvature: float | Tensor) -> Tensor:
    """Inverse of ``lorentz_to_poincare``: ``2x / (1 − c|x|²)``.

    Args:
        x: points ``[..., D]`` of the ball; one on the rim counts as half an ulp inside it.
        curvature: c.
    Returns: Lorentz points ``[..., D]``.
    Raises: as ``lorentz_exp_map0``.
    Source: Nickel and Kiela 2018, §3.
    """
    return _poincare_to_lorentz(x, curvature)


# ---- Distances -------------------------------------------------------------------------------------------------------


def lorentz_distance(x: Tensor, y: Tensor, curvature: float | Tensor) -> Tensor:
    """Distance of each pair of rows: ``acosh(−c⟨x, y⟩)/√c``.

    Computed as ``2/√c asinh(√c/2 √(|x−y|² − (x_t−y_t)²))``: near points keep their digits; coinciding points have
    distance 0 and gradient 0.

    Args:
        x: points ``[..., D]``.
        y: points ``[..., D]``.
        curvature: c.
    Returns: ``[...]``.
    Raises: as ``lorentz_exp_map``.
    Source: Desai et al. 2023 (MERU), §2.
    """
    return _lorentz_distance(x, y, curvature)


def poincare_distance(x: Tensor, y: Tensor, curvature: float | Tensor) -> Tensor:
    """Distance of each pair of rows: ``2/√c asinh(√c|x−y| / √((1−c|x|²)(1−c|y|²)))``.

    Args:
        x: points ``[..., D]`` of the ball.
        y: points ``[..., D]`` of the ball.
        curvature: c.
    Returns: ``[...]``.
    Raises: as ``lorentz_exp_map``.
    Source: Ganea et al. 2018, §2.
    """
    return _poincare_distance(x, y, curvature)


def lorentz_pairwise_inner(x: Tensor, y: Tensor, curvature: float | Tensor) -> Tensor:
    """Lorentz inner products of all pairs: ``x·y − x_t y_t``; monotone in −distance.

    Args:
        x: points ``[N, D]``.
        y: points ``[M, D]``.
        curvature: c.
    Returns: ``[N, M]``.
    Raises: as ``lorentz_exp_map0``; ValueError where ``x`` or ``y`` is not a matrix of D columns.
    Source: Desai et al. 2023 (MERU), §2.
    """
    return _lorentz_pairwise_inner(x, y, curvature)


def lorentz_pairwise_distance(x: Tensor, y: Tensor, curvature: float | Tensor) -> Tensor:
    """Distances of all pairs: ``acosh(−c⟨x_i, y_j⟩)/√c``, as a matrix product with the pairs that cancel redone.

    Args:
        x: points ``[N, D]``.
        y: points ``[M, D]``.
        curvature: c.
    Returns: ``[N, M]``. No second derivative.
    Raises: as ``lorentz_pairwise_inner``.
    Source: Desai et al. 2023 (MERU), §2.
    """
    return _lorentz_pairwise_distance(x, y, curvature)


def poincare_pairwise_distance(x: Tensor, y: Tensor, curvature: float | Tensor) -> Tensor:
    """Distances of all pairs: ``2/√c asinh(√c|x_i−y_j| / √((1−c|x_i|²)(1−c|y_j|²)))``.

    Args:
        x: points ``[N, D]`` of the ball.
        y: points ``[M, D]`` of the ball.
        curvature: c.
    Returns: ``[N, M]``. No second derivative.
    Raises: as ``lorentz_pairwise_inner``.
    Source: Ganea et al. 2018, §2.
    """
    return _poincare_pairwise_distance(x, y, curvature)


# ---- Cones -----------------------------------------------------------------------------------------------------------


def lorentz_half_aperture(x: Tensor, curvature: float | Tensor, min_radius: float = 0.1) -> Tensor:
    """Half aperture of the entailment cone of each point: ``asin(2K/(√c|x|))``, π/2 within ``2K/√c`` of the root.

    Args:
        x: points ``[..., D]``.
        curvature: c.
        min_radius: K, in units of 1/√c.
    Returns: ``[...]``, radians.
    Raises: as ``lorentz_exp_map0``.
    Source: Desai et al. 2023 (MERU), §3.2.
    """
    return _lorentz_half_aperture(x, curvature, min_radius)


def lorentz_exterior_angle(x: Tensor, y: Tensor, curvature: float | Tensor) -> Tensor:
    """Angle at ``x`` between the ray from the root through ``x`` and the geodesic from ``x`` to ``y``.

    Args:
        x: points ``[..., D]``, the general concept (a text).
        y: points ``[..., D]``, the specific one (an image).
        curvature: c.
    Returns: ``[...]``, radians in [0, π]; 0 where the points coincide, π/2 where ``x`` is the root.
    Raises: as ``lorentz_exp_map``.
    Source: Desai et al. 2023 (MERU), §3.2.
    """
    return _lorentz_exterior_angle(x, y, curvature)


def lorentz_entailment_loss(
    x: Tensor, y: Tensor, curvature: float | Tensor, min_radius: float = 0.1, reduction: Reduction = "mean"
) -> Tensor:
    """How far ``y`` lies outside the cone of ``x``: ``max(0, exterior_angle(x, y) − half_aperture(x))``.

    Args:
        x: points ``[..., D]``, the general concept (a text).
        y: points ``[..., D]``, the specific one (an image).
        curvature: c.
        min_radius: K, in units of 1/√c.
        reduction: "mean", "sum" or "none".
    Returns: a 0-d tensor, or ``[...]`` with "none"; radians. The mean of no rows is NaN, as in torch.
    Raises: as ``lorentz_exp_map``; ValueError for another reduction.
    Source: Desai et al. 2023 (MERU), §3.2.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'lorentz_entailment_loss: reduction is {reduction!r}, expected "mean", "sum" or "none"')
    losses = _lorentz_entailment_loss(x, y, curvature, min_radius)
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
