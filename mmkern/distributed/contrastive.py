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

    ``words`` are how many their labels have, if they have labels.

    Raises: TypeError or ValueError where ``group`` is none that this process is in, and ValueError in every process
        where x and y differ in more than their rows from process to process.
    """

    def __init__(self, op: str, group: Any, x: Tensor, y: Tensor, *numbers: Any, words: Sequence[int]) -> None:
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{op}: group is without this process, expected one that it is in")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"{op}: group is {type(group).__name__}, expected a torch.distributed.ProcessGroup or None")
        needs = [torch.is_grad_enabled() and isinstance(a, Tensor) and a.requires_grad for a in (x, y, *numbers)]
        mine = [x.shape[1], FLOATING.index(x.dtype), needs[0], needs[1], any(needs[2:]), *words]
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
        """What ``op`` finds over rows and over columns, of each row of x and of y that this process holds.

        Args:
            op: one of ``mmkern.ops._contrastive``, and its arguments as it takes them.
        """
        found: tuple[Tensor, ...] = _LogSums.apply(op, self._ring, *args)  # type: ignore[no-untyped-call]
        return found

    @_uncompiled
    def sigmoid_loss(self, op: Op, *args: Any) -> Tensor:
        """Of all pairs, the same in every process.

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
def join(op: str, group: Any, x: Tensor, y: Tensor, *numbers: Any, words: Sequence[int] = ()) -> Shards:
    """``Shards`` of these arguments, checked as ``op`` takes them."""
    return Shards(op, group, x, y, *numbers, words=words)


def _in_words(described: Sequence[int]) -> str:
    width, dtype, *needs = described[:5]
    names = [name for name, need in zip(("x", "y", "a number"), needs, strict=True) if need]
    words = f"labels of {' and '.join(map(str, described[5:]))} words, " if described[5:] else ""
    return f"{width} columns, {words}dtype {FLOATING[dtype]} and gradients for {', '.join(names) or 'nothing'}"


# What an op finds: so many log-sum-exps, then plain sums, over rows and over columns by turns; then the products.
_LOG_SUMS = 4


class _LogSums(torch.autograd.Function):
    """Each process meets each block of y once; sums over the block's own rows travel behind it.

    Rows of one index belong together in a process's own block alone. The log-sum-exps of each part are kept: its share
    of the gradient is ``exp(part − whole)``, and the rest is the backward of that part alone, whichever backend has it.
    """

    @staticmethod
    def forward(ctx: Any, op: Op, ring: Neighbours, *args: Any) -> tuple[Tensor, ...]:
        rows: list[Tensor] = []
        arrive = at_hand(rows)
        parts: list[Tensor] = []
        for step, held in ring.visits(_travelling(op, args)):
            *part, _ = op.run(*_block(op, args, held, step))
            rows, cols = _merged(rows, part[::2]), _merged(arrive(), part[1::2])
            arrive = ring.pass_on(cols, step)
            parts += part
        found = _by_turns(rows, arrive())
        tensors, ctx.call = saved(op, args, (*found[:_LOG_SUMS], *parts))
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*found[op.differentiable :])
        ctx.ring = ring
        return tuple(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        op, args, found = restore(ctx)
        logs, parts = found[:_LOG_SUMS], found[_LOG_SUMS:]
        each = len(parts) // ctx.ring.size
        wanted = op.wanted(ctx.needs_input_grad[2:])
        of_x, of_y, *of_numbers = _zeros(op, args, wanted, logs[0].dtype)
        arrive = at_hand([of_y])
        grads = [grad.contiguous() for grad in upstream[: op.differentiable]]
        shard = _travelling(op, args)
        for step, held in ctx.ring.visits([*shard, *logs[1::2], *grads[1::2]]):
            block, of_held = held[: len(shard)], held[len(shard) :]
            whole = _by_turns(logs[::2], of_held[: _LOG_SUMS // 2])
            of_part = _by_turns(grads[::2], of_held[_LOG_SUMS // 2 :])
            part = parts[each * step : each * (step + 1)]
            shares = [_share(*of_one) for of_one in zip(part, whole, of_part, strict=False)]
            outs = [*part, logs[0].new_empty(0, 0)]
            by_x, by_y, *by_numbers = op.run_backward(
                shares + of_part[_LOG_SUMS:], wanted, _block(op, args, block, step), outs
            )
            _add([of_x, *of_numbers], [by_x, *by_numbers])
            if by_y is not None:
                sums = arrive()
                _add(sums, [by_y])
                arrive = ctx.ring.pass_on(sums, step)
        gradients = [of_x, *arrive(), *of_numbers]
        slots = zip(op.tensors, gradients, wanted, strict=True)
        return None, None, *op.spread([g.to(args[i].dtype) if want else None for i, g, want in slots])


def _merged(whole: Sequence[Tensor], part: Sequence[Tensor]) -> list[Tensor]:
    """Sums over rows, or over columns, with those of one more block."""
    if not whole:
        return list(part)
    pairs = enumerate(zip(whole, part, strict=True))
    return [(torch.logaddexp if slot < _LOG_SUMS // 2 else torch.add)(a, b) for slot, (a, b) in pairs]


def _by_turns(rows: Sequence[Tensor], cols: Sequence[Tensor]) -> list[Tensor]:
    return [found for both in zip(rows, cols, strict=True) for found in both]


def _travelling(op: Op, args: Sequence[Any]) -> list[Tensor]:
    """y and what is of its rows, dense; no bool travels."""
    of_y = [arg.contiguous() for name, arg in zip(op.names, args, strict=True) if name.startswith("y")]
    return [x.view(torch.uint8) if x.dtype == torch.bool else x for x in of_y]


def _block(op: Op, args: Sequence[Any], held: Sequence[Tensor], step: int) -> list[Any]:
    """The call for one block of y."""
    call = dict(zip(op.names, args, strict=True))
    for name, x in zip((name for name in op.names if name.startswith("y")), held, strict=True):
        call[name] = x.view(call[name].dtype)
    call["positive_diagonal"] &= step == 0
    return list(call.values())


def _share(part: Tensor, whole: Tensor, grad: Tensor) -> Tensor:
    """Of the gradient of a log-sum-exp, that of one block."""
    return torch.exp(part - whole.masked_fill(whole == -torch.inf, 0.0)) * grad


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
