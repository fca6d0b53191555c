"""Word and character error rates, by :func:`mmkern.ops.edit_distance`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmkern.ops.edit_distance import edit_distance


class ErrorRate(NamedTuple):
    """``rate = (substitutions + insertions + deletions) / length``, of all pairs together."""

    rate: float
    substitutions: int
    insertions: int
    deletions: int
    length: int


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRate:
    """``(S + I + D) / N`` in words, which white space separates; nothing else is normalized.

    Args:
        references: what was said.
        hypotheses: what was recognized, as many.
    Returns: the rate, over all pairs together (above 1 where there are more edits than words, NaN where there is no
        word), substitutions S, insertions I, deletions D, and words of the references N.
    Raises: TypeError or ValueError where the two are no sequences of as many strings.
    Source: Morris et al. 2004, From WER and RIL to MER and WIL, §2.
    """
    return _rate("word_error_rate", references, hypotheses, str.split)


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRate:
    """The same in characters (code points), white space among them.

    Args and Returns: as those of :func:`word_error_rate`.
    Raises: TypeError or ValueError where the two are no sequences of as many strings.
    """
    return _rate("character_error_rate", references, hypotheses, list)


def _rate(
    op: str, references: Sequence[str], hypotheses: Sequence[str], split: Callable[[str], list[str]]
) -> ErrorRate:
    for name, texts in (("references", references), ("hypotheses", hypotheses)):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{op}: {name} is {type(texts).__name__}, expected a sequence of strings")
    if len(references) != len(hypotheses):
        raise ValueError(f"{op}: hypotheses has {len(hypotheses)} strings, expected {len(references)} as references")
    numbers: dict[str, int] = {}
    a, of_a = _numbered(list(map(split, references)), numbers)
    b, of_b = _numbered(list(map(split, hypotheses)), numbers)
    _, *counts = (x.sum().item() for x in edit_distance(a, b, of_a, of_b))
    substitutions, insertions, deletions = map(int, counts)
    length = int(of_a.sum())
    rate = sum(counts) / length if length else float("nan")
    return ErrorRate(rate, substitutions, insertions, deletions, length)


def _numbered(rows: Sequence[Sequence[str]], numbers: dict[str, int]) -> tuple[Tensor, Tensor]:
    """A number for each token, ``[N, T]``, and how many each row has; ``numbers`` grows."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    padded = torch.full((len(rows), max((len(row) for row in rows), default=0)), -1)
    for to, row in zip(padded, rows, strict=True):
        to[: len(row)] = torch.tensor([numbers.setdefault(token, len(numbers)) for token in row], dtype=torch.int64)
    return padded, lengths
