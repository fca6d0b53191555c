"""Tensors of which kernels take each element once: the axes that they share, and which threads take which elements. The
structs mirror csrc/cuda/pieces.cuh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from mmkern.backends.cuda_tensors import ACCESS, COLUMNS, DTYPES, MAX_COLUMNS, SIZES, fits_vectors, lanes_of

THREADS = 128
WARP = 32
PIECES = f"{SIZES} q"  # sizes; pieces


# ---- Axes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axes:
    """Those of a shape, as few as may be: neighbours that all tensors walk over as one are one."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]  # of each tensor

    @classmethod
    def of(cls, shape: Sequence[int], strides: Sequence[Sequence[int]]) -> Axes:
        sizes, kept = [shape[-1]], [[stride[-1]] for stride in strides]
        for axis in range(len(shape) - 2, -1, -1):
            n = shape[axis]
            if n == 1:
                continue
            fits = len(sizes) > 1 or n * sizes[0] <= MAX_COLUMNS
            if fits and all(given[axis] == mine[0] * sizes[0] for given, mine in zip(strides, kept, strict=True)):
                sizes[0] *= n
            else:
                sizes.insert(0, n)
                for given, mine in zip(strides, kept, strict=True):
                    mine.insert(0, given[axis])
        room = max(4 - len(sizes), 0)
        return cls((1,) * room + tuple(sizes), tuple((0,) * room + tuple(mine) for mine in kept))


def _strides(x: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Of a tensor that is expanded to a shape; a row of one number is dense."""
    strides = [0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True)]
    return (*strides[:-1], 1 if shape[-1] == 1 else strides[-1])


# ---- Pieces ----------------------------------------------------------------------------------------------------------


class Pieces:
    """Tensors on the axes of a shape that they broadcast to."""

    def __init__(self, shape: Sequence[int], tensors: Sequence[Tensor | None], mark: Sequence[int]) -> None:
        """``mark``: strides of something more that no two axes may be one for."""
        self.tensors = [x for x in tensors if x is not None]
        axes = Axes.of(shape, [*(_strides(x, shape) for x in self.tensors), mark])
        self.sizes = axes.sizes
        self.is_walkable = len(axes.sizes) == 4
        self.mark = axes.strides[-1]
        self._of = dict(zip(map(id, self.tensors), axes.strides, strict=False))
        cols = self.sizes[-1]
        warps = -(-cols // (WARP * COLUMNS))
        pieces = -(-warps * WARP // THREADS)
        self.lanes = lanes_of(cols) if warps <= 1 else -(-warps // pieces) * WARP
        self.pieces = -(-cols // (self.lanes * COLUMNS))
        self.threads = THREADS // self.lanes * self.lanes

    @property
    def rows(self) -> int:
        return prod(self.sizes[:3])

    @property
    def units(self) -> int:
        return self.rows * self.pieces

    @property
    def blocks(self) -> int:
        """Where each group of lanes takes one piece."""
        return -(-self.units * self.lanes // self.threads)

    def strides(self, x: Tensor) -> tuple[int, ...]:
        return self._of[id(x)]

    def access(self, *elements: Tensor | None) -> str:
        """How a thread reads its elements (csrc/cuda/access.cuh), where these are what it has of its own."""
        for x in self.tensors:
            *leading, last = self.strides(x)
            if last and not fits_vectors(x.element_size(), self.sizes[-1], leading, (x.data_ptr(),)):
                return "OneByOne"
        dtypes = {x.dtype for x in elements if x is not None}
        return ACCESS[dtypes.pop()] if len(dtypes) == 1 else "EightNeighbours"

    # ---- Entries of structs ----------------------------------------------------------------------------------------

    def entries(self, dtype: torch.dtype, access: str) -> list[int]:
        _, heads, length, cols = self.sizes
        return [self.rows, heads, length, cols, self.lanes, DTYPES[dtype], access != "OneByOne", self.pieces]

    def grids(self, *tensors: Tensor | None) -> list[int]:
        return [entry for x in tensors for entry in ((0,) * 4 if x is None else self._grid(x))]

    def _grid(self, x: Tensor) -> tuple[int, ...]:
        return (x.data_ptr(), *self.strides(x)[:3])


Inputs = Sequence[Tensor | None]


def walked(
    inputs: Inputs,
    outputs: Inputs,
    mark: Sequence[int],
    run: Callable[[Pieces, Inputs, Inputs], None],
    dense: Callable[[Tensor], Tensor] = Tensor.contiguous,
) -> None:
    """``run(pieces, inputs, outputs)`` on the axes of ``inputs[0]``; with ``dense`` copies, and outputs of its own,
    where there are more of them than kernels walk over."""
    lead = inputs[0]
    assert lead is not None
    pieces = Pieces(lead.shape, (*inputs, *outputs), mark)
    if pieces.is_walkable:
        return run(pieces, inputs, outputs)
    inputs = [None if x is None else dense(x) for x in inputs]
    filled = [None if x is None else x.new_empty(x.shape) for x in outputs]
    run(Pieces(lead.shape, (*inputs, *filled), mark), inputs, filled)
    for x, found in zip(outputs, filled, strict=True):
        if x is not None and found is not None:
            x.copy_(found)
    return None
