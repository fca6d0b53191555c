"""Launchers of the attention family's gradients, and their kernels.

Scores are formed again. Each gradient is summed by one program in one order, without atomics: dq along the keys, dk and
dv along the queries of all heads that share them, the gradients of biases by a kernel of their own. Where all keys fit
one tile, one program has dq, dk and dv in one pass over its queries.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from mmkern.kernels.attention_call import (
    BIAS_BLOCKS,
    KEY_BLOCKS,
    KEY_BLOCKS_BESIDE_BIAS,
    NUMBERS,
    QUERY_BLOCKS,
    Blocks,
    Call,
)
from mmkern.kernels.attention_columns import add_product, inner, load_rows, no_rows, products, scaled, store_rows
from mmkern.kernels.attention_tiles import (
    Strided,
    gradient_of_weights,
    head_at,
    keys_seen,
    queries_seeing,
    tile_and_head,
    weights_of_tile,
)
from mmkern.kernels.rows import unit_stride
from mmkern.kernels.scalar_math import div
from torch import Tensor


@triton.jit
def _load_queries(
    problem, grad, lse, first, head,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    """Tiles of q and dO, and lse. Beyond the last query lse is +∞: its weights are 0 whatever its scores."""
    q = load_rows(problem.q, head.q_batch, head.h, first, head.queries, QUERIES, WIDTH, BLOCK)
    g = load_rows(grad, head.q_batch, head.h, first, head.queries, QUERIES, VALUE_WIDTH, VALUE_BLOCK)
    at, inside = _row_numbers(first, head, QUERIES)
    return q, g, tl.load(lse + at, inside, float("inf"))


@triton.jit
def _row_numbers(first, head, QUERIES: tl.constexpr):
    """Where the numbers of QUERIES queries lie in lse and delta, and which are there."""
    i = tl.arange(0, QUERIES)
    return head.row + first + i, i < head.queries - first


@triton.jit
def _load_keys(
    problem, first, head,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    k = load_rows(problem.k, head.k_batch, head.shared, first, head.keys, KEYS, WIDTH, BLOCK)
    return k, load_rows(problem.v, head.k_batch, head.shared, first, head.keys, KEYS, VALUE_WIDTH, VALUE_BLOCK)


@triton.jit
def _load_grad_lse(grad_lse, first, head, QUERIES: tl.constexpr):
    return tl.sum(load_rows(grad_lse, head.q_batch, head.h, first, head.queries, QUERIES, 1, (1, 0)).body, 1)


@triton.jit
def _of_scores(
    q, g, k, v, lse, delta, query, key, problem, head,
    BAND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of scores, their slope, and the weights."""
    weight, _, keep, slope = weights_of_tile(products(q, k), lse, query, key, problem, head, BAND, QUERIES, KEYS, False)
    of_weight = gradient_of_weights(products(g, v), keep, problem)
    return weight * (of_weight - delta[:, None]), slope, weight


@triton.jit(do_not_specialize=NUMBERS)
def queries_kernel(
    problem,
    grad,
    grad_lse,  # [B, H, L], as four axes
    out,  # None: delta is another launch's
    lse,  # [B, H, L], float32, contiguous; so is delta
    delta,
    dq,  # None: delta alone
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
    """delta and dq: one program takes QUERIES queries of a head and walks along the keys.

    delta is what the softmax of a query takes off the gradient of each weight, ``Σ weight·gradient - dlse``. As
    ``dO·O - dlse`` it is another sum, with another rounding. Where few weights count, ``gradient - delta`` cancels, and
    has the digits of a float32 only where delta was added up of just these gradients: then that is a launch of its own,
    without ``out`` and dq (in one, registers spill). Beside 16-bit weights the difference is nothing.
    """
    tile, number = tile_and_head(tl.cdiv(queries, QUERIES))
    head = head_at(problem, number, heads, share, queries, keys, left, right, bottom_right, threshold)
    first = tile * QUERIES
    begin, end = keys_seen(first, head, BAND, QUERIES, KEYS)
    q, g, row_lse = _load_queries(problem, grad, lse, first, head, WIDTH, VALUE_WIDTH, BLOCK, VALUE_BLOCK, QUERIES)
    at, inside = _row_numbers(first, head, QUERIES)
    ADDS_UP: tl.constexpr = out is None and dq is None
    row_delta = tl.zeros([QUERIES], tl.float32)
    if out is not None:
        o = load_rows(out, head.q_batch, head.h, first, head.queries, QUERIES, VALUE_WIDTH, VALUE_BLOCK)
        row_delta = inner(g, o) - _load_grad_lse(grad_lse, first, head, QUERIES)
    elif dq is not None:
        row_delta = tl.load(delta + at, inside, 0.0)
    dq_tile = no_rows(QUERIES, BLOCK)
    total, norm = tl.zeros([QUERIES], tl.float32), tl.zeros([QUERIES], tl.float32)
    for start in range(begin, end, KEYS):
        start = tl.to_tensor(start)
        k, v = _load_keys(problem, start, head, WIDTH, VALUE_WIDTH, BLOCK, VALUE_BLOCK, KEYS)
        of_score, slope, weight = _of_scores(
            q, g, k, v, row_lse, row_delta, first, start, problem, head, BAND, QUERIES, KEYS
        )
        if ADDS_UP:
            total += tl.sum(of_score, 1)
            norm += tl.sum(weight, 1)
        if dq is not None:
            dq_tile = add_product((of_score * slope).to(k.body.dtype), k, dq_tile)
    if ADDS_UP:
        # the norm is 1 but for the rounding of lse
        row_delta = div(total, tl.where(norm == 0, 1.0, norm)) - _load_grad_lse(grad_lse, first, head, QUERIES)
    if ADDS_UP or out is not None:
        tl.store(delta + at, row_delta, inside)
    if dq is not None:
        store_rows(dq, head.q_batch, head.h, first, head.queries, scaled(dq_tile, problem.scale), WIDTH)


@triton.jit
def _of_scores_by_keys(
    q, g, k, v, lse, delta, grad_lse, query, key, problem, head,
    BAND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The left operands of dk and dv: the gradient of ``scale·q·k`` and the weights after dropout, ``[keys, queries]``.

    Made transposed, so that they are operands as they lie in the registers. A delta of None is that of the tile, which
    has all keys: ``Σ weight·gradient - dlse``.
    """
    weight, dropped, keep, slope = weights_of_tile(
        products(k, q), lse, query, key, problem, head, BAND, QUERIES, KEYS, True
    )
    of_weight = gradient_of_weights(products(v, g), keep, problem)
    if delta is None:
        delta = tl.sum(weight * of_weight, 0) - grad_lse
    of_score = weight * (of_weight - delta[None, :])
    return (of_score * slope).to(q.body.dtype), dropped.to(g.body.dtype)


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
    """dk and dv: one program takes KEYS keys and walks along the queries of each head that shares them."""
    tile, shared = tile_and_head(tl.cdiv(keys, KEYS))
    number = shared * share  # the first of its heads of q: they follow one another
    head = head_at(problem, number, heads, share, queries, keys, left, right, bottom_right, threshold)
    first = tile * KEYS
    k, v = _load_keys(problem, first, head, WIDTH, VALUE_WIDTH, BLOCK, VALUE_BLOCK, KEYS)
    k_total = no_rows(KEYS, BLOCK)
    v_total = no_rows(KEYS, VALUE_BLOCK)
    begin, end = queries_seeing(first, head, BAND, KEYS)
    for number in range(shared * share, shared * share + share):
        head = head_at(problem, number, heads, share, queries, keys, left, right, bottom_right, threshold)
        for start in range(begin, end, QUERIES):
            start = tl.to_tensor(start)
            q, g, row_lse = _load_queries(
                problem, grad, lse, start, head, WIDTH, VALUE_WIDTH, BLOCK, VALUE_BLOCK, QUERIES
            )
            at, inside = _row_numbers(start, head, QUERIES)
            row_delta = tl.load(delta + at, inside, 0.0)
            of_score, dropped = _of_scores_by_keys(
                q, g, k, v, row_lse, row_delta, None, start, first, problem, head, BAND, QUERIES, KEYS
            )
            if dv is not None:
                v_total = add_product(dropped, g, v_total)
            if dk is not None:
                k_total = add_product(of_score, q, k_total)
    if dv is not None:
        store_rows(dv, head.k_batch, head.shared, first, head.keys, scaled(v_total, problem.keep_scale), VALUE_WIDTH)
    if dk is not None:
        store_rows(dk, head.k_batch, head.shared, first, head.keys, scaled(k_total, problem.scale), WIDTH)


@triton.jit
def _part_at(x, part, step):
    return Strided(x.data + part.to(tl.int64) * step * x.unit, x.strides, x.unit)


@triton.jit(do_not_specialize=(*NUMBERS, "part_queries", "dk_step", "dv_step"))
def one_pass_kernel(
    problem,
    grad,
    grad_lse,
    lse,
    dq,  # None is not wanted
    dk,
    dk_step,  # from one part of it to the next, in its units
    dv,
    dv_step,
    part_queries,
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
    """dq, and a part of dk and dv: one program takes all keys, of which there are no more than KEYS, and walks along
    ``part_queries`` queries of each head that shares them.
    """
    part, shared = tile_and_head(tl.cdiv(tl.maximum(queries, 1), part_queries))
    number = shared * share
    head = head_at(problem, number, heads, share, queries, keys, left, right, bottom_right, threshold)
    k, v = _load_keys(problem, 0, head, WIDTH, VALUE_WIDTH, BLOCK, VALUE_BLOCK, KEYS)
    k_total = no_rows(KEYS, BLOCK)
    v_total = no_rows(KEYS, VALUE_BLOCK)
    begin = part * part_queries
    end = tl.minimum(begin + part_queries, head.queries)
    for number in range(shared * share, shared * share + share):
        head = head_at(problem, number, heads, share, queries, keys, left, right, bottom_right, threshold)
        for start in range(begin, end, QUERIES):
            start = tl.to_tensor(start)
            q, g, row_lse = _load_queries(
                problem, grad, lse, start, head, WIDTH, VALUE_WIDTH, BLOCK, VALUE_BLOCK, QUERIES
            )
            row_grad_lse = _load_grad_lse(grad_lse, start, head, QUERIES)
            of_score, dropped = _of_scores_by_keys(
                q, g, k, v, row_lse, None, row_grad_lse, start, 0, problem, head, BAND, QUERIES, KEYS
            )
            if dv is not None:
                v_total = add_product(dropped, g, v_total)
            if dk is not None:
                k_total = add_product(of_score, q, k_total)
            if dq is not None:
                dq_tile = add_product(tl.trans(of_score), k, no_rows(QUERIES, BLOCK))
                store_rows(dq, head.q_batch, head.h, start, head.queries, scaled(dq_tile, problem.scale), WIDTH)
    if dv is not None:
        to = _part_at(dv, part, dv_step)
        store_rows(to, head.k_batch, head.shared, 0, head.keys, scaled(v_total, problem.keep_scale), VALUE_WIDTH)
    if dk is not None:
        to = _part_at(dk, part, dk_step)
        store_rows(to, head.k_batch, head.shared, 0, head.keys, scaled(k_total, problem.scale), WIDTH)


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
            q, g, row_lse = _load_queries(
                problem, grad, lse, query, head, WIDTH, VALUE_WIDTH, BLOCK, VALUE_BLOCK, QUERIES
            )
            at, inside = _row_numbers(query, head, QUERIES)
            row_delta = tl.load(delta + at, inside, 0.0)
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
    """Returns what the gradient of a bias reads beside the problem: grad, lse, delta."""
    upstream = call.strided(unit_stride(grad))
    of_lse = call.strided(grad_lse[..., None])
    one_pass = call.one_pass_blocks()
    if one_pass is not None:
        _one_pass(call, one_pass, (upstream, of_lse, lse), dq, dk, dv)
        return ()
    results = call.strided(unit_stride(out)) if grad.element_size() == 2 else None
    given = (upstream, of_lse, results, lse)
    delta = torch.empty_like(lse)
    blocks = call.blocks(QUERY_BLOCKS)
    programs = call.row_programs(blocks)
    if results is None:
        call.launch(queries_kernel, programs, blocks, *given, delta, None)
    if results is not None or dq is not None:
        call.launch(queries_kernel, programs, blocks, *given, delta, call.strided(dq))
    if dk is not None or dv is not None:
        blocks = call.blocks(KEY_BLOCKS_BESIDE_BIAS if call.has_bias else KEY_BLOCKS)
        programs = call.key_programs(blocks)
        call.launch(keys_kernel, programs, blocks, upstream, lse, delta, call.strided(dk), call.strided(dv))
    return upstream, lse, delta


def _one_pass(
    call: Call, blocks: Blocks, given: tuple[Any, ...], dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> None:
    part_queries = call.part_queries(blocks)
    parts = max(triton.cdiv(call.queries, part_queries), 1)

    def room_for(gradient: Tensor | None) -> tuple[Tensor | None, Strided | None, int]:
        """Of each part; where the first lies; from one to the next."""
        if gradient is None:
            return None, None, 0
        room = gradient[None] if parts == 1 else gradient.new_empty((parts, *gradient.shape), dtype=torch.float32)
        first = call.strided(room[0])
        return room, first, room.stride(0) // first.unit.value

    (dk_room, *of_k), (dv_room, *of_v) = room_for(dk), room_for(dv)
    programs = parts * call.groups * call.batch
    call.launch(one_pass_kernel, programs, blocks, *given, call.strided(dq), *of_k, *of_v, part_queries)
    for gradient, room in ((dk, dk_room), (dv, dv_room)):
        if parts > 1 and gradient is not None and room is not None:
            gradient.copy_(room.sum(0))


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
