"""Even functions of a norm, written as smooth functions of the squared norm.

``sinh(r)/r`` and its relatives are analytic in ``z = r²``; written with ``r = sqrt(z)`` their derivative at zero is
0/0 and autograd returns NaN. Below a cutoff each takes its Taylor series, so that values and derivatives of any order
are right at zero. ``z`` is never negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Eight terms: 0.05**8 = 4e-11 (float32), 0.008**8 = 2e-17 (float64).
_CUTOFF = {torch.float64: 0.008}
_CUTOFF_DEFAULT = 0.05

SINHC = tuple(1 / math.factorial(2 * k + 1) for k in range(8))
ASINHC = tuple((-1) ** k * math.factorial(2 * k) / (4**k * math.factorial(k) ** 2 * (2 * k + 1)) for k in range(8))
TANHC = (1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925, 21844 / 6081075, -929569 / 638512875)
ATANHC = tuple(1 / (2 * k + 1) for k in range(8))


def _smooth(z: Tensor, coefficients: Sequence[float], closed: Callable[[Tensor], Tensor]) -> Tensor:
    small = z < _CUTOFF.get(z.dtype, _CUTOFF_DEFAULT)
    near = torch.where(small, z, 0.0)
    series = torch.zeros_like(z)
    for coefficient in reversed(coefficients):
        series = series * near + coefficient
    return torch.where(small, series, closed(torch.where(small, 1.0, z).sqrt()))


def sinhc(z: Tensor) -> Tensor:
    """``sinh(√z)/√z``."""
    return _smooth(z, SINHC, lambda r: r.sinh() / r)


def asinhc(z: Tensor) -> Tensor:
    """``asinh(√z)/√z``."""
    return _smooth(z, ASINHC, lambda r: r.asinh() / r)


def tanhc(z: Tensor) -> Tensor:
    """``tanh(√z)/√z``."""
    return _smooth(z, TANHC, lambda r: r.tanh() / r)


def atanhc(z: Tensor) -> Tensor:
    """``atanh(√z)/√z`` for ``z < 1``; ``z`` is held one ulp below 1."""
    return _smooth(z.clamp_max(1 - torch.finfo(z.dtype).eps / 2), ATANHC, lambda r: r.atanh() / r)


def cosh_sqrt(z: Tensor) -> Tensor:
    """``cosh(√z) = 1 + 2 sinh²(√z/2)``."""
    return 1 + z / 2 * sinhc(z / 4).square()


def safe_sqrt(z: Tensor) -> Tensor:
    """``√z`` for ``z > 0``; 0 with derivative 0 elsewhere, where ``√`` has no finite one."""
    positive = z > 0
    return torch.where(positive, torch.where(positive, z, 1.0).sqrt(), 0.0)
