"""A call of an attention op as its kernels take it, and the sizes of their tiles."""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from mmkern.kernels.attention_tiles import INDEX, NO_BAND, RESAMPLE, Problem, Segments, Strided
from mmkern.kernels.philox import least_step
from mmkern.kernels.rows import unit_stride

from mmkern.reference import attention as reference

# Numbers that every kernel takes after its tensors, and for which it is not compiled anew.
NUMBERS = ("heads", "share", "queries", "keys", "left", "right", "bottom_right", "threshold")

SOURCE_NUMBERS = tuple(f"{number}{i}" for number in ("share", "keys") for i in range(reference.MAX_SOURCES))


@dataclass(frozen=True)
class Blocks:
    """Sides of a tile, warps, how many tiles are loaded ahead, and the least columns beside a power of two of them."""

    queries: int
    keys: int
    warps: int
    stages: int = 1
    tail: int = 16  # no dot takes less


# By the bytes of an element, then by the larger of the two widths, padded: the first row that is wide enough. No
# target of tools/gpu_report.py spills a register of these tiles, with masks and biases too. In float32 a tail of 16 beside
# 32 columns takes more registers than padding does.
FORWARD_BLOCKS = {
    2: {64: Blocks(128, 64, 8, 2), 128: Blocks(128, 32, 8, 2), 256: Blocks(64, 32, 8, 2)},
    4: {64: Blocks(32, 16, 8, tail=32), 128: Blocks(32, 16, 8), 256: Blocks(16, 16, 8)},
}
# A second sum lies beside the first in the registers. In float32 256 channels of q have no room there too: where keys are
# loaded ahead, the compiler leaves q in shared memory.
SOURCE_BLOCKS = {
    2: {64: Blocks(128, 64, 8, 2), 96: Blocks(128, 32, 8, 2), 128: Blocks(64, 32, 8, 2), 256: Blocks(32, 32, 8)},
    4: {64: Blocks(32, 16, 8, tail=32), 128: Blocks(16, 16, 8), 256: Blocks(16, 16, 8, 2)},
}
QUERY_BLOCKS = {
    2: {80: Blocks(64, 32, 4, 2), 96: Blocks(64, 32, 4), 128: Blocks(64, 32, 4, 2), 256: Blocks(32, 16, 8)},
    4: {
        32: Blocks(32, 32, 4),
        48: Blocks(16, 32, 8),
        64: Blocks(32, 32, 4),
        128: Blocks(16, 32, 8),
        256: Blocks(16, 16, 8),
    },
}
KEY_BLOCKS = {
    2: {64: Blocks(32, 64, 4), 96: Blocks(16, 64, 4), 128: Blocks(32, 64, 8), 256: Blocks(16, 32, 8)},
    4: {64: Blocks(32, 16, 8, tail=32), 128: Blocks(16, 16, 4), 256: Blocks(16, 16, 8)},
}
# All keys, of 16 bits: by the larger width, padded, the first tile that has room for them. A bias would spill, and so
# would a tail of 16.
ONE_PASS_BLOCKS = {
    64: (Blocks(32, 64, 4, tail=32), Blocks(32, 128, 8, tail=32)),
    96: (Blocks(16, 64, 4, tail=32),),
    128: (Blocks(16, 64, 8),),
}
KEY_BLOCKS_BESIDE_BIAS = {**KEY_BLOCKS, 2: {**KEY_BLOCKS[2], 128: Blocks(16, 64, 8)}}
BIAS_BLOCKS = {
    2: {64: Blocks(64, 32, 8), 96: Blocks(64, 16, 4), 128: Blocks(64, 16, 8), 256: Blocks(32, 16, 8)},
    4: {64: Blocks(32, 16, 4, tail=32), 128: Blocks(16, 16, 4), 256: Blocks(16, 16, 8)},
}
_FEW_QUERIES = 16
# Queries are cut into parts where programs are too few to fill a device, but not into less than pays for adding them up.
_ENOUGH_PROGRAMS = 256
_LEAST_ROWS = 256
# All that a thread can have: left to itself ptxas spills a few to halve the registers. AMD's compiler knows no such option.
_OPTIONS = {} if torch.version.hip else {"maxnreg": 255}


def _side(size: int) -> int:
    return max(int(triton.next_power_of_2(size)), 16)


def columns(width: int, least_tail: int = 16) -> tuple[int, int]:
    """How many columns of a head lie in one tile, and how many in another beside it: 80 are 64 + 16.

    Triton's tiles are powers of two, and a product with padding costs what any other does. So a head takes the largest
    power of two in it and pads the rest, unless that comes to the next power of two: then that, and 0.
    """
    whole = _side(width)
    body = whole // 2
    tail = max(_side(width - body), least_tail)
    return (body, tail) if body >= 16 and body + tail < whole else (whole, 0)


class Call:
    """The arguments of an op as its kernels take them."""

    def __init__(
        self, a: reference.Arguments, batch: int, queries: int, keys: int, segments: Segments | None = None
    ) -> None:
        q, k, v = unit_stride(a.q), unit_stride(a.k), unit_stride(a.v)
        self.strided = Strided.of if segments is None else Strided.packed
        self.batch, self.heads, self.queries = batch, q.shape[1], queries
        self.groups, self.keys = k.shape[1], keys
        self.share = self.heads // max(self.groups, 1)
        self.threshold = least_step(a.dropout_p)
        drops = a.seed is not None and a.dropout_p > 0
        self.problem = Problem(
            self.strided(q),
            self.strided(k),
            self.strided(v),
            None if a.key_mask is None else a.key_mask.view(torch.uint8),
            Strided.broadcast(a.attn_mask),
            Strided.broadcast(a.attn_bias),
            Strided.broadcast(a.bias),
            a.prefix_lengths if a.right >= 0 else None,
            a.seed if drops else None,
            float(a.scale),
            float(a.softcap) if a.softcap > 0 else None,
            1 / (1 - a.dropout_p) if drops else 1.0,
            segments,
        )
        band = NO_BAND if a.left < 0 and a.right < 0 else RESAMPLE if a.alignment == reference.RESAMPLE else INDEX
        far = queries + keys  # as good as no bound
        self.numbers = (
            self.heads,
            self.share,
            queries,
            keys,
            min(a.left, far) if a.left >= 0 else far,
            min(a.right, far) if a.right >= 0 else far,
            int(a.alignment == reference.BOTTOM_RIGHT),
            self.threshold,
        )
        self.constants = {
            "WIDTH": q.shape[-1],
            "VALUE_WIDTH": v.shape[-1],
            "BAND": band.value,
        }

    @classmethod
    def padded(cls, args: Sequence[Any]) -> Call:
        a = reference.Arguments(*args)
        return cls(a, a.q.shape[0], a.q.shape[2], a.k.shape[2])

    @classmethod
    def packed(cls, args: Sequence[Any]) -> Call:
        a = reference.PackedArguments(*args)
        segments = Segments(a.cu_seqlens_q, a.cu_seqlens_k, a.q.shape[0], a.k.shape[0])
        return cls(
            a.of_rows(a.q, a.k, a.v, a.prefix_lengths, a.seed),
            len(a.cu_seqlens_q) - 1,
            a.max_seqlen_q,
            a.max_seqlen_k,
            segments,
        )

    def row_programs(self, blocks: Blocks) -> int:
        return int(triton.cdiv(self.queries, blocks.queries)) * self.heads * self.batch

    def key_programs(self, blocks: Blocks) -> int:
        return int(triton.cdiv(self.keys, blocks.keys)) * self.groups * self.batch

    @property
    def has_bias(self) -> bool:
        return self.problem.bias is not None or self.problem.attn_bias is not None

    @property
    def _width(self) -> int:
        return max(sum(columns(self.constants[width])) for width in ("WIDTH", "VALUE_WIDTH"))

    def part_queries(self, blocks: Blocks) -> int:
        """Of how many queries a program of the backward in one pass adds up the gradients of keys and values."""
        parts = min(
            triton.cdiv(_ENOUGH_PROGRAMS, max(self.groups * self.batch, 1)), self.queries * self.share // _LEAST_ROWS
        )
        return int(triton.cdiv(triton.cdiv(self.queries, max(parts, 1)), blocks.queries)) * blocks.queries or 1

    def one_pass_blocks(self) -> Blocks | None:
        """The tile that has room for all keys, if there is one."""
        if self.problem.q.data.element_size() != 2 or self.has_bias:
            return None
        tiles = next((tiles for widest, tiles in ONE_PASS_BLOCKS.items() if self._width <= widest), ())
        found = next((blocks for blocks in tiles if self.keys <= blocks.keys), None)
        return None if found is None else self._of_few_queries(found)

    def _of_few_queries(self, blocks: Blocks) -> Blocks:
        return replace(blocks, queries=_FEW_QUERIES) if self.queries <= _FEW_QUERIES else blocks

    def blocks(self, table: dict[int, dict[int, Blocks]]) -> Blocks:
        rows = table[self.problem.q.data.element_size()]
        return self._of_few_queries(next((b for widest, b in rows.items() if self._width <= widest), rows[max(rows)]))

    def launch(self, kernel: Any, programs: int, blocks: Blocks, *tensors: Any, **constants: Any) -> None:
        self.launch_with(self.problem, self.numbers, kernel, programs, blocks, *tensors, **constants)

    def launch_with(
        self,
        problem: Problem | tuple[Problem, ...],
        numbers: tuple[int, ...],
        kernel: Any,
        programs: int,
        blocks: Blocks,
        *tensors: Any,
        **constants: Any,
    ) -> None:
        """With this call's widths, and another problem."""
        if programs == 0:
            return
        with torch.cuda.device_of(self.problem.q.data):
            kernel[(programs,)](
                problem,
                *tensors,
                *numbers,
                **self.constants,
                **constants,
                QUERIES=blocks.queries,
                KEYS=blocks.keys,
                BLOCK=columns(self.constants["WIDTH"], blocks.tail),
                VALUE_BLOCK=columns(self.constants["VALUE_WIDTH"], blocks.tail),
                num_warps=blocks.warps,
                num_stages=blocks.stages,
                # Fused, scores differ between the kernels in their last bit; at a score of 10⁴ that is a thousandth.
                enable_fp_fusion=self.problem.q.data.element_size() == 2,
                **_OPTIONS,
            )
