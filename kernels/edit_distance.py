"""Edit distance in Triton: a program has a pair, and walks over the table row by row.

An entry has its substitutions, insertions and deletions in one word, and its distance is their sum. Within a row the
deletions are a scan: each place takes the first from which they lead there with the fewest edits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 512
_PER_WARP = 128  # entries that a warp has of a block
_REGISTERS = {} if torch.version.hip else {"maxnreg": 128}  # left to choose, ptxas takes fewer, and spills
_BITS = 21  # of each number
_MASK = tl.constexpr((1 << _BITS) - 1)  # substitutions
_INSERTIONS = tl.constexpr(_BITS)  # where they begin
_DELETIONS = tl.constexpr(2 * _BITS)


@triton.jit
def _distance(entry):
    return (entry & _MASK) + ((entry >> _INSERTIONS) & _MASK) + (entry >> _DELETIONS)


@triton.jit
def _nearer(reach, entry, later_reach, later_entry):
    """Of two places the one that leads here with fewer edits, the earlier of equals."""
    is_later = later_reach < reach
    return tl.where(is_later, later_reach, reach), tl.where(is_later, later_entry, entry)


@triton.jit
def _length(lengths, row, width):
    length = tl.zeros([], tl.int64) + width
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + row), 0), length)
    return length


@triton.jit
def _equal_at_once(a, b, most, step: tl.constexpr, BLOCK: tl.constexpr):
    """How many of ``most`` tokens are equal, from two places on, forwards or backwards."""
    found = tl.zeros([], tl.int64) + most
    for first in range(0, most, BLOCK):
        k = first + tl.arange(0, BLOCK).to(tl.int64)
        is_inside = k < most
        differs = tl.load(a + k * step, is_inside, 0) != tl.load(b + k * step, is_inside, 0)
        found = tl.minimum(found, tl.min(tl.where(differs & is_inside, k, most), 0))
    return found


@triton.jit
def edit_distance_kernel(
    a,  # [rows, n], int64
    b,  # [rows, m], int64
    a_lengths,  # [rows], int64, or None
    b_lengths,
    counts,  # [rows, 3], int64
    table,  # [rows, 2, n + 1], int64: two rows of the table
    n,
    m,
    a_stride,
    b_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    a += row * a_stride
    b += row * b_stride
    table += row * 2 * (n + 1)
    of_a, of_b = _length(a_lengths, row, n), _length(b_lengths, row, m)
    both = tl.minimum(of_a, of_b)
    same = _equal_at_once(a, b, both, 1, BLOCK)
    last = _equal_at_once(a + of_a - 1, b + of_b - 1, both - same, -1, BLOCK)
    a += same
    b += same
    of_a -= same + last
    of_b -= same + last

    for first in range(0, of_a + 1, BLOCK):
        place = first + tl.arange(0, BLOCK).to(tl.int64)
        tl.store(table + place, place << _DELETIONS, place <= of_a)
    for j in range(0, of_b):
        tl.debug_barrier()  # the row before is written
        above = table + (j % 2) * (n + 1)
        below = table + ((j + 1) % 2) * (n + 1)
        token = tl.load(b + j)
        best = tl.full([], 9223372036854775807, tl.int64)
        source = tl.zeros([], tl.int64)
        for first in range(0, of_a + 1, BLOCK):
            place = first + tl.arange(0, BLOCK).to(tl.int64)
            is_inside, has_left = place <= of_a, (place > 0) & (place <= of_a)
            up = tl.load(above + place, is_inside, 0)
            left = tl.load(above + place - 1, has_left, 0)
            differs = tl.load(a + place - 1, has_left, 0) != token
            falls = (place == 0) | (_distance(up) < _distance(left))
            entry = tl.where(falls, up + (_MASK + 1), left + differs.to(tl.int64))
            # Entries before this block come first: theirs is the place of equals.
            reach = tl.where(is_inside, _distance(entry) - place, 9223372036854775807)
            reach, entry = tl.associative_scan((reach, entry - (place << _DELETIONS)), 0, _nearer)
            reach, entry = _nearer(best, source, reach, entry)
            tl.store(below + place, entry + (place << _DELETIONS), is_inside)
            last_of_block = tl.arange(0, BLOCK) == BLOCK - 1
            best = tl.sum(tl.where(last_of_block, reach, 0), 0)
            source = tl.sum(tl.where(last_of_block, entry, 0), 0)
    tl.debug_barrier()
    entry = tl.load(table + (of_b % 2) * (n + 1) + of_a + tl.arange(0, 1))
    to = counts + row * 3 + tl.arange(0, 1)
    tl.store(to, entry & _MASK)
    tl.store(to + 1, (entry >> _INSERTIONS) & _MASK)
    tl.store(to + 2, entry >> _DELETIONS)


def edit_distance(a: Tensor, b: Tensor, a_lengths: Tensor | None, b_lengths: Tensor | None, counts: Tensor) -> None:
    """The arguments of the op, and where the counts go."""
    rows, n = a.shape
    if rows == 0:
        return
    longest = max(n, b.shape[1])
    if longest >> _BITS:
        raise ValueError(f"edit_distance: sequences of {longest} tokens, expected less than {1 << _BITS} on a GPU")
    block = min(triton.next_power_of_2(max(n + 1, 16)), _BLOCK)
    table = torch.empty(rows, 2, n + 1, dtype=torch.int64, device=a.device)
    a_lengths, b_lengths = (None if x is None else x.contiguous() for x in (a_lengths, b_lengths))
    edit_distance_kernel[(rows,)](
        a,
        b,
        a_lengths,
        b_lengths,
        counts,
        table,
        n,
        b.shape[1],
        a.stride(0),
        b.stride(0),
        BLOCK=block,
        num_warps=max(1, block // _PER_WARP),
        **_REGISTERS,
    )
