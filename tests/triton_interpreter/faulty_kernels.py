"""Kernels that are wrong on purpose: what the harness must catch."""
# ruff: noqa: N803

import triton
import triton.language as tl


@triton.jit
def double(x, y, size, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, (2 * tl.load(x + i, i < size).to(tl.float32)).to(y.dtype.element_ty), i < size)


@triton.jit
def reads_beyond(x, y, size, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + i).to(tl.float32), 0)
    tl.store(y + i, total + tl.zeros([BLOCK], tl.float32), i < size)


@triton.jit
def writes_beyond(x, y, size, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, i < size, 0.0).to(tl.float32))


@triton.jit
def adds_bfloat16(x, y, size, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, i < size, 0.0)
    tl.store(y + i, value + value, i < size)


@triton.jit
def product(x, y, z, SIDE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIDE)
    at = i[:, None] * SIDE + i[None, :]
    tl.store(z + at, tl.dot(tl.load(x + at), tl.load(y + at), input_precision=PRECISION))
