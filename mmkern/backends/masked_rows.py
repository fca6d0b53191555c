"""What both GPU backends launch ``masked_decode_step`` with: where its rows lie, and which numbers are theirs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmkern.backends.grid_rows import four_axes, sizes


class MaskedRows(NamedTuple):
    logits: Tensor  # [batch, heads, length, V]
    rows: int
    heads: int
    length: int
    of_sample: int  # rows of a sample
    settings_stride: int  # from sample to sample, 0 where all share one
    counts_stride: int
    counters: int  # of a row
    doubts: Tensor  # room for one number a row

    @classmethod
    def of(cls, logits: Tensor, settings: Tensor, counts: Tensor) -> MaskedRows:
        """Of ``[B, ..., V]`` with rows."""
        rows, heads, length = sizes(logits)
        return cls(
            four_axes(logits),
            rows,
            heads,
            length,
            rows // logits.shape[0],
            settings.stride(0) if len(settings) > 1 else 0,
            int(len(counts) > 1),
            -(-logits.shape[-1] // 4),
            torch.empty(rows, dtype=torch.float32, device=logits.device),
        )
