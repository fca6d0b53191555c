"""The scalar function of each row-wise hyperbolic op, and its adjoint.

A row-wise op is inner products of the row's vectors, a scalar function of them, and linear combinations of the vectors
with what it returns. Every op's function has one signature: ``(FUNCTION, sums, scalars, c, option)`` to
``(coefficients, row_values)``; ``sums`` and ``coefficients`` are those of the op's flavour in ``hyperbolic.py``, ``scalars`` the
inputs with one entry a row. FUNCTION is the radial profile where there is one, else None.

In an adjoint, ``name_bar`` is the derivative of the loss by ``name``. The chain of each is written above it; the reference
has the formulas themselves.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

import triton
import triton.language as tl
from mmkern.kernels.scalar_math import (
    CUTOFF,
    EPS,
    HALF_PI,
    asinhc,
    asinhc_change_series,
    atan2,
    atanhc,
    clamp_min,
    div,
    log1p,
    sech2_tanhc,
    sinhc,
    sqrt,
)

# Radial maps: out = φ(z) x, z = c|x|². A profile returns φ, φ' and 2zφ'.


@triton.jit
def radial(FUNCTION: tl.constexpr, sums, scalars, c, option):
    value, _, _ = FUNCTION(c * sums[0])
    return (value,), ()


@triton.jit
def _radial_share(change, xx, gx, c):
    """Coefficient of x, ``2cφ' (g·x) = 2zφ' (g·x)/|x|²``, and the curvature's adjoint ``φ' |x|² (g·x)``."""
    change_bar = change * gx
    return div(change_bar, tl.where(xx > 0, xx, 1.0)), div(change_bar, 2 * c)


# gx = φ g + 2c φ' (g·x) x,  c_bar = φ' |x|² (g·x)
@triton.jit
def radial_adjoint(FUNCTION: tl.constexpr, sums, scalars, c, option):
    xx, gx = sums
    value, _, change = FUNCTION(c * xx)
    share, c_bar = _radial_share(change, xx, gx, c)
    return (value, share), (c_bar,)


@triton.jit
def scaled_radial(FUNCTION: tl.constexpr, sums, scalars, c, option):
    """φ(z, r) with one ``r`` a row; the profile returns φ, ∂φ/∂r and 2z ∂φ/∂z."""
    value, _, _ = FUNCTION(c * sums[0], scalars[0])
    return (value,), ()


# as radial_adjoint, and r_bar = ∂φ/∂r (g·x)
@triton.jit
def scaled_radial_adjoint(FUNCTION: tl.constexpr, sums, scalars, c, option):
    xx, gx = sums
    value, slope_r, change = FUNCTION(c * xx, scalars[0])
    share, c_bar = _radial_share(change, xx, gx, c)
    return (value, share), (slope_r * gx, c_bar)


@triton.jit
def ball_factor(z):
    """``1/(1 + √(1+z))``; ``φ' = -φ²/(2√(1+z))``."""
    time = sqrt(1 + z)
    value = div(1.0, 1 + time)
    slope = -0.5 * value * div(value, time)
    return value, slope, -value * div(value * z, time)


@triton.jit
def ball_gap(z):
    """``1 - z`` held above zero, and its derivative."""
    gap = 1 - z
    return clamp_min(gap, EPS / 2), tl.where(gap < EPS / 2, 0.0, -1.0)


@triton.jit
def space_factor(z):
    """``2/(1-z)``; ``φ' = φ²/2``."""
    gap, gap_z = ball_gap(z)
    value = div(2.0, gap)
    slope = -0.5 * gap_z * value * value
    return value, slope, 2 * z * slope


# φ = k tanhc(k²z), k = r atanhc(z): ∂φ/∂k = sech²(k√z) and, at fixed k, 2z ∂φ/∂z = k 2q tanhc'(q), q = k²z
@triton.jit
def mobius_factor(z, r):
    ratio, _, ratio_change = atanhc(z)
    k = r * ratio
    slope_k, t, _, t_change = sech2_tanhc(k * k * z)
    return k * t, slope_k * ratio, k * t_change + slope_k * r * ratio_change


@triton.jit
def centroid_factor(z, time):
    """``1/√(time² - z)``; ``∂φ/∂time = -time φ³``, ``∂φ/∂z = φ³/2``."""
    value = div(1.0, sqrt(time * time - z))
    cube = value * value * value
    return value, -time * cube, z * cube


# Two-point maps in the plain inner products: sums xx, yy, xy; out = a x + b y


@triton.jit
def lorentz_exp_map(FUNCTION: tl.constexpr, sums, scalars, c, option):
    xx, uu, xu = sums[0], sums[1], sums[2]
    z = clamp_min(c * (uu - div(c * xu * xu, 1 + c * xx)), 0.0)
    ratio, _, change = sinhc(z)
    return (ratio + change, ratio), ()


# cosh√z = φ + 2zφ' with φ = sinhc, and its derivative is φ/2;  z = c uu - c² xu²/p, p = 1 + c xx
@triton.jit
def lorentz_exp_map_adjoint(FUNCTION: tl.constexpr, sums, scalars, c, option):
    xx, uu, xu, a_bar, b_bar = sums
    p = 1 + c * xx
    u_t = div(c * xu, p)
    raw = c * (uu - u_t * xu)
    ratio, ratio_z, change = sinhc(clamp_min(raw, 0.0))
    z_bar = tl.where(raw < 0, 0.0, 0.5 * a_bar * ratio + b_bar * ratio_z)
    p_bar = z_bar * u_t * u_t
    c_bar = z_bar * (uu - 2 * u_t * xu) + p_bar * xx
    return (ratio + change, ratio, c * p_bar, c * z_bar, -2 * c * z_bar * u_t), (c_bar,)


@triton.jit
def _mobius(xx, yy, xy):
    """Coefficients of x and y from the products times c, and the denominator."""
    denominator = 1 + 2 * xy + xx * yy
    return div(1 + 2 * xy + yy, denominator), div(1 - xx, denominator), denominator


# a = A/d, b = B/d:  d_bar = -(a a_bar + b b_bar)/d
@triton.jit
def _mobius_adjoint(xx, yy, a, b, denominator, a_bar, b_bar):
    d_bar = div(-(a * a_bar + b * b_bar), denominator)
    a_bar = div(a_bar, denominator)
    b_bar = div(b_bar, denominator)
    return yy * d_bar - b_bar, a_bar + xx * d_bar, 2 * (a_bar + d_bar)


@triton.jit
def mobius_add(FUNCTION: tl.constexpr, sums, scalars, c, option):
    a, b, _ = _mobius(c * sums[0], c * sums[1], c * sums[2])
    return (a, b), ()


@triton.jit
def mobius_add_adjoint(FUNCTION: tl.constexpr, sums, scalars, c, option):
    xx, yy, xy, a_bar, b_bar = sums
    a, b, denominator = _mobius(c * xx, c * yy, c * xy)
    xx_bar, yy_bar, xy_bar = _mobius_adjoint(c * xx, c * yy, a, b, denominator, a_bar, b_bar)
    c_bar = xx_bar * xx + yy_bar * yy + xy_bar * xy
    return (a, b, c * xx_bar, c * yy_bar, c * xy_bar), (c_bar,)


@triton.jit
def _ball_step(xx, uu, c):
    """``step = h tanhc(q)``, ``q = c h² |u|²``, ``h = 1/(1 - c|x|²)``: step, h, the gap's derivative, ``∂step/∂h = tanhc + 2q tanhc' = sech²(√q)``, ``2q ∂step/∂q``."""
    gap, gap_z = ball_gap(c * xx)
    h = div(1.0, gap)
    step_h, t, _, change = sech2_tanhc(c * h * h * uu)
    return h * t, h, gap_z, step_h, h * change


@triton.jit
def poincare_exp_map(FUNCTION: tl.constexpr, sums, scalars, c, option):
    xx, uu, xu = sums[0], sums[1], sums[2]
    step, _, _, _, _ = _ball_step(xx, uu, c)
    a, b, _ = _mobius(c * xx, c * step * step * uu, c * step * xu)
    return (a, b * step), ()


# y = step u: yy = step² uu, xy = step xu;  q = c h² uu
@triton.jit
def poincare_exp_map_adjoint(FUNCTION: tl.constexpr, sums, scalars, c, option):
    xx, uu, xu, a_bar, b_bar = sums
    step, h, gap_z, step_h, step_change = _ball_step(xx, uu, c)
    yy, xy = step * step * uu, step * xu
    a, b, denominator = _mobius(c * xx, c * yy, c * xy)
    xx_bar, yy_bar, xy_bar = _mobius_adjoint(c * xx, c * yy, a, b, denominator, a_bar, step * b_bar)
    c_bar = xx_bar * xx + yy_bar * yy + xy_bar * xy
    step_bar = b * b_bar + c * (xy_bar * xu + 2 * yy_bar * step * uu)
    log_q_bar = 0.5 * step_bar * step_change
    gap_bar = -h * h * step_bar * step_h
    c_bar += div(log_q_bar, c) + gap_bar * gap_z * xx
    uu_bar = c * yy_bar * step * step + div(log_q_bar, tl.where(uu > 0, uu, 1.0))
    return (a, b * step, c * (xx_bar + gap_bar * gap_z), uu_bar, c * xy_bar * step), (c_bar,)


# Two points in difference form: sums xx, yy, xd, dd with d = y - x; out = a x + b d


@triton.jit
def _half_sinh_squared(xx, yy, xd, dd, c):
    """``s = sinh²(θ/2) = max(0, c dd - gap²)/4`` of two Lorentz points, their times (times √c) and the gap of these."""
    x_t, y_t = sqrt(1 + c * xx), sqrt(1 + c * yy)
    gap = div(c * (2 * xd + dd), x_t + y_t)
    return clamp_min(c * dd - gap * gap, 0.0) / 4, x_t, y_t, gap


# 4s = c dd - gap²,  gap = c(2xd + dd)/(x_t + y_t),  x_t² = 1 + c xx;  gap and x_t may have an adjoint of their own.
# c_bar is that of s/c, whose terms stay small where the points meet: it lacks s_bar s/c
@triton.jit
def _half_sinh_squared_adjoint(s_bar, gap_bar, x_t_bar, xx, yy, xd, dd, c, x_t, y_t, gap):
    raw_bar = tl.where(c * dd - gap * gap < 0, 0.0, s_bar / 4)
    gap_bar -= 2 * gap * raw_bar
    share = div(gap_bar, x_t + y_t)
    q_bar = c * share
    x_t_bar = div(x_t_bar - share * gap, 2 * x_t)
    y_t_bar = div(-share * gap, 2 * y_t)
    c_bar = div(raw_bar * gap * gap, c) + share * (2 * xd + dd) + x_t_bar * xx + y_t_bar * yy
    return c * x_t_bar, c * y_t_bar, 2 * q_bar, c * raw_bar + q_bar, c_bar


@triton.jit
def _poincare_s(xx, yy, dd, c):
    """``s = c dd/(gap_x gap_y)``, the gaps and their derivatives by z."""
    gap_x, slope_x = ball_gap(c * xx)
    gap_y, slope_y = ball_gap(c * yy)
    return div(c * dd, gap_x * gap_y), gap_x, gap_y, slope_x, slope_y


# s = c dd/(gap_x gap_y),  gap = gap(c xx);  dd and the gaps may have adjoints of their own; c_bar lacks s_bar s/c
@triton.jit
def _poincare_s_adjoint(s_bar, dd_bar, gap_x_bar, gap_y_bar, xx, yy, dd, c, s, gap_x, gap_y, slope_x, slope_y):
    z_x_bar = (gap_x_bar - div(s_bar * s, gap_x)) * slope_x
    z_y_bar = (gap_y_bar - div(s_bar * s, gap_y)) * slope_y
    dd_bar += div(c * s_bar, gap_x * gap_y)
    return c * z_x_bar, c * z_y_bar, tl.zeros_like(dd), dd_bar, z_x_bar * xx + z_y_bar * yy


@triton.jit
def distance(s, c):
    """``2/√c asinh(√s)``; as ``log1p(t + √(t(t+2)))/√c``, ``t = 2s``."""
    return log1p(2 * s + 2 * (sqrt(s) * sqrt(1 + s))) * div(1.0, sqrt(c))


@triton.jit
def distance_slopes(s, c):
    """``∂distance/∂s = 1/√(c s (1+s))``, 0 where the points coincide, and ``∂distance/∂c`` at fixed s/c.

    distance = 2√(s/c) asinhc(s), so the latter is ``√(s/c)/c 2s asinhc'(s) = (√(s/(1+s)) - asinh√s)/√c³``.
    """
    root, hypotenuse = sqrt(s), sqrt(1 + s)
    inverse = tl.where(s <= 0, 0.0, div(1.0, tl.where(s <= 0, 1.0, root) * hypotenuse))
    change = tl.where(
        s < CUTOFF, root * asinhc_change_series(s), s * inverse - 0.5 * log1p(2 * s + 2 * (root * hypotenuse))
    )
    inverse_c = div(1.0, sqrt(c))
    return inverse * inverse_c, change * (inverse_c * inverse_c * inverse_c)


@triton.jit
def _log_factor(s):
    """``asinhc(s)/√(1+s) = θ/sinh θ`` and its derivative."""
    ratio, ratio_s, _ = asinhc(s)
    hypotenuse = sqrt(1 + s)
    value = div(ratio, hypotenuse)
    return value, div(ratio_s, hypotenuse) - div(value, 2 * (1 + s))


@triton.jit
def lorentz_log_map(FUNCTION: tl.constexpr, sums, scalars, c, option):
    s, _, _, _ = _half_sinh_squared(sums[0], sums[1], sums[2], sums[3], c)
    factor, _ = _log_factor(s)
    return (-2 * s * factor, factor), ()


# a = -2 s f, b = f(s)
@triton.jit
def lorentz_log_map_adjoint(FUNCTION: tl.constexpr, sums, scalars, c, option):
    xx, yy, xd, dd, a_bar, b_bar = sums
    s, x_t, y_t, gap = _half_sinh_squared(xx, yy, xd, dd, c)
    factor, factor_s = _log_factor(s)
    s_bar = (b_bar - 2 * s * a_bar) * factor_s - 2 * factor * a_bar
    xx_bar, yy_bar, xd_bar, dd_bar, c_bar = _half_sinh_squared_adjoint(
        s_bar, tl.zeros_like(s), tl.zeros_like(s), xx, yy, xd, dd, c, x_t, y_t, gap
    )
    return (-2 * s * factor, factor, xx_bar, yy_bar, xd_bar, dd_bar), (c_bar + div(s_bar * s, c),)


@triton.jit
def poincare_log_map(FUNCTION: tl.constexpr, sums, scalars, c, option):
    dd = sums[3]
    s, gap_x, gap_y, _, _ = _poincare_s(sums[0], sums[1], dd, c)
    factor, _ = _log_factor(s)
    scale = div(factor, gap_y)
    return (-scale * c * dd, scale * gap_x), ()


# a = -k c dd, b = k gap_x, k = f(s)/gap_y
@triton.jit
def poincare_log_map_adjoint(FUNCTION: tl.constexpr, sums, scalars, c, option):
    xx, yy, _, dd, a_bar, b_bar = sums
    s, gap_x, gap_y, slope_x, slope_y = _poincare_s(xx, yy, dd, c)
    factor, factor_s = _log_factor(s)
    scale = div(factor, gap_y)
    factor_bar = div(b_bar * gap_x - a_bar * c * dd, gap_y)
    s_bar = factor_bar * factor_s
    xx_bar, yy_bar, xd_bar, dd_bar, c_bar = _poincare_s_adjoint(
        s_bar, -a_bar * scale * c, b_bar * scale, -factor_bar * scale,
        xx, yy, dd, c, s, gap_x, gap_y, slope_x, slope_y,
    )  # fmt: skip
    c_bar += div(s_bar * s, c) - a_bar * scale * dd
    return (-scale * c * dd, scale * gap_x, xx_bar, yy_bar, xd_bar, dd_bar), (c_bar,)


@triton.jit
def lorentz_distance(FUNCTION: tl.constexpr, sums, scalars, c, option):
    s, _, _, _ = _half_sinh_squared(sums[0], sums[1], sums[2], sums[3], c)
    return (), (distance(s, c),)


@triton.jit
def lorentz_distance_adjoint(FUNCTION: tl.constexpr, sums, scalars, c, option):
    xx, yy, xd, dd = sums
    s, x_t, y_t, gap = _half_sinh_squared(xx, yy, xd, dd, c)
    slope, slope_c = distance_slopes(s, c)
    s_bar = scalars[0] * slope
    xx_bar, yy_bar, xd_bar, dd_bar, c_bar = _half_sinh_squared_adjoint(
        s_bar, tl.zeros_like(s), tl.zeros_like(s), xx, yy, xd, dd, c, x_t, y_t, gap
    )
    return (xx_bar, yy_bar, xd_bar, dd_bar), (c_bar + scalars[0] * slope_c,)


@triton.jit
def poincare_distance(FUNCTION: tl.constexpr, sums, scalars, c, option):
    s, _, _, _, _ = _poincare_s(sums[0], sums[1], sums[3], c)
    return (), (distance(s, c),)


@triton.jit
def poincare_distance_adjoint(FUNCTION: tl.constexpr, sums, scalars, c, option):
    xx, yy, _, dd = sums
    s, gap_x, gap_y, slope_x, slope_y = _poincare_s(xx, yy, dd, c)
    slope, slope_c = distance_slopes(s, c)
    none = tl.zeros_like(s)
    xx_bar, yy_bar, xd_bar, dd_bar, c_bar = _poincare_s_adjoint(
        scalars[0] * slope, none, none, none, xx, yy, dd, c, s, gap_x, gap_y, slope_x, slope_y
    )
    return (xx_bar, yy_bar, xd_bar, dd_bar), (c_bar + scalars[0] * slope_c,)


# Cones


@triton.jit
def _aperture(xx, c, min_radius):
    """``asin(2K/√(c|x|²))`` or π/2, and its derivative by ``z = c|x|²``: ``-K/(z √(z - 4K²))``."""
    outside = c * xx - 4 * min_radius * min_radius
    leg = sqrt(tl.where(outside <= 0, 1.0, outside))
    angle = atan2(2 * min_radius + tl.zeros_like(xx), leg)
    slope = div(-min_radius, c * tl.where(outside <= 0, 1.0, xx) * leg)
    return tl.where(outside <= 0, HALF_PI, angle), tl.where(outside <= 0, 0.0, slope)


@triton.jit
def lorentz_half_aperture(FUNCTION: tl.constexpr, sums, scalars, c, option):
    angle, _ = _aperture(sums[0], c, option)
    return (), (angle,)


# gx = 2 c A' g x
@triton.jit
def lorentz_half_aperture_adjoint(FUNCTION: tl.constexpr, sums, scalars, c, option):
    _, slope = _aperture(sums[0], c, option)
    z_bar = scalars[0] * slope
    return (2 * c * z_bar,), (z_bar * sums[0],)


@triton.jit
def _exterior_legs(xx, yy, xd, dd):
    """Legs of the triangle at x, from the products times c: along the ray, squared across it; and the times."""
    x_t, y_t = sqrt(1 + xx), sqrt(1 + yy)
    along = x_t * xd - div(xx * (2 * xd + dd), x_t + y_t)
    return along, clamp_min(xx * dd - xd * xd, 0.0), x_t, y_t


@triton.jit
def _exterior_angle(xx, yy, xd, dd):
    along, across, _, _ = _exterior_legs(xx, yy, xd, dd)
    angle = atan2(sqrt(across), tl.where((along == 0) & (across == 0), 1.0, along))
    return tl.where((xx == 0) & (dd > 0), HALF_PI, angle)


# angle = atan2(S, L), S² = across = xx dd - xd², L = x_t xd - xx q/(x_t + y_t), q = 2xd + dd;
# S_bar = L/(L²+S²), L_bar = -S/(L²+S²); 0 at the root and where the points coincide
@triton.jit
def _exterior_angle_adjoint(angle_bar, xx, yy, xd, dd, c):
    xx, yy, xd, dd = c * xx, c * yy, c * xd, c * dd
    along, across, x_t, y_t = _exterior_legs(xx, yy, xd, dd)
    side = sqrt(across)
    square = along * along + across
    still = (square == 0) | ((xx == 0) & (dd > 0))
    angle_bar = tl.where(still, 0.0, div(angle_bar, tl.where(still, 1.0, square)))
    along_bar = -angle_bar * side
    across_bar = tl.where(across > 0, div(angle_bar * along, 2 * tl.where(across > 0, side, 1.0)), 0.0)
    ratio = div(along_bar, x_t + y_t)
    q = 2 * xd + dd
    time_bar = div(ratio * xx * q, x_t + y_t)
    xx_bar = across_bar * dd - ratio * q + div(along_bar * xd + time_bar, 2 * x_t)
    yy_bar = div(time_bar, 2 * y_t)
    xd_bar = along_bar * x_t - 2 * across_bar * xd - 2 * ratio * xx
    dd_bar = across_bar * xx - ratio * xx
    c_bar = div(xx_bar * xx + yy_bar * yy + xd_bar * xd + dd_bar * dd, c)
    return c * xx_bar, c * yy_bar, c * xd_bar, c * dd_bar, c_bar


@triton.jit
def lorentz_exterior_angle(FUNCTION: tl.constexpr, sums, scalars, c, option):
    xx, yy, xd, dd = sums
    return (), (_exterior_angle(c * xx, c * yy, c * xd, c * dd),)


@triton.jit
def lorentz_exterior_angle_adjoint(FUNCTION: tl.constexpr, sums, scalars, c, option):
    xx, yy, xd, dd = sums
    xx_bar, yy_bar, xd_bar, dd_bar, c_bar = _exterior_angle_adjoint(scalars[0], xx, yy, xd, dd, c)
    return (xx_bar, yy_bar, xd_bar, dd_bar), (c_bar,)


@triton.jit
def lorentz_entailment_loss(FUNCTION: tl.constexpr, sums, scalars, c, option):
    xx, yy, xd, dd = sums
    aperture, _ = _aperture(xx, c, option)
    return (), (clamp_min(_exterior_angle(c * xx, c * yy, c * xd, c * dd) - aperture, 0.0),)


@triton.jit
def lorentz_entailment_loss_adjoint(FUNCTION: tl.constexpr, sums, scalars, c, option):
    xx, yy, xd, dd = sums
    aperture, slope = _aperture(xx, c, option)
    inside = _exterior_angle(c * xx, c * yy, c * xd, c * dd) - aperture < 0
    angle_bar = tl.where(inside, 0.0, scalars[0])
    xx_bar, yy_bar, xd_bar, dd_bar, c_bar = _exterior_angle_adjoint(angle_bar, xx, yy, xd, dd, c)
    z_bar = angle_bar * slope
    return (xx_bar - c * z_bar, yy_bar, xd_bar, dd_bar), (c_bar - z_bar * xx,)


# Transport: sums xx, yy, xd, dd, xu, du; out = u + k (2x + d)


@triton.jit
def _transport(xx, yy, xd, dd, xu, du, c):
    s, x_t, y_t, gap = _half_sinh_squared(xx, yy, xd, dd, c)
    inner = du - div(xu * gap, x_t)
    return div(c * inner, 2 + 2 * s), inner, s, x_t, y_t, gap


@triton.jit
def lorentz_parallel_transport(FUNCTION: tl.constexpr, sums, scalars, c, option):
    xx, yy, xd, dd, xu, du = sums
    k, _, _, _, _, _ = _transport(xx, yy, xd, dd, xu, du, c)
    return (k,), ()


# k = c inner/(2 + 2s), inner = du - xu gap/x_t;  k_bar = 2 g·x + g·d
@triton.jit
def lorentz_parallel_transport_adjoint(FUNCTION: tl.constexpr, sums, scalars, c, option):
    xx, yy, xd, dd, xu, du, gx, gd = sums
    k, inner, s, x_t, y_t, gap = _transport(xx, yy, xd, dd, xu, du, c)
    k_bar = 2 * gx + gd
    per_c = div(k_bar, 2 + 2 * s)
    inner_bar = c * per_c
    gap_bar = div(-inner_bar * xu, x_t)
    s_bar = div(-k_bar * k, 1 + s)
    xx_bar, yy_bar, xd_bar, dd_bar, c_bar = _half_sinh_squared_adjoint(
        s_bar, gap_bar, div(-gap_bar * gap, x_t), xx, yy, xd, dd, c, x_t, y_t, gap
    )
    xu_bar = div(-inner_bar * gap, x_t)
    c_bar += per_c * inner + div(s_bar * s, c)
    return (k, xx_bar, yy_bar, xd_bar, dd_bar, xu_bar, inner_bar), (c_bar,)


# A centroid's points: m = Σ w x, time = Σ w x_t.  w_bar = m_bar·x + time_bar x_t,  gx = w m_bar + (w time_bar c/x_t) x


@triton.jit
def centroid_points_adjoint(FUNCTION: tl.constexpr, sums, scalars, c, option):
    xx, mx = sums
    weight, time_bar = scalars
    x_t = sqrt(1 + c * xx)
    per_square = div(weight * time_bar, x_t)
    return (weight, c * per_square), (mx + time_bar * x_t, 0.5 * per_square * xx)
