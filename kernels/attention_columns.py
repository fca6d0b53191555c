"""Rows of a head in a kernel. Their columns lie in one tile or in two: a power of two, and the rest.

``BLOCK`` is the two widths, of which the second may be 0: see ``attention_call``.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Columns(NamedTuple):
    """Columns of some rows. Made in a kernel."""

    body: Any  # [rows, BLOCK[0]]
    tail: Any  # [rows, BLOCK[1]], or None


@triton.jit
def _part(x, b, h, first, rows, COUNT: tl.constexpr, WIDTH: tl.constexpr, BEGIN: tl.constexpr, SIDE: tl.constexpr):
    """Where the columns from BEGIN on lie, and which are there."""
    row, column = first + tl.arange(0, COUNT), tl.arange(BEGIN, BEGIN + SIDE)
    at = x.data + (b * x.strides[0] + h * x.strides[1]) * x.unit
    at = at + row.to(tl.int64)[:, None] * x.strides[2] * x.unit + column[None, :]
    inside = (row < rows)[:, None]
    return at, inside & (column < WIDTH)[None, :] if BEGIN + SIDE > WIDTH else inside


@triton.jit
def load_rows(x, b, h, first, rows, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """COUNT rows of one head from ``first`` on, 0 outside."""
    at, inside = _part(x, b, h, first, rows, COUNT, WIDTH, 0, BLOCK[0])
    body, tail = tl.load(at, inside, 0.0), None
    if BLOCK[1]:
        at, inside = _part(x, b, h, first, rows, COUNT, WIDTH, BLOCK[0], BLOCK[1])
        tail = tl.load(at, inside, 0.0)
    return Columns(body, tail)


@triton.jit
def store_rows(x, b, h, first, rows, columns, WIDTH: tl.constexpr):
    COUNT: tl.constexpr = columns.body.shape[0]
    BODY: tl.constexpr = columns.body.shape[1]
    at, inside = _part(x, b, h, first, rows, COUNT, WIDTH, 0, BODY)
    tl.store(at, columns.body.to(x.data.dtype.element_ty), inside)
    if columns.tail is not None:
        at, inside = _part(x, b, h, first, rows, COUNT, WIDTH, BODY, columns.tail.shape[1])
        tl.store(at, columns.tail.to(x.data.dtype.element_ty), inside)


@triton.jit
def no_rows(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Of a sum, before its first term."""
    tail = None
    if BLOCK[1]:
        tail = tl.zeros([COUNT, BLOCK[1]], tl.float32)
    return Columns(tl.zeros([COUNT, BLOCK[0]], tl.float32), tail)


@triton.jit
def products(a, b):
    """Of each row of a with each row of b, ``a bᵀ``."""
    product = tl.dot(a.body, tl.trans(b.body), input_precision="ieee")
    if a.tail is not None:
        product = tl.dot(a.tail, tl.trans(b.tail), product, input_precision="ieee")
    return product


@triton.jit
def add_product(weights, rows, total):
    """``total + weights · rows``."""
    body = tl.dot(weights, rows.body, total.body, input_precision="ieee")
    tail = None
    if rows.tail is not None:
        tail = tl.dot(weights, rows.tail, total.tail, input_precision="ieee")
    return Columns(body, tail)


@triton.jit
def inner(a, b):
    """Of each row of a with the same of b, ``Σ a b``."""
    total = tl.sum(a.body.to(tl.float32) * b.body.to(tl.float32), 1)
    if a.tail is not None:
        total += tl.sum(a.tail.to(tl.float32) * b.tail.to(tl.float32), 1)
    return total


@triton.jit
def scaled(columns, factor):
    """By a number, or one for each row with an axis of size 1."""
    tail = None
    if columns.tail is not None:
        tail = columns.tail * factor
    return Columns(columns.body * factor, tail)


@triton.jit
def added(a, b):
    tail = None
    if a.tail is not None:
        tail = a.tail + b.tail
    return Columns(a.body + b.body, tail)
