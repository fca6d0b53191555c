"""Calling the CUDA backend's kernels as the dispatcher does, on outputs that are watched on both sides."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkern.backends import cuda
from mmkern.ops._outputs import in_tuple
from tests.cases.case import Case
from tests.contract import op_of

_GUARD = 64  # elements on either side of an output
_SENTINEL = -77.0


class GuardedOutputs:
    """Outputs full of NaN between guards; leaving the block checks that the guards still stand."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def __enter__(self) -> GuardedOutputs:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            for buffer in self._buffers:
                assert (buffer[:_GUARD] == _SENTINEL).all(), "written before the beginning of an output"
                assert (buffer[-_GUARD:] == _SENTINEL).all(), "written past the end of an output"

    def new(self, like: Tensor) -> Tensor:
        """Room that lies in memory as ``like`` does."""
        buffer = torch.full((like.numel() + 2 * _GUARD,), _SENTINEL, dtype=like.dtype)
        self._buffers.append(buffer)
        nothing = math.nan if like.is_floating_point() else _SENTINEL
        return torch.as_strided(buffer, like.shape, like.stride(), _GUARD).fill_(nothing)


def forward(name: str, *args: Any) -> Tensor:
    """The output of an op; of several, a tuple (which unpacks as a Tensor does, for type checkers)."""
    op = op_of(name)
    if op.arguments[op.lead].kind == "grid":  # its kernels take arguments as the dispatcher arranges them
        args = op._prepare(args)
    with GuardedOutputs() as outputs:
        outs = tuple(map(outputs.new, op.empty_outputs(args)))
        getattr(cuda, name)(*args, *outs)
    return outs if len(outs) > 1 else outs[0]  # type: ignore[return-value]


def backward(
    name: str, grad: Tensor | Sequence[Tensor], wanted: Sequence[bool], args: Sequence[Any]
) -> list[Tensor | None]:
    """``grad``: of the output, or of several."""
    op = op_of(name)
    grads = [grad] if isinstance(grad, Tensor) else grad
    if op.arguments[op.lead].kind == "grid":
        args = op._prepare(args)
        grads = [op._dense_gradient(g, args[op.lead]) for g in grads]
    kept = in_tuple(forward(name, *args)) if op.backward_reads_outputs else ()
    with GuardedOutputs() as outputs:
        gradients = [
            outputs.new(op._empty_gradient(i, args[i], args[op.lead])) if want else None
            for i, want in zip(op.tensors, wanted, strict=True)
        ]
        getattr(cuda, f"{name}_backward")(*grads, *args, *kept, *gradients)
    return gradients


def both(case: Case, dtype: torch.dtype, grad: Tensor | None = None) -> list[Tensor]:
    """The results and, where there is a backward kernel, all gradients."""
    args = case.arguments(dtype)
    op = op_of(case.op)
    out = forward(case.op, *args)
    if f"{case.op}_backward" not in cuda.KERNELS:
        return [*in_tuple(out)]
    outs = in_tuple(out)
    grads = [torch.linspace(-1, 1, g.numel()).view(g.shape).to(g.dtype) for g in outs[: op.differentiable]]
    if grad is not None:
        grads[0] = grad
    gradients = backward(case.op, grads, [isinstance(args[i], Tensor) for i in op.tensors], args)
    return [*outs, *(g for g in gradients if g is not None)]


def widened(case: Case, times: int) -> Case:
    """The same geometry in ``times`` as many dimensions: columns repeated, lengths kept."""
    op = op_of(case.op)
    vectors = [i for i in op.vectors if op.names[i] not in ("r", "weights")]

    def build(generator: torch.Generator) -> list[Any]:
        args = case.build(generator)
        for i in vectors:
            args[i] = args[i].repeat(*[1] * (args[i].dim() - 1), times) / times**0.5
        return args

    return dataclasses.replace(case, label=f"{case.label} x{times}", build=build)
