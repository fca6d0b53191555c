"""CTC and edit distance as one writes them in PyTorch and Python; and the Levenshtein package, on strings."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkern.bench.case import Peer
from mmkern.extras import require

BEAM = 100


def ctc_greedy_decode(log_probs: Tensor) -> Tensor:
    return collapse_repeats(log_probs.argmax(-1))


def collapse_repeats(paths: Tensor) -> Tensor:
    """A row at a time, by ``unique_consecutive``; without blanks, which are 0."""
    tokens = torch.full(paths.shape, -1.0)
    for row, path in zip(tokens, paths, strict=True):
        found = torch.unique_consecutive(path)
        found = found[found != 0]
        row[: len(found)] = found
    return tokens


@torch.compiler.disable  # it would unroll every frame
def ctc_beam_decode(log_probs: Tensor) -> Tensor:
    """The score of the best labelling: prefixes in a dict, as in Hannun et al. 2014."""
    return log_probs.new_tensor([_best_score(row) for row in log_probs.tolist()])


def _best_score(frames: list[list[float]]) -> float:
    beam = {(): (0.0, -math.inf)}  # of paths that end in blank, and in the last token
    for frame in frames:
        found: dict[tuple[int, ...], list[float]] = {}
        for prefix, (blank, token) in beam.items():
            total = _log_add(blank, token)
            _add(found, prefix, 0, total + frame[0])
            if prefix:
                _add(found, prefix, 1, token + frame[prefix[-1]])
            for label, log in enumerate(frame[1:], 1):
                _add(found, (*prefix, label), 1, (blank if prefix[-1:] == (label,) else total) + log)
        best = sorted(found.items(), key=lambda item: -_log_add(*item[1]))[:BEAM]
        beam = {prefix: (blank, token) for prefix, (blank, token) in best}
    return max(_log_add(*ends) for ends in beam.values())


def _add(found: dict[tuple[int, ...], list[float]], prefix: tuple[int, ...], which: int, log: float) -> None:
    ends = found.setdefault(prefix, [-math.inf, -math.inf])
    ends[which] = _log_add(ends[which], log)


def _log_add(a: float, b: float) -> float:
    most, least = max(a, b), min(a, b)
    return most if least == -math.inf else most + math.log1p(math.exp(least - most))


@torch.compiler.disable  # it would unroll every frame
def ctc_forced_align(log_probs: Tensor, targets: Tensor) -> Tensor:
    """The score of the likeliest path, all rows at once; the way back is kept, too."""
    batch, count = targets.shape
    states = torch.zeros(batch, 2 * count + 1, dtype=torch.int64)
    states[:, 1::2] = targets
    may_skip = torch.zeros_like(states, dtype=torch.bool)
    may_skip[:, 3::2] = targets[:, 1:] != targets[:, :-1]
    best = torch.full(states.shape, -math.inf)
    best[:, :2] = log_probs[:, 0].gather(1, states[:, :2])
    ways = []
    for frame in log_probs.unbind(1)[1:]:
        one, two = (torch.nn.functional.pad(best, (n, 0), value=-math.inf)[:, :-n] for n in (1, 2))
        found, way = torch.stack([best, one, two.where(may_skip, -math.inf)]).max(0)
        best = found + frame.gather(1, states)
        ways.append(way)
    score, state = best[:, -2:].max(1)
    state += 2 * count - 1
    for way in reversed(ways):
        state = state - way.gather(1, state[:, None])[:, 0]
    return score


def edit_distance(a: Tensor, b: Tensor) -> Tensor:
    """All pairs at once, row by row of the table: deletions are a running minimum."""
    place = torch.arange(a.shape[1] + 1)
    row = place.expand(len(a), -1)
    for j in range(b.shape[1]):
        below = row + 1
        below[:, 1:] = below[:, 1:].minimum(row[:, :-1] + (a != b[:, j, None]))
        row = (below - place).cummin(-1).values + place
    return row[:, -1].float()


def levenshtein(task: str, args: Sequence[Any]) -> Peer:
    distance = require("Levenshtein", "Levenshtein", "bench").distance
    a, b = (["".join(map(chr, row)) for row in x.tolist()] for x in args)
    return Peer(
        lambda: torch.tensor([distance(x, y) for x, y in zip(a, b, strict=True)], dtype=torch.float32),
        args=(),
        leaves=(),
        comparable=lambda out: out,
    )
