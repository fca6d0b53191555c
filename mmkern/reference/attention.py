"""Attention of queries to the keys of another modality, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import philox, threshold

# How query i finds its place among the keys, for windows and causality.
TOP_LEFT, BOTTOM_RIGHT, RESAMPLE = 0, 1, 2


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    attn_bias: Tensor | None,
    bias: Tensor | None,
    prefix_lengths: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    alignment: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """``softmax(softcap(scale·q kᵀ) + bias) v`` over the keys that a query may see, and the log of the sum.

    A query that sees no key gives 0 and −∞.
    """
    groups = q.shape[1] // k.shape[1] if k.shape[1] else 1
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = scale * (q @ k.mT)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    for added in (attn_bias, bias):
        if added is not None:
            scores = scores + added
    seen = visible(q.shape[2], k.shape[2], left, right, alignment, prefix_lengths, q.device)
    for mask in (None if key_mask is None else key_mask[:, None, None], attn_mask):
        if mask is not None:
            seen = mask if seen is None else seen & mask
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    scores = scores.masked_fill(scores == -torch.inf, -torch.inf)  # and no gradient there
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    if seed is not None and dropout_p > 0:
        weights = weights * kept(weights.shape, seed, dropout_p) / (1 - dropout_p)
    return weights @ v, lse.to(torch.promote_types(lse.dtype, torch.float32))


def visible(
    queries: int,
    keys: int,
    left: int,
    right: int,
    alignment: int,
    prefix_lengths: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Which keys each query sees for its place: ``c(i) − left ≤ j ≤ c(i) + right``, or ``j`` in the prefix.

    ``c(i)`` is i, ``i + S − L`` or ``i·S/L``. A negative left or right is no bound. ``[L, S]``, or ``[B, 1, L, S]``
    with prefixes; None where every query sees every key.
    """
    if left < 0 and right < 0:
        return None
    i, j = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    if alignment == RESAMPLE:
        gap = j * queries - i * keys
        left, right = (bound * queries for bound in (left, right))
    else:
        gap = j - i - (keys - queries if alignment == BOTTOM_RIGHT else 0)
    seen = gap <= right if right >= 0 else torch.ones_like(gap, dtype=torch.bool)
    if prefix_lengths is not None:
        seen = seen | (j < prefix_lengths[:, None, None, None])
    return seen & (gap >= -left) if left >= 0 else seen


def kept(shape: torch.Size, seed: Tensor, dropout_p: float) -> Tensor:
    """Which weights of ``[B, H, L, S]`` dropout keeps: word j mod 4 of counter ``offset + row·⌈S/4⌉ + ⌊j/4⌋``."""
    *leading, keys = shape
    fours = -(-keys // 4)
    counter = seed[1] + torch.arange(torch.Size(leading).numel() * fours, device=seed.device)
    words = philox(seed[0], counter).view(*leading, fours * 4)[..., :keys]
    return words >= threshold(dropout_p)
