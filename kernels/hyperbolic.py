"""Launchers of the hyperbolic family: ``NAME(*inputs, curvature, *options, out)`` and its ``NAME_backward``.

A launcher writes into given outputs; a gradient that is None is not wanted. The row-wise ops are one kernel (``rows.py``), a
flavour from this file and a scalar function (``hyperbolic_scalars.py``); the pairwise ones are in ``hyperbolic_pairs.py``.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from mmkern.kernels import hyperbolic_pairs as pairs
from mmkern.kernels import hyperbolic_scalars as solve
from mmkern.kernels import rows, scalar_math
from mmkern.kernels.hyperbolic_centroid import centroid_sums
from mmkern.kernels.rows import Flavour
from torch import Tensor

Launcher = Callable[..., None]


@triton.jit
def _dot(x, y):
    return tl.sum(x * y, 1)


# Radial: out = φ x


@triton.jit
def _radial_sums(tiles):
    return (_dot(tiles[0], tiles[0]),)


@triton.jit
def _radial_outputs(tiles, k):
    return (k[0][:, None] * tiles[0],)


@triton.jit
def _gradient_sums(tiles):
    g, x = tiles
    return _dot(x, x), _dot(g, x)


@triton.jit
def _gradient_outputs(tiles, k):
    g, x = tiles
    return (k[0][:, None] * g + k[1][:, None] * x,)


# Plain pair: out = a x + b y


@triton.jit
def _plain_sums(tiles):
    x, y = tiles
    return _dot(x, x), _dot(y, y), _dot(x, y)


@triton.jit
def _plain_outputs(tiles, k):
    x, y = tiles
    return (k[0][:, None] * x + k[1][:, None] * y,)


@triton.jit
def _plain_gradient_sums(tiles):
    g, x, y = tiles
    return _dot(x, x), _dot(y, y), _dot(x, y), _dot(g, x), _dot(g, y)


@triton.jit
def _plain_gradient_outputs(tiles, k):
    g, x, y = tiles
    a, b, xx, yy, xy = k
    gx = a[:, None] * g + (2 * xx)[:, None] * x + xy[:, None] * y
    gy = b[:, None] * g + (2 * yy)[:, None] * y + xy[:, None] * x
    return gx, gy


# Difference pair: d = y - x; out = a x + b d, or one value a row


@triton.jit
def _difference_sums(tiles):
    x, y = tiles
    d = y - x
    return _dot(x, x), _dot(y, y), _dot(x, d), _dot(d, d)


@triton.jit
def _difference_outputs(tiles, k):
    x, y = tiles
    return (k[0][:, None] * x + k[1][:, None] * (y - x),)


@triton.jit
def _difference_gradient_sums(tiles):
    g, x, y = tiles
    d = y - x
    return _dot(x, x), _dot(y, y), _dot(x, d), _dot(d, d), _dot(g, x), _dot(g, d)


@triton.jit
def _difference_gradient_outputs(tiles, k):
    g, x, y = tiles
    a, b, xx, yy, xd, dd = k
    sx, sy = _scalar_gradient_outputs((x, y), (xx, yy, xd, dd))
    return (a - b)[:, None] * g + sx, b[:, None] * g + sy


@triton.jit
def _scalar_gradient_outputs(tiles, k):
    x, y = tiles
    xx, yy, xd, dd = k
    d = y - x
    gx = (2 * xx - xd)[:, None] * x + (xd - 2 * dd)[:, None] * d
    gy = (2 * yy + xd)[:, None] * y + (2 * dd - xd)[:, None] * d
    return gx, gy


# Transport: d = y - x; out = u + k (2x + d)


@triton.jit
def _transport_sums(tiles):
    x, y, u = tiles
    d = y - x
    return _dot(x, x), _dot(y, y), _dot(x, d), _dot(d, d), _dot(x, u), _dot(d, u)


@triton.jit
def _transport_outputs(tiles, k):
    x, y, u = tiles
    return (u + k[0][:, None] * (x + y),)


@triton.jit
def _transport_gradient_sums(tiles):
    g, x, y, u = tiles
    d = y - x
    return _dot(x, x), _dot(y, y), _dot(x, d), _dot(d, d), _dot(x, u), _dot(d, u), _dot(g, x), _dot(g, d)


@triton.jit
def _transport_gradient_outputs(tiles, k):
    g, x, y, u = tiles
    a, xx, yy, xd, dd, xu, du = k
    sx, sy = _scalar_gradient_outputs((x, y), (xx, yy, xd, dd))
    gx = a[:, None] * g + sx + (xu - du)[:, None] * u
    gy = a[:, None] * g + sy + du[:, None] * u
    return gx, gy, g + xu[:, None] * x + du[:, None] * (y - x)


RADIAL, RADIAL_GRADIENT = Flavour(_radial_sums, _radial_outputs), Flavour(_gradient_sums, _gradient_outputs)
PLAIN, PLAIN_GRADIENT = Flavour(_plain_sums, _plain_outputs), Flavour(_plain_gradient_sums, _plain_gradient_outputs)
DIFFERENCE = Flavour(_difference_sums, _difference_outputs)
DIFFERENCE_GRADIENT = Flavour(_difference_gradient_sums, _difference_gradient_outputs)
POINT_VALUE, PAIR_VALUE = Flavour(_radial_sums), Flavour(_difference_sums)
PAIR_VALUE_GRADIENT = Flavour(_difference_sums, _scalar_gradient_outputs)
TRANSPORT = Flavour(_transport_sums, _transport_outputs)
TRANSPORT_GRADIENT = Flavour(_transport_gradient_sums, _transport_gradient_outputs)


class _CurvaturePartials:
    """One partial gradient a row, summed in a fixed order: the same bits run after run."""

    def __init__(self, curvature_grad: Tensor | None, row_count: int) -> None:
        self.total = curvature_grad
        self.rows = None if curvature_grad is None else curvature_grad.new_empty(row_count, dtype=torch.float32)

    def reduce(self) -> None:
        if self.rows is not None:
            torch.sum(self.rows, 0, out=self.total)


def _backward(
    flavour: Flavour,
    adjoint: Any,
    vectors: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
    curvature: float | Tensor,
    curvature_grad: Tensor | None,
    *,
    function: Any = None,
    scalars: tuple[Tensor, ...] = (),
    scalar_gradients: tuple[Tensor | None, ...] = (),
    option: float = 0.0,
) -> None:
    partials = _CurvaturePartials(curvature_grad, prod(vectors[0].shape[:-1]))
    rows.launch(
        flavour,
        adjoint,
        vectors,
        gradients,
        curvature,
        function=function,
        scalars=scalars,
        scalar_outputs=(*scalar_gradients, partials.rows),
        option=option,
    )
    partials.reduce()


def _radial(profile: Any) -> tuple[Launcher, Launcher]:
    def forward(x: Tensor, curvature: float | Tensor, out: Tensor) -> None:
        rows.launch(RADIAL, solve.radial, (x,), (out,), curvature, function=profile)

    def backward(
        grad: Tensor, x: Tensor, curvature: float | Tensor, x_grad: Tensor | None, curvature_grad: Tensor | None
    ) -> None:
        adjoint = solve.radial_adjoint
        _backward(RADIAL_GRADIENT, adjoint, (grad, x), (x_grad,), curvature, curvature_grad, function=profile)

    return forward, backward


def _pair(flavour: Flavour, gradient: Flavour, op: Any, adjoint: Any) -> tuple[Launcher, Launcher]:
    def forward(x: Tensor, y: Tensor, curvature: float | Tensor, out: Tensor) -> None:
        rows.launch(flavour, op, (x, y), (out,), curvature)

    def backward(
        grad: Tensor,
        x: Tensor,
        y: Tensor,
        curvature: float | Tensor,
        x_grad: Tensor | None,
        y_grad: Tensor | None,
        curvature_grad: Tensor | None,
    ) -> None:
        _backward(gradient, adjoint, (grad, x, y), (x_grad, y_grad), curvature, curvature_grad)

    return forward, backward


def _pair_value(op: Any, adjoint: Any) -> tuple[Launcher, Launcher]:
    def forward(x: Tensor, y: Tensor, curvature: float | Tensor, out: Tensor) -> None:
        rows.launch(PAIR_VALUE, op, (x, y), (), curvature, scalar_outputs=(out,))

    def backward(
        grad: Tensor,
        x: Tensor,
        y: Tensor,
        curvature: float | Tensor,
        x_grad: Tensor | None,
        y_grad: Tensor | None,
        curvature_grad: Tensor | None,
    ) -> None:
        gradients = (x_grad, y_grad)
        _backward(PAIR_VALUE_GRADIENT, adjoint, (x, y), gradients, curvature, curvature_grad, scalars=(grad,))

    return forward, backward


lorentz_exp_map0, lorentz_exp_map0_backward = _radial(scalar_math.sinhc)
lorentz_log_map0, lorentz_log_map0_backward = _radial(scalar_math.asinhc)
poincare_exp_map0, poincare_exp_map0_backward = _radial(scalar_math.tanhc)
poincare_log_map0, poincare_log_map0_backward = _radial(scalar_math.atanhc)
lorentz_to_poincare, lorentz_to_poincare_backward = _radial(solve.ball_factor)
poincare_to_lorentz, poincare_to_lorentz_backward = _radial(solve.space_factor)

lorentz_exp_map, lorentz_exp_map_backward = _pair(
    PLAIN, PLAIN_GRADIENT, solve.lorentz_exp_map, solve.lorentz_exp_map_adjoint
)
poincare_exp_map, poincare_exp_map_backward = _pair(
    PLAIN, PLAIN_GRADIENT, solve.poincare_exp_map, solve.poincare_exp_map_adjoint
)
mobius_add, mobius_add_backward = _pair(PLAIN, PLAIN_GRADIENT, solve.mobius_add, solve.mobius_add_adjoint)
lorentz_log_map, lorentz_log_map_backward = _pair(
    DIFFERENCE, DIFFERENCE_GRADIENT, solve.lorentz_log_map, solve.lorentz_log_map_adjoint
)
poincare_log_map, poincare_log_map_backward = _pair(
    DIFFERENCE, DIFFERENCE_GRADIENT, solve.poincare_log_map, solve.poincare_log_map_adjoint
)

lorentz_distance, lorentz_distance_backward = _pair_value(solve.lorentz_distance, solve.lorentz_distance_adjoint)
poincare_distance, poincare_distance_backward = _pair_value(solve.poincare_distance, solve.poincare_distance_adjoint)
lorentz_exterior_angle, lorentz_exterior_angle_backward = _pair_value(
    solve.lorentz_exterior_angle, solve.lorentz_exterior_angle_adjoint
)


def mobius_scalar_mul(r: Tensor, x: Tensor, curvature: float | Tensor, out: Tensor) -> None:
    rows.launch(RADIAL, solve.scaled_radial, (x,), (out,), curvature, function=solve.mobius_factor, scalars=(r,))


def mobius_scalar_mul_backward(
    grad: Tensor,
    r: Tensor,
    x: Tensor,
    curvature: float | Tensor,
    r_grad: Tensor | None,
    x_grad: Tensor | None,
    curvature_grad: Tensor | None,
) -> None:
    _backward(
        RADIAL_GRADIENT,
        solve.scaled_radial_adjoint,
        (grad, x),
        (x_grad,),
        curvature,
        curvature_grad,
        function=solve.mobius_factor,
        scalars=(r,),
        scalar_gradients=(r_grad,),
    )


def lorentz_half_aperture(x: Tensor, curvature: float | Tensor, min_radius: float, out: Tensor) -> None:
    op = solve.lorentz_half_aperture
    rows.launch(POINT_VALUE, op, (x,), (), curvature, scalar_outputs=(out,), option=min_radius)


def lorentz_half_aperture_backward(
    grad: Tensor,
    x: Tensor,
    curvature: float | Tensor,
    min_radius: float,
    x_grad: Tensor | None,
    curvature_grad: Tensor | None,
) -> None:
    adjoint = solve.lorentz_half_aperture_adjoint
    _backward(RADIAL, adjoint, (x,), (x_grad,), curvature, curvature_grad, scalars=(grad,), option=min_radius)


def lorentz_entailment_loss(x: Tensor, y: Tensor, curvature: float | Tensor, min_radius: float, out: Tensor) -> None:
    op = solve.lorentz_entailment_loss
    rows.launch(PAIR_VALUE, op, (x, y), (), curvature, scalar_outputs=(out,), option=min_radius)


def lorentz_entailment_loss_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    curvature: float | Tensor,
    min_radius: float,
    x_grad: Tensor | None,
    y_grad: Tensor | None,
    curvature_grad: Tensor | None,
) -> None:
    _backward(
        PAIR_VALUE_GRADIENT,
        solve.lorentz_entailment_loss_adjoint,
        (x, y),
        (x_grad, y_grad),
        curvature,
        curvature_grad,
        scalars=(grad,),
        option=min_radius,
    )


def lorentz_parallel_transport(x: Tensor, y: Tensor, u: Tensor, curvature: float | Tensor, out: Tensor) -> None:
    rows.launch(TRANSPORT, solve.lorentz_parallel_transport, (x, y, u), (out,), curvature)


def lorentz_parallel_transport_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    u: Tensor,
    curvature: float | Tensor,
    x_grad: Tensor | None,
    y_grad: Tensor | None,
    u_grad: Tensor | None,
    curvature_grad: Tensor | None,
) -> None:
    adjoint = solve.lorentz_parallel_transport_adjoint
    gradients = (x_grad, y_grad, u_grad)
    _backward(TRANSPORT_GRADIENT, adjoint, (grad, x, y, u), gradients, curvature, curvature_grad)


def lorentz_centroid(x: Tensor, weights: Tensor, curvature: float | Tensor, out: Tensor) -> None:
    total, time = centroid_sums(x, weights, curvature)
    factor = solve.centroid_factor
    rows.launch(RADIAL, solve.scaled_radial, (total,), (out,), curvature, function=factor, scalars=(time,))


def lorentz_centroid_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    curvature: float | Tensor,
    x_grad: Tensor | None,
    weights_grad: Tensor | None,
    curvature_grad: Tensor | None,
) -> None:
    total, time = centroid_sums(x, weights, curvature)
    total_bar, time_bar = torch.empty_like(total), torch.empty_like(time)
    radial_part = None if curvature_grad is None else torch.empty_like(curvature_grad)
    _backward(
        RADIAL_GRADIENT,
        solve.scaled_radial_adjoint,
        (grad, total),
        (total_bar,),
        curvature,
        radial_part,
        function=solve.centroid_factor,
        scalars=(time,),
        scalar_gradients=(time_bar,),
    )
    _backward(
        RADIAL_GRADIENT,
        solve.centroid_points_adjoint,
        (total_bar[..., None, :].expand(x.shape), x),
        (x_grad,),
        curvature,
        curvature_grad,
        scalars=(weights, time_bar[..., None].expand(weights.shape)),
        scalar_gradients=(weights_grad,),
    )
    if curvature_grad is not None and radial_part is not None:
        curvature_grad += radial_part


def _pairwise(pair: pairs.Pair) -> tuple[Launcher, Launcher]:
    def forward(x: Tensor, y: Tensor, curvature: float | Tensor, out: Tensor) -> None:
        pairs.forward(pair, x, y, curvature, out)

    def backward(
        grad: Tensor,
        x: Tensor,
        y: Tensor,
        curvature: float | Tensor,
        x_grad: Tensor | None,
        y_grad: Tensor | None,
        curvature_grad: Tensor | None,
    ) -> None:
        pairs.backward(pair, grad, x, y, curvature, x_grad, y_grad, curvature_grad)

    return forward, backward


lorentz_pairwise_inner, lorentz_pairwise_inner_backward = _pairwise(pairs.LORENTZ_INNER)
lorentz_pairwise_distance, lorentz_pairwise_distance_backward = _pairwise(pairs.LORENTZ_DISTANCE)
poincare_pairwise_distance, poincare_pairwise_distance_backward = _pairwise(pairs.POINCARE_DISTANCE)
