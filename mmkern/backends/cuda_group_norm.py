"""Group norms on CUDA: which threads take a group. The kernels are ``csrc/cuda/group_norm.cuh``; the structs below
mirror theirs."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkern.backends.cuda_launch import launch
from mmkern.backends.cuda_pieces import PIECES, WARP, Inputs, Pieces, walked
from mmkern.backends.cuda_tensors import GRID, address
from mmkern.backends.modulation_sums import add_up_runs

_MAX_THREADS = 512
_HELD = {"group_norm_act": (5, 10), "group_norm_act_backward": (5,)}  # pieces, in a thread's registers
_PROBLEM = f"{PIECES} {GRID} 4P ii fi"  # sizes; x; weight, bias, scale, shift; groups, channels; eps, activation
_ARGS = struct.Struct(f"{_PROBLEM} {GRID}")  # out
_BACKWARD_ARGS = struct.Struct(f"{_PROBLEM} {GRID * 2} P")  # grad, x_to; sums
# Strides for which channels stay apart from positions.
_MARK = (1, 1, 1, 0)


@dataclass(frozen=True)
class Plan:
    """How many threads take a group, and how many of its pieces each of them holds; 0 where it is too large."""

    threads: int
    held: int

    @classmethod
    def of(cls, lanes: int, pieces: int, held: Sequence[int]) -> Plan:
        """``pieces`` of a group, each for ``lanes`` threads; ``held``: what there are kernels for."""
        at_once = min(_MAX_THREADS // lanes, pieces)
        threads = -(-at_once * lanes // WARP) * WARP
        each = -(-pieces // (threads // lanes))
        return cls(threads, next((n for n in held if n >= each), 0))


class _Call:
    """The tensors of a call, and the axes that they share."""

    def __init__(self, x: Tensor, *given: Any) -> None:
        *modulators, self.eps, self.activation = given
        self.x, self.modulators = x, [None if m is None else m.contiguous() for m in modulators]

    def launch(
        self, kernel: str, arguments: struct.Struct, pieces: Pieces, tensors: Inputs, others: Sequence[int]
    ) -> None:
        """``tensors``: x, and what has its shape."""
        x = self.x
        samples, groups, channels, _ = x.shape
        plan = Plan.of(pieces.lanes, channels * pieces.pieces, _HELD[kernel])
        access = pieces.access(*tensors)
        packed = arguments.pack(
            *pieces.entries(x.dtype, access),
            *pieces.grids(tensors[0]),
            *map(address, self.modulators),
            *(groups, channels, self.eps, self.activation),
            *pieces.grids(*tensors[1:]),
            *others,
        )
        launch(f"{kernel}<{access}, {plan.held}>", (samples * groups, 1), plan.threads, packed, x.device)


def group_norm_act(x: Tensor, *given: Any) -> None:
    """``(x, weight, bias, scale, shift, eps, activation, out)``."""
    if x.numel() == 0:
        return
    *options, out = given
    call = _Call(x, *options)

    def run(pieces: Pieces, inputs: Inputs, outputs: Inputs) -> None:
        call.launch("group_norm_act", _ARGS, pieces, (*inputs, *outputs), ())

    walked((x,), (out,), _MARK, run)


def group_norm_act_backward(grad: Tensor, x: Tensor, *given: Any) -> None:
    """``(grad, x, weight, bias, scale, shift, eps, activation, dx, dweight, dbias, dscale, dshift)``; None is not
    wanted."""
    call, (dx, *others) = _Call(x, *given[:6]), given[6:]
    if x.numel() == 0:
        for gradient in others:
            if gradient is not None:
                gradient.zero_()
        return

    def run(pieces: Pieces, inputs: Inputs, outputs: Inputs) -> None:
        sums = torch.empty((*x.shape[:3], pieces.pieces, 2), dtype=torch.float32, device=x.device)
        tensors = *inputs, *outputs
        call.launch("group_norm_act_backward", _BACKWARD_ARGS, pieces, tensors, (address(sums),))
        u, un = sums.sum(3).unbind(-1)
        add_up_runs(u, un, call.modulators[:3], others)

    walked((x, grad), (dx,), _MARK, run)
