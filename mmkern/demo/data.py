"""1,797 handwritten digits, and prompts that are true of them, from "a digit" to "the number seven"."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmkern.extras import require

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = frozenset(range(10))


@dataclass(frozen=True)
class Prompt:
    """A text and the digits of which it is true."""

    text: str
    digits: frozenset[int]


def _prompts() -> tuple[Prompt, ...]:
    odd = frozenset({1, 3, 5, 7, 9})
    even = DIGITS - odd
    small = frozenset({0, 1, 2, 3, 4})
    large = DIGITS - small
    groups = {
        "a digit": DIGITS,
        "a handwritten digit": DIGITS,
        "an odd digit": odd,
        "an even digit": even,
        "a number smaller than five": small,
        "a number larger than four": large,
        "a prime number": frozenset({2, 3, 5, 7}),
        "a square number": frozenset({0, 1, 4, 9}),
        "a power of two": frozenset({1, 2, 4, 8}),
        "a multiple of three": frozenset({0, 3, 6, 9}),
        "an odd number smaller than five": odd & small,
        "an even number smaller than five": even & small,
        "an odd number larger than four": odd & large,
        "an even number larger than four": even & large,
    }
    named = [
        Prompt(template.format(name=name, figure=figure), frozenset({figure}))
        for figure, name in enumerate(NAMES)
        for template in ("a handwritten {name}", "the digit {figure}", "the number {name}")
    ]
    return (*(Prompt(text, digits) for text, digits in groups.items()), *named)


PROMPTS = _prompts()


def tokens() -> tuple[Tensor, int]:
    """The prompts' words as numbers, ``[P, words]`` padded with 0, and the size of the vocabulary."""
    words = sorted({word for prompt in PROMPTS for word in prompt.text.split()})
    number = {word: i for i, word in enumerate(words, start=1)}
    rows = [torch.tensor([number[word] for word in prompt.text.split()]) for prompt in PROMPTS]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), len(words) + 1


@dataclass(frozen=True)
class Digits:
    """Images ``[N, 1, 8, 8]`` in 0..1 and their labels ``[N]``."""

    images: Tensor
    labels: Tensor


def load(held_out: float, seed: int) -> tuple[Digits, Digits]:
    """The digits for training and those held out, split alike in every class."""
    digits = require("sklearn.datasets", "scikit-learn", "demo").load_digits()
    split = require("sklearn.model_selection", "scikit-learn", "demo").train_test_split
    parts = split(digits.images, digits.target, test_size=held_out, stratify=digits.target, random_state=seed)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    return (
        Digits(train_images.float()[:, None] / 16, train_labels),
        Digits(test_images.float()[:, None] / 16, test_labels),
    )


@dataclass(frozen=True)
class Batch:
    images: Tensor
    prompt_ids: Tensor


def batches(digits: Digits, count: int, size: int, generator: torch.Generator) -> list[Batch]:
    """Random images, each with one of the prompts that are true of it.

    The level comes first (one digit in half of the draws, else a few, about half of them, all), then the prompt.
    """
    weights = _prompt_weights()
    found = []
    for _ in range(count):
        chosen = torch.randperm(len(digits.images), generator=generator)[:size]
        labels = digits.labels[chosen]
        prompt_ids = torch.multinomial(weights[labels], 1, generator=generator)[:, 0]
        found.append(Batch(digits.images[chosen], prompt_ids))
    return found


def _prompt_weights() -> Tensor:
    """``[10, P]``: how often a prompt is drawn for a digit."""
    true = torch.tensor([[digit in prompt.digits for prompt in PROMPTS] for digit in sorted(DIGITS)]).float()
    level = torch.tensor([_level(prompt) for prompt in PROMPTS])
    weights = torch.zeros_like(true)
    for each in range(4):
        of_level = true * (level == each)
        weights += (3 if each == 0 else 1) * of_level / of_level.sum(1, keepdim=True).clamp_min(1)
    return weights


def _level(prompt: Prompt) -> int:
    return next(level for level, most in enumerate((1, 3, 5, 10)) if len(prompt.digits) <= most)
