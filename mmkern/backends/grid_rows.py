"""Rows of ``[..., D]`` with a stride for each axis, as kernels see them: no more than four axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from torch import Tensor


def four_axes(x: Tensor) -> Tensor:
    """``[..., H, L, D]`` as ``[B, H, L, D]``; a view, but of more axes than four that do not collapse."""
    return x.reshape(-1, *x.shape[-3:]) if x.dim() > 4 else x[(None,) * (4 - x.dim())]


def sizes(x: Tensor) -> tuple[int, int, int]:
    """Rows of ``[..., D]``, heads and length."""
    heads, length = (1, 1, *x.shape[:-1])[-2:]
    return prod(x.shape[:-1]), heads, length


def written(outputs: Sequence[Tensor | None], run: Callable[..., None]) -> None:
    """``run(*outputs)``, with dense outputs where there are more axes than four."""
    dense = [None if x is None else x if x.dim() <= 4 else x.contiguous() for x in outputs]
    run(*dense)
    for x, filled in zip(outputs, dense, strict=True):
        if x is not None and filled is not None and filled.data_ptr() != x.data_ptr():
            x.copy_(filled)
