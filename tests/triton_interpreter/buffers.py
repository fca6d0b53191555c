"""Tensors with NaN around and between their elements: the interpreter reads and writes out of bounds without a word."""

from __future__ import annotations

import math

import torch
from torch import Tensor

GUARD = 256
_UNTOUCHED = 7.0


def guarded(x: Tensor) -> Tensor:
    """``x`` with the same values and strides; around and between them NaN, or True, or the largest integer."""
    if x.numel() == 0:
        return x
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    around = math.nan if x.is_floating_point() else True if x.dtype == torch.bool else torch.iinfo(x.dtype).max
    buffer = torch.full((span + 2 * GUARD,), around, dtype=x.dtype)
    once = [slice(0, 1) if stride == 0 else slice(None) for stride in x.stride()]
    view = torch.as_strided(buffer, x.shape, x.stride(), GUARD)
    view[tuple(once)] = x[tuple(once)]
    return view


class Output:
    """Room for a result that lies as ``like`` does, between two guards of a plain number.

    Before a kernel runs it is NaN, or the smallest integer.

    A guard of NaN would not show that NaN, read out of bounds, was written out of bounds.
    """

    def __init__(self, like: Tensor) -> None:
        self.buffer = torch.full((like.numel() + 2 * GUARD,), _UNTOUCHED, dtype=like.dtype)
        self.tensor = torch.as_strided(self.buffer, like.shape, like.stride(), GUARD)
        self.tensor.fill_(math.nan if like.is_floating_point() else torch.iinfo(like.dtype).min)

    def check(self, name: str) -> None:
        outside = torch.cat([self.buffer[:GUARD], self.buffer[-GUARD:]])
        if not (outside == _UNTOUCHED).all():
            raise AssertionError(f"{name}: written out of bounds")
