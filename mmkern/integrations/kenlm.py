"""A kenlm model as the language model of ``ops.ctc_beam_decode``. Needs ``pip install kenlm``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_LN_10 = math.log(10.0)


class KenLM:
    """An n-gram model of words, each named by its number in ``words``.

    ``model`` is a ``kenlm.Model``, ``words`` are those of the lexicon, in its order, or the labels, as the model spells
    them; one that it does not know has the probability of ``<unk>``. A sentence begins with ``<s>``.
    """

    def __init__(self, model: Any, words: Sequence[str]) -> None:
        self._model, self._words = model, words

    def score(self, state: Any, token: int) -> tuple[float, Any]:
        """The natural logarithm of the token's probability, and the state after it."""
        import kenlm

        if state is None:
            state = kenlm.State()
            self._model.BeginSentenceWrite(state)
        after = kenlm.State()
        return _LN_10 * self._model.BaseScore(state, self._words[token], after), after
