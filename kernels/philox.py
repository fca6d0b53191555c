"""Philox4x32-10 by position: the integers of ``mmkern.reference.philox``, bit by bit."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

import triton
import triton.language as tl

from mmkern.reference.philox import UNIFORM_BITS, threshold

_DROPPED_BITS = tl.constexpr(32 - UNIFORM_BITS)


def least_step(probability: float) -> int:
    """``n`` such that ``word >> 8 >= n`` where the uniform number of a word is at least ``probability``."""
    return threshold(probability) >> _DROPPED_BITS.value


@triton.jit
def at_least(threshold, seed, row, first, COLUMNS: tl.constexpr):
    """``[len(row), COLUMNS]``: whether word ``j mod 4`` of counter ``offset + row + ⌊j/4⌋`` is that large.

    ``seed`` points to (seed, offset); ``first``, the first j, is a multiple of 4.
    """
    four = first // 4 + tl.arange(0, COLUMNS // 4)
    counter = tl.load(seed + 1) + row[:, None] + four[None, :]
    a, b, c, d = tl.randint4x(tl.load(seed), counter)
    # The last axis of a join is the fastest: (a, c) and (b, d) interleave to a, b, c, d.
    words = tl.join(tl.join(a, c), tl.join(b, d)).reshape(row.shape[0], COLUMNS)
    return (words >> _DROPPED_BITS).to(tl.int32) >= threshold
