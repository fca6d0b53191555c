"""Forced alignment of connectionist temporal classification."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmkern.reference import ctc_align as reference

from ._checks import Arguments, is_readable
from ._define import define, named
from ._outputs import indices, summed
from .ctc import check_blank, check_log_probs, lengths_of, tokens_rows


class CtcAligned(NamedTuple):
    """Of each frame its label, the place of that in the targets, −1 of blank, and its log-probability."""

    labels: Tensor
    places: Tensor
    scores: Tensor


def _frames(args: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = args[0].shape[:2]
    return shape


def _check_targets(op: str, args: Arguments) -> None:
    targets, log_probs, blank = args["targets"], args["log_probs"], args["blank"]
    tokens_rows("targets")(op, args)
    if targets.shape[0] != log_probs.shape[0]:
        raise ValueError(f"{op}: targets has shape {list(targets.shape)}, expected [{log_probs.shape[0]}, S]")
    if targets.device != log_probs.device:
        raise ValueError(f"{op}: targets is on {targets.device}, expected {log_probs.device} as log_probs")
    lengths_of("targets", "target_lengths")(op, args)
    if not is_readable(targets):
        return
    labels, given = log_probs.shape[2], args["target_lengths"]
    most = targets.shape[1] if given is None else given[:, None]
    wrong = (targets < 0) | (targets >= labels) | (targets == blank)
    wrong &= torch.arange(targets.shape[1]) < most
    if wrong.any():
        raise ValueError(
            f"{op}: targets has {int(targets[wrong][0])}, expected a label from 0 to {labels - 1} that is not blank"
        )


def _arrange(args: Arguments) -> Arguments:
    dense = {name: None if args[name] is None else args[name].contiguous() for name in ("lengths", "target_lengths")}
    return args | dense | {"targets": args["targets"].contiguous()}


_ctc_forced_align = define(
    "ctc_forced_align(Tensor log_probs, Tensor targets, Tensor? lengths, Tensor? target_lengths, int blank) "
    "-> (Tensor, Tensor, Tensor)",
    family="ctc_align",
    reference=reference.ctc_forced_align,
    from_indices=reference.scores_of_path,
    output=(summed(_frames), indices(_frames), indices(_frames)),
    requires=[check_log_probs, lengths_of("log_probs", "lengths"), check_blank, _check_targets],
    kinds={"log_probs": "grid", **dict.fromkeys(("targets", "lengths", "target_lengths"), "fixed")},
    arrange=_arrange,
    differentiable=1,
    autocast="keep",
    is_checked_by_signature=False,
)


def ctc_forced_align(
    log_probs: Tensor,
    targets: Tensor,
    lengths: Tensor | None = None,
    target_lengths: Tensor | None = None,
    blank: int = 0,
    *,
    errors: Literal["raise", "mark"] | None = None,
) -> CtcAligned:
    """The likeliest path of a known labelling: ``argmax_{π: B(π) = l} Σ_t log p_t(π_t)``.

    Of equally likely ways to a frame the one that stays counts, then that from the neighbour, then that past a blank.

    Args:
        log_probs: ``[B, T, C]``, as of ``log_softmax``.
        targets: l, int64 ``[B, S]``, from 0 to C − 1, none of them ``blank``; what is behind a row's length is not
            read.
        lengths: int64 ``[B]``, frames of each row, as in :func:`collapse_repeats`.
        target_lengths: int64 ``[B]``, from 0 to S, or None: S.
        blank: the label that may stand between targets, and has to between equal ones.
        errors: what becomes of a row that has NaN or +∞, or too few frames for its targets: "raise", or "mark" it by
            scores of NaN and labels of −1. By default "raise" on the CPU and "mark" on a GPU, which raising would wait
            for.
    Returns: labels and places int64 ``[B, T]``: of each frame the label, and which target that is, −1 of blank; both −1
        behind the last frame. Scores ``[B, T]``, each frame's number, in float32 (float64 beside that), with a gradient
        for log_probs along the path; their sum is the path's log-probability.
    Raises: TypeError or ValueError where an argument does not fit, with its name; ValueError where a row has no path.
    Source: Graves et al. 2006, §4.1, with the maximum in place of the sum (Viterbi).
    """
    op = "ctc_forced_align"
    if errors not in (None, "raise", "mark"):
        raise ValueError(f'{op}: errors is {errors!r}, expected "raise" or "mark"')
    scores, labels, places = named(
        op, _ctc_forced_align, _ctc_forced_align, log_probs, targets, lengths, target_lengths, blank
    )
    if (errors == "raise" or (errors is None and scores.is_cpu)) and is_readable(scores.detach()):
        is_bad = scores.detach().isnan().any(1)
        if is_bad.any():
            rows = torch.nonzero(is_bad).flatten().tolist()
            more = ", ..." if len(rows) > 8 else ""
            where = ", ".join(map(str, rows[:8]))
            raise ValueError(f"{op}: log_probs has no path in rows {where}{more}: too few frames, NaN, +inf or -inf")
    return CtcAligned(labels, places, scores)
