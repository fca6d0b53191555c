"""A tile of attention scores: what all kernels of ``attention.py`` compute in the same way.

A tile is either ``[queries, keys]`` or its transpose. Its queries ``i`` and keys ``j`` come as a pair: the first, and what
each is beyond it, with an axis of size 1 (``[M, 1]`` and ``[1, N]``, or ``[1, M]`` and ``[N, 1]``).
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from mmkern.kernels.philox import at_least
from mmkern.kernels.scalar_math import div, expm1
from torch import Tensor

NO_BAND, INDEX, RESAMPLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Strided(NamedTuple):
    """A tensor of four axes, strides in units of ``unit`` elements. A stride of None: it is broadcast along that axis.

    Triton knows of an argument whether it is a multiple of 16, and would read the rows of 72 elements one by one.
    """

    data: Any
    strides: tuple[int | None, ...]
    unit: Any

    @classmethod
    def of(cls, x: Tensor | None) -> Strided | None:
        """A tensor of rows."""
        if x is None:
            return None
        unit = 8 if all(stride % 8 == 0 for stride in x.stride()[:3]) else 1
        return cls(x, tuple(stride // unit for stride in x.stride()[:3]), tl.constexpr(unit))

    @classmethod
    def packed(cls, x: Tensor | None) -> Strided | None:
        """Of ``[T, H, D]``: a segment is the batch whose number is its first row."""
        if x is None:
            return None
        (rows, heads, channels), (row, head, channel) = x.shape, x.stride()
        return cls.of(x.as_strided((1, heads, rows, channels), (row, head, row, channel)))

    @classmethod
    def broadcast(cls, x: Tensor | None) -> Strided | None:
        if x is None:
            return None
        axes = zip(x.shape, x.stride(), strict=True)
        strides = tuple(None if size == 1 or stride == 0 else stride for size, stride in axes)
        return cls(x.view(torch.uint8) if x.dtype == torch.bool else x, strides, tl.constexpr(1))


class Segments(NamedTuple):
    """Where packed sequences begin, ``[B + 1]`` each, and how many rows there are in all."""

    of_q: Any
    of_k: Any
    queries: int
    keys: int


class Problem(NamedTuple):
    """What the forward and the backward kernels read; what is None is compiled away."""

    q: Strided
    k: Strided
    v: Strided
    key_mask: Any  # [B, S], contiguous
    attn_mask: Strided | None
    attn_bias: Strided | None
    bias: Strided | None
    prefix_lengths: Any  # [B]
    seed: Any  # (seed, offset)
    scale: float
    softcap: float | None
    keep_scale: float  # 1 / (1 - dropout_p)
    segments: Segments | None


class Head(NamedTuple):
    """One head of q, and what its queries see for their place. Made in a kernel."""

    b: Any
    h: Any
    shared: Any  # its head of k and v
    q_batch: Any  # along the first axis of q and of what lies as it does
    k_batch: Any  # the same of k
    row: Any  # of its first query in lse
    counter: Any  # of Philox, for its first weight
    queries: Any
    keys: Any
    prefix: Any
    left: Any
    right: Any
    shift: Any
    threshold: Any


@triton.jit
def head_at(problem, number, heads, share, queries, keys, left, right, bottom_right, threshold, first_counter=0):
    """Head ``number`` among those of all batches. Of packed sequences ``queries`` and ``keys`` are the most."""
    number = tl.to_tensor(number).to(tl.int64)
    b, h = number // heads, number % heads
    q_batch, k_batch, row = b, b, number * queries
    counter = row * counters(keys) + first_counter
    if problem.segments is not None:
        longest = keys
        q_batch, queries = _segment(problem.segments.of_q + b, problem.segments.queries)
        k_batch, keys = _segment(problem.segments.of_k + b, problem.segments.keys)
        row = h * problem.segments.queries + q_batch
        counter = q_batch * heads * counters(longest) + h * queries * counters(keys)
    prefix = 0
    if problem.prefix_lengths is not None:
        prefix = tl.load(problem.prefix_lengths + b)
    shift = bottom_right * (keys - queries)
    return Head(b, h, h // share, q_batch, k_batch, row, counter, queries, keys, prefix, left, right, shift, threshold)


@triton.jit
def counters(keys):
    """To a row of the weights: a counter has four words."""
    return ((keys + 3) // 4).to(tl.int64)


@triton.jit
def _segment(begin, rows):
    """Its first row and its length: within the rows, whatever it says where they begin."""
    first = tl.minimum(tl.maximum(tl.load(begin), 0), rows)
    last = tl.minimum(tl.maximum(tl.load(begin + 1), first), rows)
    return first, (last - first).to(tl.int32)


@triton.jit
def tile_and_head(tiles):
    """This program's. Tiles of a head are neighbours: they share its keys in the cache."""
    program = tl.program_id(0)
    return program % tiles, program // tiles


@triton.jit
def _load_broadcast(x, i, j, head):
    at = x.data
    if x.strides[0] is not None:
        at += head.b * x.strides[0]
    if x.strides[1] is not None:
        at += head.h * x.strides[1]
    if x.strides[2] is None and x.strides[3] is None:
        return tl.load(at)
    elif x.strides[2] is None:
        return tl.load(_along(at, j, x.strides[3]), _before(j, head.keys), 0)
    elif x.strides[3] is None:
        return tl.load(_along(at, i, x.strides[2]), _before(i, head.queries), 0)
    else:
        at = _along(_along(at, i, x.strides[2]), j, x.strides[3])
        return tl.load(at, _before(i, head.queries) & _before(j, head.keys), 0)


@triton.jit
def load_gate(x, first, head, QUERIES: tl.constexpr):
    """Of the queries from ``first`` on: a number each, or one for all."""
    gate = _load_broadcast(x, (first, tl.arange(0, QUERIES)), (0, 0), head).to(tl.float32)
    return tl.broadcast_to(gate, [QUERIES])


@triton.jit
def _before(i, end):
    return i[0] + i[1] < end


@triton.jit
def _along(at, i, stride):
    return at + (i[0] + i[1]).to(tl.int64) * stride


# The band. Query i stands at c(i) and sees the keys of one interval, whose ends grow with i. Lengths are below 2³⁰.


@triton.jit
def _places(i, queries, keys):
    """``⌊i·S/L⌋`` and ``⌈i·S/L⌉``, with which ``|i·S/L - j| ≤ w`` is a statement on integers."""
    place, queries = i.to(tl.int64) * keys, tl.maximum(queries, 1)
    return (place // queries).to(tl.int32), ((place + (queries - 1)) // queries).to(tl.int32)


@triton.jit
def _in_band(i, j, head, BAND: tl.constexpr):
    if BAND == RESAMPLE:
        below, above = _places(i[0] + i[1], head.queries, head.keys)
        low, high = above - head.left - j[0], below + head.right - j[0]
    else:
        centre = i[1] + (i[0] + head.shift - j[0])
        low, high = centre - head.left, centre + head.right
    return ((j[1] <= high) | (j[1] < head.prefix - j[0])) & (j[1] >= low)


@triton.jit
def keys_seen(first, head, BAND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """First key that QUERIES queries from ``first`` on see, rounded to a multiple of KEYS, and one beyond the last.

    None beyond the last query, where programs for longer segments find themselves.
    """
    begin, end = 0, head.keys
    if BAND != NO_BAND:
        last = tl.minimum(first + QUERIES, head.queries) - 1
        low, high = first + head.shift, last + head.shift
        if BAND == RESAMPLE:
            low, high = _places(first, head.queries, head.keys)[1], _places(last, head.queries, head.keys)[0]
        begin = tl.maximum(low - head.left, 0) // KEYS * KEYS
        end = tl.minimum(tl.maximum((high + head.right + 1).to(tl.int64), head.prefix), head.keys).to(tl.int32)
    return begin, tl.where(first < head.queries, end, 0)


@triton.jit
def queries_seeing(first, head, BAND: tl.constexpr, KEYS: tl.constexpr):
    """First query that sees one of KEYS keys from ``first`` on, and one beyond the last; none beyond the last key."""
    begin, end = 0, head.queries
    if BAND != NO_BAND:
        low, high = first - head.right, tl.minimum(first + KEYS, head.keys) - 1 + head.left
        if BAND == RESAMPLE:
            low = _places(tl.maximum(low, 0), head.keys, head.queries)[1]
            high = _places(high, head.keys, head.queries)[0]
        else:
            low, high = low - head.shift, high - head.shift
        begin = tl.maximum(tl.where(first < head.prefix, 0, low), 0)
        end = tl.minimum(high + 1, head.queries)
    return begin, tl.where(first < head.keys, end, 0)


@triton.jit
def _tanh(x):
    """``tanh x``, to 2 ulp also near 0."""
    magnitude = tl.abs(x)
    m = expm1(tl.where(magnitude > 20, 40.0, 2 * magnitude))
    value = div(m, m + 2)
    return tl.where(x < 0, -value, value)


@triton.jit
def scores(product, i, j, problem, head, BAND: tl.constexpr):
    """Scores of a tile from its products ``q·k``, −∞ where unseen; and their slope in ``scale·product``.

    In units of 1, not of log₂e: the log-sum-exp of a row whose keys but one vanish is then that key's score, exactly.
    """
    score = product * problem.scale
    slope = 1.0
    if problem.softcap is not None:
        bent = _tanh(div(score, problem.softcap))
        score = problem.softcap * bent
        slope = 1 - bent * bent
    if problem.attn_bias is not None:
        score += _load_broadcast(problem.attn_bias, i, j, head).to(tl.float32)
    if problem.bias is not None:
        score += _load_broadcast(problem.bias, i, j, head).to(tl.float32)
    seen = _before(j, head.keys)
    if BAND != NO_BAND:
        seen = seen & _in_band(i, j, head, BAND)
    if problem.attn_mask is not None:
        seen = seen & (_load_broadcast(problem.attn_mask, i, j, head) != 0)
    if problem.key_mask is not None:
        row = problem.key_mask + head.b * head.keys
        seen = seen & (tl.load(_along(row, j, 1), _before(j, head.keys), 0) != 0)
    return tl.where(seen, score, -float("inf")), slope


@triton.jit
def kept(query, key, problem, head, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Which weights dropout keeps, ``[QUERIES, KEYS]`` from this query and key on."""
    counter = head.counter + (query + tl.arange(0, QUERIES)) * counters(head.keys)
    return at_least(head.threshold, problem.seed, counter, key, KEYS)


@triton.jit
def weights_of_tile(
    product, lse, query, key, problem, head,
    BAND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Weights before dropout, the same after it but for its scale, what it keeps (or None), and the scores' slope."""
    i, j, keep = tl.arange(0, QUERIES), tl.arange(0, KEYS), None
    if problem.seed is not None:
        keep = kept(query, key, problem, head, QUERIES, KEYS)
    if TRANSPOSED:
        i, j, lse = i[None, :], j[:, None], lse[None, :]
        if keep is not None:
            keep = tl.trans(keep)
    else:
        i, j, lse = i[:, None], j[None, :], lse[:, None]
    score, slope = scores(product, (query, i), (key, j), problem, head, BAND)
    weight = tl.exp(score - tl.where(lse == -float("inf"), 0.0, lse))
    dropped = weight
    if keep is not None:
        dropped = tl.where(keep, weight, 0.0)
    return weight, dropped, keep, slope


@triton.jit
def gradient_of_weights(of_dropped, keep, problem):
    """Before dropout, from ``dO·v``, that of the weights after it."""
    if keep is not None:
        of_dropped = tl.where(keep, of_dropped * problem.keep_scale, 0.0)
    return of_dropped
