"""What Triton's interpreter needs before its answers can be trusted. Import only with TRITON_INTERPRET=1.

As shipped, its bfloat16 is wrong (casts truncate, ``tl.dot`` multiplies bit patterns), it shows nothing of TF32's
lost digits, a scalar comparison cannot be broadcast, and each call of a device function patches all of
``triton.language`` anew.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton._utils import validate_block_shape
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle, _get_np_dtype

if not triton.knobs.runtime.interpret:
    raise ImportError("TRITON_INTERPRET=1 must be set before triton is imported")

MAX_PROGRAMS = 512


def to_float32(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    if dtype == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    return data.astype(np.float32)


def to_bfloat16(data: np.ndarray) -> np.ndarray:
    """Bits of ``data`` rounded to nearest even."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)


def _cast(self: InterpreterBuilder, src: TensorHandle, dst_type: Any) -> TensorHandle:
    target = dst_type.scalar
    data = to_float32(src.data, src.dtype.scalar) if src.dtype.scalar == tl.bfloat16 else src.data
    if target == tl.bfloat16:
        return TensorHandle(to_bfloat16(data).reshape(np.shape(data)), target)
    return TensorHandle(data.astype(_get_np_dtype(dst_type)), target)


def _dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, input_precision: Any, _: Any
) -> TensorHandle:
    operands = [to_float32(handle.data, handle.dtype.scalar) for handle in (a, b)]
    if a.dtype.scalar == tl.float32 and input_precision != ir.INPUT_PRECISION.IEEE:
        for operand in operands:
            if (operand[np.isfinite(operand)].view(np.uint32) & 0x1FFF).any():
                raise ValueError("tl.dot: a TF32 dot of operands that TF32 rounds")
    elif a.dtype.scalar == tl.float32:
        return TensorHandle(_fused_dot(*operands, d.data), d.dtype.scalar)
    return TensorHandle(np.matmul(*operands, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _fused_dot(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """As a GPU does it without matrix instructions: one fused product after the other.

    Kernels that compute the same product in tiles of other shapes rely on the same bits, which BLAS does not give.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(a.shape[1]):
        total = (a[:, k, None] * b[None, k] + total).astype(np.float32)
    return total


def _splat(self: InterpreterBuilder, type_: Any, arg: TensorHandle) -> TensorHandle:
    # The handle of a comparison carries the type of its operands; only its data is boolean.
    return TensorHandle(np.broadcast_to(arg.data.reshape(-1)[:1], tuple(type_.shape)).copy(), arg.dtype.scalar)


def _refuse_bfloat16(name: str) -> Callable[..., TensorHandle]:
    """The handles hold bfloat16 as bits, on which NumPy would happily do integer arithmetic."""
    original = getattr(InterpreterBuilder, name)

    def checked(self: InterpreterBuilder, *args: Any) -> TensorHandle:
        for a in args:
            if isinstance(a, TensorHandle) and a.dtype.scalar.name == "bf16":
                raise TypeError(f"{name}: arithmetic on bfloat16; cast to float32 first")
        return original(self, *args)

    return checked


def _set_grid(self: InterpreterBuilder, *grid: int) -> None:
    if math.prod(grid) > MAX_PROGRAMS:
        raise ValueError(
            f"a grid of {grid}: the interpreter takes milliseconds a program; at most {MAX_PROGRAMS} in a test"
        )
    self.grid_dim = grid


_patched_modules: set[str] = set()


def _call_device_function(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    # A launch patches triton.language and undoes it; triton's own device functions see `core`, which stays patched.
    module = self.fn.__module__
    if module.startswith("triton.") and module not in _patched_modules:
        interpreter._patch_lang(self.fn)
        _patched_modules.add(module)
    return self.rewrite()(*args, **kwargs)


# Types and shapes are made anew for every value: more than half of the time, for a handful of different ones.


@cache
def _block_shape(sides: tuple[int, ...]) -> tuple[Any, int]:
    shape = tl.tuple(list(sides))
    return shape, validate_block_shape(shape)


@cache
def _tensor_shape(sides: tuple[int, ...]) -> tuple[Any, Any]:
    return tl.tuple([tl.constexpr(side) for side in sides]), tl.constexpr(math.prod(sides))


def _init_block_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    sides = tuple(side.value if isinstance(side, tl.constexpr) else side for side in shape)
    if not sides:
        raise TypeError("a block type needs an axis")
    self.element_ty = element_ty
    self.shape, self.numel = _block_shape(sides)
    self.name = f"<{sides}, {element_ty}>"


def _init_tensor(self: tl.tensor, handle: TensorHandle, type_: tl.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type_, type_.scalar
    self.shape, self.numel = _tensor_shape(tuple(type_.shape.values) if type_.is_block() else ())


def _unless_alike(name: str) -> Callable[..., tuple[tl.tensor, tl.tensor]]:
    """What makes two operands of one type and one shape: nothing, where they are."""
    original = getattr(TritonSemantic, name)

    def checked(self: TritonSemantic, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> tuple[tl.tensor, tl.tensor]:
        alike = type(lhs) is type(rhs) is tl.tensor and lhs.shape is rhs.shape and lhs.dtype.name == rhs.dtype.name
        if alike and rhs.dtype.name in ("fp32", "int32", "int64"):
            return lhs, rhs
        return original(self, lhs, rhs, *args, **kwargs)

    return checked


def install() -> None:
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.create_splat = _splat
    InterpreterBuilder.create_fp_to_fp = lambda self, src, dst_type, rounding: _cast(self, src, dst_type)
    InterpreterBuilder.set_grid_dim = _set_grid
    for name in ("binary_op", "unary_op", "create_fma", "create_fabs", "create_rsqrt"):
        setattr(InterpreterBuilder, name, _refuse_bfloat16(name))
    InterpretedFunction.__call__ = _call_device_function
    tl.block_type.__init__, tl.tensor.__init__ = _init_block_type, _init_tensor
    for name in ("binary_op_type_checking_impl", "broadcast_impl_value"):
        setattr(TritonSemantic, name, _unless_alike(name))
    # A third of the time, for an assertion that is dropped unless ``debug`` is set too.
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    np.seterr(all="ignore")


@contextmanager
def approximate() -> Iterator[None]:
    """``/`` and ``tl.rsqrt`` with the 2 ulp that a GPU's may be wrong by."""
    builder = InterpreterBuilder
    divide, rsqrt = builder.create_fdiv, builder.create_rsqrt
    noise = np.random.default_rng(0)

    def blurred(handle: TensorHandle) -> TensorHandle:
        factor = 1 + noise.uniform(-(2.0**-22), 2.0**-22, handle.data.shape)
        return TensorHandle((handle.data * factor).astype(handle.data.dtype), handle.dtype)

    builder.create_fdiv = lambda self, a, b: blurred(divide(self, a, b))
    builder.create_rsqrt = lambda self, a: blurred(rsqrt(self, a))
    try:
        yield
    finally:
        builder.create_fdiv, builder.create_rsqrt = divide, rsqrt


@dataclass
class Traffic:
    """Bytes that masked loads and stores asked global memory for."""

    read: int = 0
    written: int = 0


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    traffic = Traffic()
    builder = InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self: InterpreterBuilder, ptrs: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
        traffic.read += _bytes(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counted_store(
        self: InterpreterBuilder, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, policy: Any
    ) -> None:
        traffic.written += _bytes(ptrs, mask)
        store(self, ptrs, value, mask, policy)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def _bytes(ptrs: TensorHandle, mask: TensorHandle) -> int:
    count = np.count_nonzero(np.broadcast_to(mask.data, ptrs.data.shape))
    return operator.index(count) * (ptrs.get_element_ty().primitive_bitwidth // 8)
