"""A step of masked iterative decoding on CUDA: what ``csrc/cuda/masked_decode.cuh`` is launched with."""

from __future__ import annotations

import struct

from torch import Tensor

from mmkern.backends.cuda_launch import launch
from mmkern.backends.cuda_tensors import DTYPES, GRID, fits_vectors, grid_entries
from mmkern.backends.masked_rows import MaskedRows

THREADS = 256
# logits; tokens, masked; seed, counters; rows, of_sample; settings; log_probs, out, stays, doubts; sizes, dtype
_DRAW_ARGS = struct.Struct(f"{GRID} PP Pq qq Pq 4P 6i")
# doubts, tokens; counts; out, stays; positions
_MASK_ARGS = struct.Struct("PP Pq PP 2i")


def masked_decode_step(
    logits: Tensor,
    tokens: Tensor,
    masked: Tensor,
    seed: Tensor,
    settings: Tensor,
    counts: Tensor,
    log_probs: Tensor,
    out: Tensor,
    stays: Tensor,
) -> None:
    if tokens.numel() == 0:
        return
    rows = MaskedRows.of(logits, settings, counts)
    x = rows.logits
    draw = _DRAW_ARGS.pack(
        *grid_entries(x),
        tokens.data_ptr(),
        masked.data_ptr(),
        seed.data_ptr(),
        rows.counters,
        rows.rows,
        rows.of_sample,
        settings.data_ptr(),
        rows.settings_stride,
        log_probs.data_ptr(),
        out.data_ptr(),
        stays.data_ptr(),
        rows.doubts.data_ptr(),
        x.shape[-1],
        rows.heads,
        rows.length,
        DTYPES[x.dtype],
        fits_vectors(x.element_size(), 0, x.stride()[:3], (x.data_ptr(),)),
        0,
    )
    launch("draw_masked", (rows.rows, 1), THREADS, draw, x.device)
    mask = _MASK_ARGS.pack(
        rows.doubts.data_ptr(),
        tokens.data_ptr(),
        counts.data_ptr(),
        rows.counts_stride,
        out.data_ptr(),
        stays.data_ptr(),
        rows.of_sample,
        0,
    )
    launch("mask_again", (rows.rows // rows.of_sample, 1), THREADS, mask, x.device)
