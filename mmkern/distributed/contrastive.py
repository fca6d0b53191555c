"""Contrastive losses of a batch whose rows lie in shards, one a process: blocks of y go round in a ring.

All that joins processes is here: the log-sum-exps over all pairs, the sigmoid loss, and sums. What the losses make of
them is in mmkern/ops/contrastive.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from mmkern.ops._autograd import restore, saved
from mmkern.ops._checks import FLOATING, accumulation_dtype
from mmkern.ops._define import Op

from .neighbours import Neighbours, at_hand

_Call = TypeVar("_Call", bound=Callable[..., Any])


def _uncompiled(call: _Call) -> _Call:
    """A compiler breaks its graph there."""
    return torch.compiler.disable(call)  # type: ignore[no-any-return]


class Shards:
    """The rows of x and y of all processes of ``group``, of which this one holds its own.

    Raises: TypeError or ValueError where ``group`` is none that this process is in, and ValueError in every process
        where x and y differ in more than their rows from process to process.
    """

    def __init__(self, op: str, group: Any, x: Tensor, y: Tensor, *numbers: Any) -> None:
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{op}: group is without this process, expected one that it is in")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"{op}: group is {type(group).__name__}, expected a torch.distributed.ProcessGroup or None")
        needs = [torch.is_grad_enabled() and isinstance(a, Tensor) and a.requires_grad for a in (x, y, *numbers)]
        mine = [x.shape[1], FLOATING.index(x.dtype), needs[0], needs[1], any(needs[2:])]
        self._ring = Neighbours(group, [x.shape[0], *mine], 0, x.device)
        self.rows = sum(self._ring.sizes)
        for rank, (_, *theirs) in enumerate(self._ring.described):
            if theirs != mine:
                got, expected = _in_words(theirs), _in_words(mine)
                raise ValueError(
                    f"{op}: x and y of process {rank} have {got}, expected {expected} as in process {self._ring.rank}"
                )

    @_uncompiled
    def log_sums(self, op: Op, *args: Any) -> tuple[Tensor, ...]:
        """Of each row of x and of y that this process holds: over all pairs but the positive one, then of that.

        Args:
            op: ``pairwise_logsumexp`` or its Lorentz twin, and its arguments as it takes them.
        """
        found: tuple[Tensor, ...] = _LogSums.apply(op, self._ring, *args)  # type: ignore[no-untyped-call]
        return found

    @_uncompiled
    def sigmoid_loss(self, op: Op, *args: Any) -> Tensor:
        """The sum over all pairs, the same in every process.

        Args:
            op: ``sigmoid_loss``, and its arguments as it takes them.
        """
        loss: Tensor = _SigmoidLoss.apply(op, self._ring, *args)  # type: ignore[no-untyped-call]
        return loss

    @_uncompiled
    def sum(self, x: Tensor) -> Tensor:
        """Over all processes, of what each uses for a loss of its own rows: gradients are summed too."""
        total: Tensor = _Sum.apply(x, self._ring.group, True)  # type: ignore[no-untyped-call]
        return total

    @_uncompiled
    def total(self, part: Tensor) -> Tensor:
        """The one loss of all processes from the part of each: its gradient is the same in all, and taken once."""
        total: Tensor = _Sum.apply(part, self._ring.group, False)  # type: ignore[no-untyped-call]
        return total


@_uncompiled
def join(op: str, group: Any, x: Tensor, y: Tensor, *numbers: Any) -> Shards:
    """``Shards`` of these arguments, checked as ``op`` takes them."""
    return Shards(op, group, x, y, *numbers)


def _in_words(described: Sequence[int]) -> str:
    width, dtype, *needs = described
    names = [name for name, need in zip(("x", "y", "a number"), needs, strict=True) if need]
    return f"{width} columns, dtype {FLOATING[dtype]} and gradients for {', '.join(names) or 'nothing'}"


class _LogSums(torch.autograd.Function):
    """Each process meets each block of y once; the log-sum-exps of the block's own rows travel behind it.

    Positive pairs are in a process's own block alone. The log-sum-exps of each part are kept: its share of the gradient
    is ``exp(part − whole)``, and the rest is the backward of that part alone, whichever backend has it.
    """

    @staticmethod
    def forward(ctx: Any, op: Op, ring: Neighbours, *args: Any) -> tuple[Tensor, ...]:
        x, y = args[:2]
        wide = accumulation_dtype(x.dtype)
        rows, cols = (z.new_full(z.shape[:1], -torch.inf, dtype=wide) for z in (x, y))
        arrive = at_hand([cols])
        parts: list[Tensor] = []
        for step, (held,) in ring.visits([y.contiguous()]):
            part_rows, part_cols, *chosen, _ = op.run(*_block(args, held, step))
            rows = torch.logaddexp(rows, part_rows)
            (cols,) = arrive()
            arrive = ring.pass_on([torch.logaddexp(cols, part_cols)], step)
            parts += (part_rows, part_cols, *chosen)
        (cols,) = arrive()
        tensors, ctx.call = saved(op, args, (rows, cols, *parts))
        ctx.save_for_backward(*tensors)
        ctx.ring = ring
        return rows, cols, *parts[2:4]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_cols: Tensor, *grads_chosen: Tensor) -> tuple[Tensor | None, ...]:
        op, args, (rows, cols, *parts) = restore(ctx)
        wanted = op.wanted(ctx.needs_input_grad[2:])
        of_x, of_y, *of_numbers = _zeros(op, args, wanted, rows.dtype)
        arrive = at_hand([of_y])
        for step, (held, *of_held) in ctx.ring.visits([args[1].contiguous(), cols, grad_cols.contiguous()]):
            part = parts[4 * step : 4 * step + 4]
            grads = [
                _share(one, whole) * grad
                for one, (whole, grad) in zip(part[:2], ((rows, grad_rows), of_held), strict=True)
            ]
            grads += grads_chosen if step == 0 else map(torch.zeros_like, part[2:])
            outs = [*part, rows.new_empty(0, 0)]
            by_x, by_y, *by_numbers = op.run_backward(grads, wanted, _block(args, held, step), outs)
            _add([of_x, *of_numbers], [by_x, *by_numbers])
            if by_y is not None:
                sums = arrive()
                _add(sums, [by_y])
                arrive = ctx.ring.pass_on(sums, step)
        found = [of_x, *arrive(), *of_numbers]
        narrow = [g.to(args[i].dtype) if want else None for i, g, want in zip(op.tensors, found, wanted, strict=True)]
        return None, None, *op.spread(narrow)


def _block(args: Sequence[Any], held: Tensor, step: int) -> list[Any]:
    """The call for one block of y: rows of one index belong together in a process's own alone."""
    x, _, *numbers, positive_mask, positive_diagonal, keeps_products = args
    return [x, held, *numbers, positive_mask, positive_diagonal and step == 0, keeps_products]


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.exp(part - whole.masked_fill(whole == -torch.inf, 0.0))


def _zeros(op: Op, args: Sequence[Any], wanted: Sequence[bool], dtype: torch.dtype) -> list[Tensor]:
    """Sums of gradients, empty where none is wanted."""
    return [
        torch.zeros(args[i].shape if want else 0, dtype=dtype, device=args[op.lead].device)
        for i, want in zip(op.tensors, wanted, strict=True)
    ]


def _add(sums: Sequence[Tensor], parts: Sequence[Tensor | None]) -> None:
    for total, part in zip(sums, parts, strict=True):
        if part is not None:
            total += part


class _SigmoidLoss(torch.autograd.Function):
    """One round: the gradient of a block of y is made with its loss, and travels behind it."""

    @staticmethod
    def forward(ctx: Any, op: Op, ring: Neighbours, *args: Any) -> Tensor:
        x, y, *numbers, positive_diagonal, makes = args
        wanted = [makes and want for want in op.wanted(ctx.needs_input_grad[2:])]
        wide = accumulation_dtype(x.dtype)
        loss: Tensor = x.new_zeros((), dtype=wide)
        of_x, of_y, *of_numbers = _zeros(op, args, wanted, wide)
        arrive = at_hand([of_y])
        for step, (held,) in ring.visits([y.contiguous()]):
            part, *made = op.run(x, held, *numbers, positive_diagonal and step == 0, makes)
            loss = loss + part
            by_x, by_y, *by_numbers = (g if want else None for g, want in zip(made, wanted, strict=True))
            _add([of_x, *of_numbers], [by_x, *by_numbers])
            if by_y is not None:
                sums = arrive()
                _add(sums, [by_y])
                arrive = ring.pass_on(sums, step)
        dist.all_reduce(loss, group=ring.group)
        tensors, ctx.call = saved(op, args, (loss, of_x, *arrive(), *of_numbers))
        ctx.save_for_backward(*tensors)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        op, args, outs = restore(ctx)
        wanted = op.wanted(ctx.needs_input_grad[2:])
        return None, None, *op.spread(op.run_backward([grad], wanted, args, outs))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, sums_gradients: bool) -> Tensor:
        ctx.group = group if sums_gradients else None
        return _summed(x, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad if ctx.group is None else _summed(grad, ctx.group), None, None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total: Tensor = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
