"""What the decoding family means, in plain PyTorch: what is kept of a row of logits, and the race that chooses one."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from .philox import philox

_WORD = 64


class Filter(IntEnum):
    """A column of ``filters``, ``[B or 1, 6]``, in the order in which they act but for the last, which is the first."""

    TOP_K = 0  # the k largest; all with k from V on
    TEMPERATURE = 1  # divides the logits; at 0 the largest one is chosen
    TOP_P = 2  # the fewest of that mass, the largest first; all with 1
    MIN_P = 3  # those of at least so many times the probability of the likeliest
    TYPICAL_P = 4  # the fewest of that mass, those first whose surprise is nearest to the entropy; all with 1
    REPETITION_PENALTY = 5  # of tokens of the history: divides what is above 0, multiplies what is below


NEUTRAL = {
    Filter.TOP_K: torch.inf,
    Filter.TEMPERATURE: 1.0,
    Filter.TOP_P: 1.0,
    Filter.MIN_P: 0.0,
    Filter.TYPICAL_P: 1.0,
    Filter.REPETITION_PENALTY: 1.0,
}


def sample_tokens(
    logits: Tensor, seed: Tensor, filters: Tensor, history: Tensor | None = None, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The log-probability of a token of each row of ``logits`` ``[B, V]`` among those that are kept, and the token.

    Each filter sees what the ones before it have left. Of equal tokens the lower index counts as the larger.

    Args:
        seed: int64 ``[B or 1, 2]``: key and offset. A row with a key of its own draws as a row alone would; of rows
            with one key, row b has counters ``offset + b·⌈V/4⌉`` and on.
        filters: see ``Filter``.
        history: int64 ``[B or 1, H]``: tokens that are penalized; those below 0 or from V on are none.
        allowed: int64 ``[B or 1, ⌈V/64⌉]``: bit i of word w is token 64 w + i.
    Returns: ``[B]`` and int64 ``[B]``; NaN and −1 where no token is left, or the logit of one is NaN or +∞.
    """
    candidates = _allowed(penalized(logits, filters, history), allowed)
    z = _kept(candidates, filters)
    rows, count = logits.shape
    score = (z - z.amax(-1, keepdim=True)).exp() / exponential(seed, rows, count, z.dtype)
    score = score.where(filters[:, Filter.TEMPERATURE, None] != 0, z)
    tokens = score.where(z > -torch.inf, -torch.inf).argmax(-1)  # the first of equals
    is_bad = ~(candidates < torch.inf).all(-1) | (candidates == -torch.inf).all(-1)
    return _log_probs(z, tokens).masked_fill(is_bad, torch.nan), tokens.masked_fill(is_bad, -1)


def log_probs_of_tokens(
    logits: Tensor,
    seed: Tensor,
    filters: Tensor,
    history: Tensor | None,
    allowed: Tensor | None,
    _: Tensor,
    tokens: Tensor,
) -> Tensor:
    """Of ``tokens`` among those that are kept; NaN for −1."""
    z = kept_logits(logits, filters, history, allowed)
    return _log_probs(z, tokens.clamp_min(0)).masked_fill(tokens < 0, torch.nan)


def _log_probs(z: Tensor, tokens: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def exponential(seed: Tensor, rows: int, count: int, dtype: torch.dtype) -> Tensor:
    """``[rows, count]`` numbers of the standard exponential distribution: ``−ln(1 − v)``, ``v = (w + ½)·2⁻³²``.

    v is rounded to float32, which leaves small ones their digits: it is these that win a race. Word i of a row is the
    i-th of its counters' words, four each.
    """
    fours = -(-count // 4)
    counters = seed[:, 1:] + torch.arange(fours, device=seed.device)
    if seed.shape[0] == 1:
        counters = counters + fours * torch.arange(rows, device=seed.device)[:, None]
    words = philox(seed[:, :1], counters).flatten(-2)[:, :count]
    v = (words.float() * 2.0**-32 + 2.0**-33).clamp_max(1 - 2.0**-24)
    return -torch.log1p(-v.to(dtype)).expand(rows, count)


def kept_logits(
    logits: Tensor, filters: Tensor, history: Tensor | None = None, allowed: Tensor | None = None
) -> Tensor:
    """Over the temperature, and −∞ where they are not kept."""
    return _kept(_allowed(penalized(logits, filters, history), allowed), filters)


def penalized(logits: Tensor, filters: Tensor, history: Tensor | None) -> Tensor:
    """In float32, or float64."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if history is None:
        return z
    history = history.expand(len(z), -1)
    is_token = (history >= 0) & (history < z.shape[1])
    seen = torch.zeros(z.shape, dtype=torch.int64, device=z.device)
    seen = seen.scatter_add(1, history.where(is_token, 0), is_token.long()) > 0
    penalty = filters[:, Filter.REPETITION_PENALTY, None].to(z.dtype)
    return z.where(~seen, torch.where(z > 0, z / penalty, z * penalty))


def _allowed(z: Tensor, allowed: Tensor | None) -> Tensor:
    """−∞ where they are not."""
    if allowed is None:
        return z
    bits = (allowed[..., None] >> torch.arange(_WORD, device=z.device)) & 1
    return z.where(bits.flatten(-2)[:, : z.shape[1]] == 1, -torch.inf)


def _kept(z: Tensor, filters: Tensor) -> Tensor:
    top_k, temperature, top_p, min_p, typical_p, _ = filters.to(z.dtype)[:, :, None].unbind(1)
    order = z.argsort(dim=-1, descending=True, stable=True)  # before the temperature, whose rounding makes more equal
    is_first = (torch.arange(z.shape[1], device=z.device) < top_k).expand_as(z)
    z = z.where(torch.empty_like(is_first).scatter(-1, order, is_first), -torch.inf)
    z = z / temperature.masked_fill(temperature == 0, 1)
    z = _with_mass(z, order, top_p)
    z = z.where((z - z.amax(-1, keepdim=True)).exp() >= min_p, -torch.inf)
    log_p = z.double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1, keepdim=True)
    return _with_mass(z, (-log_p - entropy).abs().argsort(dim=-1, stable=True), typical_p)


def _with_mass(z: Tensor, order: Tensor, least: Tensor) -> Tensor:
    """The first in order whose probabilities come to ``least``; the first of all in any case."""
    p = z.double().softmax(-1).gather(-1, order)
    keeps = (p.cumsum(-1) - p < least) | (least >= 1)
    keeps[:, :1] = True
    return z.where(torch.empty_like(keeps).scatter(-1, order, keeps), -torch.inf)
