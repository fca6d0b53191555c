"""What the suites of CUDA kernels on the host ask of a case, whatever its family."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkern import backends
from mmkern.backends import cuda
from mmkern.ops._define import OPS
from mmkern.ops._outputs import in_tuple
from tests import contract
from tests.cases.case import Case
from tests.cuda_on_host import calls
from tests.cuda_on_host.harness import HostLauncher, Order


def has_backward(op: str) -> bool:
    return f"{op}_backward" in cuda.KERNELS


def check_contract(case: Case, dtype: torch.dtype) -> None:
    contract.check_forward(case, lambda *args: calls.forward(case.op, *args), dtype)
    if has_backward(case.op):
        contract.check_backward(case, lambda grads, wanted, args: calls.backward(case.op, grads, wanted, args), dtype)


def check_any_order(case: Case, launcher: HostLauncher) -> None:
    """The contract, and the same bits in whatever order threads run."""
    check_contract(case, torch.float32)
    expected = calls.both(case, torch.float32)
    for order, seed in ((Order.reverse, 0), (Order.random, 1)):
        with launcher.order(order, seed):
            for one, other in zip(expected, calls.both(case, torch.float32), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def check_outputs_of_any_layout(case: Case) -> None:
    """Dense outputs, and outputs that lie in memory as inputs do, get the same numbers."""
    op = OPS[case.op]
    args = op._prepare(case.arguments(torch.float32))
    lying = op.empty_outputs(args)
    dense = [torch.empty(out.shape, dtype=out.dtype) for out in lying]
    for outs in (lying, dense):
        getattr(cuda, case.op)(*args, *outs)
    _check_equal(lying, dense)
    if not has_backward(case.op):
        return
    grads = contract.gradients_for(case, lying)
    wanted = [isinstance(args[i], Tensor) for i in op.tensors]
    lying = [op._empty_gradient(i, args[i], args[0]) if w else None for i, w in zip(op.tensors, wanted, strict=True)]
    dense = [None if g is None else torch.empty(g.shape, dtype=g.dtype) for g in lying]
    for gradients in (lying, dense):
        getattr(cuda, f"{case.op}_backward")(*grads, *args, *gradients)
    _check_equal(lying, dense)


def _check_equal(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:
            assert one is other
        else:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def check_gradients_one_by_one(case: Case) -> None:
    """A gradient alone is the same as beside the others."""
    op = OPS[case.op]
    args = case.arguments(torch.float32)
    grads = contract.gradients_for(case, in_tuple(calls.forward(case.op, *args)))
    there = [isinstance(args[i], Tensor) for i in op.tensors]
    together = calls.backward(case.op, grads, there, args)
    for slot in (slot for slot, tensor in enumerate(there) if tensor):
        wanted = [i == slot for i in range(len(there))]
        alone = calls.backward(case.op, grads, wanted, args)
        _check_equal(alone, [g if want else None for g, want in zip(together, wanted, strict=True)])


# ---- Layouts ---------------------------------------------------------------------------------------------------------


def both_ways(name: str, args: Sequence[Any], grads: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The results and all gradients, by default those of the results themselves."""
    outs = in_tuple(calls.forward(name, *args))
    if not has_backward(name):
        return [*outs]
    wanted = [isinstance(args[i], Tensor) for i in OPS[name].tensors]
    found = calls.backward(name, grads or [*outs], wanted, args)
    return [*outs, *(gradient for gradient in found if gradient is not None)]


def unaligned(x: Tensor) -> Tensor:
    room = torch.full((*x.shape[:-1], x.shape[-1] + 3), math.nan)
    room[..., 1:-2] = x
    return room[..., 1:-2]


def turned(x: Tensor) -> Tensor:
    """Of four axes or five, in an order that does not collapse."""
    order = (3, 1, 2, 0) if x.dim() == 4 else (3, 1, 4, 0, 2)  # its own inverse
    return x.permute(order).contiguous().permute(order)


def spread(x: Tensor) -> Tensor:
    """No two axes collapse."""
    room = torch.full([2 * n for n in x.shape], math.nan)
    place = tuple(slice(n) for n in x.shape)
    room[place] = x
    return room[place]


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (unaligned, turned, spread)


def check_layouts(name: str, args: Sequence[Any]) -> None:
    """The same numbers where tensors of the shape of the first lie in another way; and for gradients that repeat."""
    shape = args[0].shape
    expected = both_ways(name, args)

    def lying(tensors: Sequence[Any], lay: Callable[[Tensor], Tensor]) -> list[Any]:
        return [lay(x) if isinstance(x, Tensor) and x.shape == shape else x for x in tensors]

    grads = expected[: len(OPS[name].outputs)]
    for lay in LAYOUTS:
        found = both_ways(name, lying(args, lay), lying(grads, lay))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    repeated = [grad.flatten()[3 % grad.numel()].expand(grad.shape) for grad in grads]
    copied = [grad.contiguous() for grad in repeated]
    for one, other in zip(both_ways(name, args, repeated), both_ways(name, args, copied), strict=True):
        torch.testing.assert_close(one, other)


def rows_far_apart(near: Tensor) -> Tensor:
    """Two rows 2^31 elements apart, in address space that is reserved but hardly touched."""
    stride, cols = (1 << 31) + 8, near.shape[-1]
    far = torch.empty(stride + cols, dtype=near.dtype).as_strided((2, cols), (stride, 1))
    return far.copy_(near)


def check_served(*ops: str) -> None:
    """``use_backend("cuda")`` finds the kernels, which take every call."""
    on_device = next(backend for backend in backends.BACKENDS if backend.name == "cuda")
    for name in ops:
        assert on_device.has(OPS[name], name)
        assert on_device.has(OPS[name], f"{name}_backward") == has_backward(name)
        for kernel in (name, f"{name}_backward"):
            assert on_device.limits(kernel) is None
