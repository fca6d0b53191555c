"""Activations beside a scale, a shift or a gate on CUDA: what elements share, which rows a block takes. The kernels are
``csrc/cuda/affine_activation.cuh`` and ``gated_activation.cuh``; the structs below mirror theirs."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import prod

import torch
from torch import Tensor

from mmkern.backends.cuda_launch import launch
from mmkern.backends.cuda_pieces import PIECES, WARP, Inputs, Pieces, walked
from mmkern.backends.cuda_tensors import DTYPES, GRID, address

# Of more rows a block takes several, for which it reads what they share, and writes sums of columns, once.
_MAX_BLOCKS = 2048
_MAX_BLOCKS_OF_SUMS = 512

_MODULATOR = f"{GRID} ii"  # rows; dtype, shared
_AFFINE = f"{PIECES} qq {GRID} {_MODULATOR * 2} fi0q"  # sizes; run, rows_a_block; x; scale, shift; offset, activation
_AFFINE_ARGS = struct.Struct(f"{_AFFINE} {GRID}")  # out
# grad, x_to; scale_to, shift_to; column_sums, piece_sums
_AFFINE_BACKWARD_ARGS = struct.Struct(f"{_AFFINE} {GRID * 4} PP")
_GATED_ARGS = struct.Struct(f"{PIECES} {GRID * 3} i0q")  # sizes; hidden, gate, out; activation
_GATED_BACKWARD_ARGS = struct.Struct(f"{PIECES} {GRID * 5} i0q")  # grad, hidden, gate, hidden_to, gate_to; activation


# ---- What elements share ---------------------------------------------------------------------------------------------


class Shared(IntEnum):
    """What has a number of its own; as kernels are told of it."""

    BY_NONE = 0  # each element
    BY_ROW = 1
    BY_RUN = 2  # each column of a run of rows


@dataclass(frozen=True)
class Sharing:
    """What elements share of scale and shift; if they share of both, these are of one shape.

    ``order`` is that of the axes of x in which elements that share a number are neighbours: those that what is shared
    has come first. ``mark`` has the strides of a dense tensor of its shape, so that axes which share stay apart.
    """

    by: Shared
    order: tuple[int, ...]
    mark: tuple[int, ...]
    runs: int  # of rows that share a row of numbers

    @classmethod
    def of(cls, x: Tensor, *modulators: Tensor | None) -> Sharing:
        *leading, last = range(x.dim())
        shared = next((m for m in modulators if m is not None and m.shape != x.shape), None)
        if shared is None:
            return cls(Shared.BY_NONE, (*leading, last), (0,) * x.dim(), 1)
        by = Shared.BY_ROW if shared.shape[last] < x.shape[last] else Shared.BY_RUN
        order = (*sorted(leading, key=lambda axis: shared.shape[axis] == 1), last)
        sizes = [shared.shape[axis] for axis in order]
        strides = (0 if n == 1 else prod(sizes[axis + 1 :]) for axis, n in enumerate(sizes[:-1]))
        return cls(by, order, (*strides, int(by is Shared.BY_RUN)), prod(sizes[:-1]) if by is Shared.BY_RUN else 1)

    def ordered(self, *tensors: Tensor | None) -> list[Tensor | None]:
        return [None if x is None else x.permute(self.order) for x in tensors]

    def of_modulator(self, modulator: Tensor | None, x: Tensor) -> Shared:
        return Shared.BY_NONE if modulator is None or modulator.shape == x.shape else self.by


# ---- Scale and shift -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which threads take which rows: a block takes pieces of ``rows_a_block`` of a run."""

    threads: int
    run: int
    rows_a_block: int
    blocks: int
    parts: int  # rows of partial sums: one for each warp, or for each group that is wider

    @classmethod
    def of(cls, pieces: Pieces, runs: int, most: int) -> Plan:
        """``most``: blocks, unless there are more runs."""
        run = pieces.rows // runs
        threads = min(pieces.threads, -(-run * pieces.lanes // WARP) * WARP)
        groups = threads // pieces.lanes
        blocks_a_run = min(-(-most // (runs * pieces.pieces)), -(-run // groups))
        rows_a_block = -(-run // (blocks_a_run * groups)) * groups
        blocks = runs * -(-run // rows_a_block)
        return cls(threads, run, rows_a_block, blocks * pieces.pieces, blocks * (threads // max(pieces.lanes, WARP)))


class _Affine:
    """A call's tensors, in the order of ``sharing``, on the axes that they share."""

    def __init__(self, pieces: Pieces, inputs: Inputs, sharing: Sharing, most: int) -> None:
        x, scale, shift, grad = inputs
        assert x is not None
        self.pieces, self.x, self.modulators = pieces, x, (scale, shift)
        self.shared = [sharing.of_modulator(m, x) for m in self.modulators]
        self.plan = Plan.of(pieces, sharing.runs, most)
        # What a run shares may be of another type than x, unless it is of 16 bits and x is not.
        read_as_x = (Shared.BY_NONE, Shared.BY_RUN) if x.dtype == torch.float32 else (Shared.BY_NONE,)
        like_x = [m for m, shared in zip(self.modulators, self.shared, strict=True) if shared in read_as_x]
        self.access = pieces.access(x, grad, *like_x)

    def launch(
        self, kernel: str, arguments: struct.Struct, offset: float, activation: int, others: Sequence[int]
    ) -> None:
        packed = arguments.pack(
            *self.pieces.entries(self.x.dtype, self.access),
            *(self.plan.run, self.plan.rows_a_block),
            *self.pieces.grids(self.x),
            *(entry for pair in zip(self.modulators, self.shared, strict=True) for entry in self._entries(*pair)),
            *(offset, activation),
            *others,
        )
        launch(f"{kernel}<{self.access}>", (self.plan.blocks, 1), self.plan.threads, packed, self.x.device)

    def _entries(self, modulator: Tensor | None, shared: Shared) -> list[int]:
        return [*self.pieces.grids(modulator), 0 if modulator is None else DTYPES[modulator.dtype], shared]


def affine_activation(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, offset: float, activation: int, out: Tensor
) -> None:
    """``(x, scale, shift, offset, activation, out)``."""
    if x.numel() == 0:
        return
    sharing = Sharing.of(x, scale, shift)

    def run(pieces: Pieces, inputs: Inputs, outputs: Inputs) -> None:
        call = _Affine(pieces, inputs, sharing, _MAX_BLOCKS)
        call.launch("affine_activation", _AFFINE_ARGS, offset, activation, pieces.grids(*outputs))

    walked(sharing.ordered(x, scale, shift, None), sharing.ordered(out), sharing.mark, run)


def affine_activation_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offset: float,
    activation: int,
    dx: Tensor | None,
    *of_modulators: Tensor | None,
) -> None:
    """``(grad, x, scale, shift, offset, activation, dx, dscale, dshift)``; None is not wanted."""
    if x.numel() == 0:
        for gradient in of_modulators:
            if gradient is not None:
                gradient.zero_()
        return
    sharing = Sharing.of(x, scale, shift)
    own = [g if g is not None and g.shape == x.shape else None for g in of_modulators]
    summed = [g if g is not None and g.shape != x.shape else None for g in of_modulators]
    has_sums = any(g is not None for g in summed)

    def run(pieces: Pieces, inputs: Inputs, outputs: Inputs) -> None:
        by_run = sharing.by is Shared.BY_RUN
        call = _Affine(pieces, inputs, sharing, _MAX_BLOCKS_OF_SUMS if has_sums and by_run else _MAX_BLOCKS)
        size = (call.plan.parts, 2, pieces.sizes[-1]) if by_run else (pieces.units, 2, 1)
        sums = torch.empty(size, dtype=torch.float32, device=x.device) if has_sums else None
        sums_to = (address(sums), 0) if by_run else (0, address(sums))
        others = [*pieces.grids(inputs[3], *outputs), *sums_to]
        call.launch("affine_activation_backward", _AFFINE_BACKWARD_ARGS, offset, activation, others)
        if sums is not None:
            _add_up(sums, summed)

    walked(sharing.ordered(x, scale, shift, grad), sharing.ordered(dx, *own), sharing.mark, run)


def _add_up(sums: Tensor, gradients: Inputs) -> None:
    """``sums``: ``[parts, 2, C]``, the parts of each row of a gradient after each other."""
    for gradient, found in zip(gradients, sums.unbind(1), strict=True):
        if gradient is not None:
            cols = found.shape[-1]
            gradient.copy_(found.reshape(gradient.numel() // cols, -1, cols).sum(1).view_as(gradient))


# ---- Gates -----------------------------------------------------------------------------------------------------------


def gated_activation(x: Tensor, activation: int, out: Tensor) -> None:
    """``(x, activation, out)``."""
    _walk_halves("gated_activation", _GATED_ARGS, (), x, (out,), activation)


def gated_activation_backward(grad: Tensor, x: Tensor, activation: int, dx: Tensor | None) -> None:
    """``(grad, x, activation, dx)``; None is not wanted."""
    if dx is not None:
        _walk_halves("gated_activation_backward", _GATED_BACKWARD_ARGS, (grad,), x, dx.tensor_split(2, -1), activation)


def _walk_halves(
    kernel: str, arguments: struct.Struct, grads: Inputs, x: Tensor, outputs: Inputs, activation: int
) -> None:
    if x.numel() == 0:
        return
    hidden, gate = x.tensor_split(2, -1)

    def run(pieces: Pieces, inputs: Inputs, outputs: Inputs) -> None:
        access = pieces.access(*inputs)
        packed = arguments.pack(*pieces.entries(x.dtype, access), *pieces.grids(*inputs, *outputs), activation)
        launch(f"{kernel}<{access}>", (pieces.blocks, 1), pieces.threads, packed, x.device)

    walked((*grads, hidden, gate), outputs, (0,) * x.dim(), run)
