"""Attention of one set of queries to several sources of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._checks import FLOATING, NUMBER, check_broadcast
from ._random import seed_tensor
from .attention import cross_attention
from .attention_rows import merge_attention

_OP = "multi_source_attention"


class Source(NamedTuple):
    """Keys and values of one source, such as a text, an image or a control signal.

    Args:
        k: ``[B, Hkv, S, D]``.
        v: ``[B, Hkv, S, Dv]``; Dv is that of all sources.
        gate: weighs the source: a number, or a tensor broadcastable to ``[B, Hq, L, 1]``, which may need a gradient.
        key_mask: bool ``[B, S]``, True = attend.
        bias: added to the scores, broadcastable to ``[B, Hq, L, S]``; may need a gradient.
    """

    k: Tensor
    v: Tensor
    gate: float | Tensor = 1.0
    key_mask: Tensor | None = None
    bias: Tensor | None = None


def multi_source_attention(
    q: Tensor,
    sources: Sequence[Source],
    *,
    mode: Literal["sum", "joint"] = "sum",
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """Attention to several sources, each gated: ``Σᵢ gateᵢ · softmax(scale·q kᵢᵀ) vᵢ``.

    With ``mode="joint"`` one softmax runs over the keys of all sources: ``Σᵢ gateᵢ · Σⱼ pᵢⱼ vᵢⱼ`` with
    ``Σᵢ Σⱼ pᵢⱼ = 1``. No keys are copied: partial results are merged by their log-sum-exp.

    Args:
        q: ``[B, Hq, L, D]``.
        sources: one or more; Hkv and S may differ from source to source.
        mode: "sum" (decoupled cross-attention) or "joint".
        scale, softcap, dropout_p, generator, seed, offset: as in ``cross_attention``. Source i takes the Philox
            counters after those of the sources before it.
    Returns: ``[B, Hq, L, Dv]`` in the dtype of q. A query that sees no key of a source gets 0 from it.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Ye et al. 2023, IP-Adapter, eq. 5 (sum).
    """
    if mode not in ("sum", "joint"):
        raise ValueError(f"{_OP}: mode is {mode!r}, expected 'sum' or 'joint'")
    if not sources:
        raise ValueError(f"{_OP}: sources is empty, expected at least one Source")
    if dropout_p > 0 and seed is None:
        seed, generator = seed_tensor(_OP, q, generator, None, 0)[0], None
    parts: list[tuple[Tensor, Tensor]] = []
    for i, source in enumerate(sources):
        if not isinstance(source, Source):
            raise TypeError(f"{_OP}: sources[{i}] is {type(source).__name__}, expected a Source")
        try:
            out, lse = cross_attention(
                q,
                source.k,
                source.v,
                key_mask=source.key_mask,
                bias=source.bias,
                scale=scale,
                softcap=softcap,
                dropout_p=dropout_p,
                generator=generator,
                seed=seed,
                offset=offset,
                return_lse=True,
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{_OP}: sources[{i}]: {error}") from error
        _check_gate(i, source.gate, q)
        if parts and out.shape != parts[0][0].shape:
            widths = f"{out.shape[3]} channels, expected {parts[0][0].shape[3]} as sources[0]"
            raise ValueError(f"{_OP}: sources[{i}].v has {widths}")
        parts.append((out, lse))
        offset += lse.numel() * -(-source.k.shape[2] // 4)
    gates = [source.gate for source in sources]
    if mode == "sum":
        total = _gated(parts[0][0], gates[0])
        for (out, _), gate in zip(parts[1:], gates[1:], strict=True):
            total = _add_gated(total, out, gate)
        return total
    gated = [_gated(out, gate) for (out, _), gate in zip(parts, gates, strict=True)]
    return merge_attention(gated, [lse for _, lse in parts])[0]


def _check_gate(i: int, gate: float | Tensor, q: Tensor) -> None:
    if isinstance(gate, NUMBER):
        return
    if not isinstance(gate, Tensor):
        raise TypeError(f"{_OP}: sources[{i}].gate is {type(gate).__name__}, expected a number or a Tensor")
    check_broadcast(_OP, f"sources[{i}].gate", gate, q, FLOATING, (*q.shape[:3], 1))


def _gated(out: Tensor, gate: float | Tensor) -> Tensor:
    if isinstance(gate, Tensor):
        return out * gate.to(out.dtype)
    return out if gate == 1 else out * gate


def _add_gated(total: Tensor, out: Tensor, gate: float | Tensor) -> Tensor:
    """``total + gate·out``, in one pass."""
    if isinstance(gate, Tensor):
        return torch.addcmul(total, out, gate.to(out.dtype))
    return torch.add(total, out, alpha=gate)
