"""Attention of packed sequences."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
from torch import Tensor

from mmkern.reference import attention as reference

from ._checks import Arguments, check_tensor, floating_rows, is_readable
from ._define import define
from ._random import seed_tensor
from .attention import band, numbers

_INTEGERS = (torch.int32, torch.int64)


def _check(op: str, args: Arguments) -> None:
    q, k, v = args["q"], args["k"], args["v"]
    for name in ("q", "k", "v"):
        if args[name].dim() != 3:
            raise ValueError(f"{op}: {name} has shape {list(args[name].shape)}, expected [length, heads, channels]")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"{op}: k has shape {list(k.shape)}, expected [Tk, Hkv, {q.shape[2]}] as q {list(q.shape)}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"{op}: v has shape {list(v.shape)}, expected {list(k.shape[:2])} and Dv as k")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: q has {q.shape[1]} heads, expected a multiple of the {k.shape[1]} of k and v")
    if q.shape[2] == 0:
        raise ValueError(f"{op}: q has shape {list(q.shape)}, expected at least one channel")
    for side, packed in (("q", q), ("k", k)):
        _check_lengths(op, side, args, packed)
    if args["cu_seqlens_q"].shape != args["cu_seqlens_k"].shape:
        got, expected = (list(args[f"cu_seqlens_{side}"].shape) for side in ("k", "q"))
        raise ValueError(f"{op}: cu_seqlens_k has shape {got}, expected {expected} as cu_seqlens_q")
    check_tensor(op, "prefix_lengths", args["prefix_lengths"], q, _INTEGERS, (len(args["cu_seqlens_q"]) - 1,))


def _check_lengths(op: str, side: str, args: Arguments, packed: Tensor) -> None:
    """Values are read where that is free: on the CPU."""
    name, longest = f"cu_seqlens_{side}", args[f"max_seqlen_{side}"]
    ends = args[name]
    if not isinstance(longest, int) or isinstance(longest, bool):
        raise TypeError(f"{op}: max_seqlen_{side} is {type(longest).__name__}, expected an int")
    if not isinstance(ends, Tensor):
        raise TypeError(f"{op}: {name} is {type(ends).__name__}, expected a Tensor")
    check_tensor(op, name, ends, packed, _INTEGERS, None)
    if ends.dim() != 1 or len(ends) == 0:
        raise ValueError(f"{op}: {name} has shape {list(ends.shape)}, expected [segments + 1]")
    if not is_readable(ends):
        return
    values = ends.tolist()
    total = packed.shape[0]
    if values[0] != 0 or values[-1] != total or any(a > b for a, b in itertools.pairwise(values)):
        raise ValueError(f"{op}: {name} is {values}, expected numbers from 0 to {total} that do not decrease")
    found = max((b - a for a, b in itertools.pairwise(values)), default=0)
    if longest < found:
        raise ValueError(f"{op}: max_seqlen_{side} is {longest}, expected at least {found}, the longest segment")


def _arrange(args: Arguments) -> Arguments:
    for name in ("cu_seqlens_q", "cu_seqlens_k", "prefix_lengths"):
        if args[name] is not None:
            args[name] = args[name].long().contiguous()
    return args


_cross_attention_varlen = define(
    "cross_attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "Tensor? prefix_lengths, Tensor? seed, int max_seqlen_q, int max_seqlen_k, float scale, float softcap, int left, "
    "int right, int alignment, float dropout_p) -> (Tensor, Tensor)",
    family="attention",
    reference=reference.cross_attention_varlen,
    output=(lambda args: (*args[0].shape[:2], args[2].shape[2]), lambda args: (args[0].shape[1], args[0].shape[0])),
    requires=[floating_rows("q", "k", "v"), _check],
    kinds={
        **dict.fromkeys(("q", "k", "v"), "grid"),
        **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "prefix_lengths", "seed"), "fixed"),
    },
    arrange=_arrange,
    autocast="lower",
    second_derivative=False,
    backward_reads_outputs=True,
    is_checked_by_signature=False,
)


def cross_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    is_causal: bool = False,
    causal_alignment: Literal["bottom_right", "top_left"] = "bottom_right",
    prefix_lengths: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    window_alignment: Literal["index", "resample"] = "index",
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    return_lse: bool = False,
) -> Any:
    """:func:`cross_attention` of sequences that follow each other without padding, each to the keys of its own segment.

    Segment b has the queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1] − 1``, and likewise its keys. Places (causal,
    windows, prefixes) count from the beginning of a segment.

    Args:
        q: ``[Tq, Hq, D]``.
        k: ``[Tk, Hkv, D]``; Hq is a multiple of Hkv.
        v: ``[Tk, Hkv, Dv]``.
        cu_seqlens_q: int32 or int64 ``[B + 1]``: where segments begin, from 0 to Tq.
        cu_seqlens_k: the same of the keys, from 0 to Tk.
        max_seqlen_q: at least the most queries of a segment.
        max_seqlen_k: at least the most keys of a segment.
        prefix_lengths: int ``[B]``.
        seed, offset: of the dropout: a segment's Philox counters begin at
            ``offset + cu_seqlens_q[b]·Hq·⌈max_seqlen_k/4⌉`` and go on as those of ``cross_attention``.
        scale, softcap, is_causal, causal_alignment, window_size, window_alignment, dropout_p, generator, return_lse:
            as in ``cross_attention``.
    Returns: ``[Tq, Hq, Dv]`` in the dtype of q; with ``return_lse`` also ``[Hq, Tq]`` in float32 (float64 for
        float64). A query whose segment has no key gets 0 and −∞, and no gradient.
    Raises: TypeError or ValueError where an argument does not fit, with its name. Values of cu_seqlens are read, and
        checked, on the CPU alone.
    Source: Dao 2023, FlashAttention-2, algorithms 1 and 2; the layout is that of flash-attn.
    """
    name = "cross_attention_varlen"
    left, right, alignment = band(name, is_causal, causal_alignment, prefix_lengths, window_size, window_alignment)
    scale, softcap, dropout_p = numbers(name, q, scale, softcap, dropout_p)
    out, lse = _cross_attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        prefix_lengths,
        seed_tensor(name, q, generator, seed, offset) if dropout_p > 0 else None,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        softcap,
        left,
        right,
        alignment,
        dropout_p,
    )
    return (out, lse) if return_lse else out
