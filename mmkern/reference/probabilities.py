"""Probabilities of tokens in plain PyTorch: the logarithm of one, and those of the largest, made to sum to 1 again."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class Kept(IntEnum):
    """A column of ``filters``, ``[B or 1, 2]``, in the order in which they act."""

    TOP_K = 0  # the k largest; all with k from V on
    TOP_P = 1  # the fewest of that share of what is left, the largest first; all with 1


def token_log_prob(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``logits[..., token] − lse``, and of ``lse = m + log Σ exp(logits − m)`` both parts, m the largest logit.

    Args:
        logits: ``[..., V]``.
        tokens: int64 ``[...]``.
    Returns: ``[...]``, in float32 at least; NaN for a token that is none of V, and in all where a logit is NaN or +∞,
        or all are −∞.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = wide.amax(-1)
    largest = largest.masked_fill(largest.isinf(), torch.nan)
    is_token = (tokens >= 0) & (tokens < logits.shape[-1])
    own = wide.log_softmax(-1).gather(-1, tokens.where(is_token, 0)[..., None]).squeeze(-1)
    return own.masked_fill(~is_token, torch.nan), largest, (wide - largest[..., None]).logsumexp(-1)


def renormalize(probs: Tensor, filters: Tensor) -> Tensor:
    """``probs`` ``[B, V]`` of those that are kept over their sum, and 0; NaN in a row with NaN, ∞ or less, or no sum.

    Of equal ones the lower index counts as the larger.
    """
    wide = probs.to(torch.promote_types(probs.dtype, torch.float32))
    top_k, top_p = filters.to(wide.dtype)[:, :, None].unbind(1)
    order = wide.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(wide.shape[1], device=wide.device)
    is_first = (place < top_k).expand_as(wide)
    sorted_mass = wide.gather(-1, order).double().where(is_first, 0.0)
    before = sorted_mass.cumsum(-1) - sorted_mass
    in_mass = (before < top_p.double() * sorted_mass.sum(-1, keepdim=True)) | (top_p >= 1) | (place == 0)
    kept = torch.empty_like(is_first).scatter(-1, order, is_first & in_mass)
    chosen = wide.where(kept, 0.0)
    total = chosen.sum(-1, keepdim=True)
    is_bad = ~((wide >= 0) & (wide < torch.inf)).all(-1, keepdim=True) | (total == 0)
    return (chosen / total).masked_fill(is_bad, torch.nan).to(probs.dtype)
