"""Numbers that all blocks of a launch, or of several, add to: ``csrc/cuda/sum_partials.cuh``."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from mmkern.backends.cuda_launch import launch
from mmkern.backends.cuda_tensors import MAX_LANES

_SUM_ARGS = struct.Struct("PPq")  # partials, total, count


class Total:
    """Partial sums, one a block, that a last kernel adds up in a fixed order; None is not wanted."""

    def __init__(self, total: Tensor | None, blocks: int) -> None:
        self._total = total
        self._partials = None if total is None else total.new_empty(blocks, dtype=torch.float32)
        self._taken = 0

    def take(self, blocks: int) -> int:
        """The address of the next so many partial sums."""
        if self._partials is None:
            return 0
        first, self._taken = self._taken, self._taken + blocks
        return self._partials[first:].data_ptr()

    def finish(self) -> None:
        if self._total is not None and self._partials is not None:
            arguments = _SUM_ARGS.pack(self._partials.data_ptr(), self._total.data_ptr(), self._partials.numel())
            launch("sum_partials", (1, 1), MAX_LANES, arguments, self._total.device)
