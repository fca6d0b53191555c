"""Beam search of CTC in Triton: ``mmkern.reference.ctc_beam``, as csrc/cuda/ctc_beam.cuh does it. A program has a row,
frame after frame. What a frame makes of the beam, each prefix that stays and each that grows by a label, is one row of
numbers, of which the largest are found as those of logits are.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from mmkern.kernels.scalar_math import INFINITY, exp, log1p
from mmkern.kernels.token_selection import Boundary, Row, are_kept, boundary_of, largest_of, logits_of
from torch import Tensor

from mmkern.backends.beam_room import BeamRoom

_BLOCK = 1024
_ROOT = tl.constexpr(0x243F6A8885A308D3)  # any


class Frame(NamedTuple):
    logs: Any
    labels: Any
    least: Any  # what is looked at


class Room(NamedTuple):
    """Of a row; see ``BeamRoom``."""

    floats: Any
    hashes: Any
    ints: Any
    beam: Any


@triton.jit
def _in_blank(room, parity):
    return room.floats + parity * 2 * room.beam


@triton.jit
def _in_token(room, parity):
    return room.floats + (parity * 2 + 1) * room.beam


@triton.jit
def _total(room):
    return room.floats + 4 * room.beam


@triton.jit
def _stay(room):
    """Of those that stay the paths that end in blank, and behind them those in the last token."""
    return room.floats + 5 * room.beam


@triton.jit
def _values(room):
    return room.floats + 7 * room.beam


@triton.jit
def _hash(room, parity):
    """Of each prefix, and behind them of those without their last tokens."""
    return room.hashes + parity * 2 * room.beam


@triton.jit
def _last(room, parity):
    """The last tokens, and behind them the nodes."""
    return room.ints + parity * 2 * room.beam


@triton.jit
def _shorter(room):
    return room.ints + 4 * room.beam


@triton.jit
def _nodes(room):
    """Of each node its parent, token and time."""
    return room.ints + 5 * room.beam


@triton.jit
def _hash_of(prefix, token):
    h = prefix.to(tl.uint64, bitcast=True) ^ ((token + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9
    h = (h ^ (h >> 27)) * 0x94D049BB133111EB
    return (h ^ (h >> 31)).to(tl.int64, bitcast=True)


@triton.jit
def _log_add(a, b):
    most, least = tl.where(a > b, a, b), tl.where(a > b, b, a)
    is_none = most == -INFINITY
    return tl.where(is_none, most, most + log1p(exp(tl.where(is_none, 0.0, least - most))))


@triton.jit
def _log_of(frame, label, mask):
    """-∞ of a label that is too unlikely to be looked at, and where there is none."""
    log = tl.load(frame.logs + label, mask, -INFINITY).to(tl.float32)
    return tl.where(log >= frame.least, log, -INFINITY)


@triton.jit
def _ending(room, parity, i, token, mask):
    """What a prefix has before a token: only what ends in blank where that is its last one."""
    is_last = tl.load(_last(room, parity) + i, mask, -1) == token
    blank = tl.load(_in_blank(room, parity) + i, mask, -INFINITY)
    return tl.where(is_last, blank, tl.load(_total(room) + i, mask, -INFINITY))


@triton.jit
def _add_up(room, parity, count, BEAM: tl.constexpr):
    i = tl.arange(0, BEAM)
    blank = tl.load(_in_blank(room, parity) + i, i < count, -INFINITY)
    token = tl.load(_in_token(room, parity) + i, i < count, -INFINITY)
    tl.store(_total(room) + i, _log_add(blank, token), i < count)
    tl.debug_barrier()


@triton.jit
def _stay_and_grow(room, parity, frame, count, blank, BEAM: tl.constexpr, BLOCK: tl.constexpr):
    """All that the frame makes of the beam."""
    i = tl.arange(0, BEAM)
    inside = i < count
    last = tl.load(_last(room, parity) + i, inside, -1)
    wanted = tl.load(_hash(room, parity) + room.beam + i, inside, 0)
    shorter = tl.full([BEAM], -1, tl.int32)
    for j in range(0, count):
        shorter = tl.where((tl.load(_hash(room, parity) + j) == wanted) & (last >= 0), j, shorter)
    log = _log_of(frame, last, inside & (last >= 0))
    token = tl.load(_in_token(room, parity) + i, inside, -INFINITY) + log
    token = _log_add(token, _ending(room, parity, shorter, last, inside & (shorter >= 0)) + log)
    in_blank = tl.load(_total(room) + i, inside, -INFINITY) + tl.sum(_log_of(frame, blank + tl.arange(0, 1), True), 0)
    tl.store(_shorter(room) + i, shorter, inside)
    tl.store(_stay(room) + i, in_blank, inside)
    tl.store(_stay(room) + room.beam + i, token, inside)
    tl.store(_values(room) + i, _log_add(in_blank, token), inside)
    grown = _values(room) + count
    for first in range(0, count * frame.labels, BLOCK):
        at = first + tl.arange(0, BLOCK)
        is_there = at < count * frame.labels
        source, label = at // frame.labels, at % frame.labels
        value = _ending(room, parity, source, label, is_there) + _log_of(frame, label, is_there)
        tl.store(grown + at, tl.where(label == blank, -INFINITY, value), is_there)
    tl.debug_barrier()
    none = tl.full([BEAM], -INFINITY, tl.float32)
    tl.store(grown + shorter * frame.labels + last, none, inside & (shorter >= 0))
    tl.debug_barrier()


@triton.jit
def _take_over(room, parity, frame, count, time, BLOCK: tl.constexpr):
    """The largest become the beam, beside the likeliest: how many they are, and the number of that."""
    row = Row(_values(room), None, count * (frame.labels + 1))
    top, is_bad = largest_of(row, BLOCK)
    key, ties = tl.zeros([], tl.int64), tl.full([], 2147483647, tl.int32)
    if (row.size > room.beam) & ~is_bad:
        key, ties = boundary_of(row, None, room.beam.to(tl.float64), BLOCK)
    boundary = Boundary(key, ties, 0.0)
    seen, found = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for first in range(0, row.size, BLOCK):
        value = logits_of(row, first, BLOCK)
        kept, seen = are_kept(value, tl.full([BLOCK], 1.0, tl.float32), boundary, seen)
        kept &= ~is_bad
        place = found + tl.cumsum(kept.to(tl.int32), 0) - 1
        at = first + tl.arange(0, BLOCK)
        stays = at < count
        source = tl.where(stays, at, (at - count) // frame.labels)
        token = tl.where(stays, 0, (at - count) % frame.labels)
        its_hash = tl.load(_hash(room, parity) + source, kept, 0)
        its_shorter = tl.load(_hash(room, parity) + room.beam + source, kept, 0)
        its_last = tl.load(_last(room, parity) + source, kept, 0)
        its_node = tl.load(_last(room, parity) + room.beam + source, kept, 0)
        in_blank = tl.load(_stay(room) + at, kept & stays, -INFINITY) - top
        in_token = tl.load(_stay(room) + room.beam + at, kept & stays, 0.0)
        node = 1 + time * room.beam + place
        is_new = kept & ~stays
        tl.store(_nodes(room) + 3 * node.to(tl.int64), its_node, is_new)
        tl.store(_nodes(room) + 3 * node.to(tl.int64) + 1, token, is_new)
        tl.store(_nodes(room) + 3 * node.to(tl.int64) + 2, tl.zeros([BLOCK], tl.int32) + time, is_new)
        to = 1 - parity
        tl.store(_in_blank(room, to) + place, in_blank, kept)
        tl.store(_in_token(room, to) + place, tl.where(stays, in_token, value) - top, kept)
        tl.store(_hash(room, to) + place, tl.where(stays, its_hash, _hash_of(its_hash, token)), kept)
        tl.store(_hash(room, to) + room.beam + place, tl.where(stays, its_shorter, its_hash), kept)
        tl.store(_last(room, to) + place, tl.where(stays, its_last, token), kept)
        tl.store(_last(room, to) + room.beam + place, tl.where(stays, its_node, node), kept)
        found += tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()
    return found, tl.where(is_bad, 0.0, top)


@triton.jit
def _written(room, node, tokens, times, width, BLOCK: tl.constexpr):
    """The tokens of a node, -1 behind them; how many they are."""
    count = tl.zeros([], tl.int64)
    at = node
    while at > 0:
        count += 1
        at = tl.load(_nodes(room) + 3 * at)
    for first in range(0, width, BLOCK):
        place = first + tl.arange(0, BLOCK)
        none = tl.full([BLOCK], -1, tl.int64)
        tl.store(tokens + place, none, (place >= count) & (place < width))
        tl.store(times + place, none, (place >= count) & (place < width))
    to = count
    at = node
    while at > 0:
        to -= 1
        tl.store(tokens + to, tl.load(_nodes(room) + 3 * at + 1).to(tl.int64))
        tl.store(times + to, tl.load(_nodes(room) + 3 * at + 2).to(tl.int64))
        at = tl.load(_nodes(room) + 3 * at)
    return count


@triton.jit(do_not_specialize=["width", "labels", "beam", "blank", "nbest"])
def beam_kernel(
    log_probs,  # [batch, width, labels]
    lengths,  # [batch], int64, or None
    floats,
    hashes,
    ints,
    scores,  # [batch, nbest]
    tokens,  # [batch, nbest, width], int64
    counts,  # [batch, nbest], int64
    times,  # [batch, nbest, width], int64
    width,
    labels,
    row_stride,
    frame_stride,
    floats_stride,
    hashes_stride,
    ints_stride,
    beam,
    blank,
    nbest,
    prune,
    BEAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    frames = tl.zeros([], tl.int64) + width
    if lengths is not None:
        frames = tl.minimum(tl.maximum(tl.load(lengths + number), 0), frames)
    room = Room(floats + number * floats_stride, hashes + number * hashes_stride, ints + number * ints_stride, beam)
    tl.store(_in_blank(room, 0), 0.0)
    tl.store(_in_token(room, 0), -INFINITY)
    tl.store(_hash(room, 0), _ROOT)
    tl.store(_hash(room, 0) + beam, 0)
    tl.store(_last(room, 0), -1)
    tl.store(_last(room, 0) + beam, 0)
    tl.store(_nodes(room), -1)
    tl.debug_barrier()
    count, is_odd = tl.full([], 1, tl.int32), tl.zeros([], tl.int32)
    offset = tl.zeros([], tl.float64)
    for t in range(0, frames):
        row = Row(log_probs + number * row_stride + t * frame_stride, None, labels)
        best, _ = largest_of(row, BLOCK)
        for first in range(0, labels, BLOCK):
            is_odd |= tl.max((~(logits_of(row, first, BLOCK) < INFINITY)).to(tl.int32), 0)
        time = tl.zeros([], tl.int32) + t
        parity = time % 2
        _add_up(room, parity, count, BEAM)
        looked_at = Frame(row.logits, labels, tl.where(prune < best, prune, best))
        _stay_and_grow(room, parity, looked_at, count, blank, BEAM, BLOCK)
        count, top = _take_over(room, parity, looked_at, count, time.to(tl.int32), BLOCK)
        offset += top.to(tl.float64)
    _add_up(room, (frames % 2).to(tl.int32), count, BEAM)
    i = tl.arange(0, BEAM)
    total = tl.load(_total(room) + i, i < count, -INFINITY)
    total = tl.where(is_odd != 0, -INFINITY, total)
    for n in range(0, nbest):
        at = number * nbest + n
        best, place = tl.max(total, 0), tl.argmax(total, 0, tie_break_left=True)
        total = tl.where(i == place, -INFINITY, total)
        node = tl.zeros([], tl.int32)
        if best > -INFINITY:
            node = tl.load(_last(room, (frames % 2).to(tl.int32)) + beam + place)
        score = tl.where(best > -INFINITY, (offset + best.to(tl.float64)).to(tl.float32), -INFINITY)
        tl.store(scores + at, tl.where(is_odd != 0, float("nan"), score))
        tl.store(counts + at, _written(room, node, tokens + at * width, times + at * width, width, BLOCK))


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
    with torch.cuda.device_of(log_probs):
        beam_kernel[(rows,)](
            log_probs,
            None if lengths is None else lengths.contiguous(),
            *room,
            scores,
            tokens,
            counts,
            times,
            width,
            labels,
            *log_probs.stride()[:2],
            *(x.stride(0) for x in room),
            beam,
            blank,
            nbest,
            prune_log_prob,
            BEAM=triton.next_power_of_2(beam),
            BLOCK=_BLOCK,
            num_warps=4,
        )
