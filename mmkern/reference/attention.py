"""Attention of queries to the keys of another modality, in plain PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .philox import philox, threshold

# How query i finds its place among the keys, for windows and causality.
TOP_LEFT, BOTTOM_RIGHT, RESAMPLE = 0, 1, 2


class Arguments(NamedTuple):
    """What the op and its kernels are given, checked and arranged: ``mmkern.ops.cross_attention`` says what each is."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    attn_mask: Tensor | None
    attn_bias: Tensor | None
    bias: Tensor | None
    prefix_lengths: Tensor | None
    seed: Tensor | None
    scale: float
    softcap: float
    left: int
    right: int
    alignment: int
    dropout_p: float


def cross_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """``softmax(softcap(scale·q kᵀ) + bias) v`` over the keys that a query may see, and the log of the sum.

    A query that sees no key gives 0 and −∞.
    """
    a = Arguments(*args)
    groups = a.q.shape[1] // a.k.shape[1] if a.k.shape[1] else 1
    k, v = a.k.repeat_interleave(groups, 1), a.v.repeat_interleave(groups, 1)
    scores = a.scale * (a.q @ k.mT)
    if a.softcap > 0:
        scores = a.softcap * torch.tanh(scores / a.softcap)
    for added in (a.attn_bias, a.bias):
        if added is not None:
            scores = scores + added
    seen = visible(a)
    for mask in (None if a.key_mask is None else a.key_mask[:, None, None], a.attn_mask):
        if mask is not None:
            seen = mask if seen is None else seen & mask
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    scores = scores.masked_fill(scores == -torch.inf, -torch.inf)  # and no gradient there
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    if a.seed is not None and a.dropout_p > 0:
        weights = weights * kept(weights.shape, a.seed, a.dropout_p) / (1 - a.dropout_p)
    return weights @ v, lse.to(torch.promote_types(lse.dtype, torch.float32))


# How many sources a call of multi_source_attention has places for.
MAX_SOURCES = 4


class Source(NamedTuple):
    """One source of it."""

    k: Tensor
    v: Tensor
    gate: Tensor | None
    key_mask: Tensor | None
    bias: Tensor | None


class SourcesArguments(NamedTuple):
    """What the op of several sources is given: ``mmkern.ops.multi_source_attention`` says what each is."""

    q: Tensor
    sources: tuple[Source, ...]
    seed: Tensor | None
    scale: float
    softcap: float
    joint: bool
    dropout_p: float

    @classmethod
    def of(cls, args: Sequence[Any]) -> SourcesArguments:
        """From q, the fields of each source in a row, None in those of the ones that are not there, and the rest."""
        size = len(Source._fields)
        places = [Source(*args[at : at + size]) for at in range(1, 1 + MAX_SOURCES * size, size)]
        return cls(args[0], tuple(s for s in places if s.k is not None), *args[1 + MAX_SOURCES * size :])

    def problem(self, source: Source, seed: Tensor | None) -> Arguments:
        """That of one source, with the seed as it stands there."""
        options = (self.scale, self.softcap, -1, -1, TOP_LEFT, self.dropout_p)
        return Arguments(self.q, source.k, source.v, source.key_mask, None, None, source.bias, None, seed, *options)


def multi_source_attention(*args: Any) -> Tensor:
    """``Σᵢ gateᵢ · attention to source i``, whose weights, joint, are shares of the sum over all keys.

    The Philox counters of a source follow those of the sources before it.
    """
    a = SourcesArguments.of(args)
    seed, gated, lses = a.seed, [], []
    for source in a.sources:
        out, lse = cross_attention(*a.problem(source, seed))
        gated.append(out if source.gate is None else source.gate * out)
        lses.append(lse)
        if seed is not None:
            seed = torch.stack([seed[0], seed[1] + lse.numel() * -(-source.k.shape[2] // 4)])
    if a.joint:
        all_lses = torch.stack(lses)
        total = all_lses.logsumexp(0)
        shares = torch.exp(all_lses - total.masked_fill(total == -torch.inf, 0.0))
        gated = [out * share[..., None].to(out.dtype) for out, share in zip(gated, shares, strict=True)]
    return torch.stack(gated).sum(0)


class PackedArguments(NamedTuple):
    """What the op of packed sequences is given: ``mmkern.ops.cross_attention_varlen`` says what each is."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    prefix_lengths: Tensor | None
    seed: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float
    softcap: float
    left: int
    right: int
    alignment: int
    dropout_p: float

    def of_rows(self, q: Tensor, k: Tensor, v: Tensor, prefix: Tensor | None, seed: Tensor | None) -> Arguments:
        """The same problem of these rows."""
        return Arguments(q, k, v, None, None, None, None, prefix, seed, *self[9:])


def cross_attention_varlen(*args: Any) -> tuple[Tensor, Tensor]:
    """:func:`cross_attention` of each segment; its dropout begins at counter ``offset + cu_q·Hq·⌈max_seqlen_k/4⌉``."""
    a = PackedArguments(*args)
    fours = -(-a.max_seqlen_k // 4)
    outs, lses = [], []
    ends = list(zip(a.cu_seqlens_q.tolist(), a.cu_seqlens_k.tolist(), strict=True))
    if len(ends) == 1:
        ends *= 2  # an empty segment, so that the result depends on the arguments
    for b, ((q_begin, k_begin), (q_end, k_end)) in enumerate(itertools.pairwise(ends)):
        seed = None
        if a.seed is not None:
            seed = torch.stack([a.seed[0], a.seed[1] + q_begin * a.q.shape[1] * fours])
        prefix = None if a.prefix_lengths is None else a.prefix_lengths[b : b + 1]
        q, k, v = a.q[q_begin:q_end], a.k[k_begin:k_end], a.v[k_begin:k_end]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out, lse = cross_attention(*a.of_rows(q, k, v, prefix, seed))
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def visible(a: Arguments) -> Tensor | None:
    """Which keys each query sees for its place: ``c(i) − left ≤ j ≤ c(i) + right``, or ``j`` in the prefix.

    ``c(i)`` is i, ``i + S − L`` or ``i·S/L``. A negative left or right is no bound. ``[L, S]``, or ``[B, 1, L, S]``
    with prefixes; None where every query sees every key.
    """
    queries, keys, device = a.q.shape[2], a.k.shape[2], a.q.device
    left, right = (min(bound, queries + keys) for bound in (a.left, a.right))  # as good as none, and no overflow
    if left < 0 and right < 0:
        return None
    i, j = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    if a.alignment == RESAMPLE:
        gap = j * queries - i * keys
        left, right = (bound * queries for bound in (left, right))
    else:
        gap = j - i - (keys - queries if a.alignment == BOTTOM_RIGHT else 0)
    seen = gap <= right if right >= 0 else torch.ones_like(gap, dtype=torch.bool)
    if a.prefix_lengths is not None:
        seen = seen | (j < a.prefix_lengths[:, None, None, None])
    return seen & (gap >= -left) if left >= 0 else seen


def kept(shape: torch.Size, seed: Tensor, dropout_p: float) -> Tensor:
    """Which weights of ``[B, H, L, S]`` dropout keeps: word j mod 4 of counter ``offset + row·⌈S/4⌉ + ⌊j/4⌋``."""
    *leading, keys = shape
    fours = -(-keys // 4)
    counter = seed[1] + torch.arange(torch.Size(leading).numel() * fours, device=seed.device)
    words = philox(seed[0], counter).view(*leading, fours * 4)[..., :keys]
    return words >= threshold(dropout_p)
