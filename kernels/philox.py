"""Philox4x32-10 by position: the integers of ``mmkern.reference.philox``, bit by bit, and numbers made of them."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

import triton
import triton.language as tl
from mmkern.kernels.scalar_math import log, sin_cos_of_turns, sqrt

from mmkern.reference.philox import UNIFORM_BITS, threshold

_DROPPED_BITS = tl.constexpr(32 - UNIFORM_BITS)
_ULP, _ULP_OF_WORD = tl.constexpr(2.0**-UNIFORM_BITS), tl.constexpr(2.0**-32)


def least_step(probability: float) -> int:
    """``n`` such that ``word >> 8 >= n`` where the uniform number of a word is at least ``probability``."""
    return threshold(probability) >> _DROPPED_BITS.value


@triton.jit
def _words(seed, row, first, COLUMNS: tl.constexpr):
    """Four of ``[len(row), COLUMNS // 4]``, of counters ``offset + row + first/4 + column``.

    ``seed`` points to (seed, offset); ``first`` is a multiple of 4.
    """
    four = first // 4 + tl.arange(0, COLUMNS // 4)
    return tl.randint4x(tl.load(seed), tl.load(seed + 1) + row[:, None] + four[None, :])


@triton.jit
def _side_by_side(a, b, c, d):
    """``[rows, 4 columns]``: a, b, c, d of the first column, then those of the next."""
    # The last axis of a join is the fastest: (a, c) and (b, d) interleave to a, b, c, d.
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(a.shape[0], 4 * a.shape[1])


@triton.jit
def at_least(threshold, seed, row, first, COLUMNS: tl.constexpr):
    """``[len(row), COLUMNS]``: whether word ``j mod 4`` of counter ``offset + row + ⌊j/4⌋`` is that large.

    ``seed`` points to (seed, offset); ``first``, the first j, is a multiple of 4.
    """
    a, b, c, d = _words(seed, row, first, COLUMNS)
    return (_side_by_side(a, b, c, d) >> _DROPPED_BITS).to(tl.int32) >= threshold


@triton.jit
def uniform(seed, row, first, COLUMNS: tl.constexpr):
    """``[len(row), COLUMNS]``: ``(w + ½)·2⁻³²``, below 1, of word ``j mod 4`` of counter ``offset + row + ⌊j/4⌋``."""
    a, b, c, d = _words(seed, row, first, COLUMNS)
    v = tl.fma(_side_by_side(a, b, c, d).to(tl.float32), _ULP_OF_WORD, 0.5 * _ULP_OF_WORD)
    return tl.where(v < 1 - _ULP, v, 1 - _ULP)


@triton.jit
def _box_muller(a, b):
    u = tl.fma(a.to(tl.float32), _ULP_OF_WORD, _ULP_OF_WORD)
    sin, cos = sin_cos_of_turns((b >> _DROPPED_BITS).to(tl.float32) * _ULP)
    radius = sqrt(-2 * log(u))
    return radius * cos, radius * sin


@triton.jit
def normal(seed, row, first, COLUMNS: tl.constexpr):
    """``[len(row), COLUMNS]`` standard normal numbers: number ``j mod 4`` of counter ``offset + row + ⌊j/4⌋``."""
    a, b, c, d = _words(seed, row, first, COLUMNS)
    first_cos, first_sin = _box_muller(a, b)
    second_cos, second_sin = _box_muller(c, d)
    return _side_by_side(first_cos, first_sin, second_cos, second_sin)
