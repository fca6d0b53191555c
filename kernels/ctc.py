"""CTC in Triton: the likeliest label of each frame, and what is left of a path without repeats and blanks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_PER_WARP = 256  # numbers that a warp has of a block


@triton.jit
def best_labels_kernel(
    log_probs,  # [batch, frames, labels]
    path,  # [batch, frames], int64
    best,  # [batch, frames], float32: the number of that label; NaN where one is NaN or +inf
    frames,
    labels,
    batch_stride,
    frame_stride,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = log_probs + program // frames * batch_stride + program % frames * frame_stride
    top, label, odd = tl.full([], -float("inf"), tl.float32), tl.zeros([], tl.int64), tl.zeros([], tl.int32)
    for first in range(0, labels, BLOCK):
        place = first + tl.arange(0, BLOCK)
        x = tl.load(row + place, place < labels, -float("inf")).to(tl.float32)
        odd |= tl.max((~(x < float("inf"))).to(tl.int32), 0)
        here = tl.max(x, 0)
        label = tl.where(here > top, first + tl.argmax(x, 0, tie_break_left=True), label)
        top = tl.maximum(top, here)
    at = program + tl.arange(0, 1)
    tl.store(path + at, label)
    tl.store(best + at, tl.where(odd != 0, float("nan"), top))


@triton.jit
def collapse_kernel(
    path,  # [rows, width], int64
    best,  # [rows, width], float32, or None
    lengths,  # [rows], int64, or None
    scores,  # [rows], float32: the sum of best; or None
    tokens,  # [rows, width], int64
    counts,  # [rows], int64
    times,  # [rows, width], int64
    blank,
    width,
    path_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = row + tl.arange(0, 1)
    frames = tl.zeros([], tl.int64) + width
    if lengths is not None:
        frames = tl.minimum(tl.maximum(tl.load(lengths + row), 0), frames)
    if best is not None:
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, width, BLOCK):
            place = first + tl.arange(0, BLOCK)
            total += tl.load(best + row * width + place, place < frames, 0.0)
        score = tl.sum(total, 0)
        tl.store(scores + at, score)
        frames = tl.where(score == score, frames, 0)
    count = tl.zeros([], tl.int64)
    for first in range(0, width, BLOCK):
        place = first + tl.arange(0, BLOCK)
        is_inside = place < frames
        here = tl.load(path + row * path_stride + place, is_inside, 0)
        before = tl.load(path + row * path_stride + place - 1, is_inside & (place > 0), 0)
        is_kept = is_inside & (here != blank) & ((place == 0) | (here != before))
        kept = is_kept.to(tl.int64)
        to = row * width + count + tl.cumsum(kept, 0) - 1
        tl.store(tokens + to, here, is_kept)
        tl.store(times + to, place.to(tl.int64), is_kept)
        count += tl.sum(kept, 0)
    tl.store(counts + at, count)
    for first in range(0, width, BLOCK):
        place = first + tl.arange(0, BLOCK)
        none = tl.full([BLOCK], -1, tl.int64)
        is_left = (place >= count) & (place < width)
        tl.store(tokens + row * width + place, none, is_left)
        tl.store(times + row * width + place, none, is_left)


def collapse_repeats(
    tokens: Tensor, lengths: Tensor | None, blank: int, kept: Tensor, counts: Tensor, times: Tensor
) -> None:
    """The arguments of the op; tokens, how many they are, and their times."""
    _collapse(tokens, None, lengths, None, kept, counts, times, blank)


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
    batch, frames, labels = log_probs.shape
    path = torch.empty_like(tokens)
    best = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device)
    if path.numel():
        block, warps = _shape(labels)
        best_labels_kernel[(batch * frames,)](
            log_probs, path, best, frames, labels, *log_probs.stride()[:2], BLOCK=block, num_warps=warps
        )
    _collapse(path, best, lengths, scores, tokens, counts, times, blank)


def _collapse(
    path: Tensor,
    best: Tensor | None,
    lengths: Tensor | None,
    scores: Tensor | None,
    tokens: Tensor,
    counts: Tensor,
    times: Tensor,
    blank: int,
) -> None:
    rows, width = path.shape
    if rows == 0:
        return
    block, warps = _shape(width)
    lengths = None if lengths is None else lengths.contiguous()
    collapse_kernel[(rows,)](
        path,
        best,
        lengths,
        scores,
        tokens,
        counts,
        times,
        blank,
        width,
        path.stride(0),
        BLOCK=block,
        num_warps=warps,
    )


def _shape(n: int) -> tuple[int, int]:
    """The block for a row of n, and its warps."""
    block = min(triton.next_power_of_2(max(n, 16)), _BLOCK)
    return block, max(1, block // _PER_WARP)
