"""Attention as the field writes it in PyTorch: what mmkern is timed against."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

BAND = 4  # keys to each side


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def near_diagonal(q: Tensor, k: Tensor) -> Tensor:
    """The band |i·S/L − j| ≤ 4."""
    queries, keys = q.shape[2], k.shape[2]
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    return (i * keys - j * queries).abs() <= BAND * queries


def key_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return _attend(q, k, v, mask[:, None, None])


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k, v, near_diagonal(q, k))


def two_sources(q: Tensor, k: Tensor, v: Tensor, more_k: Tensor, more_v: Tensor) -> Tensor:
    return _attend(q, k, v) + _attend(q, more_k, more_v)


def segment_by_segment(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> Tensor:
    lengths = [(ends[1:] - ends[:-1]).tolist() for ends in (cu_seqlens_q, cu_seqlens_k)]
    split = [x.transpose(0, 1).split(n, 1) for x, n in ((q, lengths[0]), (k, lengths[1]), (v, lengths[1]))]
    return torch.cat([_attend(*parts) for parts in zip(*split, strict=True)], 1).transpose(0, 1)


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "cross_attention": _attend,
    "cross_attention, key mask": key_mask,
    "cross_attention, window": window,
    "multi_source_attention": two_sources,
    "cross_attention_varlen": segment_by_segment,
}
SDPA: dict[str, Callable[..., Tensor]] = {
    "cross_attention": scaled_dot_product_attention,
    "cross_attention, key mask": lambda q, k, v, mask: scaled_dot_product_attention(
        q, k, v, attn_mask=mask[:, None, None]
    ),
    "cross_attention, window": lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=near_diagonal(q, k)),
}
