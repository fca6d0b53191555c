"""Elementary functions of float32 tensors, written in ``tl`` alone.

``tl.exp`` and ``tl.log`` are the machine's approximations (a GPU loses up to 60 ulp of ``exp`` at 88 and every digit of
``log`` near 1) and libdevice does not run in the interpreter, so everything here is built from IEEE additions, products and
fused products, and from ``div`` and ``sqrt``. Results are within about 2 ulp. Comparisons are written so that NaN passes
through (``tl.maximum`` would drop it).

``sinhc`` and its relatives have the series and the cutoff of ``mmkern.reference.smooth``.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

import math

import triton
import triton.language as tl

from mmkern.reference import smooth

EPS = tl.constexpr(2.0**-23)
PI = tl.constexpr(math.pi)
HALF_PI = tl.constexpr(math.pi / 2)
INFINITY = tl.constexpr(math.inf)
_SMALLEST = tl.constexpr(2.0**-126)

_LOG2_E = tl.constexpr(1 / math.log(2))
# ln 2 = high + low; high has 9 bits, so that its multiples are exact.
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(math.log(2) - 0.693359375)
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_TAN_PI_8 = tl.constexpr(math.sqrt(2) - 1)

# Minimax fits, relative error below 0.1 ulp of float32:
# (expm1(f) - f - f²/2) / f³ on |f| <= ln(2)/2; (log1p(f) - f + f²/2) / f³ on [√½ - 1, √2 - 1];
# (atan(a)/a - 1) / a² in a² on |a| <= tan(π/8); sin(πf/2)/f and cos(πf/2) in f² on |f| <= ½;
# erf(a)/a - 1 in a² on |a| <= 1; log(erfc(a)) on [1, 3.92], to an ulp of 1 - erfc(a).
_EXPM1 = tl.constexpr((0.1666666567, 0.0416664816, 0.0083334194, 0.0013933253, 0.0001982413))
_LOG1P = tl.constexpr(
    (0.3333333135, -0.2500081956, 0.2000122666, -0.1662335694, 0.1420175731, -0.1316018254, 0.1276157796, -0.0763449744)
)
_ATAN = tl.constexpr((-0.3333331645, 0.1999847144, -0.1424353272, 0.1059381291, -0.0607821979))
_SIN_OF_QUARTERS = tl.constexpr((1.5707964, -0.6459635, 0.0796800303, -0.004601658))
_COS_OF_QUARTERS = tl.constexpr((1.0, -1.2337005, 0.25366917, -0.020859936, 0.000903363))
_ERF = tl.constexpr((0.12837911, -0.37612626, 0.11283585, -0.026853813, 0.0051883278, -0.00080101937, 0.000078538615))
_LOG_ERFC = tl.constexpr(
    (-0.00035372295, -1.12704, -0.63822568, -0.10303735, 0.021805309, -0.0029396052, 0.00018557378)
)
_ERF_IS_ONE = tl.constexpr(3.92)  # rounded

CUTOFF = tl.constexpr(smooth._CUTOFF_DEFAULT)


def _derivative(coefficients: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(k * a for k, a in enumerate(coefficients))[1:]


_SINHC = tl.constexpr(smooth.SINHC)
_ASINHC = tl.constexpr(smooth.ASINHC)
_TANHC = tl.constexpr(smooth.TANHC)
_ATANHC = tl.constexpr(smooth.ATANHC)
_SINHC_SLOPE = tl.constexpr(_derivative(smooth.SINHC))
_ASINHC_SLOPE = tl.constexpr(_derivative(smooth.ASINHC))
_TANHC_SLOPE = tl.constexpr(_derivative(smooth.TANHC))
_ATANHC_SLOPE = tl.constexpr(_derivative(smooth.ATANHC))


@triton.jit
def div(a, b):
    """``a/b``: the machine's 2 ulp quotient, corrected once.

    ``tl.div_rn`` and ``tl.sqrt_rn`` call a slow path; a call takes the registers of a whole tile with it.
    """
    inverse = 1.0 / b
    quotient = a * inverse
    correction = tl.fma(-quotient, b, a) * inverse
    return tl.where(tl.abs(correction) < INFINITY, quotient + correction, quotient)


@triton.jit
def sqrt(x):
    """``√x`` for x >= 0, from the machine's ``rsqrt``, corrected once; below float32's normal range, x."""
    inverse = tl.rsqrt(x)
    root = x * inverse
    root = tl.fma(tl.fma(-root, root, x), 0.5 * inverse, root)
    return tl.where((x >= _SMALLEST) & (x < INFINITY), root, x)


@triton.jit
def polynomial(x, COEFFICIENTS: tl.constexpr):
    value = tl.zeros_like(x) + COEFFICIENTS[len(COEFFICIENTS) - 1]
    for i in tl.static_range(2, len(COEFFICIENTS) + 1):
        value = tl.fma(value, x, COEFFICIENTS[len(COEFFICIENTS) - i])
    return value


@triton.jit
def clamp_min(z, LOW: tl.constexpr):
    return tl.where(z < LOW, LOW, z)


@triton.jit
def two_to(n):
    """``2**n`` for integers -126 <= n <= 127."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _split_exponent(r):
    """``r = n ln 2 + f``, |f| <= ln(2)/2: ``n`` and ``expm1(f)``."""
    n = tl.floor(tl.fma(r, _LOG2_E, 0.5))
    f = tl.fma(n, -_LN2_LOW, tl.fma(n, -_LN2_HIGH, r))
    return n.to(tl.int32), tl.fma(f * f, tl.fma(f, polynomial(f, _EXPM1.value), 0.5), f)


@triton.jit
def _times_two_to(x, n):
    """``x·2ⁿ`` for |n| <= 250, rounded once."""
    first = n >> 1
    return x * two_to(first) * two_to(n - first)


@triton.jit
def exp(r):
    n, fraction = _split_exponent(tl.where(r > 100, 100.0, tl.where(r < -105, -105.0, r)))
    return _times_two_to(1 + fraction, n)


@triton.jit
def expm1(r):
    """``exp(r) - 1`` for 0 <= r <= 88."""
    n, fraction = _split_exponent(r)
    power = two_to(n)
    return tl.fma(power, fraction, power - 1)


@triton.jit
def half_exp(r):
    """``exp(r)/2`` for r >= 0; finite up to r = 89.4, which ``exp(r)`` is not."""
    n, fraction = _split_exponent(tl.where(r > 100, 100.0, r))
    return _times_two_to(1 + fraction, n - 1)


@triton.jit
def tanh(x):
    a = tl.abs(x)
    m = expm1(2 * tl.where(a > 20, 20.0, a))
    t = div(m, m + 2)
    return tl.where(x < 0, -t, t)


@triton.jit
def erf(x):
    a = tl.abs(x)
    near = tl.fma(a, polynomial(a * a, _ERF.value), a)
    far = 1 - exp(polynomial(tl.where(a > _ERF_IS_ONE, _ERF_IS_ONE, a), _LOG_ERFC.value))
    value = tl.where(a < 1, near, far)
    return tl.where(x < 0, -value, value)


@triton.jit
def _log(w, relative_rest):
    """``log(w(1 + rest))`` for normal w > 0 and a rest below its last digit."""
    bits = w.to(tl.int32, bitcast=True)
    k = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1
    log_mantissa = tl.fma(f * f, tl.fma(f, polynomial(f, _LOG1P.value), -0.5), f)
    k = k.to(tl.float32)
    return tl.fma(k, _LN2_HIGH, log_mantissa + tl.fma(k, _LN2_LOW, relative_rest))


@triton.jit
def log(x):
    """For finite x of float32's normal range."""
    return _log(x, 0.0)


@triton.jit
def log1p(u):
    """``log(1 + u)`` for u > -1, relative error of an ulp also near 0."""
    w = 1 + u
    lost = tl.where(u < 1, u - (w - 1), 1 - (w - u))
    return tl.where(u < INFINITY, _log(w, lost / w), u)


@triton.jit
def sin_cos_of_turns(v):
    """``sin 2πv`` and ``cos 2πv`` for v in [0, 1] of at most 24 bits: of whole quarters of a turn, and of what is left."""
    quarters = 4 * v
    whole = tl.floor(quarters + 0.5)
    f = quarters - whole
    s, c = f * polynomial(f * f, _SIN_OF_QUARTERS.value), polynomial(f * f, _COS_OF_QUARTERS.value)
    q = whole.to(tl.int32)
    is_odd = (q & 1) != 0
    sin, cos = tl.where(is_odd, c, s), tl.where(is_odd, s, c)
    return tl.where((q & 2) != 0, -sin, sin), tl.where(((q + 1) & 2) != 0, -cos, cos)


@triton.jit
def atan2(y, x):
    """Angle of the point ``(x, y)`` for y >= 0, in [0, π]; 0 at the origin."""
    steep = y > tl.abs(x)
    short = tl.where(steep, tl.abs(x), y)
    a = div(short, tl.where(steep, y, tl.where(short == 0, 1.0, tl.abs(x))))
    far = a > _TAN_PI_8
    b = tl.where(far, div(a - 1, a + 1), a)
    angle = tl.fma(b * b * b, polynomial(b * b, _ATAN.value), b) + tl.where(far, HALF_PI / 2, 0.0)
    angle = tl.where(steep, HALF_PI - angle, angle)
    return tl.where(x < 0, PI - angle, angle)


# The smooth functions: value φ(z), derivative φ'(z), and 2zφ'(z), which keeps its digits where φ' is below float32's range.


@triton.jit
def _smooth(z, closed, closed_change, SERIES: tl.constexpr, SERIES_SLOPE: tl.constexpr):
    small = z < CUTOFF
    series_slope = polynomial(z, SERIES_SLOPE)
    value = tl.where(small, polynomial(z, SERIES), closed)
    slope = tl.where(small, series_slope, div(closed_change, 2 * z))
    return value, slope, tl.where(small, 2 * z * series_slope, closed_change)


@triton.jit
def sinhc(z):
    """``sinh(√z)/√z``; ``2zφ' = cosh(√z) - φ``."""
    r = sqrt(z)
    e = half_exp(r)
    inverse = div(0.25, e)
    m = expm1(tl.where(r > 1, 1.0, r))
    sinh = tl.where(r > 1, e - inverse, 0.5 * (m + div(m, 1 + m)))
    value = div(sinh, r)
    return _smooth(z, value, e + inverse - value, _SINHC.value, _SINHC_SLOPE.value)


@triton.jit
def asinhc(z):
    """``asinh(√z)/√z``; ``2zφ' = 1/√(1+z) - φ``."""
    r = sqrt(z)
    hypotenuse = sqrt(1 + z)
    value = div(log1p(r + div(z, 1 + hypotenuse)), r)
    return _smooth(z, value, div(1.0, hypotenuse) - value, _ASINHC.value, _ASINHC_SLOPE.value)


@triton.jit
def asinhc_change_series(z):
    """``2z asinhc'(z)`` below the cutoff."""
    return 2 * z * polynomial(z, _ASINHC_SLOPE.value)


@triton.jit
def sech2_tanhc(z):
    """``1/cosh²(√z)``, then ``tanh(√z)/√z``; ``2zφ' = 1/cosh² - φ``."""
    r = sqrt(z)
    m = expm1(2 * tl.where(r > 20, 20.0, r))
    sech2 = div(4 * (m + 1), (m + 2) * (m + 2))
    value = div(m, (m + 2) * r)
    value, slope, change = _smooth(z, value, sech2 - value, _TANHC.value, _TANHC_SLOPE.value)
    return sech2, value, slope, change


@triton.jit
def tanhc(z):
    """``tanh(√z)/√z``."""
    _, value, slope, change = sech2_tanhc(z)
    return value, slope, change


@triton.jit
def atanhc(z):
    """``atanh(√z)/√z``, ``z`` held one ulp below 1; ``2zφ' = 1/(1-z) - φ``."""
    held = tl.where(z > 1 - EPS / 2, 1 - EPS / 2, z)
    r = sqrt(held)
    gap = 1 - held
    # atanh r = log1p(2r/(1-r))/2, and 1-r = (1-z)/(1+r) keeps the digits that 1-r has lost.
    value = div(0.5 * log1p(div(2 * r * (1 + r), gap)), r)
    value, slope, change = _smooth(held, value, div(1.0, gap) - value, _ATANHC.value, _ATANHC_SLOPE.value)
    return value, tl.where(held < z, 0.0, slope), tl.where(held < z, 0.0, change)
