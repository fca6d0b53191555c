"""What both GPU backends launch ``absorbing_step`` with: where its rows lie, and which numbers are theirs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mmkern.backends.grid_rows import four_axes, sizes


class AbsorbingRows(NamedTuple):
    first: Tensor  # branch: [batch, heads, length, V + 1]
    to_next: int  # branch
    branches: int
    of_sample: int  # rows of a sample
    rates_stride: int  # from sample to sample, 0 where all share one
    weights_stride: int
    counters: int  # of a row

    @classmethod
    def of(cls, log_scores: Tensor, rates: Tensor, weights: Tensor | None) -> AbsorbingRows:
        """Of ``[..., K, V + 1]`` with rows; what has no such view is copied."""
        first = four_axes(log_scores.select(-2, 0))
        if first.data_ptr() != log_scores.data_ptr():
            return cls.of(log_scores.contiguous(), rates, weights)
        rows, samples = sizes(first)[0], log_scores.shape[0] if log_scores.dim() > 2 else 1
        return cls(
            first,
            log_scores.stride(-2),
            log_scores.shape[-2],
            rows // samples,
            int(len(rates) > 1),
            weights.stride(0) if weights is not None and len(weights) > 1 else 0,
            -(-log_scores.shape[-1] // 4),
        )
