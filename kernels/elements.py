"""Where tiles of tensors lie whose axes are those of one of them, or broadcast to it, with any strides."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mmkern.backends.grid_rows import step_along, with_fewest_axes

UNIT = 8  # elements of 16 bits whose address is known to be a multiple of 16 bytes
_SHORTEST = 128  # elements of a block that a longer one would not fill


class Grid(NamedTuple):
    """A tensor on the axes of x."""

    data: Any
    strides: tuple[int | None, ...]  # of the samples, then of the rows' axes, in units; None where it is broadcast
    unit: Any
    has_columns: Any  # or one for a whole row


class Tile(NamedTuple):
    """Part of a sample: ``[BLOCK_ROWS, BLOCK]``."""

    sample: Any
    index: Any  # of the sample, then of the rows along their axes: [BLOCK_ROWS, 1]
    is_row: Any
    col: Any  # [1, BLOCK], or [BLOCK_ROWS, BLOCK] where rows begin elsewhere
    is_col: Any


@triton.jit
def tile_of(sample, row, end, begin, axes, cols, BLOCK: tl.constexpr):
    """Rows ``row`` below ``end`` of a sample, which lie along ``axes``, the fastest first, without the slowest; of them
    the columns from ``begin`` on."""
    index, rest = (), row[:, None]
    for i in tl.static_range(len(axes)):
        index = (rest % axes[i],) + index
        rest = rest // axes[i]
    col = (begin + tl.arange(0, BLOCK))[None, :]
    return Tile(sample, (sample, rest) + index, (row < end)[:, None], col, col < cols)


@triton.jit
def _at(x, tile):
    """Where the elements of a tile lie, and which of them there are; one for all along an axis of broadcasting."""
    offset, inside = tl.zeros([1, 1], tl.int64), tl.full([1, 1], True, tl.int1)
    for i in tl.static_range(len(x.strides)):
        if x.strides[i] is not None:
            offset += tile.index[i] * x.strides[i]
            if i > 0:
                inside &= tile.is_row
    at = x.data + offset * x.unit
    if x.has_columns:
        return at + tile.col, inside & tile.is_col
    else:  # a kernel's return does not end it
        return at, inside


@triton.jit
def load(x, tile):
    at, inside = _at(x, tile)
    return tl.load(at, inside, 0.0).to(tl.float32)


@triton.jit
def store(to, tile, values):
    if to is not None:
        at, inside = _at(to, tile)
        tl.store(at, values.to(to.data.dtype.element_ty), inside)


@dataclass(frozen=True)
class Layout:
    """The tensors of a call on as few axes as may be."""

    x: Tensor
    samples: int  # that a tile must not have parts of two of; else 1
    sizes: list[int]  # of the rows' axes, and the last
    axes: list[int]  # of x: what these are made of

    @classmethod
    def of(cls, x: Tensor, others: Sequence[Tensor | None], in_samples: bool = False) -> Layout:
        sizes, axes = with_fewest_axes([x, *(t for t in others if t is not None)], int(in_samples))
        return cls(x, x.shape[0] if in_samples else 1, sizes, axes)

    @property
    def rows(self) -> int:
        """Of a sample."""
        return prod(self.sizes[:-1])

    @property
    def cols(self) -> int:
        return self.sizes[-1]

    @property
    def unit(self) -> int:
        """Of which rows have a whole number: so that kernels know that of their length."""
        return gcd(UNIT, self.cols)

    @property
    def row_axes(self) -> tuple[int, ...]:
        """As ``tile_of`` takes them."""
        return tuple(reversed(self.sizes[1:-1]))

    def place(self, x: Tensor | None) -> Grid | None:
        if x is None:
            return None
        along_rows = [step_along(x, axis, self.x.shape) for axis in self.axes[:-1]]
        steps = [step_along(x, 0, self.x.shape) if self.samples > 1 else 0, *along_rows]
        unit, has_columns = gcd(UNIT, *steps), step_along(x, self.axes[-1], self.x.shape) != 0
        strides = tuple(step // unit if step else None for step in steps)
        return Grid(x, strides, tl.constexpr(unit), tl.constexpr(has_columns))

    def places(self, tensors: Sequence[Tensor | None]) -> tuple[Grid | None, ...]:
        return tuple(self.place(x) for x in tensors)

    def block(self, elements: int, rows: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Rows and columns of a tile of ``elements``, of which few lie outside.

        ``rows``: of which a tile has no other, ``width``: from the first column to the last; by default all.
        """
        rows, width = rows or self.rows, width or self.cols
        elements = elements if self.cols % 4 == 0 else elements // 2  # read one by one, they hold an address each
        block = min(int(triton.next_power_of_2(max(width, 4))), elements)
        while block > _SHORTEST and 8 * triton.cdiv(width, block) * block > 9 * width:
            block //= 2
        return min(int(triton.next_power_of_2(rows)), elements // block), block
