"""The sides of a case (mmkern and its rivals), and the check that comes before any timing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mmkern
from mmkern import ops, testing
from mmkern.ops._outputs import Result, in_tuple

from .case import Case

# Rivals run the field's own formulas, which lose digits; this only has to tell them from another function.
FORWARD_TOLERANCE = 3e-3
BACKWARD_TOLERANCE = 3e-2

Thunk = Callable[[], Any]


class WrongResultError(AssertionError):
    """A side does not compute what the case says."""


@dataclass(frozen=True)
class Side:
    """One implementation with its inputs. ``comparable`` turns an output of it into mmkern's form."""

    function: Callable[..., Result]
    args: Sequence[Any]
    leaves: Sequence[Tensor]
    comparable: Callable[[Tensor], Tensor] = lambda out: out

    def forward(self) -> tuple[Tensor, ...]:
        return in_tuple(self.function(*self.args))

    def gradients(self, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.leaves, grads)

    def timed(self, case: Case) -> Thunk:
        """What one sample times."""
        function, args = self.function, self.args
        if case.mode != "forward+backward":
            return lambda: function(*args)
        grads = gradients_of(self.forward())
        return lambda: self.gradients(grads)


def gradients_of(outs: Sequence[Tensor]) -> list[Tensor]:
    """Fixed gradients for the outputs: 1 for a loss, else noise in its shape."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(out.shape, generator=generator).to(out.dtype) if out.dim() else torch.ones_like(out) for out in outs
    ]


def build_sides(case: Case, rivals: Sequence[str]) -> dict[str, Side]:
    """mmkern first, then those of ``rivals`` ("eager", "compile", "peer") that the case has."""
    args = case.arguments()
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    sides = {"mmkern": Side(case.family.ours.get(case.task) or getattr(ops, case.op), args, leaves)}
    formula = case.family.rivals[case.task]
    if "eager" in rivals:
        sides["eager"] = Side(formula, args, leaves)
    if "compile" in rivals:
        torch._dynamo.reset()  # else a function seen on another shape is compiled for sizes unknown
        sides["compile"] = Side(torch.compile(formula, dynamic=False), args, leaves)
    if "peer" in rivals and case.with_peer and case.family.peer:
        peer = case.family.peer(case.task, args)
        sides[case.family.peer_name] = Side(peer.function, peer.args, peer.leaves, peer.comparable)
    return sides


def yardstick(case: Case, args: Sequence[Any]) -> Thunk:
    """What ``case.yardstick`` times."""
    lead: Tensor = max((a for a in args if isinstance(a, Tensor)), key=Tensor.numel).detach()
    if case.yardstick == "bare kernel":
        return _bare_kernel(case, args)
    if case.yardstick == "x * 2":
        x = lead.clone().requires_grad_()
        return lambda: x * 2
    if case.yardstick == "sgemm":
        x, y = (a.detach() for a in case.family.product(args))
        return lambda: torch.mm(x, y.T)
    return lead.clone


def product_flops(case: Case, args: Sequence[Any]) -> int:
    """Of the product that is the yardstick; 1 where there is none."""
    if case.yardstick != "sgemm":
        return 1
    x, y = case.family.product(args)
    return 2 * x.shape[0] * y.numel()


def _bare_kernel(case: Case, args: Sequence[Any]) -> Thunk:
    """``empty_like`` and the kernel: the least that a call could cost."""
    from mmkern import _C

    kernel, lead = getattr(_C, case.op), args[0]
    return lambda: kernel(*args, torch.empty_like(lead), case.threads)


def check(case: Case, sides: Mapping[str, Side]) -> None:
    """Hold mmkern to the numerics contract, on a few of the rows, and every rival to mmkern, on all of them.

    Raises ContractError or WrongResultError.
    """
    _hold_to_contract(case, sides["mmkern"])
    ours = sides["mmkern"]
    outs = ours.forward()
    if not all(map(torch.equal, outs, ours.forward())):
        raise WrongResultError(f"{case}: a second call gives other bits")
    gradients = ours.gradients(gradients_of(outs)) if case.mode == "forward+backward" else ()
    for name, side in sides.items():
        if name == "mmkern":
            continue
        for theirs, mine in zip(side.forward(), outs, strict=True):
            _close(f"{case}, {name}", side.comparable(theirs), mine, FORWARD_TOLERANCE)
        if gradients and side.leaves is ours.leaves:
            for leaf, (theirs, mine) in enumerate(zip(side.gradients(gradients_of(outs)), gradients, strict=True)):
                _close(f"{case}, {name}, gradient {leaf}", theirs, mine, BACKWARD_TOLERANCE)


def _hold_to_contract(case: Case, ours: Side) -> None:
    args = [_alone(case.family.few(a.detach()), a) if isinstance(a, Tensor) else a for a in ours.args]
    few = Side(ours.function, args, [a for a in args if isinstance(a, Tensor) and a.requires_grad])
    with mmkern.verify():
        outs = few.forward()
        if case.mode == "forward+backward":
            few.gradients(gradients_of(outs))


def _alone(x: Tensor, of: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).requires_grad_(of.requires_grad)


def _close(what: str, theirs: Tensor, ours: Tensor, tolerance: float) -> None:
    theirs, ours = theirs.detach(), ours.detach()
    if theirs.shape != ours.shape:
        raise WrongResultError(f"{what}: shape {list(theirs.shape)}, mmkern's {list(ours.shape)}")
    if not theirs.isfinite().float().mean() > 0.99:  # a rival may break in single places, and then stays a rival
        raise WrongResultError(f"{what}: not finite")
    tolerance = max(tolerance, 16 * torch.finfo(ours.dtype).eps)
    error = testing.relative_error(theirs, ours.double()).max().item()
    if not error <= tolerance:
        raise WrongResultError(f"{what}: differs from mmkern by {error:.1e} of the scale, allowed {tolerance:.1e}")
