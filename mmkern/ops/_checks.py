"""What an op asks of its arguments. Every check names the op, the argument, what came and what was expected."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]
Check = Callable[[str, Arguments], None]

NUMBER = (int, float)  # not int | float, which Dynamo of torch 2.9 cannot trace
LARGEST = sys.float_info.max
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_number(op: str, name: str, value: Any, expected: str, low: float, high: float) -> None:
    """A Python number from ``low`` to ``high``."""
    if not isinstance(value, NUMBER) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} is {type(value).__name__}, expected {expected}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} is {value}, expected {expected}")


def floating_rows(*names: str, axes: int = 1) -> Check:
    """Floating tensors of one dtype and device with at least ``axes`` axes."""

    def check(op: str, args: Arguments) -> None:
        first = args[names[0]]
        for name in names:
            x = args[name]
            if not isinstance(x, Tensor):
                raise TypeError(f"{op}: {name} is {type(x).__name__}, expected a Tensor")
            if x.dtype not in FLOATING:
                raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected float32, float64, bfloat16 or float16")
            if x.dtype != first.dtype:
                raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected {first.dtype} as {names[0]}")
            if x.device != first.device:
                raise ValueError(f"{op}: {name} is on {x.device}, expected {first.device} as {names[0]}")
            if x.dim() < axes:
                raise ValueError(f"{op}: {name} has shape {list(x.shape)}, expected at least {axes} axes")
            if x.layout != torch.strided:
                raise TypeError(f"{op}: {name} has layout {x.layout}, expected torch.strided")

    return check


def broadcastable(*names: str) -> Check:
    """Tensors whose last axes are equal and whose leading axes broadcast."""

    def check(op: str, args: Arguments) -> None:
        first = args[names[0]]
        for name in names[1:]:
            x = args[name]
            if x.shape[-1] != first.shape[-1]:
                raise ValueError(
                    f"{op}: {name} has shape {list(x.shape)}, expected a last axis of {first.shape[-1]} as {names[0]}"
                )
            try:
                torch.broadcast_shapes(first.shape, x.shape)
            except RuntimeError:
                shapes = f"{list(x.shape)}, which does not broadcast with {list(first.shape)}"
                raise ValueError(f"{op}: {name} has shape {shapes} of {names[0]}") from None

    return check


def matrices(*names: str) -> Check:
    """Two-dimensional tensors with equal last axes."""

    def check(op: str, args: Arguments) -> None:
        width = args[names[0]].shape[-1]
        for name in names:
            shape = args[name].shape
            if len(shape) != 2 or shape[-1] != width:
                raise ValueError(f"{op}: {name} has shape {list(shape)}, expected [rows, {width}]")

    return check


def positive(name: str, beside: str) -> Check:
    """A float above zero, or a 0-d floating tensor on the device of ``beside`` (its value is not read on a GPU)."""

    def check(op: str, args: Arguments) -> None:
        value = args[name]
        if isinstance(value, Tensor):
            _check_scalar_tensor(op, name, value, args[beside])
            if not is_readable(value):
                return
            value = value.item()
        if not isinstance(value, NUMBER) or isinstance(value, bool):
            raise TypeError(f"{op}: {name} is {type(value).__name__}, expected a float or a 0-d Tensor")
        if not value > 0:
            raise ValueError(f"{op}: {name} is {value}, expected a number above 0")

    return check


def scalar(name: str, beside: str) -> Check:
    """A float, or a 0-d floating tensor on the device of ``beside``."""

    def check(op: str, args: Arguments) -> None:
        value = args[name]
        if isinstance(value, Tensor):
            _check_scalar_tensor(op, name, value, args[beside])
        elif not isinstance(value, NUMBER) or isinstance(value, bool):
            raise TypeError(f"{op}: {name} is {type(value).__name__}, expected a float or a 0-d Tensor")

    return check


def is_readable(value: Tensor) -> bool:
    """Whether the value is there to be read: on the CPU, and not a tracer's or a transform's stand-in."""
    return (
        not torch.compiler.is_compiling()
        and value.device.type == "cpu"
        and type(value) in (Tensor, torch.nn.Parameter)
        and torch._C._functorch.maybe_current_level() is None
        and not torch._C._len_torch_dispatch_stack()
    )


def _check_scalar_tensor(op: str, name: str, value: Tensor, beside: Tensor) -> None:
    if value.dim() != 0:
        raise ValueError(f"{op}: {name} has shape {list(value.shape)}, expected a float or a 0-d tensor")
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} has dtype {value.dtype}, expected a floating dtype")
    if value.device != beside.device:
        raise ValueError(f"{op}: {name} is on {value.device}, expected {beside.device}")


def non_negative_number(name: str) -> Check:
    def check(op: str, args: Arguments) -> None:
        value = args[name]
        if not isinstance(value, NUMBER) or isinstance(value, bool):
            raise TypeError(f"{op}: {name} is {type(value).__name__}, expected a float")
        if not value >= 0:
            raise ValueError(f"{op}: {name} is {value}, expected a number of at least 0")

    return check


def trailing(name: str, of: str, drop: int) -> Check:
    """``name`` has the shape of ``of`` without its last ``drop`` axes."""

    def check(op: str, args: Arguments) -> None:
        got, wanted = list(args[name].shape), list(args[of].shape[:-drop])
        if got != wanted:
            raise ValueError(f"{op}: {name} has shape {got}, expected {wanted}")

    return check


def same_shape(*names: str) -> Check:
    def check(op: str, args: Arguments) -> None:
        expected = list(args[names[0]].shape)
        for name in names[1:]:
            got = list(args[name].shape)
            if got != expected:
                raise ValueError(f"{op}: {name} has shape {got}, expected {expected} as {names[0]}")

    return check


def floating_beside(*names: str, of: str, accumulates: bool = False, is_optional: bool = False) -> Check:
    """Floating tensors on the device of ``of``, of any dtype or, with ``accumulates``, in that of its sums."""

    def check(op: str, args: Arguments) -> None:
        lead = args[of]
        allowed = (accumulation_dtype(lead.dtype),) if accumulates else FLOATING
        for name in names:
            x = args[name]
            if x is None and is_optional:
                continue
            if not isinstance(x, Tensor):
                raise TypeError(f"{op}: {name} is {type(x).__name__}, expected a Tensor")
            if x.dtype not in allowed:
                expected = f"{allowed[0]} beside {lead.dtype}" if accumulates else "a floating dtype"
                raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected {expected}")
            if x.device != lead.device:
                raise ValueError(f"{op}: {name} is on {x.device}, expected {lead.device} as {of}")

    return check


def boolean(name: str) -> Check:
    def check(op: str, args: Arguments) -> None:
        if not isinstance(args[name], bool):
            raise TypeError(f"{op}: {name} is {type(args[name]).__name__}, expected a bool")

    return check


def check_tensor(
    op: str,
    name: str,
    x: Any,
    beside: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...] | None,
    of: str = "q",
) -> None:
    """A tensor, if there is one, of a dtype and a shape, on the device of ``beside``, which is called ``of``."""
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} is {type(x).__name__}, expected a Tensor or None")
    if x.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected {expected}")
    if x.device != beside.device:
        raise ValueError(f"{op}: {name} is on {x.device}, expected {beside.device} as {of}")
    if shape is not None and x.shape != shape:
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}, expected {list(shape)}")


def broadcasts(size: int, wanted: int) -> bool:
    """Of one axis. Not ``size in (1, wanted)``: there Dynamo takes two symbols for different sizes."""
    return size == 1 or size == wanted


def check_broadcast(
    op: str,
    name: str,
    x: Any,
    beside: Tensor,
    dtypes: tuple[torch.dtype, ...],
    full: tuple[int, ...],
    of: str = "q",
) -> None:
    check_tensor(op, name, x, beside, dtypes, None, of)
    if x is None:
        return
    trailing = full[len(full) - x.dim() :]
    if x.dim() > len(full) or not all(map(broadcasts, x.shape, trailing)):
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}, expected to broadcast to {list(full)}")
