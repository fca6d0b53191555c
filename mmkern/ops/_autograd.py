"""What autograd keeps of a call of an op, and how its gradients are found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._outputs import Result, in_tuple

if TYPE_CHECKING:
    from ._define import Op

# What a node keeps: the tensors, and beside the op the other arguments; each argument is None in one of the two. After
# the arguments come the outputs, where the backward kernel reads them.
Saved = tuple[tuple[Tensor | None, ...], tuple["Op", tuple[Any, ...]]]


def saved(op: Op, args: Sequence[Any], result: Result) -> Saved:
    tensors = tuple(a if isinstance(a, Tensor) else None for a in args)
    outs = in_tuple(result) if op.backward_reads_outputs else ()
    return (*tensors, *outs), (op, tuple(None if isinstance(a, Tensor) else a for a in args))


def save(ctx: Any, op: Op, args: Sequence[Any], result: Result) -> None:
    tensors, ctx.call = saved(op, args, result)
    ctx.save_for_backward(*tensors)
    _mark(ctx, op, result)


def _mark(ctx: Any, op: Op, result: Result) -> None:
    others = in_tuple(result)[op.differentiable :]
    if others:
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)  # else backward gets zeros as large as these outputs


def upstream(op: Op, args: Sequence[Any], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients of the differentiable outputs, zeros where there is none."""
    given = enumerate(grads[: op.differentiable])
    return [op.zeros_like_output(slot, args) if g is None else g for slot, g in given]


def restore(ctx: Any) -> tuple[Op, list[Any], Sequence[Tensor]]:
    """The op, its arguments and, where the backward kernel reads them, its outputs."""
    op, numbers = ctx.call
    tensors = ctx.saved_tensors
    args = [number if a is None else a for a, number in zip(tensors, numbers, strict=False)]
    return op, args, tensors[len(numbers) :]


class _Function(torch.autograd.Function):
    """Makes an output part of the graph: the classic form, which costs a fifth of ``setup_context``'s.

    The kernel ran before; in a tuple, its output is no input of the graph's node.
    """

    @staticmethod
    def forward(ctx: Any, made: tuple[Result, tuple[Tensor | None, ...], Any], *args: Any) -> Result:
        out, ctx.to_save, ctx.call = made  # save_for_backward's assignment, without its call: 1 of 20 µs
        op: Op = ctx.call[0]
        if op.differentiable < len(op.outputs):
            _mark(ctx, op, out)
        return out

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        op, args, outs = restore(ctx)
        grads = upstream(op, args, given)
        wanted = op.wanted(ctx.needs_input_grad[1:])
        gradients: Sequence[Tensor | None]
        if op.makes_gradients and not torch.is_grad_enabled():
            gradients = op.scaled(grads[0], wanted, args, outs, in_place=not _keeps_graph())
        elif not torch.is_grad_enabled():  # True exactly with create_graph=True
            gradients = op.run_backward(grads, wanted, args, outs)
        elif op.second_derivative:
            gradients = op.reference_gradients(grads, wanted, args, outs, create_graph=True)
        else:
            gradients = _OnceDifferentiable.apply(op, wanted, *grads, *args, *outs)
        return None, *op.spread(gradients)


# Whether this backward leaves what was saved for another one.
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


# Function.apply without its care for functorch, whose calls go another way: 5 of 12 µs.
record = super(torch.autograd.Function, _Function).apply


class TransformableFunction(torch.autograd.Function):
    """The same under torch.func transforms."""

    @staticmethod
    def forward(op: Op, *args: Any) -> Result:
        return op.run(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
        save(ctx, inputs[0], inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        op, args, outs = restore(ctx)
        grads = upstream(op, args, given)
        wanted = op.wanted(ctx.needs_input_grad[1:])
        # Transforms nest, so each level differentiates the one below: always the reference.
        return None, *op.spread(op.reference_gradients(grads, wanted, args, outs, create_graph=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], op: Op, *args: Any) -> tuple[Result, Any]:
        return op.vmap(info, in_dims[1:], *args)


class _OnceDifferentiable(torch.autograd.Function):
    """Gradients of an op that has no second derivative: asking for one raises instead of dropping the term."""

    @staticmethod
    def forward(ctx: Any, op: Op, wanted: list[bool], *given: Any) -> tuple[Tensor | None, ...]:
        ctx.op = op
        return tuple(op.run_backward(*op.split_backward(given, wanted)))

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(no_second_derivative(ctx.op))


def no_second_derivative(op: Op) -> str:
    return f"{op.name} has no second derivative; use mmkern.use_backend('reference') for one"
