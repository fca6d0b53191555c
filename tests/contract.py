"""Run a case on a backend and hold it to the numerics contract (mmkern.testing), forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkern import testing
from mmkern.ops._define import OPS, Op
from mmkern.ops._outputs import Result, in_tuple
from tests.cases.case import Case


def op_of(name: str) -> Op:
    """The definition behind a public function."""
    return OPS[name]


def gradients_for(case: Case, outs: Sequence[Tensor]) -> list[Tensor]:
    outs = outs[: op_of(case.op).differentiable]
    generator = torch.Generator().manual_seed(1)
    wide = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outs]
    return [g.to(out.dtype).to(out.device) for g, out in zip(wide, outs, strict=True)]


def check_forward(case: Case, run: Callable[..., Result], dtype: torch.dtype, device: str = "cpu") -> Result:
    """``run(*arguments)`` against the oracle; returns its result."""
    op = op_of(case.op)
    args = case.arguments(dtype, device)
    result = run(*args)
    outs = in_tuple(result)
    for slot, out in enumerate(outs):
        expected = op.output_dtype(slot, dtype)
        assert out.dtype == expected, f"{case}, output {slot}: dtype {out.dtype}, expected {expected}"
    testing.verify_forward(op, args, outs)
    return result


def check_backward(
    case: Case,
    run: Callable[[Sequence[Tensor], Sequence[bool], Sequence[Any]], Sequence[Tensor | None]],
    dtype: torch.dtype,
    device: str = "cpu",
) -> list[Tensor | None]:
    """``run(grads, wanted, arguments)`` gives the gradients of the tensor arguments; each against the oracle."""
    op = op_of(case.op)
    args = case.arguments(dtype, device)
    wanted = [isinstance(args[i], Tensor) for i in op.tensors]
    grads = gradients_for(case, op.empty_outputs(args))
    gradients = list(run(grads, wanted, args))
    testing.verify_backward(op, grads, args, gradients)
    return gradients


def by_autograd(
    function: Callable[..., Result],
) -> Callable[[Sequence[Tensor], Sequence[bool], Sequence[Any]], list[Tensor | None]]:
    """Gradients of a public function, as a user gets them."""

    def run(grads: Sequence[Tensor], wanted: Sequence[bool], args: Sequence[Any]) -> list[Tensor | None]:
        leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        outs = in_tuple(function(*leaves))[: len(grads)]
        tensors = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        found = iter(torch.autograd.grad(outs, tensors, grads, allow_unused=True))
        return [next(found) if want else None for want in wanted]

    return run


def kernels_when_compiled(run: Callable[..., Tensor], *args: Tensor) -> list[str]:
    """The ops of mmkern in the graph that a compiler gets; ``run`` and its gradients are the same through it."""
    kernels: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        kernels.extend(str(n.target) for n in module.graph.nodes if "mmkern" in str(n.target))
        return module.forward

    def both(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in args]
        out = run(*leaves)
        return (out, *torch.autograd.grad(out.square().sum(), leaves))

    torch.testing.assert_close(both(torch.compile(run, fullgraph=True, backend=backend)), both(run))
    return kernels


def saved_bytes(run: Callable[[], Any]) -> list[int]:
    """Of each memory that autograd keeps of a call for its backward."""
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return list(saved.values())
