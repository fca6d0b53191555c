"""The row-wise companions of attention on CUDA: how many threads share a row, which rows a block takes. The kernels are
``csrc/cuda/attention_rows.cuh``; the structs below mirror theirs."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkern.backends.cuda_launch import launch
from mmkern.backends.cuda_tensors import DTYPES, GRID, SIZES, grid_entries, grid_rows, grids_fit_vectors, lanes_of
from mmkern.backends.grid_rows import four_axes, sizes, written

_THREADS = 128
_MAX_BLOCKS = 4096  # which walk on from there
_MAX_BLOCKS_OF_SUMS = 512  # each writes a part of the weight's gradient
_PAIRS = 8  # in a thread's registers
_MAX_WIDTH = 4096  # 256 threads

_MERGE_ARGS = struct.Struct(f"{SIZES} {GRID * 10}")
_ROTARY_ARGS = struct.Struct(f"{SIZES} {GRID * 5} PP iiif 0q")  # weight, partials; pairs, normalize, interleaved, eps


def limits(*args: Any) -> list[str]:
    """Why no kernel takes a rotation with these first arguments."""
    width = args[0].shape[-1] if args and isinstance(args[0], Tensor) and args[0].dim() else 0
    return [f"takes up to {_MAX_WIDTH} channels a head, got {width}"] if width > _MAX_WIDTH else []


def _numbers(x: Tensor | None) -> Tensor | None:
    return None if x is None else four_axes(x[..., None])


def _blocks(rows: int, lanes: int, most: int) -> tuple[int, int]:
    """Blocks, and threads of a block."""
    threads = max(lanes, _THREADS)
    return min(-(-rows * lanes // threads), most), threads


# ---- Merging ---------------------------------------------------------------------------------------------------------


def _merge(
    kernel: str, inputs: Sequence[Tensor], upstream: Sequence[Tensor | None], outputs: Sequence[Tensor | None]
) -> None:
    lead = inputs[0]
    rows, heads, length = sizes(lead)
    if rows == 0:
        return
    cols = lead.shape[-1]
    lanes = lanes_of(cols)
    blocks, threads = _blocks(rows, lanes, _MAX_BLOCKS)
    given = [grid_rows(x) if i % 2 == 0 else _numbers(x) for i, x in enumerate((*inputs, *upstream))]

    def run(*outputs: Tensor | None) -> None:
        to = [grid_rows(x) if i % 2 == 0 else _numbers(x) for i, x in enumerate(outputs)]
        in_vectors = grids_fit_vectors((*given[::2], *to[::2]))
        shape = rows, heads, length, cols, lanes, DTYPES[lead.dtype], in_vectors
        grids = (entry for x in (*given, *to) for entry in grid_entries(x))
        launch(kernel, (blocks, 1), threads, _MERGE_ARGS.pack(*shape, *grids), lead.device)

    written(outputs, run)


def merge_attention(*given: Tensor) -> None:
    """``(out, lse, other, other_lse, merged, merged_lse)``."""
    _merge("merge_parts", given[:4], (None, None), (*given[4:], None, None))


def merge_attention_backward(grad: Tensor, grad_lse: Tensor, *given: Any) -> None:
    """``(grad, grad_lse, out, lse, other, other_lse)`` and their gradients; one of None is not wanted."""
    _merge("merge_parts_backward", given[:4], (grad, grad_lse), given[4:])


# ---- Rotary embeddings -----------------------------------------------------------------------------------------------


def _rotary(
    kernel: str,
    problem: Sequence[Any],
    grad: Tensor | None,
    to: Tensor | None,
    partials: Tensor | None,
    grid: tuple[int, int, int],
) -> None:
    x, weight, cos, sin, eps, normalize, interleaved = problem
    rows, heads, length = sizes(x)
    cols, pairs = x.shape[-1], cos.shape[-1]
    lanes, blocks, threads = grid
    given = [grid_rows(tensor) for tensor in (x, cos, sin, grad)]

    def run(to: Tensor | None) -> None:
        to = None if to is None else four_axes(to)
        in_vectors = (
            pairs % _PAIRS == 0 and cols % (2 * _PAIRS) == 0 and grids_fit_vectors((*given, to, grid_rows(weight)))
        )
        arguments = _ROTARY_ARGS.pack(
            *(rows, heads, length, cols, lanes, DTYPES[x.dtype], in_vectors),
            *(entry for tensor in (*given, to) for entry in grid_entries(tensor)),
            0 if weight is None else weight.data_ptr(),
            0 if partials is None else partials.data_ptr(),
            pairs,
            normalize,
            interleaved,
            eps,
        )
        name = f"{kernel}<{'true' if in_vectors else 'false'}>"
        launch(name, (blocks, 1), threads, arguments, x.device)

    written((to,), run)


def _lanes(x: Tensor) -> int:
    """A thread has 8 pairs, or as many channels that pass."""
    return lanes_of(-(-x.shape[-1] // 2))


def rotary_embedding(*given: Any) -> None:
    """``(x, weight, cos, sin, eps, normalize, interleaved, out)``."""
    *problem, out = given
    rows = sizes(problem[0])[0]
    if rows == 0:
        return
    lanes = _lanes(problem[0])
    _rotary("rotary", problem, None, out, None, (lanes, *_blocks(rows, lanes, _MAX_BLOCKS)))


def rotary_embedding_backward(grad: Tensor, *given: Any) -> None:
    """``(grad, x, weight, cos, sin, eps, normalize, interleaved, dx, dweight)``; a gradient of None is not wanted."""
    *problem, x_grad, weight_grad = given
    x = problem[0]
    rows = sizes(x)[0]
    if rows == 0:
        if weight_grad is not None:
            weight_grad.zero_()
        return
    lanes = _lanes(x)
    blocks, threads = _blocks(rows, lanes, _MAX_BLOCKS if weight_grad is None else _MAX_BLOCKS_OF_SUMS)
    partials = None
    if weight_grad is not None:
        sums = blocks * (threads // max(lanes, 32))
        partials = torch.empty((sums, x.shape[-1]), dtype=torch.float32, device=x.device)
    _rotary("rotary_backward", problem, grad, x_grad, partials, (lanes, blocks, threads))
    if partials is not None:
        torch.sum(partials, 0, out=weight_grad)
