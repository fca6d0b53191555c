"""Cases of masked iterative decoding. Rows that are not masked are full of NaN: nothing of them may be looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mmkern.reference.masked_decode import Setting

from .case import Case
from .hyperbolic import randn

STEP = "masked_decode_step"
Make = Callable[[torch.Generator], Tensor]

PLAIN = {Setting.TOP_K: torch.inf, Setting.TEMPERATURE: 1.0, Setting.NOISE: 0.0}
MASKGCT = {Setting.TOP_K: 21, Setting.TEMPERATURE: 0.8, Setting.NOISE: 0.5}
# Positions, and tokens: one, fewer than a vector, some vectors and what is left, several stretches and tiles.
SIZES = (((1,), 1), ((5,), 7), ((3, 9), 40), ((2, 40), 65), ((2, 3, 7), 111), ((1, 2), 5000), ((0, 3), 9), ((2, 0), 9))


def logits(*sizes: int) -> Make:
    return lambda g: 2 * randn(g, *sizes)


def few_values(*sizes: int) -> Make:
    """Many scores are equal, in whatever order a row is summed."""

    def make(g: torch.Generator) -> Tensor:
        x = torch.randint(0, 2, sizes, generator=g).double().log()
        x[..., 0] = 0
        return x

    return make


def odd(g: torch.Generator) -> Tensor:
    """Among rows as they are: NaN, +inf, nothing but -inf, one token left, and huge ones."""
    x = randn(g, 2, 8, 60)
    x[0, 1, 40], x[0, 3, 59], x[0, 5], x[1, 2, 1:], x[1, 4] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        -torch.inf,
        3e4 * x[1, 4],
    )
    return x


def step(
    label: str, make: Make, settings: list[dict[Setting, float]], counts: list[int], *, share: float = 0.7
) -> Case:
    """``settings`` and ``counts``: one for all samples, or one a sample. ``share``: of positions, is masked."""

    def build(g: torch.Generator) -> list[Any]:
        x = make(g)
        positions, size = x.shape[:-1], x.shape[-1]
        masked = torch.rand(positions, generator=g) < share
        tokens = torch.randint(size, positions, generator=g).masked_fill(masked, size)
        if 0 not in x.stride():
            x.masked_fill_(~masked[..., None], torch.nan)
        seed = torch.randint(2**40, (2,), generator=g)
        table = torch.tensor([[each[column] for column in Setting] for each in settings], dtype=torch.float64)
        return [x, tokens, masked, seed, table, torch.tensor(counts)]

    return Case(STEP, label, build, wide=(4,))


def _cases() -> Iterator[Case]:
    for positions, size in SIZES:
        name = "x".join(map(str, (*positions, size)))
        yield step(name, logits(*positions, size), [PLAIN], [2])
        yield step(f"{name}, MaskGCT", logits(*positions, size), [MASKGCT], [3])
    many = logits(3, 16, 80)
    for name, settings in {
        "cold": PLAIN | {Setting.TEMPERATURE: 1e-3},
        "hot": PLAIN | {Setting.TEMPERATURE: 5.0},
        "greedy": MASKGCT | {Setting.TEMPERATURE: 0.0},
        "noisy": PLAIN | {Setting.NOISE: 30.0},
        "top-1": PLAIN | {Setting.TOP_K: 1},
        "top-k of many": PLAIN | {Setting.TOP_K: 300},
    }.items():
        yield step(f"{name}, 3x16x80", many if "many" not in name else logits(2, 20, 700), [settings], [7])
    yield step("none again", many, [MASKGCT], [0])
    yield step("all again", many, [MASKGCT], [16])
    yield step("more than there are", many, [PLAIN], [13], share=0.3)
    yield step("below 0", many, [PLAIN], [-4])
    yield step("none masked", many, [MASKGCT], [7], share=0.0)
    yield step("all masked", many, [MASKGCT], [7], share=1.0)
    yield step("ties", few_values(2, 30, 40), [PLAIN | {Setting.TEMPERATURE: 0.0}], [12])
    yield step("ties, top-k", few_values(2, 30, 40), [PLAIN | {Setting.TOP_K: 12}], [12])
    yield step("several stretches of positions", logits(2, 5000, 6), [MASKGCT], [2600, 40])
    yield step("several stretches, ties", few_values(1, 5000, 6), [PLAIN | {Setting.TEMPERATURE: 0.0}], [2400])
    each = [PLAIN, MASKGCT, PLAIN | {Setting.TEMPERATURE: 0.0}, MASKGCT | {Setting.TOP_K: 2}]
    yield step("settings and a count each", logits(4, 20, 90), each, [0, 5, 20, 9])
    yield step("odd", odd, [MASKGCT], [2], share=1.0)
    yield step("odd, most again", odd, [PLAIN], [6], share=1.0)
    yield step("rows inside", lambda g: logits(5, 2, 3, 40)(g).permute(1, 2, 0, 3), [MASKGCT], [4])
    yield step("sliced", lambda g: logits(2, 9, 70)(g)[..., 5:60], [MASKGCT], [4])
    yield step("columns", lambda g: logits(2, 40, 9)(g).transpose(1, 2), [MASKGCT], [4])
    yield step("expanded", lambda g: logits(1, 9, 40)(g).expand(3, 9, 40), [MASKGCT], [4])
    yield step("axes inside", lambda g: logits(2, 3, 2, 2, 40)(g).transpose(0, 2), [MASKGCT], [4])


CASES = list(_cases())
