"""Beam search of connectionist temporal classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mmkern.reference import ctc_beam as reference
from mmkern.reference.ctc_words import All, HotWords, LanguageModel, OfTokens, OfWords, Scorer

from ._checks import LARGEST, Arguments, check_number
from ._define import define, named
from ._outputs import indices, summed
from .ctc import CtcDecoded, check_blank, check_log_probs, lengths_of, raise_if_marked

_MOST = 2**31  # nodes of the tree of prefixes, and of what a frame may make of them


def _check_sizes(op: str, args: Arguments) -> None:
    beam, nbest = args["beam"], args["nbest"]
    _, frames, labels = args["log_probs"].shape
    for name, value in (("beam", beam), ("nbest", nbest)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{op}: {name} is {type(value).__name__}, expected an int")
    most = (_MOST - 1) // max(frames, labels + 1)
    if not 1 <= beam <= most:
        raise ValueError(
            f"{op}: beam is {beam}, expected an int from 1 to {most}, as there are {frames} frames of {labels} labels"
        )
    if not 1 <= nbest <= beam:
        raise ValueError(f"{op}: nbest is {nbest}, expected an int from 1 to {beam}, the beam")


def _labellings(args: Any) -> tuple[int, ...]:
    return args[0].shape[0], args[4]


def _tokens(args: Any) -> tuple[int, ...]:
    return args[0].shape[0], args[4], args[0].shape[1]


_ctc_beam_decode = define(
    "ctc_beam_decode(Tensor log_probs, Tensor? lengths, int beam, int blank, int nbest, float prune_log_prob) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    family="ctc_beam",
    reference=reference.ctc_beam_decode,
    output=(summed(_labellings), indices(_tokens), indices(_labellings), indices(_tokens)),
    requires=[check_log_probs, lengths_of("log_probs", "lengths"), check_blank, _check_sizes],
    kinds={"log_probs": "grid", "lengths": "fixed"},
    differentiable=0,
    autocast="keep",
    is_checked_by_signature=False,
)


def ctc_beam_decode(
    log_probs: Tensor,
    lengths: Tensor | None = None,
    *,
    beam: int = 100,
    blank: int = 0,
    nbest: int = 1,
    prune_log_prob: float | None = None,
    lexicon: Lexicon | None = None,
    lm: LanguageModel | None = None,
    lm_weight: float = 1.0,
    length_bonus: float = 0.0,
    hot_words: Mapping[tuple[int, ...], float] | None = None,
    errors: Literal["raise", "mark"] | None = None,
) -> CtcDecoded:
    """The likeliest labellings: ``argmax_l log Σ_{π: B(π) = l} Π_t p_t(π_t)``, by prefix beam search.

    Where the beam holds every prefix, scores are ``−torch.nn.functional.ctc_loss`` of the labellings. Of equally likely
    prefixes those that were there before a frame come first.

    Args:
        log_probs: ``[B, T, C]``, as of ``log_softmax``.
        lengths: int64 ``[B]``, frames of each row, as in :func:`collapse_repeats`.
        beam: how many prefixes are kept after each frame.
        blank: the label that is dropped, and separates equal ones.
        nbest: N, how many labellings are returned, up to ``beam``.
        prune_log_prob: labels below that are not looked at in a frame, but for its likeliest; or None.
        lexicon: words that the labelling is made of; or None: any labels.
        lm: has ``score(state, token)``, which gives the log-probability of a token and the state after it; at first the
            state is None. Tokens are the numbers of words in the lexicon, or without one the labels. Such a model, a
            lexicon and hot words are asked from Python, on the CPU, a prefix at a time: prune, and keep the beam small.
        lm_weight: times the log-probability of each token that ``lm`` sees.
        length_bonus: is added for each of these tokens: for each word, or without a lexicon for each label.
        hot_words: what a phrase, a tuple of labels, adds wherever it stands; a part of that while it is being begun.
        errors: as in :func:`ctc_greedy_decode`.
    Returns: tokens and times ``[B, N, T]``, −1 behind the last, and lengths ``[B, N]``, in int64, the likeliest first;
        a time is the frame in which the beam took the token. Scores ``[B, N]``, in float32 (float64 beside that): −∞
        where a row has fewer labellings. No gradient: it is for decoding.
    Raises: TypeError or ValueError where an argument does not fit, with its name; ValueError where a row has NaN or +∞.
    Source: Graves et al. 2006, §3.2 (prefix search); Hannun et al. 2014, First-Pass Large Vocabulary Continuous Speech
        Recognition using Bi-Directional Recurrent DNNs, algorithm 1.
    """
    op = "ctc_beam_decode"
    if errors not in (None, "raise", "mark"):
        raise ValueError(f'{op}: errors is {errors!r}, expected "raise" or "mark"')
    if prune_log_prob is not None:
        check_number(op, "prune_log_prob", prune_log_prob, "a number or None", -LARGEST, LARGEST)
    least = -torch.inf if prune_log_prob is None else float(prune_log_prob)
    given = log_probs.detach() if isinstance(log_probs, Tensor) else log_probs
    args = given, lengths, beam, blank, nbest, least
    scorer = _scorer(op, log_probs, blank, lexicon, lm, (lm_weight, length_bonus), hot_words)
    search = partial(_search, scorer) if scorer else _ctc_beam_decode
    scores, tokens, counts, times = named(op, _ctc_beam_decode, search, *args)
    if errors == "raise" or (errors is None and scores.is_cpu):
        raise_if_marked(op, scores[:, 0])
    return CtcDecoded(tokens, counts, times, scores)


# ---- Words and language models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lexicon:
    """Words, each a sequence of labels, and the label that stands between them. The last word needs none behind it."""

    words: Sequence[Sequence[int]]
    separator: int


def _search(scorer: Scorer, *args: Any) -> tuple[Tensor, ...]:
    """By the reference, on the CPU."""
    log_probs, lengths, beam, blank, nbest, least = _ctc_beam_decode._prepare(args)
    lengths = None if lengths is None else lengths.cpu()
    found = reference.ctc_beam_decode(log_probs.cpu(), lengths, beam, blank, nbest, least, scorer)
    return tuple(x.to(log_probs.device) for x in found)


def _scorer(
    op: str,
    log_probs: Tensor,
    blank: int,
    lexicon: Lexicon | None,
    lm: LanguageModel | None,
    weights: tuple[float, float],
    hot_words: Mapping[tuple[int, ...], float] | None,
) -> Scorer | None:
    check_log_probs(op, {"log_probs": log_probs})
    check_blank(op, {"blank": blank, "log_probs": log_probs})
    labels = set(range(log_probs.shape[2])) - {blank}
    for name, weight in zip(("lm_weight", "length_bonus"), weights, strict=True):
        check_number(op, name, weight, "a number", -LARGEST, LARGEST)
    if lm is not None and not callable(getattr(lm, "score", None)):
        raise TypeError(f"{op}: lm is {type(lm).__name__}, expected an object with score(state, token)")
    scorers: list[Scorer] = []
    if lexicon is not None:
        if not isinstance(lexicon, Lexicon):
            raise TypeError(f"{op}: lexicon is {type(lexicon).__name__}, expected a Lexicon")
        words = [tuple(map(int, word)) for word in lexicon.words]
        if lexicon.separator not in labels:
            raise ValueError(f"{op}: lexicon has the separator {lexicon.separator}, expected a label that is not blank")
        for number, word in enumerate(words):
            if not word or not labels - {lexicon.separator} >= set(word):
                raise ValueError(
                    f"{op}: lexicon has {list(word)} as word {number}, expected labels, neither blank nor the separator"
                )
        scorers.append(OfWords(words, lexicon.separator, lm, *weights))
    elif lm is not None or weights[1] != 0:
        scorers.append(OfTokens(lm, *weights))
    if hot_words:
        phrases = {tuple(map(int, phrase)): bonus for phrase, bonus in hot_words.items()}
        for phrase, bonus in phrases.items():
            check_number(op, "hot_words", bonus, "finite numbers", -LARGEST, LARGEST)
            if not phrase or not labels >= set(phrase):
                raise ValueError(f"{op}: hot_words has {list(phrase)}, expected labels that are not blank")
        scorers.append(HotWords(phrases))
    return All(scorers) if scorers else None
