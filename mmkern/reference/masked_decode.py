"""A step of masked iterative decoding (MaskGIT) in plain PyTorch: sample, score, mask the least certain again."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from . import decoding
from .absorbing import of_samples
from .decoding import NEUTRAL, Filter, exponential, kept_logits


class Setting(IntEnum):
    """A column of ``settings``, ``[B or 1, 3]``."""

    TOP_K = 0  # the k largest logits are kept; all with k from V on
    TEMPERATURE = 1  # divides the logits; at 0 the largest one is chosen
    NOISE = 2  # of the scores by which the least certain are told


def masked_decode_step(
    logits: Tensor, tokens: Tensor, masked: Tensor, seed: Tensor, settings: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of what was drawn at masked positions, the tokens, and 1 where a position stays masked.

    A score is ``p + noise·g``: p of the token among the kept ones at temperature 1, g a number of the standard Gumbel
    distribution. As many of a sample's masked positions as ``counts`` says, those of the least scores, and of equal
    ones the first, stay as they were.

    Args:
        logits: ``[B, ..., V]``.
        tokens: int64 ``[B, ...]``.
        masked: bool ``[B, ...]``. Of other positions nothing is read; they keep their tokens.
        seed: int64 ``[2]``: key and offset. Row r of R has counters ``offset + r·⌈V/4⌉`` and on, and for g word r of
            those from ``offset + R·⌈V/4⌉`` on.
        settings: see ``Setting``.
        counts: int64 ``[B or 1]``.
    Returns: ``[B, ...]``, int64 and int64 ``[B, ...]``; NaN where a row has NaN, +∞ or nothing above −∞, which counts
        as the least certain, and whose token is −1.
    """
    rows = logits.reshape(-1, logits.shape[-1]).where(masked.reshape(-1, 1), 0.0)
    filters = _filters(settings, tokens)
    _, drawn = decoding.sample_tokens(rows, seed[None], filters)
    is_bad = (drawn < 0).view_as(tokens)
    filters[:, Filter.TEMPERATURE] = 1
    log_p = kept_logits(rows, filters).log_softmax(-1).gather(-1, drawn.clamp_min(0)[:, None]).view_as(tokens)
    after = seed + torch.tensor([0, len(rows) * -(-logits.shape[-1] // 4)], device=seed.device)
    gumbel = -exponential(after[None], 1, tokens.numel(), log_p.dtype).log().view_as(tokens)
    noise = of_samples(settings[:, Setting.NOISE, None], tokens).squeeze(-1).to(log_p.dtype)
    scores = (log_p.exp() + noise * gumbel).masked_fill(is_bad, -torch.inf).where(masked, torch.inf)
    rank = scores.view(*tokens.shape[:1], tokens[:1].numel()).argsort(stable=True).argsort().view_as(tokens)
    stays = masked & (rank < of_samples(counts[:, None], tokens).squeeze(-1))
    log_probs = log_p.masked_fill(is_bad, torch.nan).where(masked, 0.0)
    return log_probs, drawn.view_as(tokens).where(masked & ~stays, tokens), stays.long()


def _filters(settings: Tensor, tokens: Tensor) -> Tensor:
    """``[rows, 6]``, of ``sample_tokens``."""
    filters = settings.new_tensor([NEUTRAL[column] for column in Filter]).repeat(tokens.numel(), 1)
    of_row = of_samples(settings, tokens).expand(*tokens.shape, -1).reshape(-1, len(Setting))
    filters[:, Filter.TOP_K], filters[:, Filter.TEMPERATURE] = of_row[:, Setting.TOP_K], of_row[:, Setting.TEMPERATURE]
    return filters
