"""Attention of one set of queries to several sources of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from mmkern import backends
from mmkern.reference import attention as reference
from mmkern.reference.attention import MAX_SOURCES

from ._checks import FLOATING, NUMBER, Arguments, check_broadcast, floating_rows
from ._define import define
from ._random import seed_tensor
from .attention import check_shapes, cross_attention, four_axes, numbers
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


# ---- In one launch ---------------------------------------------------------------------------------------------------


def _check(op: str, args: Arguments) -> None:
    q = args["q"]
    for i in range(MAX_SOURCES):
        fields = {name: args[f"{name}{i}"] for name in Source._fields}
        if i > 0 and all(x is None for x in fields.values()):
            continue
        if i > 0 and args[f"k{i - 1}"] is None:
            raise ValueError(f"{op}: sources[{i}] is there, expected sources[{i - 1}] before it")
        one = {"q": q, **fields, "attn_mask": None, "attn_bias": None, "prefix_lengths": None}
        floating_rows("q", "k", "v")(f"{op}: sources[{i}]", one)
        check_shapes(f"{op}: sources[{i}]", one)
        _check_beside(i, fields["gate"], fields["v"].shape[3], q, args["v0"].shape[3])


def _check_beside(i: int, gate: float | Tensor | None, width: int, q: Tensor, expected_width: int) -> None:
    """What a source has to do with the queries and with the first of the sources."""
    if isinstance(gate, Tensor):
        check_broadcast(_OP, f"sources[{i}].gate", gate, q, FLOATING, (*q.shape[:3], 1))
    if width != expected_width:
        raise ValueError(f"{_OP}: sources[{i}].v has {width} channels, expected {expected_width} as sources[0]")


def _arrange(args: Arguments) -> Arguments:
    for i in range(MAX_SOURCES):
        for name in (f"gate{i}", f"bias{i}"):
            args[name] = four_axes(args[name], args["q"])
        if args[f"key_mask{i}"] is not None:
            args[f"key_mask{i}"] = args[f"key_mask{i}"].contiguous()
    return args


def _of_each(*fields: str) -> list[str]:
    return [f"{field}{i}" for i in range(MAX_SOURCES) for field in fields]


_in_one_launch = define(
    f"{_OP}(Tensor q, "
    + "".join(
        f"Tensor{mark} k{i}, Tensor{mark} v{i}, Tensor? gate{i}, Tensor? key_mask{i}, Tensor? bias{i}, "
        for i, mark in enumerate(["", *["?"] * (MAX_SOURCES - 1)])
    )
    + "Tensor? seed, float scale, float softcap, bool joint, float dropout_p) -> Tensor",
    family="attention",
    reference=reference.multi_source_attention,
    output=lambda args: (*args[0].shape[:3], args[2].shape[3]),
    requires=[_check],
    kinds={
        **dict.fromkeys(("q", *_of_each("k", "v", "gate", "bias")), "grid"),
        **dict.fromkeys(("seed", *_of_each("key_mask")), "fixed"),
    },
    arrange=_arrange,
    autocast="lower",
)


def _is_one_launch(q: Tensor, sources: Sequence[Source]) -> bool:
    """Whether a kernel takes all sources: there are few, and no gradient is asked for."""
    if len(sources) > MAX_SOURCES or not isinstance(q, Tensor):
        return False
    tensors = (x for x in (q, *(field for source in sources for field in source)) if isinstance(x, Tensor))
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    return is_dynamo_compiling() or backends.has_kernel(_in_one_launch, q)


# ---- The public op ---------------------------------------------------------------------------------------------------


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
    ``Σᵢ Σⱼ pᵢⱼ = 1``. No keys are copied. Up to four sources are one launch where no gradient is asked for, on a CPU
    and in Triton; otherwise each is a call of ``cross_attention``, and a joint softmax merges their results by their
    log-sum-exp.

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
    if not isinstance(sources, (list, tuple)):
        raise TypeError(f"{_OP}: sources is {type(sources).__name__}, expected a sequence of Source")
    if not sources:
        raise ValueError(f"{_OP}: sources is empty, expected at least one Source")
    for i, source in enumerate(sources):
        if not isinstance(source, Source):
            raise TypeError(f"{_OP}: sources[{i}] is {type(source).__name__}, expected a Source")
        for name in ("k", "v"):
            if not isinstance(getattr(source, name), Tensor):
                kind = type(getattr(source, name)).__name__
                raise TypeError(f"{_OP}: sources[{i}].{name} is {kind}, expected a Tensor")
        if not isinstance(source.gate, (*NUMBER, Tensor)):
            kind = type(source.gate).__name__
            raise TypeError(f"{_OP}: sources[{i}].gate is {kind}, expected a number or a Tensor")
    own_scale, own_softcap, dropout_p = numbers(_OP, q, scale, softcap, dropout_p)
    draws = dropout_p > 0
    if _is_one_launch(q, sources):
        places: list[Any] = [x for source in sources for x in source._replace(gate=_gate_tensor(source.gate, q))]
        return _in_one_launch(
            q,
            *places,
            *[None] * (MAX_SOURCES * len(Source._fields) - len(places)),
            seed_tensor(_OP, q, generator, seed, offset) if draws else None,
            own_scale,
            own_softcap,
            mode == "joint",
            dropout_p,
        )
    if draws and seed is None:
        seed, generator = seed_tensor(_OP, q, generator, None, 0)[0], None
    options = {"scale": scale, "softcap": softcap, "dropout_p": dropout_p, "generator": generator, "seed": seed}
    return _one_by_one(q, sources, mode == "joint", offset, options)


def _gate_tensor(gate: Any, q: Tensor) -> Any:
    if isinstance(gate, NUMBER):
        return None if gate == 1 else q.new_full((1, 1, 1, 1), gate)
    return gate


def _one_by_one(q: Tensor, sources: Sequence[Source], joint: bool, offset: int, options: dict[str, Any]) -> Tensor:
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for i, (k, v, gate, key_mask, bias) in enumerate(sources):
        masks: dict[str, Any] = {"key_mask": key_mask, "bias": bias}
        try:
            out, lse = cross_attention(q, k, v, **masks, **options, offset=offset, return_lse=True)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{_OP}: sources[{i}]: {str(error).removeprefix('cross_attention: ')}") from error
        _check_beside(i, gate, out.shape[3], q, (outs or [out])[0].shape[3])
        outs.append(out)
        lses.append(lse)
        offset += lse.numel() * -(-k.shape[2] // 4)
    gates = [source.gate for source in sources]
    if joint:
        return merge_attention([_gated(*each) for each in zip(outs, gates, strict=True)], lses)[0]
    total = _gated(outs[0], gates[0])
    for out, gate in zip(outs[1:], gates[1:], strict=True):
        total = _add_gated(total, out, gate)
    return total


def _gated(out: Tensor, gate: float | Tensor) -> Tensor:
    if isinstance(gate, Tensor):
        return out * gate.to(out.dtype)
    return out if gate == 1 else out * gate


def _add_gated(total: Tensor, out: Tensor, gate: float | Tensor) -> Tensor:
    """``total + gate·out``, in one pass."""
    if isinstance(gate, Tensor):
        return torch.addcmul(total, out, gate.to(out.dtype))
    return torch.add(total, out, alpha=gate)
