"""Tensors with NaN around and between their elements: the interpreter reads and writes out of bounds without a word."""

from __future__ import annotations

import math

import torch
from torch import Tensor

GUARD = 256


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
    """A contiguous result, NaN before a kernel runs, between two guards."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.buffer = torch.full((math.prod(shape) + 2 * GUARD,), math.nan, dtype=dtype)
        self.tensor = self.buffer[GUARD:-GUARD].view(shape)

    def check(self, name: str) -> None:
        outside = torch.cat([self.buffer[:GUARD], self.buffer[-GUARD:]])
        if not outside.isnan().all():
            raise AssertionError(f"{name}: written out of bounds")
