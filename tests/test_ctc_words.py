"""Beam search of CTC with a lexicon, a language model and hot words: all labellings by enumeration, and use."""

from __future__ import annotations

import itertools
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmkern import ops
from mmkern.integrations.kenlm import KenLM
from mmkern.reference.ctc_words import HotWords
from tests.test_ctc import collapsed

Tokens = tuple[int, ...]


class Bigrams:
    """Of any tokens: the state is the one before."""

    def score(self, state: Any, token: int) -> tuple[float, Any]:
        return -0.3 * ((7 * (0 if state is None else state + 1) + 3 * token) % 5) - 0.1, token


def all_labellings(log_probs: torch.Tensor) -> dict[Tokens, float]:
    """Of ``[T, C]``: each, and the logarithm of its probability."""
    scores: dict[Tokens, float] = {}
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        score = sum(float(log_probs[t, label]) for t, label in enumerate(path))
        found = tuple(collapsed(list(path), 0)[0])
        scores[found] = float(torch.tensor([scores.get(found, -torch.inf), score], dtype=torch.float64).logsumexp(0))
    return scores


def chain(tokens: Tokens) -> float:
    state, total = None, 0.0
    for token in tokens:
        score, state = Bigrams().score(state, token)
        total += score
    return total


def words_of(labelling: Tokens, words: list[Tokens], separator: int) -> Tokens | None:
    """Their numbers; None where there is another."""
    parts = [tuple(part) for is_gap, part in itertools.groupby(labelling, lambda t: t == separator) if not is_gap]
    return tuple(map(words.index, parts)) if all(part in words for part in parts) else None


WORDS: list[Tokens] = [(1,), (1, 2), (2, 1)]


def expected_score(labelling: Tokens, acoustic: float, given: dict[str, Any]) -> float:
    total = acoustic
    tokens: Tokens | None = labelling
    if "lexicon" in given:
        tokens = words_of(labelling, WORDS, 3)
        if tokens is None:
            return -math.inf
    if "lm" in given:
        total += given.get("lm_weight", 1.0) * chain(tokens)
    total += given.get("length_bonus", 0.0) * len(tokens)
    for phrase, bonus in given.get("hot_words", {}).items():
        total += bonus * sum(labelling[i : i + len(phrase)] == phrase for i in range(len(labelling)))
    return total


LEXICON = ops.Lexicon(WORDS, 3)
HOT = {(1, 2): 0.7, (2, 1, 1): 1.1, (1,): -0.2, (3, 1, 2): 0.4}


@pytest.mark.parametrize(
    "given",
    [
        {"lm": Bigrams()},
        {"lm": Bigrams(), "lm_weight": 0.4, "length_bonus": 0.3},
        {"length_bonus": -0.5},
        {"lexicon": LEXICON},
        {"lexicon": LEXICON, "length_bonus": 0.8},
        {"lexicon": LEXICON, "lm": Bigrams(), "lm_weight": 1.5},
        {"hot_words": HOT},
        {"lexicon": LEXICON, "lm": Bigrams(), "hot_words": HOT},
    ],
    ids=lambda given: " ".join(given),
)
@pytest.mark.parametrize("frames", [1, 4, 6])
def test_scores_are_those_of_all_labellings(frames: int, given: dict[str, Any]) -> None:
    log_probs = torch.randn(frames, 4, generator=torch.Generator().manual_seed(frames)).double().log_softmax(-1)
    scores = {
        labelling: expected_score(labelling, acoustic, given)
        for labelling, acoustic in all_labellings(log_probs).items()
    }
    best = sorted(scores, key=lambda labelling: -scores[labelling])[:6]
    found = ops.ctc_beam_decode(log_probs[None], beam=2000, nbest=6, **given)
    for n, labelling in enumerate(best):
        if scores[labelling] == -math.inf:
            assert found.scores[0, n] == -math.inf
            continue
        assert tuple(found.tokens[0, n, : found.lengths[0, n]].tolist()) == labelling
        torch.testing.assert_close(float(found.scores[0, n]), scores[labelling])


@pytest.mark.parametrize("seed", range(20))
def test_hot_words_add_what_stands_there(seed: int) -> None:
    """Of any text, and any phrases, which overlap and are in each other."""
    g = torch.Generator().manual_seed(seed)
    phrases = {
        tuple(torch.randint(3, (int(torch.randint(1, 5, (), generator=g)),), generator=g).tolist()): bonus
        for bonus in torch.randn(6, generator=g).tolist()
    }
    text = tuple(torch.randint(3, (60,), generator=g).tolist())
    words, total = HotWords(phrases), 0.0
    state = words.start()
    for n, token in enumerate(text, 1):
        score, state = words.step(state, token)
        total += score
        expected = sum(
            bonus * sum(text[i : i + len(phrase)] == phrase for i in range(n - len(phrase) + 1))
            for phrase, bonus in phrases.items()
        )
        assert total + words.finish(state) == pytest.approx(expected, abs=1e-9)


def test_a_phrase_gives_hope_before_it_ends() -> None:
    words = HotWords({(1, 2, 3, 4): 4.0})
    state, scores = words.start(), []
    for token in (1, 2, 3, 9, 1, 2, 3, 4):
        score, state = words.step(state, token)
        scores.append(score)
    assert scores == [1, 1, 1, -3, 1, 1, 1, 1]


def test_without_words_the_search_is_the_same() -> None:
    """With a model that says nothing: its search in Python, and the kernel."""

    class Nothing:
        def score(self, state: Any, token: int) -> tuple[float, Any]:
            return 0.0, None

    log_probs = torch.randn(3, 25, 8).log_softmax(-1)
    lengths = torch.tensor([25, 0, 17])
    plain = ops.ctc_beam_decode(log_probs, lengths, beam=12, nbest=3)
    found = ops.ctc_beam_decode(log_probs, lengths, beam=12, nbest=3, lm=Nothing())
    assert torch.equal(found.tokens, plain.tokens)
    assert torch.equal(found.times, plain.times)
    torch.testing.assert_close(found.scores, plain.scores)


def test_each_token_of_a_state_is_asked_for_once() -> None:
    asked = []

    class Counting:
        def score(self, state: Any, token: int) -> tuple[float, Any]:
            asked.append((state, token))
            return -1.0, (*(state or ()), token)

    ops.ctc_beam_decode(torch.randn(1, 20, 6).log_softmax(-1), beam=10, lm=Counting())
    assert len(asked) == len(set(asked)) > 20


def test_a_model_of_kenlm(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for the package, which has its interface: states that are written to, logarithms to base 10."""

    class State:
        history: tuple[str, ...] = ()

    class Model:
        def BeginSentenceWrite(self, state: State) -> None:  # noqa: N802
            state.history = ("<s>",)

        def BaseScore(self, before: State, word: str, after: State) -> float:  # noqa: N802
            after.history = (*before.history, word)
            return -float(len(before.history)) - (word == "b")

    monkeypatch.setitem(sys.modules, "kenlm", types.SimpleNamespace(State=State))
    model = KenLM(Model(), ["a", "b"])
    score, state = model.score(None, 1)
    assert score == pytest.approx(-2 * math.log(10))
    assert state.history == ("<s>", "b")
    score, after = model.score(state, 0)
    assert score == pytest.approx(-2 * math.log(10))
    assert after.history == ("<s>", "b", "a")
    assert state.history == ("<s>", "b")


_X = torch.zeros(1, 4, 5)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.ctc_beam_decode(_X, lm=3), TypeError, r"lm is int, expected an object with score\(state, token\)"),  # type: ignore[arg-type]
    (lambda: ops.ctc_beam_decode(_X, lexicon=[(1,)]), TypeError, "lexicon is list, expected a Lexicon"),  # type: ignore[arg-type]
    (lambda: ops.ctc_beam_decode(_X, lexicon=ops.Lexicon([(1,)], 0)), ValueError, "lexicon has the separator 0"),
    (lambda: ops.ctc_beam_decode(_X, lexicon=ops.Lexicon([(1,), ()], 2)), ValueError, r"lexicon has \[\] as word 1"),
    (lambda: ops.ctc_beam_decode(_X, lexicon=ops.Lexicon([(1, 2)], 2)), ValueError, r"lexicon has \[1, 2\] as word 0"),
    (lambda: ops.ctc_beam_decode(_X, lexicon=ops.Lexicon([(1, 5)], 2)), ValueError, r"lexicon has \[1, 5\] as word 0"),
    (lambda: ops.ctc_beam_decode(_X, hot_words={(): 1.0}), ValueError, r"hot_words has \[\], expected labels"),
    (lambda: ops.ctc_beam_decode(_X, hot_words={(0, 1): 1.0}), ValueError, r"hot_words has \[0, 1\], expected labels"),
    (lambda: ops.ctc_beam_decode(_X, hot_words={(1,): math.nan}), ValueError, "hot_words is nan, expected finite"),
    (lambda: ops.ctc_beam_decode(_X, lm_weight=math.inf), ValueError, "lm_weight is inf, expected a number"),
    (lambda: ops.ctc_beam_decode(_X, length_bonus="1"), TypeError, "length_bonus is str, expected a number"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"ctc_beam_decode: {message}"):
        call()
