"""Blocks of all pairs, whose weights a backward of a contrastive loss has in memory one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_SIDE = 4096  # 64 MB of floats


def blocks_of_pairs(n: int, m: int) -> tuple[list[slice], list[slice]]:
    """Slices of rows and of columns: of squares, or of longer blocks of a short side."""
    return _slices(n, BLOCK_SIDE * max(BLOCK_SIDE // m, 1)), _slices(m, BLOCK_SIDE * max(BLOCK_SIDE // n, 1))


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def room_for_sums(gradient: Tensor | None, terms: int) -> Tensor | None:
    """Where so many blocks add up their parts of a gradient: itself, if that keeps their digits."""
    if gradient is None or gradient.dtype == torch.float32 or terms == 1:
        return gradient
    return torch.empty_like(gradient, dtype=torch.float32)
