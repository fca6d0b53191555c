"""Attention on CUDA: which kernel, how many warps, over how many blocks the keys are split. The kernels are
``csrc/cuda/attention*.cuh``; the structs below mirror theirs."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkern.backends.cuda_launch import launch
from mmkern.backends.cuda_tensors import DTYPES, address
from mmkern.reference.attention import Arguments
from mmkern.reference.philox import threshold

_WARP_ROWS = 16
_MAX_WARPS = 4
_MAX_INT = 1 << 30  # queries of a whole batch, and keys, are counted in int
_SHARED_BYTES = (99 << 10) - 32  # what every device from sm_80 on has for a block, but for what a kernel keeps itself
_STEP = 16  # to whose multiple channels are padded in shared memory
_VALUE_WIDTHS = (64, 128, 256)
_MAX_WIDTH = 256
# Keys are split where blocks are too few to fill a device, but not into less than pays for the merge.
_ENOUGH_BLOCKS = 256
_LEAST_KEYS = 256
_MERGE_THREADS = 128


TYPES = {torch.float32: "Float32", torch.bfloat16: "Bfloat16", torch.float16: "Float16"}

_HEADS = "Pqqq"  # data, strides of batch, head and row
_BROADCAST = "P4q"
_NO_BROADCAST = (0,) * 5
_ARGS = struct.Struct(
    f"{_HEADS * 3} {_BROADCAST * 3}"  # q, k, v; attn_mask, attn_bias, bias
    "PPP P3q P qqq q"  # key_mask, prefix_lengths, seed; out, lse; all_rows, left, right; least_kept
    "6i 2i i 3i"  # heads, groups, queries, keys, width, value_width; splits, split_keys; alignment; vectors of q, k, v
    "fff 0q"  # scale, softcap, dropout_p
)
_MERGE_ARGS = struct.Struct("PP P3q Pq 5i 0q")  # partials, partial_lses, out, lse, rows; sizes, dtype


def limits(*args: Any) -> list[str]:
    """Why no kernel takes a call with these first arguments."""
    q, k, v = (x if isinstance(x, Tensor) and x.dim() == 4 else None for x in (*args, None, None)[:3])
    widest = max((x.shape[3] for x in (q, v) if x is not None), default=0)
    longest = max(0 if q is None else q.shape[:3].numel(), 0 if k is None else k.shape[2])
    return [
        *([f"takes up to {_MAX_WIDTH} channels a head, got {widest}"] if widest > _MAX_WIDTH else []),
        *([f"counts up to {_MAX_INT} queries and keys, got {longest}"] if longest > _MAX_INT else []),
    ]


@dataclass(frozen=True)
class Plan:
    """How a call is cut into blocks; sizes alone decide."""

    kernel: str
    tiles: int  # of queries
    warps: int
    splits: int
    split_keys: int
    shared_bytes: int

    @classmethod
    @functools.lru_cache(maxsize=4096)  # the shapes of a model recur
    def of(cls, dtype: torch.dtype, heads: int, rows: int, keys: int, width: int, value_width: int) -> Plan:
        """``heads`` of k and v over the whole batch, each for ``rows`` queries."""
        columns = next(columns for columns in _VALUE_WIDTHS if value_width <= columns)
        tile_keys = (32 if dtype == torch.float32 else 64) // (2 if columns == _VALUE_WIDTHS[-1] else 1)

        def shared_bytes(warps: int) -> int:
            """The queries, and one tile of keys and values; a row is 16 bytes longer than its channels."""
            row, value_row = (_up_to(_STEP, n) * dtype.itemsize + 16 for n in (width, value_width))
            return (warps * _WARP_ROWS + tile_keys) * row + tile_keys * value_row

        warps = min(-(-rows // _WARP_ROWS), _MAX_WARPS)
        while shared_bytes(warps) > _SHARED_BYTES:
            warps -= 1
        tiles = -(-rows // (_WARP_ROWS * warps))
        splits = max(min(-(-_ENOUGH_BLOCKS // (heads * tiles)), -(-keys // _LEAST_KEYS)), 1)
        split_keys = _up_to(tile_keys, max(-(-keys // splits), 1))
        splits = max(-(-keys // split_keys), 1)
        kernel = f"attention<{TYPES[dtype]}, {columns}>"
        return cls(kernel, tiles, warps, splits, split_keys, shared_bytes(warps))


def _up_to(multiple: int, n: int) -> int:
    return -(-n // multiple) * multiple


def _heads(x: Tensor) -> tuple[tuple[int, ...], bool]:
    """Address and strides, and whether all rows begin and end at multiples of 16 bytes."""
    pointer, item_size = x.data_ptr(), x.element_size()
    batch, head, row, _ = x.stride()
    in_vectors = not (pointer | (batch | head | row | x.shape[3]) * item_size) & 15
    return (pointer, batch, head, row), in_vectors


def _broadcast(x: Tensor | None) -> tuple[int, ...]:
    if x is None:
        return _NO_BROADCAST
    return x.data_ptr(), *(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def cross_attention(*given: Any) -> None:
    """``(q, k, v, key_mask, …, dropout_p, out, lse)``: see ``mmkern.reference.attention``."""
    *args, out, lse = given
    a = Arguments(*args)
    q, k, v = a.q, a.k, a.v
    batch, heads, queries, width = q.shape
    groups, keys, value_width = v.shape[1:]
    if lse.numel() == 0:
        return
    plan = Plan.of(q.dtype, batch * groups, heads // groups * queries, keys, width, value_width)
    results = out, lse
    if plan.splits > 1:
        partials = torch.empty((plan.splits, *out.shape), dtype=torch.float32, device=q.device)
        results = partials, torch.empty((plan.splits, *lse.shape), dtype=torch.float32, device=q.device)
    (of_q, q_vectors), (of_k, k_vectors), (of_v, v_vectors) = _heads(q), _heads(k), _heads(v)
    reach = queries + keys  # from one end to the other
    arguments = _ARGS.pack(
        *of_q,
        *of_k,
        *of_v,
        *_broadcast(a.attn_mask),
        *_broadcast(a.attn_bias),
        *_broadcast(a.bias),
        address(a.key_mask),
        address(a.prefix_lengths),
        address(a.seed if a.dropout_p > 0 else None),
        results[0].data_ptr(),
        *results[0].stride()[-4:-1],
        results[1].data_ptr(),
        lse.numel(),
        min(a.left, reach),
        min(a.right, reach),
        threshold(a.dropout_p),
        heads,
        groups,
        queries,
        keys,
        width,
        value_width,
        plan.splits,
        plan.split_keys,
        a.alignment,
        q_vectors,
        k_vectors,
        v_vectors,
        a.scale / a.softcap if a.softcap > 0 else a.scale,
        a.softcap,
        a.dropout_p,
    )
    blocks = batch * groups * plan.splits * plan.tiles
    launch(plan.kernel, (blocks, 1), plan.warps * 32, arguments, q.device, plan.shared_bytes)
    if plan.splits > 1:
        partials, partial_lses = (x.data_ptr() for x in results)
        to = out.data_ptr(), *out.stride()[:3], lse.data_ptr(), lse.numel()
        sizes = heads, queries, plan.splits, value_width
        merge = _MERGE_ARGS.pack(partials, partial_lses, *to, *sizes, DTYPES[q.dtype])
        launch("merge_attention", (lse.numel(), 1), _MERGE_THREADS, merge, q.device)
