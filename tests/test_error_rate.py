"""Word and character error rates: by hand, and against the Levenshtein package."""

from __future__ import annotations

import math
from collections.abc import Callable

import Levenshtein
import pytest
import torch

from mmkern.metrics import ErrorRate, character_error_rate, word_error_rate

SAID = ["the cat sat on the mat", "a b c", "", "yes"]
HEARD = ["the bat sat  on mat", "a x b c", "uh", "yes"]


def test_words_by_hand() -> None:
    """cat/bat, the second "the", x, uh."""
    assert word_error_rate(SAID, HEARD) == ErrorRate(4 / 10, 1, 2, 1, 10)


def test_characters_by_hand() -> None:
    assert character_error_rate(["abc", "d"], ["axc", ""]) == ErrorRate(2 / 4, 1, 0, 1, 4)


def test_edits_are_those_of_the_package() -> None:
    g = torch.Generator().manual_seed(0)
    words = ["no", "yes", "maybe", "well"]

    def text() -> str:
        count = int(torch.randint(0, 12, (), generator=g))
        return " ".join(words[i] for i in torch.randint(0, 4, (count,), generator=g).tolist())

    said, heard = [text() for _ in range(200)], [text() for _ in range(200)]
    for metric, split in ((word_error_rate, str.split), (character_error_rate, list)):
        found = metric(said, heard)
        kinds = [kind for a, b in zip(said, heard, strict=True) for kind, *_ in Levenshtein.editops(split(a), split(b))]
        expected = [kinds.count(kind) for kind in ("replace", "insert", "delete")]
        assert list(found[1:4]) == expected
        assert found.rate == sum(expected) / found.length


def test_nothing_was_said() -> None:
    found = word_error_rate([""], ["uh"])
    assert math.isnan(found.rate)
    assert found.insertions == 1
    assert math.isnan(word_error_rate([], []).rate)


@pytest.mark.parametrize("metric", [word_error_rate, character_error_rate])
def test_bad_input(metric: Callable[..., ErrorRate]) -> None:
    name = metric.__name__
    with pytest.raises(TypeError, match=f"{name}: references is str, expected a sequence of strings"):
        metric("a b", ["a b"])
    with pytest.raises(TypeError, match=f"{name}: hypotheses is list, expected a sequence of strings"):
        metric(["a"], [1])
    with pytest.raises(ValueError, match=f"{name}: hypotheses has 2 strings, expected 1 as references"):
        metric(["a"], ["a", "b"])
