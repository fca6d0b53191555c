"""A token of each row of logits on CUDA: what ``csrc/cuda/sample_tokens.cuh`` is launched with."""

from __future__ import annotations

import struct

from torch import Tensor

from mmkern.backends.cuda_launch import launch
from mmkern.backends.cuda_tensors import DTYPES, address, fits_vectors
from mmkern.reference import decoding as reference

THREADS = 256
# logits; seeds, counters; filters; allowed; log_probs, tokens; size, dtype, vectors
_ARGS = struct.Struct("Pq Pqq Pq Pq PP 4i")


def sample_tokens(
    logits: Tensor,
    seed: Tensor,
    filters: Tensor,
    history: Tensor | None,
    allowed: Tensor | None,
    log_probs: Tensor,
    tokens: Tensor,
) -> None:
    rows, size = logits.shape
    if rows == 0:
        return
    if history is not None:
        logits = reference.penalized(logits, filters, history)
    seed, filters = seed.contiguous(), filters.contiguous()
    allowed = None if allowed is None else allowed.contiguous()
    vectors = fits_vectors(logits.element_size(), 0, (logits.stride(0),), (logits.data_ptr(),))
    arguments = _ARGS.pack(
        logits.data_ptr(),
        logits.stride(0),
        seed.data_ptr(),
        _stride(seed),
        -(-size // 4) if seed.shape[0] == 1 else 0,
        filters.data_ptr(),
        _stride(filters),
        address(allowed),
        _stride(allowed),
        log_probs.data_ptr(),
        tokens.data_ptr(),
        size,
        DTYPES[logits.dtype],
        vectors,
        0,
    )
    launch("sample_tokens", (rows, 1), THREADS, arguments, logits.device)


def _stride(x: Tensor | None) -> int:
    """From row to row, 0 where there is one for all."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)
