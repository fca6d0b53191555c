"""Tensors ``[..., D]`` with a stride for each axis, as kernels see them: four axes at most, or as few as may be."""

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


def with_fewest_axes(tensors: Sequence[Tensor], first: int = 0) -> tuple[list[int], list[int]]:
    """Of ``tensors[0]``, when neighbouring axes from ``first`` on that all tensors walk over as one become one: the
    sizes that are left, and of each the innermost axis, whose step is that of the whole.

    The others have the same axes, or an axis once. The last stays the last.
    """
    shape = tensors[0].shape
    last = len(shape) - 1
    sizes, kept = [shape[last]], [last]
    for axis in range(last - 1, first - 1, -1):
        if shape[axis] == 1:
            continue
        if all(step_along(t, axis, shape) == step_along(t, kept[0], shape) * sizes[0] for t in tensors):
            sizes[0] *= shape[axis]
        else:
            sizes.insert(0, shape[axis])
            kept.insert(0, axis)
    return sizes, kept


def step_along(x: Tensor, axis: int, shape: Sequence[int]) -> int:
    """From an element of ``x``, expanded to ``shape``, to the next; along the last axis it is dense or expanded."""
    if x.shape[axis] != shape[axis]:
        return 0
    return 1 if axis == len(shape) - 1 else x.stride(axis)
