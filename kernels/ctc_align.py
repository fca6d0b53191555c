"""Forced alignment of CTC in Triton: ``mmkern.reference.ctc_align``. A program has a row, frame after frame; which way
each state was reached is one byte, and the path is read backwards from them.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from mmkern.kernels.scalar_math import INFINITY
from mmkern.kernels.token_selection import Row, logits_of
from torch import Tensor

_BLOCK = 1024
_PER_WARP = 256


@triton.jit
def _length(lengths, row, width):
    length = tl.zeros([], tl.int64) + width
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + row), 0), length)
    return length


@triton.jit
def align_kernel(
    log_probs,  # [batch, width, labels]
    targets,  # [batch, most], int64
    lengths,  # [batch], int64, or None
    target_lengths,  # [batch], int64, or None
    shifted,  # [batch, most + 1]: room for the numbers of the targets
    ways,  # [batch, width, 2, most + 1], uint8
    scores,  # [batch, width]
    labels_out,  # [batch, width], int64
    places,  # [batch, width], int64
    width,
    labels,
    most,
    row_stride,
    frame_stride,
    blank,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    frames, count = _length(lengths, number, width), _length(target_lengths, number, most)
    k = tl.arange(0, STATES)
    is_target = k < count
    token = tl.load(targets + number * most + k, is_target, 0)
    before = tl.load(targets + number * most + k - 1, is_target & (k > 0), 0)
    may_skip = (k > 0) & (token != before)
    odd = tl.max((is_target & ((token < 0) | (token >= labels))).to(tl.int32), 0)
    token = tl.where((token >= 0) & (token < labels), token, 0)
    shifted += number * (most + 1)
    ways += number * width * 2 * (most + 1)
    rows = log_probs + number * row_stride

    in_blank = tl.where(k == 0, 0.0, -INFINITY)  # before the first frame
    in_target = tl.full([STATES], -INFINITY, tl.float32)
    for t in range(0, frames):
        row = Row(rows + t * frame_stride, None, labels)
        for first in range(0, labels, BLOCK):
            odd |= tl.max((~(logits_of(row, first, BLOCK) < INFINITY)).to(tl.int32), 0)
        tl.store(shifted + k, in_target, k < count)
        tl.debug_barrier()
        neighbour = tl.load(shifted + k - 1, (k > 0) & (k <= count), -INFINITY)
        tl.debug_barrier()
        of_blank = tl.sum(tl.load(row.logits + blank + tl.arange(0, 1)).to(tl.float32), 0)
        of_target = tl.load(row.logits + token, is_target, -INFINITY).to(tl.float32)
        to = ways + t * 2 * (most + 1) + k
        tl.store(to, (neighbour > in_blank).to(tl.uint8), k <= count)
        passes = tl.where(may_skip, neighbour, -INFINITY)
        stays = in_target >= in_blank
        best = tl.where(stays, in_target, in_blank)
        skips = passes > best
        tl.store(to + most + 1, tl.where(skips, 2, tl.where(stays, 0, 1)).to(tl.uint8), is_target)
        in_blank = tl.where(neighbour > in_blank, neighbour, in_blank) + of_blank
        in_target = tl.where(skips, passes, best) + of_target
        top = tl.max(tl.where(in_blank > in_target, in_blank, in_target), 0)
        less = tl.where(top > -INFINITY, top, 0.0)
        in_blank, in_target = in_blank - less, in_target - less
    tl.debug_barrier()

    end_blank = tl.sum(tl.where(k == count, in_blank, 0.0), 0)
    end_target = tl.where(count > 0, tl.sum(tl.where(k == count - 1, in_target, 0.0), 0), -INFINITY)
    is_blank = (end_blank >= end_target).to(tl.int32)
    end = tl.where(is_blank != 0, end_blank, end_target)
    is_found = (odd == 0) & (end > -INFINITY)
    written = tl.where(is_found, frames, 0)
    at = number * width
    for first in range(0, width, BLOCK):
        place = first + tl.arange(0, BLOCK)
        none = tl.full([BLOCK], -1, tl.int64)
        is_left = (place >= written) & (place < width)
        tl.store(labels_out + at + place, none, is_left)
        tl.store(places + at + place, none, is_left)
        tl.store(scores + at + place, tl.where(is_found, 0.0, float("nan")) + tl.zeros([BLOCK], tl.float32), is_left)
    state = tl.where(is_blank != 0, count, count - 1)
    for u in range(0, written):
        t = written - 1 - u
        label = tl.zeros([], tl.int64) + blank
        if is_blank == 0:
            label = tl.load(targets + number * most + state)
        tl.store(labels_out + at + t, label)
        tl.store(places + at + t, tl.where(is_blank != 0, -1, state))
        tl.store(scores + at + t, tl.load(rows + t * frame_stride + label).to(tl.float32))
        way = tl.load(ways + (t * 2 + 1 - is_blank) * (most + 1) + state).to(tl.int32)
        state -= tl.where(is_blank != 0, way, (way == 2).to(tl.int32))
        is_blank = tl.where(is_blank != 0, (way == 0).to(tl.int32), (way == 1).to(tl.int32))


def ctc_forced_align(
    log_probs: Tensor,
    targets: Tensor,
    lengths: Tensor | None,
    target_lengths: Tensor | None,
    blank: int,
    scores: Tensor,
    labels: Tensor,
    places: Tensor,
) -> None:
    """The arguments of the op; the numbers of the path, its labels, and their places."""
    batch, width, count = log_probs.shape
    if batch == 0:
        return
    most = targets.shape[1]
    shifted = torch.empty(batch, most + 1, dtype=torch.float32, device=log_probs.device)
    ways = torch.empty(batch, width, 2, most + 1, dtype=torch.uint8, device=log_probs.device)
    states = triton.next_power_of_2(most + 1)
    with torch.cuda.device_of(log_probs):
        align_kernel[(batch,)](
            log_probs,
            targets,
            lengths,
            target_lengths,
            shifted,
            ways,
            scores,
            labels,
            places,
            width,
            count,
            most,
            *log_probs.stride()[:2],
            blank,
            STATES=states,
            BLOCK=min(triton.next_power_of_2(max(count, 16)), _BLOCK),
            num_warps=max(1, min(states // _PER_WARP, 16)),
        )
