"""The edits between sequences of tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from mmkern.reference import edit_distance as reference

from ._define import define, named
from ._outputs import indices
from .ctc import lengths_of, tokens_rows


class Edits(NamedTuple):
    """Of each pair, int64 ``[N]``; the distance is the sum of the others."""

    distance: Tensor
    substitutions: Tensor
    insertions: Tensor
    deletions: Tensor


def _counts(args: Any) -> tuple[int, ...]:
    return args[0].shape[0], 3


_edit_distance = define(
    "edit_distance(Tensor a, Tensor b, Tensor? a_lengths, Tensor? b_lengths) -> Tensor",
    family="edit_distance",
    reference=reference.edit_distance,
    output=indices(_counts),
    requires=[tokens_rows("a", "b"), lengths_of("a", "a_lengths"), lengths_of("b", "b_lengths")],
    kinds={"a": "grid", "b": "grid", "a_lengths": "fixed", "b_lengths": "fixed"},
    differentiable=0,
    autocast="keep",
    is_checked_by_signature=False,
)


def edit_distance(a: Tensor, b: Tensor, a_lengths: Tensor | None = None, b_lengths: Tensor | None = None) -> Edits:
    """The fewest edits that make a into b: ``min substitutions + insertions + deletions`` (Levenshtein).

    Where several alignments need as few, the counts are those of the one that is found backwards from the ends, once
    what both begin and end with is set aside: a deletion where that is one of the best steps, else an insertion where
    the distance to the row above falls, else a pair. They are those of ``Levenshtein.editops``, on which jiwer's word
    error rate stands.

    Args:
        a: int64 ``[N, T]``: for an error rate, the reference.
        b: int64 ``[N, U]``: for an error rate, the hypothesis.
        a_lengths, b_lengths: int64 ``[N]``, how many tokens each row has, from 0 to T, and U (on a GPU, where they are
            not read, what is beyond counts as the nearest of these); or None: all.
    Returns: distance, substitutions, insertions (tokens of b alone) and deletions (of a alone), int64 ``[N]``.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Myers 1999, A fast bit-vector algorithm for approximate string matching; Hyyrö 2003 (of long ones).
    """
    op = "edit_distance"
    counts = named(op, _edit_distance, _edit_distance, a, b, a_lengths, b_lengths)
    return Edits(counts.sum(-1), *counts.unbind(-1))
