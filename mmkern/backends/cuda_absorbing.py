"""A step of absorbing-state diffusion on CUDA: what ``csrc/cuda/absorbing_step.cuh`` is launched with."""

from __future__ import annotations

import struct

from torch import Tensor

from mmkern.backends.absorbing_rows import AbsorbingRows
from mmkern.backends.cuda_launch import launch
from mmkern.backends.cuda_tensors import DTYPES, GRID, address, grid_entries
from mmkern.backends.grid_rows import sizes

THREADS = 128
# log_scores, to_next; tokens, seed; counters, of_sample; rates; weights; log_probs, out; sizes, dtype
_ARGS = struct.Struct(f"{GRID} q PP qq Pq Pq PP 6i")


def absorbing_step(
    log_scores: Tensor,
    tokens: Tensor,
    seed: Tensor,
    rates: Tensor,
    weights: Tensor | None,
    log_probs: Tensor,
    out: Tensor,
) -> None:
    if tokens.numel() == 0:
        return
    rows = AbsorbingRows.of(log_scores, rates, weights)
    count, heads, length = sizes(rows.first)
    packed = _ARGS.pack(
        *grid_entries(rows.first),
        rows.to_next,
        tokens.data_ptr(),
        seed.data_ptr(),
        rows.counters,
        rows.of_sample,
        rates.data_ptr(),
        rows.rates_stride,
        address(weights),
        rows.weights_stride,
        log_probs.data_ptr(),
        out.data_ptr(),
        rows.branches,
        log_scores.shape[-1] - 1,
        heads,
        length,
        DTYPES[log_scores.dtype],
        0,
    )
    launch("absorbing_step", (count, 1), THREADS, packed, log_scores.device)
