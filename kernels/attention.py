"""Launchers of the attention family, and the kernels of the forward; those of the gradients: ``attention_backward``."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from mmkern.kernels.attention_backward import cross_attention_backward, cross_attention_varlen_backward
from mmkern.kernels.attention_call import FORWARD_BLOCKS, NUMBERS, SOURCE_BLOCKS, SOURCE_NUMBERS, Call
from mmkern.kernels.attention_columns import add_product, added, load_rows, no_rows, products, scaled, store_rows
from mmkern.kernels.attention_tiles import Strided, counters, head_at, kept, keys_seen, load_gate, scores, tile_and_head
from mmkern.kernels.scalar_math import log1p
from torch import Tensor

from mmkern.reference import attention as reference

__all__ = [
    "cross_attention",
    "cross_attention_backward",
    "cross_attention_varlen",
    "cross_attention_varlen_backward",
    "multi_source_attention",
]


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    problem,
    out,  # [B, H, L, VALUE_WIDTH]
    lse,  # [B, H, L], float32, contiguous
    heads,
    share,  # heads of q to one of k and v
    queries,
    keys,
    left,
    right,
    bottom_right,
    threshold,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BAND: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    """One program takes QUERIES queries of a head and walks along the keys, as FlashAttention does."""
    tile, number = tile_and_head(tl.cdiv(queries, QUERIES))
    head = head_at(problem, number, heads, share, queries, keys, left, right, bottom_right, threshold)
    first = tile * QUERIES
    q = load_rows(problem.q, head.q_batch, head.h, first, head.queries, QUERIES, WIDTH, BLOCK)
    softmax = _no_keys(QUERIES, VALUE_BLOCK)
    softmax = _follow_keys(
        problem, head, q, first, None, softmax, WIDTH, VALUE_WIDTH, BAND, QUERIES, KEYS, BLOCK, VALUE_BLOCK
    )
    store_rows(out, head.q_batch, head.h, first, head.queries, _normalised(softmax, problem), VALUE_WIDTH)
    # The norm has a term 1, the top's own: log1p of the others keeps their digits.
    norm, i = softmax.norm, tl.arange(0, QUERIES)
    log_norm = tl.where(norm == 0, -float("inf"), softmax.top + log1p(norm - 1))
    tl.store(lse + head.row + first + i, log_norm, i < head.queries - first)


class Softmax(NamedTuple):
    """Of a tile of queries, over the keys so far. Made in a kernel."""

    total: Any  # Σ exp(score - top) v, in columns
    norm: Any  # Σ exp(score - top)
    top: Any  # the largest score


@triton.jit
def _no_keys(QUERIES: tl.constexpr, VALUE_BLOCK: tl.constexpr):
    top = tl.full([QUERIES], -float("inf"), tl.float32)
    return Softmax(no_rows(QUERIES, VALUE_BLOCK), tl.zeros([QUERIES], tl.float32), top)


@triton.jit
def _follow_keys(
    problem, head, q, first, gate, softmax,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BAND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """The softmax with all keys of the problem that these queries see; their weights are multiplied by the gate."""
    total, norm, top = softmax.total, softmax.norm, softmax.top
    i, j = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    begin, end = keys_seen(first, head, BAND, QUERIES, KEYS)
    for start in range(begin, end, KEYS):
        start = tl.to_tensor(start)
        k = load_rows(problem.k, head.k_batch, head.shared, start, head.keys, KEYS, WIDTH, BLOCK)
        score = scores(products(q, k), (first, i[:, None]), (start, j[None, :]), problem, head, BAND)[0]
        new_top = tl.maximum(top, tl.max(score, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight = tl.exp(score - base[:, None])
        fade = tl.exp(top - base)
        top = new_top
        norm = norm * fade + tl.sum(weight, 1)
        if problem.seed is not None:
            weight = tl.where(kept(first, start, problem, head, QUERIES, KEYS), weight, 0.0)
        if gate is not None:
            weight *= gate[:, None]
        v = load_rows(problem.v, head.k_batch, head.shared, start, head.keys, KEYS, VALUE_WIDTH, VALUE_BLOCK)
        total = add_product(weight.to(v.body.dtype), v, scaled(total, fade[:, None]))
    return Softmax(total, norm, top)


@triton.jit
def _normalised(softmax, problem):
    inverse = problem.keep_scale / tl.where(softmax.norm == 0, 1.0, softmax.norm)
    return scaled(softmax.total, inverse[:, None])


@triton.jit(do_not_specialize=("heads", "queries", "rows", "threshold", *SOURCE_NUMBERS))
def sources_kernel(
    problems,  # one for each source
    gates,
    out,
    heads,
    queries,
    rows,  # B·H·L
    threshold,
    share0,
    share1,
    share2,
    share3,
    keys0,
    keys1,
    keys2,
    keys3,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BAND: tl.constexpr,
    JOINT: tl.constexpr,  # one softmax over the keys of all
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    """One program takes QUERIES queries of a head and walks along the keys of one source after another."""
    tile, number = tile_and_head(tl.cdiv(queries, QUERIES))
    first = tile * QUERIES
    share, keys = (share0, share1, share2, share3), (keys0, keys1, keys2, keys3)
    head = head_at(problems[0], number, heads, share[0], queries, keys[0], 0, 0, 0, threshold)
    q = load_rows(problems[0].q, head.q_batch, head.h, first, head.queries, QUERIES, WIDTH, BLOCK)
    result = no_rows(QUERIES, VALUE_BLOCK)
    softmax = _no_keys(QUERIES, VALUE_BLOCK)
    counter = 0  # of Philox, for the first weight of the source
    for s in tl.static_range(len(problems)):
        problem = problems[s]
        head = head_at(problem, number, heads, share[s], queries, keys[s], 0, 0, 0, threshold, counter)
        counter += tl.to_tensor(rows).to(tl.int64) * counters(keys[s])
        gate = None
        if gates[s] is not None:
            gate = load_gate(gates[s], first, head, QUERIES)
        if JOINT:
            softmax = _follow_keys(
                problem, head, q, first, gate, softmax, WIDTH, VALUE_WIDTH, BAND, QUERIES, KEYS, BLOCK, VALUE_BLOCK
            )
        else:
            alone = _follow_keys(
                problem, head, q, first, None, _no_keys(QUERIES, VALUE_BLOCK),
                WIDTH, VALUE_WIDTH, BAND, QUERIES, KEYS, BLOCK, VALUE_BLOCK,
            )  # fmt: skip
            found = _normalised(alone, problem)
            if gate is not None:
                found = scaled(found, gate[:, None])
            result = added(result, found)
    if JOINT:
        result = _normalised(softmax, problems[0])
    store_rows(out, head.q_batch, head.h, first, head.queries, result, VALUE_WIDTH)


def cross_attention(*given: Any) -> None:
    """``(q, k, v, key_mask, …, dropout_p, out, lse)``: see ``mmkern.reference.attention``."""
    *args, out, lse = given
    _forward(Call.padded(args), out, lse)


def cross_attention_varlen(*given: Any) -> None:
    """``(q, k, v, cu_seqlens_q, …, dropout_p, out, lse)``."""
    *args, out, lse = given
    _forward(Call.packed(args), out, lse)


def multi_source_attention(*given: Any) -> None:
    """``(q, k0, v0, gate0, key_mask0, bias0, k1, …, seed, scale, softcap, joint, dropout_p, out)``."""
    *args, out = given
    a = reference.SourcesArguments.of(args)
    calls = [Call.padded(a.problem(source, a.seed)) for source in a.sources]
    first, absent = calls[0], [0] * (reference.MAX_SOURCES - len(calls))
    blocks = first.blocks(SOURCE_BLOCKS)
    numbers = (
        first.heads,
        first.queries,
        first.batch * first.heads * first.queries,
        first.threshold,
        *(call.share for call in calls),
        *absent,
        *(call.keys for call in calls),
        *absent,
    )
    gates = tuple(Strided.broadcast(source.gate) for source in a.sources)
    first.launch_with(
        tuple(call.problem for call in calls),
        numbers,
        sources_kernel,
        first.row_programs(blocks),
        blocks,
        gates,
        first.strided(out),
        JOINT=bool(a.joint),
    )


def _forward(call: Call, out: Tensor, lse: Tensor) -> None:
    blocks = call.blocks(FORWARD_BLOCKS)
    call.launch(forward_kernel, call.row_programs(blocks), blocks, call.strided(out), lse)
