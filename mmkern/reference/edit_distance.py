"""What the edits between two sequences of tokens are, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

_SUBSTITUTIONS, _INSERTIONS, _DELETIONS = range(3)


def edit_distance(a: Tensor, b: Tensor, a_lengths: Tensor | None, b_lengths: Tensor | None) -> Tensor:
    """Of the fewest edits that make ``a`` into ``b``: substitutions, insertions and deletions.

    A table has the edits from the first i tokens of a to the first j of b. Its entries come from the one before it by a
    deletion where that is one of the best steps; else from the row above by an insertion, if the distance falls from
    i − 1 to i there; else from both. What a and b begin and end with is set aside first.

    Args:
        a, b: int64 ``[N, T]`` and ``[N, U]``.
        a_lengths, b_lengths: int64 ``[N]``: what is below 0 counts as 0, and above T as T, above U as U; or None.
    Returns: int64 ``[N, 3]``.
    """
    a, of_a, b, of_b = _trimmed(a, _lengths(a, a_lengths), b, _lengths(b, b_lengths))
    rows, width = a.shape
    place = torch.arange(width + 1, device=a.device).expand(rows, -1)
    counts = torch.zeros(rows, width + 1, 3, dtype=torch.int64, device=a.device)
    counts[..., _DELETIONS] = place
    for j in range(b.shape[1]):
        below = _without_deletions(counts, a != b[:, j, None])
        # The first place from which deletions lead here with the fewest edits.
        reach = (below.sum(-1) - place) * (width + 1) + place
        start = reach.cummin(-1).values % (width + 1)
        found = below.gather(1, start[..., None].expand_as(below))
        found[..., _DELETIONS] += place - start
        counts = found.where((j < of_b)[:, None, None], counts)
    return counts.gather(1, of_a[:, None, None].expand(-1, 1, 3)).squeeze(1)


def _without_deletions(counts: Tensor, differs: Tensor) -> Tensor:
    """The next row of the table, as far as insertions and pairs lead."""
    distance = counts.sum(-1)
    falls = distance[:, 1:] < distance[:, :-1]
    below = counts.clone()
    below[..., _INSERTIONS] += 1
    paired = counts[:, :-1].clone()
    paired[..., _SUBSTITUTIONS] += differs
    below[:, 1:] = below[:, 1:].where(falls[..., None], paired)
    return below


def _lengths(x: Tensor, lengths: Tensor | None) -> Tensor:
    full = torch.full(x.shape[:1], x.shape[1], device=x.device)
    return full if lengths is None else lengths.clamp(min=0).minimum(full)


def _trimmed(a: Tensor, of_a: Tensor, b: Tensor, of_b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Without what both begin with, and then without what both end with."""
    first = _equal_at_once(a, torch.zeros_like(of_a), b, torch.zeros_like(of_b), of_a.minimum(of_b), 1)
    left = of_a.minimum(of_b) - first
    last = _equal_at_once(a, of_a - 1, b, of_b - 1, left, -1)
    return _from(a, first), of_a - first - last, _from(b, first), of_b - first - last


def _equal_at_once(a: Tensor, at_a: Tensor, b: Tensor, at_b: Tensor, most: Tensor, step: int) -> Tensor:
    """How many tokens are equal, from two places on."""
    k = torch.arange(min(a.shape[1], b.shape[1]), device=a.device)
    is_inside = k < most[:, None]
    of_a, of_b = ((at[:, None] + step * k).where(is_inside, 0) for at in (at_a, at_b))
    return ((a.gather(1, of_a) == b.gather(1, of_b)) & is_inside).long().cumprod(-1).sum(-1)


def _from(x: Tensor, first: Tensor) -> Tensor:
    place = first[:, None] + torch.arange(x.shape[1], device=x.device)
    return x.gather(1, place.clamp_max(max(x.shape[1] - 1, 0)))
