"""Attention of queries to the keys of another modality, forward and backward."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from mmkern.reference import attention as reference

from ._checks import FLOATING, LARGEST, Arguments, check_broadcast, check_number, check_tensor, floating_rows
from ._define import define
from ._random import seed_tensor

_ALIGNMENTS = {
    "top_left": reference.TOP_LEFT,
    "bottom_right": reference.BOTTOM_RIGHT,
    "resample": reference.RESAMPLE,
}
_BIASES = ("attn_bias", "bias")


def check_shapes(op: str, args: Arguments) -> None:
    q, k, v = args["q"], args["k"], args["v"]
    for name in ("q", "k", "v"):
        if args[name].dim() != 4:
            raise ValueError(
                f"{op}: {name} has shape {list(args[name].shape)}, expected [batch, heads, length, channels]"
            )
    (batch, heads, queries, width), (_, groups, keys, _) = q.shape, k.shape
    if k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(f"{op}: k has shape {list(k.shape)}, expected [{batch}, Hkv, S, {width}] as q {list(q.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{op}: v has shape {list(v.shape)}, expected {list(k.shape[:3])} and Dv as k")
    if groups == 0 or heads % groups:
        raise ValueError(f"{op}: q has {heads} heads, expected a multiple of the {groups} of k and v")
    if width == 0:
        raise ValueError(f"{op}: q has shape {list(q.shape)}, expected at least one channel")
    check_tensor(op, "key_mask", args["key_mask"], q, (torch.bool,), (batch, keys))
    check_tensor(op, "prefix_lengths", args["prefix_lengths"], q, (torch.int64, torch.int32), (batch,))
    for name, argument, dtypes in (
        ("attn_mask", "attn_mask", (torch.bool,)),
        ("attn_mask", "attn_bias", FLOATING),
        ("bias", "bias", FLOATING),
    ):
        check_broadcast(op, name, args[argument], q, dtypes, (batch, heads, queries, keys))


def _arrange(args: Arguments) -> Arguments:
    for name in ("attn_mask", *_BIASES):
        args[name] = four_axes(args[name], args["q"])
    for name in ("key_mask", "prefix_lengths"):
        if args[name] is not None:
            args[name] = args[name].contiguous()
    if args["prefix_lengths"] is not None:
        args["prefix_lengths"] = args["prefix_lengths"].long()
    return args


def four_axes(x: Tensor | None, q: Tensor) -> Tensor | None:
    """What broadcasts to four axes: of the size 1 where it is expanded, and in the dtype of q if it is no mask."""
    if x is None:
        return None
    x = x[(None,) * (4 - x.dim())]
    if x.dtype != torch.bool:
        x = x.to(q.dtype)
    if x.requires_grad:  # each element has a gradient of its own
        return x
    for axis, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if stride == 0 and size > 1:
            x = x.narrow(axis, 0, 1)
    return x if x.shape[3] == 1 or x.stride(3) == 1 else x.contiguous()


_cross_attention = define(
    "cross_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? attn_mask, Tensor? attn_bias, "
    "Tensor? bias, Tensor? prefix_lengths, Tensor? seed, float scale, float softcap, int left, int right, "
    "int alignment, float dropout_p) -> (Tensor, Tensor)",
    family="attention",
    reference=reference.cross_attention,
    output=(lambda args: (*args[0].shape[:3], args[2].shape[3]), lambda args: tuple(args[0].shape[:3])),
    requires=[floating_rows("q", "k", "v"), check_shapes],
    kinds={
        **dict.fromkeys(("q", "k", "v", *_BIASES), "grid"),
        **dict.fromkeys(("key_mask", "attn_mask", "prefix_lengths", "seed"), "fixed"),
    },
    arrange=_arrange,
    autocast="lower",
    second_derivative=False,
    backward_reads_outputs=True,
)


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    bias: Tensor | None = None,
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
    """``softmax(softcap(scale·q kᵀ) + attn_mask + bias) v``, in one pass, scores never in memory.

    Query i stands at c(i) = i + S − L among the keys (``causal_alignment="top_left"``: at i;
    ``window_alignment="resample"``: at i·S/L). It sees key j where every mask allows it and
    c(i) − left ≤ j ≤ c(i) + right.

    Args:
        q: ``[B, Hq, L, D]``.
        k: ``[B, Hkv, S, D]``; Hq is a multiple of Hkv, and neighbouring heads of q share one of k and v.
        v: ``[B, Hkv, S, Dv]``.
        key_mask: bool ``[B, S]``, True = attend.
        attn_mask: bool (True = attend) or floating (added to the scores), broadcastable to ``[B, Hq, L, S]``.
        bias: added to the scores, broadcastable to ``[B, Hq, L, S]``; has a gradient, as a floating attn_mask has.
        scale: of the scores; 1/√D by default.
        softcap: scores become ``softcap·tanh(scores / softcap)`` (Gemma 2), before masks and biases.
        is_causal: no key beyond c(i).
        causal_alignment: where c(0) is.
        prefix_lengths: int ``[B]``: keys before it are seen by every query, the others causally (PaliGemma). Beside
            it a window has no right bound of its own.
        window_size: (left, right) keys around c(i); −1 = no bound.
        window_alignment: "resample" stretches the queries over the keys: the band |i·S/L − j| ≤ w.
        dropout_p: share of the weights set to zero, the others scaled by 1 / (1 − dropout_p).
        generator: draws the seed of the dropout, where none is given.
        seed, offset: of the dropout: Philox counters offset + row·⌈S/4⌉ + ⌊j/4⌋.
        return_lse: return the log of the sum of each row's exponentials too.
    Returns: ``[B, Hq, L, Dv]`` in the dtype of q; with ``return_lse`` also ``[B, Hq, L]`` in float32 (float64 for
        float64). A query that sees no key gets 0 and −∞, and no gradient.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Dao 2023, FlashAttention-2, algorithms 1 and 2.
    """
    name = "cross_attention"
    left, right, alignment = band(name, is_causal, causal_alignment, prefix_lengths, window_size, window_alignment)
    scale, softcap, dropout_p = numbers(name, q, scale, softcap, dropout_p)
    is_floating = isinstance(attn_mask, Tensor) and attn_mask.is_floating_point()
    out, lse = _cross_attention(
        q,
        k,
        v,
        key_mask,
        None if is_floating else attn_mask,
        attn_mask if is_floating else None,
        bias,
        prefix_lengths,
        seed_tensor(name, q, generator, seed, offset) if dropout_p > 0 else None,
        scale,
        softcap,
        left,
        right,
        alignment,
        dropout_p,
    )
    return (out, lse) if return_lse else out


def check_dropout(op: str, name: str, value: float) -> None:
    check_number(op, name, value, "a number in [0, 1)", 0.0, math.nextafter(1.0, 0.0))


def numbers(
    op: str, q: Any, scale: float | None, softcap: float | None, dropout_p: float
) -> tuple[float, float, float]:
    """All three checked, with their defaults; a softcap of 0 is none."""
    if scale is None:
        # What is no q is refused by the checks that follow.
        scale = float(q.shape[-1] ** -0.5) if isinstance(q, Tensor) and q.dim() and q.shape[-1] else 1.0
    check_number(op, "scale", scale, "a finite number, or None", -LARGEST, LARGEST)
    if softcap is not None:
        check_number(op, "softcap", softcap, "a finite number above 0, or None", math.ulp(0.0), LARGEST)
    check_dropout(op, "dropout_p", dropout_p)
    return scale, 0.0 if softcap is None else softcap, dropout_p


def band(
    op: str,
    is_causal: bool,
    causal_alignment: str,
    prefix_lengths: Tensor | None,
    window_size: tuple[int, int],
    window_alignment: str,
) -> tuple[int, int, int]:
    """The bounds left and right (−1 = none), and the alignment."""
    for argument, value, known in (
        ("causal_alignment", causal_alignment, ("bottom_right", "top_left")),
        ("window_alignment", window_alignment, ("index", "resample")),
    ):
        if value not in known:
            raise ValueError(f"{op}: {argument} is {value!r}, expected {' or '.join(map(repr, known))}")
    if not isinstance(is_causal, bool):
        raise TypeError(f"{op}: is_causal is {type(is_causal).__name__}, expected a bool")
    if prefix_lengths is not None and not is_causal:
        raise ValueError(f"{op}: prefix_lengths came with is_causal=False, expected is_causal=True")
    is_pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    if not is_pair or not all(isinstance(n, int) and not isinstance(n, bool) and n >= -1 for n in window_size):
        raise ValueError(f"{op}: window_size is {window_size}, expected two integers of at least -1")
    left, right = window_size
    if prefix_lengths is not None and right >= 0:
        raise ValueError(f"{op}: window_size is {window_size}, expected (left, -1) beside prefix_lengths")
    alignment = causal_alignment if window_alignment == "index" else window_alignment
    return left, 0 if is_causal else right, _ALIGNMENTS[alignment]
