"""Launchers of the attention family, and their kernels.

Scores are recomputed in the backward. Each gradient is summed by one program in one order, without atomics: dq along the
keys, dk and dv along the queries of all heads that share them, the gradients of biases by a kernel of their own.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from mmkern.kernels.attention_call import (
    BIAS_BLOCKS,
    FORWARD_BLOCKS,
    KEY_BLOCKS,
    KEY_BLOCKS_BESIDE_BIAS,
    NUMBERS,
    QUERY_BLOCKS,
    SOURCE_BLOCKS,
    SOURCE_NUMBERS,
    Call,
)
from mmkern.kernels.attention_tiles import (
    Strided,
    counters,
    gradient_of_scores,
    head_at,
    kept,
    keys_seen,
    load_gate,
    load_rows,
    queries_seeing,
    scores,
    store_rows,
    tile_and_head,
    weights_of_tile,
)
from mmkern.kernels.rows import unit_stride
from mmkern.kernels.scalar_math import div, log1p
from torch import Tensor

from mmkern.reference import attention as reference


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

    total: Any  # Σ exp(score - top) v
    norm: Any  # Σ exp(score - top)
    top: Any  # the largest score


@triton.jit
def _no_keys(QUERIES: tl.constexpr, VALUE_BLOCK: tl.constexpr):
    top = tl.full([QUERIES], -float("inf"), tl.float32)
    return Softmax(tl.zeros([QUERIES, VALUE_BLOCK], tl.float32), tl.zeros([QUERIES], tl.float32), top)


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
        product = tl.dot(q, tl.trans(k), input_precision="ieee")
        score = scores(product, (first, i[:, None]), (start, j[None, :]), problem, head, BAND)[0]
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
        total = tl.dot(weight.to(v.dtype), v, total * fade[:, None], input_precision="ieee")
    return Softmax(total, norm, top)


@triton.jit
def _normalised(softmax, problem):
    inverse = problem.keep_scale / tl.where(softmax.norm == 0, 1.0, softmax.norm)
    return softmax.total * inverse[:, None]


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
    result = tl.zeros([QUERIES, VALUE_BLOCK], tl.float32)
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
            if BLOCK > 128 and q.dtype == tl.float32:  # kept from one loop to the next, it fills the registers
                q = load_rows(problem.q, head.q_batch, head.h, first, head.queries, QUERIES, WIDTH, BLOCK)
            alone = _follow_keys(
                problem, head, q, first, None, _no_keys(QUERIES, VALUE_BLOCK),
                WIDTH, VALUE_WIDTH, BAND, QUERIES, KEYS, BLOCK, VALUE_BLOCK,
            )  # fmt: skip
            found = _normalised(alone, problem)
            if gate is not None:
                found *= gate[:, None]
            result += found
    if JOINT:
        result = _normalised(softmax, problems[0])
    store_rows(out, head.q_batch, head.h, first, head.queries, result, VALUE_WIDTH)


@triton.jit
def _load_queries(
    problem, grad, lse, delta, first, head,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    """Tiles of q and dO, lse and delta. Beyond the last query lse is +∞: its weights are 0 whatever its scores."""
    q = load_rows(problem.q, head.q_batch, head.h, first, head.queries, QUERIES, WIDTH, BLOCK)
    g = load_rows(grad, head.q_batch, head.h, first, head.queries, QUERIES, VALUE_WIDTH, VALUE_BLOCK)
    i = tl.arange(0, QUERIES)
    row, mask = head.row + first + i, i < head.queries - first
    row_delta = tl.zeros([QUERIES], tl.float32)
    if delta is not None:
        row_delta = tl.load(delta + row, mask, 0.0)
    return q, g, tl.load(lse + row, mask, float("inf")), row_delta


@triton.jit
def _load_keys(
    problem, first, head,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    k = load_rows(problem.k, head.k_batch, head.shared, first, head.keys, KEYS, WIDTH, BLOCK)
    return k, load_rows(problem.v, head.k_batch, head.shared, first, head.keys, KEYS, VALUE_WIDTH, VALUE_BLOCK)


@triton.jit
def _of_scores(
    q, g, k, v, lse, delta, query, key, problem, head,
    BAND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of scores, their slope, and the weights."""
    product = tl.dot(q, tl.trans(k), input_precision="ieee")
    weight, _, keep, slope = weights_of_tile(product, lse, query, key, problem, head, BAND, QUERIES, KEYS, False)
    of_weights = tl.dot(g, tl.trans(v), input_precision="ieee")
    return gradient_of_scores(weight, keep, of_weights, delta[:, None], problem), slope, weight


@triton.jit(do_not_specialize=NUMBERS)
def delta_kernel(
    problem,
    grad,
    grad_lse,  # [B, H, L], as four axes
    out,
    delta,  # [B, H, L], float32, contiguous
    heads,
    share,
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
    """``dO·O - dlse`` of each query: what its softmax takes off the gradient of every weight."""
    tile, number = tile_and_head(tl.cdiv(queries, QUERIES))
    head = head_at(problem, number, heads, share, queries, keys, left, right, bottom_right, threshold)
    first = tile * QUERIES
    g = load_rows(grad, head.q_batch, head.h, first, head.queries, QUERIES, VALUE_WIDTH, VALUE_BLOCK).to(tl.float32)
    o = load_rows(out, head.q_batch, head.h, first, head.queries, QUERIES, VALUE_WIDTH, VALUE_BLOCK).to(tl.float32)
    of_lse = tl.sum(load_rows(grad_lse, head.q_batch, head.h, first, head.queries, QUERIES, 1, 1), 1)
    i = tl.arange(0, QUERIES)
    tl.store(delta + head.row + first + i, tl.sum(g * o, 1) - of_lse, i < head.queries - first)


@triton.jit(do_not_specialize=NUMBERS)
def delta_of_weights_kernel(
    problem,
    grad,
    grad_lse,
    lse,
    delta,
    heads,
    share,
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
    """The same as ``Σ weight·gradient - dlse``, along the keys.

    The sums differ in rounding. Where few weights count, ``gradient - delta`` cancels, and has the digits of a float32
    only where delta was added up of just these gradients. Beside 16-bit weights that difference is nothing.
    """
    tile, number = tile_and_head(tl.cdiv(queries, QUERIES))
    head = head_at(problem, number, heads, share, queries, keys, left, right, bottom_right, threshold)
    first = tile * QUERIES
    q, g, row_lse, zero = _load_queries(
        problem, grad, lse, None, first, head, WIDTH, VALUE_WIDTH, BLOCK, VALUE_BLOCK, QUERIES
    )
    total, norm = tl.zeros([QUERIES], tl.float32), tl.zeros([QUERIES], tl.float32)
    begin, end = keys_seen(first, head, BAND, QUERIES, KEYS)
    for start in range(begin, end, KEYS):
        start = tl.to_tensor(start)
        k, v = _load_keys(problem, start, head, WIDTH, VALUE_WIDTH, BLOCK, VALUE_BLOCK, KEYS)
        of_score, _, weight = _of_scores(q, g, k, v, row_lse, zero, first, start, problem, head, BAND, QUERIES, KEYS)
        total += tl.sum(of_score, 1)
        norm += tl.sum(weight, 1)
    of_lse = tl.sum(load_rows(grad_lse, head.q_batch, head.h, first, head.queries, QUERIES, 1, 1), 1)
    total = div(total, tl.where(norm == 0, 1.0, norm)) - of_lse  # the norm is 1 but for the rounding of lse
    i = tl.arange(0, QUERIES)
    tl.store(delta + head.row + first + i, total, i < head.queries - first)


@triton.jit(do_not_specialize=NUMBERS)
def queries_kernel(
    problem,
    grad,
    lse,  # [B, H, L], float32, contiguous; so is delta
    delta,
    dq,
    heads,
    share,
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
    """dq: one program takes QUERIES queries of a head and walks along the keys."""
    tile, number = tile_and_head(tl.cdiv(queries, QUERIES))
    head = head_at(problem, number, heads, share, queries, keys, left, right, bottom_right, threshold)
    first = tile * QUERIES
    q, g, row_lse, row_delta = _load_queries(
        problem, grad, lse, delta, first, head, WIDTH, VALUE_WIDTH, BLOCK, VALUE_BLOCK, QUERIES
    )
    total = tl.zeros([QUERIES, BLOCK], tl.float32)
    begin, end = keys_seen(first, head, BAND, QUERIES, KEYS)
    for start in range(begin, end, KEYS):
        start = tl.to_tensor(start)
        k, v = _load_keys(problem, start, head, WIDTH, VALUE_WIDTH, BLOCK, VALUE_BLOCK, KEYS)
        of_score, slope, _ = _of_scores(
            q, g, k, v, row_lse, row_delta, first, start, problem, head, BAND, QUERIES, KEYS
        )
        total = tl.dot((of_score * slope).to(k.dtype), k, total, input_precision="ieee")
    store_rows(dq, head.q_batch, head.h, first, head.queries, total * problem.scale, WIDTH)


@triton.jit(do_not_specialize=NUMBERS)
def keys_kernel(
    problem,
    grad,
    lse,
    delta,
    dk,  # None is not wanted
    dv,  # None is not wanted
    heads,
    share,
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
    """dk and dv: one program takes KEYS keys and walks along the queries of each head that shares them.

    Tiles are transposed, so that a tile of weights is the left operand of its product as it lies in the registers.
    """
    tile, shared = tile_and_head(tl.cdiv(keys, KEYS))
    number = shared * share  # the first of its heads of q: they follow one another
    head = head_at(problem, number, heads, share, queries, keys, left, right, bottom_right, threshold)
    first = tile * KEYS
    k, v = _load_keys(problem, first, head, WIDTH, VALUE_WIDTH, BLOCK, VALUE_BLOCK, KEYS)
    k_total = tl.zeros([KEYS, BLOCK], tl.float32)
    v_total = tl.zeros([KEYS, VALUE_BLOCK], tl.float32)
    begin, end = queries_seeing(first, head, BAND, KEYS)
    for number in range(shared * share, shared * share + share):
        head = head_at(problem, number, heads, share, queries, keys, left, right, bottom_right, threshold)
        for start in range(begin, end, QUERIES):
            start = tl.to_tensor(start)
            q, g, row_lse, row_delta = _load_queries(
                problem, grad, lse, delta, start, head, WIDTH, VALUE_WIDTH, BLOCK, VALUE_BLOCK, QUERIES
            )
            product = tl.dot(k, tl.trans(q), input_precision="ieee")
            weight, dropped, keep, slope = weights_of_tile(
                product, row_lse, start, first, problem, head, BAND, QUERIES, KEYS, True
            )
            if dv is not None:
                v_total = tl.dot(dropped.to(g.dtype), g, v_total, input_precision="ieee")
            if dk is not None:
                of_weights = tl.dot(v, tl.trans(g), input_precision="ieee")
                of_score = gradient_of_scores(weight, keep, of_weights, row_delta[None, :], problem)
                k_total = tl.dot((of_score * slope).to(q.dtype), q, k_total, input_precision="ieee")
    if dv is not None:
        store_rows(dv, head.k_batch, head.shared, first, head.keys, v_total * problem.keep_scale, VALUE_WIDTH)
    if dk is not None:
        store_rows(dk, head.k_batch, head.shared, first, head.keys, k_total * problem.scale, WIDTH)


@triton.jit(do_not_specialize=(*NUMBERS, "batch"))
def bias_kernel(
    problem,
    grad,
    lse,
    delta,
    out,  # float32, contiguous: [B, H, L, S] less the axes that are summed
    batch,
    heads,
    share,
    queries,
    keys,
    left,
    right,
    bottom_right,
    threshold,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BAND: tl.constexpr,
    SUMS: tl.constexpr,  # whether batch, heads, queries, keys are summed
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    """Gradient of a bias: one program takes a tile of it and walks along the axes that are summed."""
    row_tiles = 1 if SUMS[2] else tl.cdiv(queries, QUERIES)
    column_tiles = 1 if SUMS[3] else tl.cdiv(keys, KEYS)
    tile, part = tile_and_head(row_tiles * column_tiles)  # part: of the batches and heads that remain
    row_begin, column_begin = tile // column_tiles * QUERIES, tile % column_tiles * KEYS
    row_end = queries if SUMS[2] else tl.minimum(row_begin + QUERIES, queries)
    column_end = keys if SUMS[3] else tl.minimum(column_begin + KEYS, keys)
    if SUMS[0]:
        number_begin, number_end, step = part, batch * heads, 1 if SUMS[1] else heads
    else:
        number_begin = part * heads if SUMS[1] else part
        number_end, step = number_begin + (heads if SUMS[1] else 1), 1

    total = tl.zeros([QUERIES, KEYS], tl.float32)
    for number in range(number_begin, number_end, step):
        head = head_at(problem, number, heads, share, queries, keys, left, right, bottom_right, threshold)
        for query in range(row_begin, row_end, QUERIES):
            query = tl.to_tensor(query)
            q, g, row_lse, row_delta = _load_queries(
                problem, grad, lse, delta, query, head, WIDTH, VALUE_WIDTH, BLOCK, VALUE_BLOCK, QUERIES
            )
            begin, end = keys_seen(query, head, BAND, QUERIES, KEYS)
            for start in range(tl.maximum(begin, column_begin), tl.minimum(end, column_end), KEYS):
                start = tl.to_tensor(start)
                k, v = _load_keys(problem, start, head, WIDTH, VALUE_WIDTH, BLOCK, VALUE_BLOCK, KEYS)
                total += _of_scores(q, g, k, v, row_lse, row_delta, query, start, problem, head, BAND, QUERIES, KEYS)[0]

    i, j = row_begin + tl.arange(0, QUERIES), column_begin + tl.arange(0, KEYS)
    at = out + part.to(tl.int64) * (1 if SUMS[2] else queries) * (1 if SUMS[3] else keys)
    if SUMS[2] and SUMS[3]:
        tl.store(at, tl.sum(tl.sum(total, 1), 0))
    elif SUMS[2]:
        tl.store(at + j, tl.sum(total, 0), j < keys)
    elif SUMS[3]:
        tl.store(at + i, tl.sum(total, 1), i < queries)
    else:
        at += i.to(tl.int64)[:, None] * keys + j[None, :]
        tl.store(at, total, (i < queries)[:, None] & (j < keys)[None, :])


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


def cross_attention_backward(grad: Tensor, grad_lse: Tensor, *given: Any) -> None:
    """``(grad, grad_lse, q, …, dropout_p, out, lse, dq, dk, dv, dattn_bias, dbias)``; a gradient of None is not wanted."""
    *args, out, lse, dq, dk, dv, dattn_bias, dbias = given
    call = Call.padded(args)
    inputs = _backward(call, grad, grad_lse, out, lse, dq, dk, dv)
    for gradient in (dattn_bias, dbias):
        if gradient is not None:
            _bias_gradient(call, inputs, gradient)


def cross_attention_varlen_backward(grad: Tensor, grad_lse: Tensor, *given: Any) -> None:
    """``(grad, grad_lse, q, …, dropout_p, out, lse, dq, dk, dv)``; a gradient of None is not wanted."""
    *args, out, lse, dq, dk, dv = given
    _backward(Call.packed(args), grad, grad_lse.T, out, lse, dq, dk, dv)


def _backward(
    call: Call,
    grad: Tensor,
    grad_lse: Tensor,  # its axes are those of grad without the channels
    out: Tensor,
    lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
) -> tuple[Any, ...]:
    """Returns what the kernels read beside the problem: grad, lse, delta."""
    upstream, upstream_lse = call.strided(unit_stride(grad)), call.strided(grad_lse[..., None])
    delta = torch.empty_like(lse)
    inputs = (upstream, lse, delta)
    blocks = call.blocks(QUERY_BLOCKS)
    programs = call.row_programs(blocks)
    if grad.element_size() == 2:
        call.launch(delta_kernel, programs, blocks, upstream, upstream_lse, call.strided(unit_stride(out)), delta)
    else:
        call.launch(delta_of_weights_kernel, programs, blocks, upstream, upstream_lse, lse, delta)
    if dq is not None:
        call.launch(queries_kernel, programs, blocks, *inputs, call.strided(dq))
    if dk is not None or dv is not None:
        has_bias = call.problem.bias is not None or call.problem.attn_bias is not None
        blocks = call.blocks(KEY_BLOCKS_BESIDE_BIAS if has_bias else KEY_BLOCKS)
        call.launch(keys_kernel, call.key_programs(blocks), blocks, *inputs, call.strided(dk), call.strided(dv))
    return inputs


def _bias_gradient(call: Call, inputs: tuple[Any, ...], gradient: Tensor) -> None:
    full = (call.batch, call.heads, call.queries, call.keys)
    shape = list(gradient.shape)
    if 1 in shape[2:]:  # a row or a column for each head is little: the heads side by side, and then their sum
        shape[:2] = full[:2]
    blocks = call.blocks(BIAS_BLOCKS)
    out = gradient if shape == list(gradient.shape) else gradient.new_empty(shape)
    programs = shape[0] * shape[1] * triton.cdiv(shape[2], blocks.queries) * triton.cdiv(shape[3], blocks.keys)
    call.launch(bias_kernel, programs, blocks, *inputs, out, call.batch, SUMS=tuple(size == 1 for size in shape))
    if out is not gradient:
        summed = [axis for axis in (0, 1) if gradient.shape[axis] == 1]
        torch.sum(out, summed, keepdim=True, out=gradient)
