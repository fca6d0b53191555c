"""What beam search of CTC finds, in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ctc_words import Scorer, Tokens


@dataclass
class Prefixes:
    """The prefixes of a beam, and the log-probability of the paths of each that end in blank, and in its last token."""

    tokens: list[Tokens]
    times: list[Tokens]
    in_blank: Tensor
    in_token: Tensor
    extra: Tensor  # what a scorer adds
    states: list[int]  # the scorer's

    @property
    def total(self) -> Tensor:
        return torch.logaddexp(self.in_blank, self.in_token)


def ctc_beam_decode(
    log_probs: Tensor,
    lengths: Tensor | None,
    beam: int,
    blank: int,
    nbest: int,
    prune_log_prob: float,
    scorer: Scorer | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The likeliest labellings, of the prefixes that are among the ``beam`` likeliest after each frame.

    Args:
        log_probs: ``[B, T, C]``.
        lengths: int64 ``[B]``, frames of each row: what is below 0 counts as 0, and above T as T; or None, T.
        nbest: N, how many, up to ``beam``.
        prune_log_prob: numbers below count as −∞, but for the largest of a frame.
        scorer: adds to the score of a labelling with each token, and at its end.
    Returns: ``[B, N]``, the log-probability of each, the likeliest first; its tokens ``[B, N, T]``, how many they are,
        and the frame in which the beam took each. −∞ and no token where there are fewer; NaN for a row with NaN or +∞.
    """
    batch, width, _ = log_probs.shape
    wide = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))
    scores = wide.new_full((batch, nbest), -torch.inf)
    tokens = torch.full((batch, nbest, width), -1, device=wide.device)
    times, counts = tokens.clone(), torch.zeros(batch, nbest, dtype=torch.int64, device=wide.device)
    for b, row in enumerate(wide):
        frames = row[: width if lengths is None else max(int(lengths[b]), 0)]
        if not (frames < torch.inf).all():
            scores[b] = torch.nan
            continue
        found = _search(frames, beam, blank, prune_log_prob, scorer)
        total = found.total
        if scorer:
            total = total + found.extra + total.new_tensor([scorer.finish(state) for state in found.states])
        best = total.sort(descending=True, stable=True).indices[:nbest]
        order = best[total[best] > -torch.inf].tolist()
        scores[b, : len(order)] = total[order]
        for n, i in enumerate(order):
            counts[b, n] = count = len(found.tokens[i])
            tokens[b, n, :count] = torch.tensor(found.tokens[i], dtype=torch.int64)
            times[b, n, :count] = torch.tensor(found.times[i], dtype=torch.int64)
    return scores, tokens, counts, times


def _search(frames: Tensor, beam: int, blank: int, prune_log_prob: float, scorer: Scorer | None) -> Prefixes:
    none, zero = frames.new_full((1,), -torch.inf), frames.new_zeros(1)
    found = Prefixes([()], [()], zero, none, zero, [scorer.start() if scorer else 0])
    for time, frame in enumerate(frames):
        likely = (frame >= prune_log_prob) | (frame == frame.max())
        found = _after(found, frame.where(likely, -torch.inf), time, beam, blank, scorer)
    return found


def _after(old: Prefixes, frame: Tensor, time: int, beam: int, blank: int, scorer: Scorer | None) -> Prefixes:
    """One frame more: each prefix stays, by a blank or its last token once more, or grows by a token.

    A token that was the last one grows a prefix only behind a blank. Of equally likely ones those that stay come first,
    then those that grow in the order of their prefixes and tokens.
    """
    lasts = [tokens[-1] if tokens else blank for tokens in old.tokens]
    last = torch.tensor(lasts, dtype=torch.int64, device=frame.device)
    place = torch.arange(len(last), device=frame.device)
    in_blank = old.total + frame[blank]
    in_token = old.in_token + frame[last]
    grown = old.total[:, None] + frame
    grown[place, last] = old.in_blank + frame[last]
    grown[:, blank] = -torch.inf
    slots = {tokens: i for i, tokens in enumerate(old.tokens)}
    for i, tokens in enumerate(old.tokens):
        if tokens and tokens[:-1] in slots:  # the shorter one grows into this one
            shorter = slots[tokens[:-1]]
            in_token[i] = torch.logaddexp(in_token[i], grown[shorter, tokens[-1]])
            grown[shorter, tokens[-1]] = -torch.inf
    acoustic = torch.cat([torch.logaddexp(in_blank, in_token), grown.flatten()])
    extra = torch.cat([old.extra, _extra_of_grown(old, grown, scorer).flatten()])
    candidates = acoustic + extra
    best = candidates.sort(descending=True, stable=True).indices[:beam]
    best = best[candidates[best] > -torch.inf].sort().values
    stay, grow = best[best < len(last)], best[best >= len(last)]
    slots_and_tokens = [divmod(i - len(last), len(frame)) for i in grow.tolist()]
    states = [
        scorer.step(old.states[i], token).state if scorer else 0  # made before
        for i, token in slots_and_tokens
    ]
    return Prefixes(
        [old.tokens[i] for i in stay.tolist()] + [(*old.tokens[i], token) for i, token in slots_and_tokens],
        [old.times[i] for i in stay.tolist()] + [(*old.times[i], time) for i, _ in slots_and_tokens],
        torch.cat([in_blank[stay], frame.new_full(grow.shape, -torch.inf)]),
        torch.cat([in_token[stay], acoustic[grow]]),
        extra[best],
        [old.states[i] for i in stay.tolist()] + states,
    )


def _extra_of_grown(old: Prefixes, grown: Tensor, scorer: Scorer | None) -> Tensor:
    """Of each prefix and token, 0 where it cannot grow by that."""
    if scorer is None:
        return torch.zeros_like(grown)
    extra = [[0.0] * grown.shape[1] for _ in old.tokens]
    for i, token in (grown > -torch.inf).nonzero().tolist():
        extra[i][token] = float(old.extra[i]) + scorer.step(old.states[i], token).score
    return grown.new_tensor(extra)
