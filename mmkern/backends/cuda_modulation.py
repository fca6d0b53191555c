"""Norms and their modulation on CUDA: how many threads share a row, which rows a block takes. The kernels are
``csrc/cuda/adaptive_norm*.cuh``; the structs below mirror theirs."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmkern.backends.cuda_launch import launch
from mmkern.backends.cuda_tensors import (
    ACCESS,
    COLUMNS,
    DTYPES,
    GRID,
    SIZES,
    address,
    grid_entries,
    grid_rows,
    grids_fit_vectors,
    lanes_of,
)
from mmkern.backends.grid_rows import sizes, written
from mmkern.backends.modulation_sums import PartialSums, Sharing

_THREADS = 128
_WARP = 32
# Of more rows a block takes several, for which it reads their modulators, and writes sums of columns, once.
_MAX_BLOCKS = 1024
_MAX_BLOCKS_OF_SUMS = 512
_MAX_CHUNKS = 2  # of a row, in registers; their sums of columns are in shared memory
_SUMS = 3  # of each column
_FORWARD, _BACKWARD = "adaptive_norm", "adaptive_norm_backward"

# x, residual, gate, scale, shift, frame_scale; weight, bias; run, rows_a_block; eps, centered, of_each_row
_PROBLEM = f"{SIZES} {GRID * 6} PP qq f ii 0q"
_FORWARD_ARGS = struct.Struct(f"{_PROBLEM} {GRID * 2}")  # out, total
# grad, total_grad, x_to, residual_to, gate_to, scale_to, shift_to; sums, gate_sums, frame_sums
_BACKWARD_ARGS = struct.Struct(f"{_PROBLEM} {GRID * 7} PPP")


@dataclass(frozen=True)
class Plan:
    """Which threads take which rows: a block takes ``rows_a_block`` of a run, and ``lanes`` of its threads a row."""

    in_vectors: bool  # all rows begin and end at multiples of 16 bytes
    lanes: int
    chunks: int  # of a row in a thread's registers; 0 where a row is longer
    threads: int
    run: int
    rows_a_block: int
    blocks: int

    @classmethod
    def of(cls, rows: int, cols: int, run: int, in_vectors: bool, most: int) -> Plan:
        """``most``: blocks, unless there are more runs."""
        lanes = lanes_of(cols)
        chunks = -(-cols // (lanes * COLUMNS))
        if chunks > (_MAX_CHUNKS if in_vectors else 1):
            chunks = 0
        elif lanes > _WARP:
            lanes = _up_to(_WARP, -(-cols // (chunks * COLUMNS)))
        threads = _up_to(_WARP, max(min(_THREADS // lanes, run), 1) * lanes)
        groups = threads // lanes
        blocks_a_run = min(-(-most // (rows // run)), -(-run // groups))
        rows_a_block = _up_to(groups, -(-run // blocks_a_run))
        return cls(in_vectors, lanes, chunks, threads, run, rows_a_block, rows // run * -(-run // rows_a_block))

    @property
    def parts(self) -> int:
        """Rows of partial sums: one for each warp, or for each group that is wider."""
        return self.blocks * (self.threads // max(self.lanes, _WARP))

    def bytes_of_sums(self, cols: int) -> int:
        """Of shared memory, in the backward."""
        return _SUMS * cols * 4 if self.chunks == _MAX_CHUNKS else 0


def _up_to(multiple: int, n: int) -> int:
    return -(-n // multiple) * multiple


def _of_rows(modulator: Tensor | None, x: Tensor) -> Tensor | None:
    """One for each row of x, expanded."""
    return None if modulator is None else grid_rows(modulator.expand(*x.shape[:-1], modulator.shape[-1]))


class _Problem:
    """What both kernels read."""

    def __init__(self, x: Tensor, residual: Tensor | None, gate: Tensor | None, *given: Any) -> None:
        self.weight, self.bias, scale, shift, frames, self.eps, self.centered = given
        self.x = x
        self.rows = [grid_rows(x), grid_rows(residual), *(_of_rows(each, x) for each in (gate, scale, shift))]
        self.frames = _of_rows(frames, x)
        self.sharing = Sharing.of(x, gate, scale, shift)

    def plan(self, run: int, most: int, others: Sequence[Tensor | None]) -> Plan:
        """``others``: the rows that a kernel reads and writes beside these."""
        in_vectors = grids_fit_vectors((*self.rows, *others, grid_rows(self.weight), grid_rows(self.bias)))
        return Plan.of(self.sharing.rows, self.x.shape[-1], run, in_vectors, most)

    def launch(self, kernel: str, plan: Plan, arguments: struct.Struct, others: Sequence[int]) -> None:
        rows, heads, length = sizes(self.x)
        cols, dtype = self.x.shape[-1], self.x.dtype
        packed = arguments.pack(
            *(rows, heads, length, cols, plan.lanes, DTYPES[dtype], plan.in_vectors),
            *_entries((*self.rows, self.frames)),
            *(address(self.weight), address(self.bias)),
            *(plan.run, plan.rows_a_block, self.eps, self.centered, self.sharing.of_each_row),
            *others,
        )
        name = f"{kernel}<{ACCESS[dtype] if plan.in_vectors else 'OneByOne'}, {plan.chunks}>"
        shared_bytes = plan.bytes_of_sums(cols) if kernel == _BACKWARD else 0
        launch(name, (plan.blocks, 1), plan.threads, packed, self.x.device, shared_bytes)


def _entries(rows: Sequence[Tensor | None]) -> Iterator[int]:
    return (entry for x in rows for entry in grid_entries(x))


# ---- Forward ---------------------------------------------------------------------------------------------------------


def ada_layer_norm(x: Tensor, *given: Any) -> None:
    """``(x, weight, bias, scale, shift, frame_scale, eps, centered, out)``."""
    *args, out = given
    residual_ada_layer_norm(x, None, None, *args, out, None)


def residual_ada_layer_norm(*given: Any) -> None:
    """``(x, residual, gate, weight, bias, scale, shift, frame_scale, eps, centered, out, total)``."""
    *args, out, total = given
    problem = _Problem(*args)
    if problem.sharing.rows == 0:
        return

    def run(*outputs: Tensor | None) -> None:
        to = [grid_rows(output) for output in outputs]
        plan = problem.plan(problem.sharing.modulated_run, _MAX_BLOCKS, to)
        problem.launch(_FORWARD, plan, _FORWARD_ARGS, [*_entries(to)])

    written((out, total), run)


# ---- Backward --------------------------------------------------------------------------------------------------------


def ada_layer_norm_backward(grad: Tensor, x: Tensor, *given: Any) -> None:
    """``(grad, x, weight, …, centered, dx, dweight, dbias, dscale, dshift, dframe_scale)``; None is not wanted."""
    args, (dx, *others) = given[:7], given[7:]
    residual_ada_layer_norm_backward(grad, None, x, None, None, *args, dx, None, None, *others)


def residual_ada_layer_norm_backward(grad: Tensor, total_grad: Tensor | None, *given: Any) -> None:
    """``(grad, total_grad, x, residual, gate, …, centered, dx, dresidual, dgate, …)``; None is not wanted."""
    args, (dx, dresidual, *shared) = given[:10], given[10:]
    x, _, _, weight, bias, scale, *_ = args
    problem = _Problem(*args)
    sharing = problem.sharing
    if sharing.rows == 0:
        for gradient in shared:
            if gradient is not None:
                gradient.zero_()
        return

    def run(dx: Tensor | None, dresidual: Tensor | None) -> None:
        dgate, _, _, dscale, dshift, _ = shared
        of_rows = [
            *(grad, total_grad, dx, dresidual, dgate if sharing.gate_rows == 1 else None),
            *((dscale, dshift) if sharing.of_each_row else (None, None)),
        ]
        of_rows = [grid_rows(each) for each in of_rows]
        most = _MAX_BLOCKS if all(gradient is None for gradient in shared) else _MAX_BLOCKS_OF_SUMS
        plan = problem.plan(sharing.run, most, of_rows)
        sums = PartialSums.empty(sharing, plan.parts, x, shared)
        sums_to = [address(each) for each in (sums.columns, sums.gate, sums.frames)]
        problem.launch(_BACKWARD, plan, _BACKWARD_ARGS, [*_entries(of_rows), *sums_to])
        sums.add_up((weight, bias, scale), shared)

    written((dx, dresidual), run)
