"""Activations and their slopes: ``Activation`` of ``mmkern.reference.activations``."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

import math

import triton
import triton.language as tl
from mmkern.kernels.scalar_math import div, erf, exp, tanh

from mmkern.reference.activations import Activation

_SILU, _GELU, _GELU_TANH, _RELU = (
    tl.constexpr(activation.value)
    for activation in (Activation.SILU, Activation.GELU, Activation.GELU_TANH, Activation.RELU)
)
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_DENSITY_AT_0 = tl.constexpr(1 / math.sqrt(2 * math.pi))  # of a normal number
_LINEAR, _CUBE = tl.constexpr(math.sqrt(2 / math.pi)), tl.constexpr(math.sqrt(2 / math.pi) * 0.044715)


@triton.jit
def activated(u, ACTIVATION: tl.constexpr):
    """``act(u)`` and ``act'(u)``."""
    if ACTIVATION == _SILU:
        share = div(1.0, 1 + exp(-u))
        value, slope = u * share, share * tl.fma(u, 1 - share, 1.0)
    elif ACTIVATION == _GELU:
        below = tl.fma(0.5, erf(u * _SQRT_HALF), 0.5)
        value, slope = u * below, tl.fma(u * _DENSITY_AT_0, exp(-0.5 * u * u), below)
    elif ACTIVATION == _GELU_TANH:
        square = u * u
        t = tanh(u * tl.fma(square, _CUBE, _LINEAR))
        half = tl.fma(0.5, t, 0.5)
        value, slope = u * half, tl.fma(0.5 * u * tl.fma(-t, t, 1.0), tl.fma(square, 3 * _CUBE, _LINEAR), half)
    elif ACTIVATION == _RELU:
        value, slope = tl.where(u < 0, 0.0, u), tl.where(u <= 0, 0.0, 1.0)
    else:
        value, slope = u, 1.0
    return value, slope
