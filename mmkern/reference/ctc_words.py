"""What words and language models add to the score of a labelling: a number for each token more, from a state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

Tokens = tuple[int, ...]


class Step(NamedTuple):
    """What a token adds, and the state after it; −∞ where it may not come."""

    score: float
    state: Any


class Scorer(Protocol):
    """Something with a state for each labelling."""

    def start(self) -> Any: ...

    def step(self, state: Any, token: int) -> Step: ...

    def finish(self, state: Any) -> float:
        """What the end of the labelling adds."""
        ...


class LanguageModel(Protocol):
    """``score(state, token)``: the log-probability of a token, and the state after it; at first the state is None."""

    def score(self, state: Any, token: int) -> tuple[float, Any]: ...


@dataclass
class OfTokens:
    """A language model of the labels themselves."""

    model: LanguageModel | None
    weight: float
    bonus: float

    def start(self) -> Any:
        return None

    def step(self, state: Any, token: int) -> Step:
        if self.model is None:
            return Step(self.bonus, None)
        score, after = self.model.score(state, token)
        return Step(self.weight * score + self.bonus, after)

    def finish(self, state: Any) -> float:
        return 0.0


@dataclass
class _Node:
    after: dict[int, int] = field(default_factory=dict)
    word: int | None = None


@dataclass
class OfWords:
    """Words of a lexicon, between which ``separator`` stands; a model of them, by their numbers.

    The last word needs no separator; one before the first word, or behind another, adds nothing.
    """

    words: Sequence[Tokens]
    separator: int
    model: LanguageModel | None
    weight: float
    bonus: float
    _nodes: list[_Node] = field(default_factory=lambda: [_Node()])

    def __post_init__(self) -> None:
        for number, word in enumerate(self.words):
            at = 0
            for token in word:
                if token not in self._nodes[at].after:
                    self._nodes.append(_Node())
                    self._nodes[at].after[token] = len(self._nodes) - 1
                at = self._nodes[at].after[token]
            if self._nodes[at].word is None:
                self._nodes[at].word = number

    def start(self) -> Any:
        return 0, None

    def step(self, state: Any, token: int) -> Step:
        at, before = state
        if token != self.separator:
            after = self._nodes[at].after.get(token)
            return Step(-math.inf, None) if after is None else Step(0.0, (after, before))
        return Step(0.0, state) if at == 0 else self._word(at, before)

    def finish(self, state: Any) -> float:
        at, before = state
        return 0.0 if at == 0 else self._word(at, before).score

    def _word(self, at: int, before: Any) -> Step:
        word = self._nodes[at].word
        if word is None:
            return Step(-math.inf, None)
        if self.model is None:
            return Step(self.bonus, (0, None))
        score, after = self.model.score(before, word)
        return Step(self.weight * score + self.bonus, (0, after))


class HotWords:
    """A bonus for each place where a phrase stands, which grows with each token of it, and is lost where it breaks off.

    Aho and Corasick's automaton: a state is the longest end of the labelling that begins a phrase.
    """

    def __init__(self, phrases: Mapping[Tokens, float]) -> None:
        self._nodes: dict[Tokens, tuple[float, float]] = {(): (0.0, 0.0)}  # hope of a phrase, and what has been earned
        for phrase, bonus in phrases.items():
            for n in range(1, len(phrase) + 1):
                hope = max(bonus, 0.0) * n / len(phrase) if n < len(phrase) else 0.0
                self._nodes[phrase[:n]] = (max(hope, self._nodes.get(phrase[:n], (0.0, 0.0))[0]), 0.0)
        hopes = {start: hope for start, (hope, _) in self._nodes.items()}
        for start in self._nodes:
            ends = [start[n:] for n in range(len(start) + 1)]
            earned = math.fsum(phrases.get(end, 0.0) for end in ends)
            self._nodes[start] = max(hopes.get(end, 0.0) for end in ends), earned

    def start(self) -> Any:
        return ()

    def step(self, state: Any, token: int) -> Step:
        after: Tokens = (*state, token)
        while after not in self._nodes:
            after = after[1:]
        hope, earned = self._nodes[after]
        return Step(hope + earned - self._nodes[state][0], after)

    def finish(self, state: Any) -> float:
        return -self._nodes[state][0]


class All:
    """Several scorers together; each step is made once."""

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        self._scorers = scorers
        self._steps: dict[tuple[int, int], Step] = {}
        self._states: list[tuple[Any, ...]] = [tuple(each.start() for each in scorers)]

    def start(self) -> int:
        return 0

    def step(self, state: int, token: int) -> Step:
        found = self._steps.get((state, token))
        if found is None:
            found = self._steps[state, token] = self._made(self._states[state], token)
        return found

    def _made(self, states: tuple[Any, ...], token: int) -> Step:
        steps = []
        for each, state in zip(self._scorers, states, strict=True):
            steps.append(each.step(state, token))
            if steps[-1].score == -math.inf:
                return Step(-math.inf, None)
        self._states.append(tuple(step.state for step in steps))
        return Step(math.fsum(step.score for step in steps), len(self._states) - 1)

    def finish(self, state: int) -> float:
        ends = zip(self._scorers, self._states[state], strict=True)
        return math.fsum(each.finish(of_each) for each, of_each in ends)
