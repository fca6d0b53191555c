"""A token of each row of logits on CUDA: what ``csrc/cuda/sample_tokens.cuh`` is launched with."""

from __future__ import annotations

import struct
from typing import Any

from mmkern.backends.cuda_launch import launch
from mmkern.backends.cuda_tensors import DTYPES, address, fits_vectors
from mmkern.backends.token_rows import TokenRows

THREADS = 256
# logits; seeds, counters; filters; allowed; log_probs, tokens; size, dtype, vectors
_ARGS = struct.Struct("Pq Pqq Pq Pq PP 4i")


def sample_tokens(*given: Any) -> None:
    """The arguments of the op; log-probabilities and tokens."""
    *arguments, log_probs, tokens = given
    rows = TokenRows.of(*arguments)
    logits = rows.logits
    count, size = logits.shape
    if count == 0:
        return
    of_logits, of_seed, of_filters, of_allowed = rows.strides
    packed = _ARGS.pack(
        logits.data_ptr(),
        of_logits,
        rows.seed.data_ptr(),
        of_seed,
        rows.counters,
        rows.filters.data_ptr(),
        of_filters,
        address(rows.allowed),
        of_allowed,
        log_probs.data_ptr(),
        tokens.data_ptr(),
        size,
        DTYPES[logits.dtype],
        fits_vectors(logits.element_size(), 0, (of_logits,), (logits.data_ptr(),)),
        0,
    )
    launch("sample_tokens", (count, 1), THREADS, packed, logits.device)
