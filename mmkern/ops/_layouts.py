"""How tensors must lie for kernels to read them."""

from __future__ import annotations

from torch import Tensor


def dense_rows(x: Tensor) -> Tensor:
    """``x`` itself where its last axis is dense and its leading axes collapse to one stride, else a copy."""
    if x.is_contiguous() or x.dim() == 0:
        return x
    if x.dim() > 1 and x.shape[-1] > 1 and x.stride(-1) != 1:
        return x.contiguous()
    expected = None
    for size, stride in list(zip(x.shape, x.stride(), strict=True))[-2::-1]:
        if size == 1:
            continue
        if expected is not None and stride != expected:
            return x.contiguous()
        expected = stride * size
    return x if x.dim() > 1 else x.contiguous()


def dense_last_axis(x: Tensor) -> Tensor:
    """``x`` itself where neighbours along its last axis are neighbours in memory, else a copy."""
    return x if x.dim() == 0 or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def needs_order(x: Tensor) -> bool:
    """Its rows are dense, and follow each other in another order than that of its axes."""
    return not x.is_contiguous() and (x.shape[-1] <= 1 or x.stride(-1) == 1)
