"""What the decoding family means, in plain PyTorch: what is kept of a row of logits, and the race that chooses one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .philox import philox

_WORD = 32


@dataclass(frozen=True, eq=False)
class Filters:
    """What is kept of a row, in this order: each sees what the ones before it have left.

    Args:
        allowed: int32 ``[B or 1, ⌈V/32⌉]``: bit i of word w is token 32 w + i.
        history: int64 ``[B, H]``: tokens that are penalized; those below 0 are none.
        repetition_penalty, temperature, top_k, top_p, min_p, typical_p: ``[B or 1]``.
    """

    repetition_penalty: Tensor | None = None
    history: Tensor | None = None
    allowed: Tensor | None = None
    temperature: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    typical_p: Tensor | None = None


def sample_tokens(logits: Tensor, filters: Filters, seed: Tensor) -> tuple[Tensor, Tensor]:
    """A token of each row of ``logits`` ``[B, V]``, and its log-probability among those that are kept.

    The logits are penalized and divided by the temperature; then the k largest are kept, of these the smallest set of
    mass p, what is at least ``min_p`` of the likeliest, and what is typical. Of equal ones the lower index counts as
    the larger. At temperature 0 it is the largest.

    Args:
        seed: int64 ``[B or 1, 2]``: key and offset. A row with a key of its own draws as a row alone would; of rows
            with one key, row b has counters ``offset + b·⌈V/4⌉`` and on.
    Returns: int64 ``[B]`` and ``[B]``; −1 and NaN where a logit is NaN or +∞, or no token is left.
    """
    z = kept_logits(logits, filters)
    rows, count = logits.shape
    score = (z - z.amax(-1, keepdim=True)).exp() / exponential(seed, rows, count, z.dtype)
    if filters.temperature is not None:
        score = score.where(filters.temperature[:, None] != 0, z)
    score = score.where(z > -torch.inf, -torch.inf)
    tokens = score.argmax(-1)  # the first of equals
    log_probs = z.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    is_bad = (logits.isnan() | logits.isposinf()).any(-1) | (z == -torch.inf).all(-1)
    return tokens.masked_fill(is_bad, -1), log_probs.masked_fill(is_bad, torch.nan)


def exponential(seed: Tensor, rows: int, count: int, dtype: torch.dtype) -> Tensor:
    """``[rows, count]`` numbers of the standard exponential distribution: ``−ln(1 − v)``, ``v = (w + ½)·2⁻³²``.

    v is rounded to float32, which leaves small ones their digits: it is these that win a race.
    """
    fours = -(-count // 4)
    counters = seed[:, 1:] + torch.arange(fours, device=seed.device)
    if seed.shape[0] == 1:
        counters = counters + fours * torch.arange(rows, device=seed.device)[:, None]
    words = philox(seed[:, :1], counters).flatten(-2)[:, :count]
    v = words.float() * 2.0**-32 + 2.0**-33
    return -torch.log1p(-v.to(dtype)).expand(rows, count)


def kept_logits(logits: Tensor, filters: Filters) -> Tensor:
    """Over the temperature, and −∞ where they are not kept."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if filters.history is not None and filters.repetition_penalty is not None:
        seen = torch.zeros(z.shape, dtype=torch.int64, device=z.device)
        seen = seen.scatter_add(1, filters.history.clamp_min(0), (filters.history >= 0).long()) > 0
        penalty = filters.repetition_penalty[:, None].to(z.dtype)
        z = z.where(~seen, torch.where(z > 0, z / penalty, z * penalty))
    if filters.allowed is not None:
        bits = (filters.allowed[..., None] >> torch.arange(_WORD, device=z.device)) & 1
        z = z.where(bits.flatten(-2)[:, : z.shape[1]] == 1, -torch.inf)
    if filters.temperature is not None:
        z = z / filters.temperature[:, None].to(z.dtype).masked_fill(filters.temperature[:, None] == 0, 1)
    order = z.argsort(dim=-1, descending=True, stable=True)
    z = z.gather(-1, order)  # from here on sorted
    if filters.top_k is not None:
        z = z.where(torch.arange(z.shape[1], device=z.device) < filters.top_k[:, None], -torch.inf)
    if filters.top_p is not None:
        z = _with_mass(z, filters.top_p)
    if filters.min_p is not None:
        z = z.where((z - z[:, :1]).exp() >= filters.min_p[:, None], -torch.inf)
    if filters.typical_p is not None:
        log_p = z.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1, keepdim=True)
        by_surprise = (-log_p - entropy).abs().argsort(dim=-1, stable=True)
        z = torch.full_like(z, -torch.inf).scatter(
            -1, by_surprise, _with_mass(z.gather(-1, by_surprise), filters.typical_p)
        )
    return torch.empty_like(z).scatter(-1, order, z)


def _with_mass(z: Tensor, least: Tensor) -> Tensor:
    """The first of each row whose probabilities come to ``least``; the first of all in any case."""
    p = z.softmax(-1)
    before = p.cumsum(-1) - p
    keeps = before < least[:, None]
    keeps[:, :1] = True
    return z.where(keeps, -torch.inf)
