"""What decoding of connectionist temporal classification means, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def collapse_repeats(tokens: Tensor, lengths: Tensor | None, blank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each run of equal tokens one, but none of ``blank``: the tokens, how many they are, and where each begins.

    Args:
        tokens: int64 ``[B, T]``.
        lengths: int64 ``[B]``, how many tokens a row has: what is below 0 counts as 0, and above T as T; or None, T.
    Returns: int64 ``[B, T]``, ``[B]`` and ``[B, T]``; −1 behind the last.
    """
    rows, width = tokens.shape
    differs = torch.ones_like(tokens, dtype=torch.bool)
    differs[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    is_kept = differs & (tokens != blank) & _is_inside(lengths, tokens)
    place = (is_kept.cumsum(-1) - 1).where(is_kept, width)
    times = torch.arange(width, device=tokens.device).expand(rows, width)

    def compacted(x: Tensor) -> Tensor:
        return x.new_full((rows, width + 1), -1).scatter(1, place, x)[:, :width]

    return compacted(tokens), is_kept.sum(-1), compacted(times)


def ctc_greedy_decode(log_probs: Tensor, lengths: Tensor | None, blank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The path of the likeliest label of each frame, the first of equals, without repeats and blanks.

    Args:
        log_probs: ``[B, T, C]``.
        lengths: int64 ``[B]``, frames of each row, as above.
    Returns: the path's log-probability ``[B]``, in float32 or float64; tokens, how many they are, and the frame in
        which each begins. A row with NaN or +∞ has the score NaN and no token.
    """
    wide = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))
    path = wide.argmax(-1)
    is_inside = _is_inside(lengths, path)
    best = wide.gather(-1, path[..., None]).squeeze(-1)
    is_bad = (~(wide < torch.inf).all(-1) & is_inside).any(-1)
    scores = best.where(is_inside, 0).sum(-1).masked_fill(is_bad, torch.nan)
    frames = is_inside.sum(-1).masked_fill(is_bad, 0)
    return scores, *collapse_repeats(path, frames, blank)


def _is_inside(lengths: Tensor | None, x: Tensor) -> Tensor:
    """Of ``x`` ``[B, T]``: the first so many of each row."""
    place = torch.arange(x.shape[1], device=x.device)
    return (place < (x.shape[1] if lengths is None else lengths[:, None])).expand(x.shape)
