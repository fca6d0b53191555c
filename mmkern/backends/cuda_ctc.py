"""CTC on CUDA: what ``csrc/cuda/ctc_greedy.cuh`` and ``ctc_beam.cuh`` are launched with."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from mmkern.backends.beam_room import BeamRoom
from mmkern.backends.cuda_launch import launch
from mmkern.backends.cuda_tensors import DTYPES, address, fits_vectors

_THREADS, _WARPS = 256, 8
# log_probs, strides; path, best; frames, width; labels, dtype, vectors
_BEST_LABELS_ARGS = struct.Struct("P2q 2P 2q 4i")
# path, stride; best, lengths; scores, tokens, counts, times; blank, width
_COLLAPSE_ARGS = struct.Struct("Pq 2P 4P 2q")
# log_probs, strides; lengths; room; scores, tokens, counts, times; width; labels, beam, blank, nbest; prune, dtype
_BEAM_ARGS = struct.Struct("P2q P 3P 4P q 4i fi")


def ctc_greedy_decode(
    log_probs: Tensor,
    lengths: Tensor | None,
    blank: int,
    scores: Tensor,
    tokens: Tensor,
    counts: Tensor,
    times: Tensor,
) -> None:
    """The arguments of the op; scores, tokens, how many they are, and their times."""
    rows, width, labels = log_probs.shape
    path = torch.empty_like(tokens)
    best = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device)
    frames, strides = rows * width, log_probs.stride()[:2]
    if frames:
        packed = _BEST_LABELS_ARGS.pack(
            log_probs.data_ptr(),
            *strides,
            path.data_ptr(),
            best.data_ptr(),
            frames,
            width,
            labels,
            DTYPES[log_probs.dtype],
            fits_vectors(log_probs.element_size(), labels, strides, (log_probs.data_ptr(),)),
            0,
        )
        launch("best_labels", (-(-frames // _WARPS), 1), _THREADS, packed, log_probs.device)
    _collapse(path, best, lengths, blank, scores, tokens, counts, times)


def collapse_repeats(
    path: Tensor, lengths: Tensor | None, blank: int, tokens: Tensor, counts: Tensor, times: Tensor
) -> None:
    """The arguments of the op; tokens, how many they are, and their times."""
    _collapse(path, None, lengths, blank, None, tokens, counts, times)


def _collapse(
    path: Tensor,
    best: Tensor | None,
    lengths: Tensor | None,
    blank: int,
    scores: Tensor | None,
    tokens: Tensor,
    counts: Tensor,
    times: Tensor,
) -> None:
    rows, width = path.shape
    if rows == 0:
        return
    lengths = None if lengths is None else lengths.contiguous()
    outs = (scores, tokens, counts, times)
    packed = _COLLAPSE_ARGS.pack(
        path.data_ptr(), path.stride(0), address(best), address(lengths), *map(address, outs), blank, width
    )
    launch("collapse_repeats", (rows, 1), _THREADS, packed, path.device)


def ctc_beam_decode(
    log_probs: Tensor,
    lengths: Tensor | None,
    beam: int,
    blank: int,
    nbest: int,
    prune_log_prob: float,
    scores: Tensor,
    tokens: Tensor,
    counts: Tensor,
    times: Tensor,
) -> None:
    """The arguments of the op; scores, tokens, how many they are, and their times."""
    rows, width, labels = log_probs.shape
    if rows == 0:
        return
    room = BeamRoom.of(log_probs, beam)
    lengths = None if lengths is None else lengths.contiguous()
    packed = _BEAM_ARGS.pack(
        log_probs.data_ptr(),
        *log_probs.stride()[:2],
        address(lengths),
        *(x.data_ptr() for x in room),
        *map(address, (scores, tokens, counts, times)),
        width,
        labels,
        beam,
        blank,
        nbest,
        prune_log_prob,
        DTYPES[log_probs.dtype],
    )
    launch("ctc_beam_decode", (rows, 1), _THREADS, packed, log_probs.device)
