"""Run a case on a backend and hold it to the numerics contract (mmkern.testing), forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkern import testing
from mmkern.ops._define import OPS, Op
from tests.cases.hyperbolic import Case


def op_of(name: str) -> Op:
    """The definition behind a public function."""
    return OPS[name]


def gradient_for(case: Case, out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype).to(out.device)


def check_forward(case: Case, run: Callable[..., Tensor], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """``run(*arguments)`` against the oracle; returns its result."""
    op = op_of(case.op)
    args = case.arguments(dtype, device)
    out = run(*args)
    assert out.dtype == dtype, f"{case}: dtype {out.dtype}, expected {dtype}"
    testing.verify_forward(op, args, [out])
    return out


def check_backward(
    case: Case,
    run: Callable[[Tensor, Sequence[bool], Sequence[Any]], Sequence[Tensor | None]],
    dtype: torch.dtype,
    device: str = "cpu",
) -> list[Tensor | None]:
    """``run(grad, wanted, arguments)`` gives the gradients of the tensor arguments; each against the oracle."""
    op = op_of(case.op)
    args = case.arguments(dtype, device)
    wanted = [isinstance(args[i], Tensor) for i in op.tensors]
    grad = gradient_for(case, torch.empty(op.outputs[0](args), dtype=dtype, device=device))
    gradients = list(run(grad, wanted, args))
    testing.verify_backward(op, [grad], args, gradients)
    return gradients


def by_autograd(
    function: Callable[..., Tensor],
) -> Callable[[Tensor, Sequence[bool], Sequence[Any]], list[Tensor | None]]:
    """Gradients of a public function, as a user gets them."""

    def run(grad: Tensor, wanted: Sequence[bool], args: Sequence[Any]) -> list[Tensor | None]:
        leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args]
        out = function(*leaves)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        found = iter(torch.autograd.grad(out, tensors, grad, allow_unused=True))
        return [next(found) if want else None for want in wanted]

    return run
