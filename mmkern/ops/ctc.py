"""Decoding of connectionist temporal classification: from scores of frames to tokens."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmkern.reference import ctc as reference

from ._checks import Arguments, Check, check_tensor, floating_rows, is_readable
from ._define import define, named
from ._outputs import indices, summed

_NONE = -(2**63)  # a blank that no token is


class Collapsed(NamedTuple):
    """Of each row the tokens, −1 behind the last, how many there are, and the place where each began."""

    tokens: Tensor
    lengths: Tensor
    times: Tensor


class CtcDecoded(NamedTuple):
    """Of each labelling the tokens, −1 behind the last, how many there are, the frame of each, and the score."""

    tokens: Tensor
    lengths: Tensor
    times: Tensor
    scores: Tensor


def lengths_of(x: str, lengths: str) -> Check:
    """``lengths``: int64 ``[B]``, from 0 to the width of ``x`` ``[B, T, ...]``, or None."""

    def check(op: str, args: Arguments) -> None:
        row, given = args[x], args[lengths]
        check_tensor(op, lengths, given, row, (torch.int64,), row.shape[:1], x)
        if given is None or not is_readable(given):
            return
        wrong = given[(given < 0) | (given > row.shape[1])]
        if wrong.numel():
            raise ValueError(f"{op}: {lengths} has {wrong[0].item()}, expected a number from 0 to {row.shape[1]}")

    return check


def tokens_rows(*names: str) -> Check:
    """int64 tensors ``[B, T]``, each with a T of its own, of one B and device."""

    def check(op: str, args: Arguments) -> None:
        first = args[names[0]]
        for name in names:
            x = args[name]
            if not isinstance(x, Tensor):
                raise TypeError(f"{op}: {name} is {type(x).__name__}, expected a Tensor")
            if x.dim() != 2 or x.shape[0] != first.shape[0]:
                rows = "B" if name == names[0] else first.shape[0]
                raise ValueError(f"{op}: {name} has shape {list(x.shape)}, expected [{rows}, T]")
            check_tensor(op, name, x, first, (torch.int64,), None, names[0])

    return check


def check_log_probs(op: str, args: Arguments) -> None:
    floating_rows("log_probs")(op, args)
    shape = args["log_probs"].shape
    if len(shape) != 3 or shape[2] == 0:
        raise ValueError(f"{op}: log_probs has shape {list(shape)}, expected [B, T, C] with C of at least 1")


def check_blank(op: str, args: Arguments) -> None:
    blank, labels = args["blank"], args["log_probs"].shape[2]
    if not isinstance(blank, int) or isinstance(blank, bool):
        raise TypeError(f"{op}: blank is {type(blank).__name__}, expected an int")
    if not 0 <= blank < labels:
        raise ValueError(f"{op}: blank is {blank}, expected an int from 0 to {labels - 1}, a label of log_probs")


def _frames(args: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = args[0].shape[:2]
    return shape


def _batch(args: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = args[0].shape[:1]
    return shape


_COLLAPSED = (indices(_frames), indices(_batch), indices(_frames))

_collapse_repeats = define(
    "collapse_repeats(Tensor tokens, Tensor? lengths, int blank) -> (Tensor, Tensor, Tensor)",
    family="ctc",
    reference=reference.collapse_repeats,
    output=_COLLAPSED,
    requires=[tokens_rows("tokens"), lengths_of("tokens", "lengths")],
    kinds={"tokens": "grid", "lengths": "fixed"},
    differentiable=0,
    autocast="keep",
    is_checked_by_signature=False,
)

_ctc_greedy_decode = define(
    "ctc_greedy_decode(Tensor log_probs, Tensor? lengths, int blank) -> (Tensor, Tensor, Tensor, Tensor)",
    family="ctc",
    reference=reference.ctc_greedy_decode,
    output=(summed(_batch), *_COLLAPSED),
    requires=[check_log_probs, lengths_of("log_probs", "lengths"), check_blank],
    kinds={"log_probs": "grid", "lengths": "fixed"},
    differentiable=0,
    autocast="keep",
    is_checked_by_signature=False,
)


def collapse_repeats(tokens: Tensor, lengths: Tensor | None = None, blank: int | None = None) -> Collapsed:
    """Of each run of equal tokens one, and none of ``blank``: ``B(π)`` of CTC.

    Args:
        tokens: π, int64 ``[B, T]``.
        lengths: int64 ``[B]``, how many tokens each row has, from 0 to T (on a GPU, where it is not read, what is
            beyond counts as the nearest of these); or None: T.
        blank: a token that separates equal ones and is dropped, or None.
    Returns: tokens and times ``[B, T]``, −1 behind the last, and lengths ``[B]``, all int64. The run of token i begins
        at ``times[:, i]``.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Graves et al. 2006, §3.1.
    """
    op = "collapse_repeats"
    if blank is not None and (not isinstance(blank, int) or isinstance(blank, bool)):
        raise TypeError(f"{op}: blank is {type(blank).__name__}, expected an int or None")
    return Collapsed(
        *named(op, _collapse_repeats, _collapse_repeats, tokens, lengths, _NONE if blank is None else blank)
    )


def ctc_greedy_decode(
    log_probs: Tensor,
    lengths: Tensor | None = None,
    blank: int = 0,
    *,
    errors: Literal["raise", "mark"] | None = None,
) -> CtcDecoded:
    """The labelling of the likeliest path: ``B(argmax_π Σ_t log p_t(π_t))``.

    Args:
        log_probs: ``[B, T, C]``, or any scores: of equal ones in a frame the lower label is taken.
        lengths: int64 ``[B]``, frames of each row, as in :func:`collapse_repeats`.
        blank: the label that is dropped, and separates equal ones.
        errors: what becomes of a row that has NaN or +∞: "raise", or "mark" it by the score NaN and no token. By
            default "raise" on the CPU and "mark" on a GPU, which raising would wait for.
    Returns: tokens and times ``[B, T]``, −1 behind the last, and lengths ``[B]``, in int64; scores ``[B]``, the sum of
        the path's numbers, in float32 (float64 beside that). No gradient: it is for decoding.
    Raises: TypeError or ValueError where an argument does not fit, with its name; ValueError where a row has NaN or +∞.
    Source: Graves et al. 2006, §3.2 (best path decoding).
    """
    op = "ctc_greedy_decode"
    if errors not in (None, "raise", "mark"):
        raise ValueError(f'{op}: errors is {errors!r}, expected "raise" or "mark"')
    given = log_probs.detach() if isinstance(log_probs, Tensor) else log_probs
    scores, tokens, counts, times = named(op, _ctc_greedy_decode, _ctc_greedy_decode, given, lengths, blank)
    if errors == "raise" or (errors is None and scores.is_cpu):
        raise_if_marked(op, scores)
    return CtcDecoded(tokens, counts, times, scores)


def raise_if_marked(op: str, scores: Tensor) -> None:
    if is_readable(scores) and scores.isnan().any():
        rows = torch.nonzero(scores.isnan()).flatten().tolist()
        more = ", ..." if len(rows) > 8 else ""
        raise ValueError(f"{op}: log_probs has NaN or +inf in rows {', '.join(map(str, rows[:8]))}{more}")
