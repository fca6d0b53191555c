"""Forced alignment of CTC in plain PyTorch: the likeliest path of a labelling that is known."""

from __future__ import annotations

import torch
from torch import Tensor


def ctc_forced_align(
    log_probs: Tensor,
    targets: Tensor,
    lengths: Tensor | None,
    target_lengths: Tensor | None,
    blank: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``argmax_{π: B(π) = l} Σ_t log p_t(π_t)``: the numbers of the path, its labels, and which of l each is.

    Of equally likely ways to a frame the one that stays counts, then that from the neighbour, then that past a blank;
    at the end the one in blank.

    Args:
        log_probs: ``[B, T, C]``.
        targets: l, int64 ``[B, S]``, none of them ``blank``.
        lengths: int64 ``[B]``, frames of each row: what is below 0 counts as 0, and above T as T; or None, T.
        target_lengths: int64 ``[B]``, of the targets alike.
    Returns: ``[B, T]``: of each frame its number, and in int64 its label and the place of that in the targets, −1 of
        blank. 0, −1 and −1 behind the last frame; NaN, −1 and −1 in a row of NaN, +∞, a target that is none of C, or no
        path.
    """
    batch, width, _ = log_probs.shape
    scores = log_probs.new_zeros(batch, width, dtype=torch.promote_types(log_probs.dtype, torch.float32))
    labels = torch.full((batch, width), -1, device=log_probs.device)
    places = labels.clone()
    for b in range(batch):
        frames = width if lengths is None else min(max(int(lengths[b]), 0), width)
        most = targets.shape[1]
        count = most if target_lengths is None else min(max(int(target_lengths[b]), 0), most)
        place = _path(log_probs[b, :frames], targets[b, :count], blank)
        if place is None:
            scores[b] = torch.nan
            continue
        places[b, :frames] = place
        labels[b, :frames] = blank if count == 0 else targets[b, place.clamp_min(0)].where(place >= 0, blank)
    return chosen(log_probs, labels).where(~scores.isnan(), torch.nan), labels, places


def chosen(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Of each frame the number of its label, 0 of none."""
    wide = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))
    return wide.gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1).where(labels >= 0, 0.0)


def scores_of_path(
    log_probs: Tensor,
    targets: Tensor,
    lengths: Tensor | None,
    target_lengths: Tensor | None,
    blank: int,
    scores: Tensor,
    labels: Tensor,
    _: Tensor,
) -> Tensor:
    return chosen(log_probs, labels).where(~scores.isnan(), torch.nan)


def _path(frames: Tensor, targets: Tensor, blank: int) -> Tensor | None:
    """Which target each frame has, −1 of blank; None where there is no path."""
    wide = frames.to(torch.promote_types(frames.dtype, torch.float32))
    count, labels = len(targets), wide.shape[1]
    if not (wide < torch.inf).all() or ((targets < 0) | (targets >= labels)).any():
        return None
    # States: a blank before each target and one behind the last; the targets. At first there is nothing.
    none = wide.new_full((1,), -torch.inf)
    skips = torch.cat([targets.new_zeros(1, dtype=torch.bool), targets[1:] != targets[:-1]])[:count]
    in_blank, in_target = torch.cat([wide.new_zeros(1), none.repeat(count)]), none.repeat(count)
    from_blank, from_target = [], []
    for frame in wide:
        before = torch.cat([none, in_target])
        passes = before[:-1].where(skips, -torch.inf)
        stay = in_target >= in_blank[:-1]
        best = in_target.where(stay, in_blank[:-1])
        skipped = passes > best
        from_blank.append((before > in_blank).long())
        from_target.append(torch.where(skipped, 2, (~stay).long()))
        in_blank = torch.maximum(in_blank, before) + frame[blank]
        in_target = passes.where(skipped, best) + frame[targets]
        top = torch.cat([in_blank, in_target]).max()
        if top > -torch.inf:  # beside the likeliest, so that numbers keep their digits
            in_blank, in_target = in_blank - top, in_target - top
    is_blank = count == 0 or bool(in_blank[-1] >= in_target[-1])
    if not (in_blank[-1] if is_blank else in_target[-1]) > -torch.inf:
        return None
    place, path = count if is_blank else count - 1, []
    for of_blank, of_target in zip(reversed(from_blank), reversed(from_target), strict=True):
        path.append(-1 if is_blank else place)
        choice = int(of_blank[place] if is_blank else of_target[place])
        if is_blank:
            place, is_blank = place - choice, choice == 0
        else:
            place, is_blank = place - (choice == 2), choice == 1
    return torch.tensor(path[::-1], dtype=torch.int64, device=frames.device)
