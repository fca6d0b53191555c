"""What the decoding family means, in plain PyTorch: what is kept of a row of logits, and the race that chooses one."""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import philox

_WORD = 32


def sample_tokens(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    typical_p: Tensor | None,
    allowed: Tensor | None,
    repetition_penalty: Tensor | None,
    history: Tensor | None,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """A token of each row of ``logits`` ``[B, V]``, and its log-probability among those that are kept.

    First penalties, then what is allowed, temperature, the k largest, the smallest set of mass p, what is at least
    ``min_p`` of the likeliest, and what is typical; each sees what the one before it has left. Of equal ones the lower
    index counts as the larger.

    Args:
        temperature, top_k, top_p, min_p, typical_p, repetition_penalty: ``[B or 1]``, or None.
        allowed: int32 ``[B or 1, ⌈V/32⌉]``: bit i of word w is token 32 w + i.
        history: int64 ``[B, H]``: tokens that are penalized; those below 0 are none.
        seed: int64 ``[B or 1, 2]``: key and offset. A row with a key of its own draws as a row alone would; of rows
            with one key, row b has counters ``offset + b·⌈V/4⌉`` and on.
    Returns: int64 ``[B]`` and ``[B]``; −1 and NaN where a logit is NaN or +∞, or no token is left.
    """
    z = kept_logits(logits, temperature, top_k, top_p, min_p, typical_p, allowed, repetition_penalty, history)
    is_drawn = torch.ones((1, 1), dtype=torch.bool) if temperature is None else temperature[:, None] != 0
    rows, count = logits.shape
    race = (z - z.amax(-1, keepdim=True)).exp() / exponential(seed, rows, count, z.dtype)
    score = torch.where(is_drawn.to(z.device), race, z).where(z > -torch.inf, -torch.inf)
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


def kept_logits(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    typical_p: Tensor | None,
    allowed: Tensor | None,
    repetition_penalty: Tensor | None,
    history: Tensor | None,
) -> Tensor:
    """Over the temperature, and −∞ where they are not kept."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if history is not None and repetition_penalty is not None:
        seen = torch.zeros(z.shape, dtype=torch.int64, device=z.device)
        seen = seen.scatter_add(1, history.clamp_min(0), (history >= 0).long()) > 0
        penalty = repetition_penalty[:, None].to(z.dtype)
        z = z.where(~seen, torch.where(z > 0, z / penalty, z * penalty))
    if allowed is not None:
        bits = (allowed[..., None] >> torch.arange(_WORD, device=z.device)) & 1
        z = z.where(bits.flatten(-2)[:, : z.shape[1]] == 1, -torch.inf)
    if temperature is not None:
        z = z / temperature[:, None].to(z.dtype).masked_fill(temperature[:, None] == 0, 1)
    order = z.argsort(dim=-1, descending=True, stable=True)
    z = z.gather(-1, order)  # from here on sorted
    if top_k is not None:
        z = z.where(torch.arange(z.shape[1], device=z.device) < top_k[:, None], -torch.inf)
    if top_p is not None:
        z = _with_mass(z, top_p)
    if min_p is not None:
        z = z.where((z - z[:, :1]).exp() >= min_p[:, None], -torch.inf)
    if typical_p is not None:
        log_p = z.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1, keepdim=True)
        by_surprise = (-log_p - entropy).abs().argsort(dim=-1, stable=True)
        z = torch.full_like(z, -torch.inf).scatter(-1, by_surprise, _with_mass(z.gather(-1, by_surprise), typical_p))
    return torch.empty_like(z).scatter(-1, order, z)


def _with_mass(z: Tensor, least: Tensor) -> Tensor:
    """The first of each row whose probabilities come to ``least``; the first of all in any case."""
    p = z.softmax(-1)
    before = p.cumsum(-1) - p
    keeps = before < least[:, None]
    keeps[:, :1] = True
    return z.where(keeps, -torch.inf)
