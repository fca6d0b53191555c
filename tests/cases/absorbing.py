"""Cases of absorbing-state diffusion. Rows that are not masked are full of NaN: nothing of them may be looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mmkern.reference.absorbing import log_ratio

from .case import Case
from .hyperbolic import randn

STEP, ENTROPY, LOSS = "absorbing_step", "absorbing_score_entropy", "absorbing_score_loss"
Scores = Callable[[torch.Generator], Tensor]
Change = Callable[[Tensor], None]

# Of the tokens, and V: fewer than a vector, blocks of 64 and what is left of one, several stretches and tiles.
SIZES = (
    ((5,), 1),
    ((9,), 7),
    ((4, 5), 63),
    ((2, 3, 4), 64),
    ((3, 2), 65),
    ((2, 3, 2, 2), 111),
    ((2, 3), 1000),
    ((2,), 4500),
    ((0, 3), 9),
    ((), 12),
)


def scores(*sizes: int) -> Scores:
    return lambda g: 1.5 * randn(g, *sizes) - 1


def _layouts(size: int) -> dict[str, Scores]:
    """Of ``[2, 3, 5, K, size]``, two branches."""

    def of_branches(g: torch.Generator) -> Tensor:
        return scores(2, 2, 3, 5, size)(g).movedim(0, -2)

    return {
        "branches first": of_branches,
        "rows inside": lambda g: of_branches(g).permute(2, 0, 1, 3, 4).clone().permute(1, 2, 0, 3, 4),
        "sliced": lambda g: scores(2, 3, 5, 2, size + 9)(g)[..., 4 : size + 4],
        "columns": lambda g: scores(2, 3, 5, size, 2)(g).transpose(-1, -2),
        "expanded": lambda g: scores(1, 1, 5, 2, size)(g).expand(2, 3, 5, 2, size),
    }


# ---- Steps -----------------------------------------------------------------------------------------------------------


def _masked(g: torch.Generator, x: Tensor, is_masked: Tensor) -> Tensor:
    """``x`` with NaN in the rows that are not, in the same layout, unless one memory has several rows."""
    if 0 in x.stride():
        return x
    return x.masked_fill_(~is_masked.reshape(*is_masked.shape, *[1] * (x.dim() - is_masked.dim())), torch.nan)


def step(
    label: str,
    make: Scores,
    rates: list[float],
    *,
    weights: list[list[float]] | None = None,
    share: float = 0.6,
    change: Change = lambda x: None,
) -> Case:
    """``rates``, over V, and ``weights``: one for all samples, or one a sample. ``share``: of rows, is masked."""

    def build(g: torch.Generator) -> list[Any]:
        x = make(g)
        size = x.shape[-1] - 1
        tokens = torch.randint(0, size, x.shape[:-2], generator=g)
        is_masked = torch.rand(tokens.shape, generator=g) < share
        change(x)
        x = _masked(g, x, is_masked)
        seed = torch.randint(2**40, (2,), generator=g)
        a = torch.tensor(rates, dtype=torch.float64) / size
        w = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        return [x, tokens.masked_fill(is_masked, size), seed, a, w]

    return Case(STEP, label, build, wide=(3, 4))


def odd(x: Tensor) -> None:
    """NaN, +inf, nothing but -inf, one token, -inf in one branch or all, huge ones, and NaN beside -inf."""
    x[0, :, 40], x[1, :, 0], x[2], x[3, :, 1:], x[4, 0, ::3], x[5, :, ::2] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        -torch.inf,
        -torch.inf,
        -torch.inf,
    )
    x[6] *= 3e3
    x[7, :, -1] = torch.nan  # of MASK: it is not read
    x[8, 0, 5], x[8, 1:, 5] = torch.nan, -torch.inf


def _steps() -> Iterator[Case]:
    for sizes, size in SIZES:
        name = "x".join(map(str, (*sizes, size)))
        yield step(name, scores(*sizes, 1, size + 1), [0.4])
        yield step(f"{name}, guided", scores(*sizes, 3, size + 1), [0.4], weights=[[-0.9, 1.3, 0.6]])
    for name, make in _layouts(70).items():
        yield step(f"{name}, guided", make, [0.2, 0.7], weights=[[0.4, 0.6], [-0.5, 1.5]])
    yield step("axes inside", lambda g: scores(2, 3, 5, 2, 2, 20)(g).transpose(0, 2), [0.3], weights=[[-1.0, 2.0]])
    for name, rates in {
        "still": [0.0],
        "slow": [1e-6],
        "beyond 1": [30.0],
        "huge": [1e38],
        "last": [torch.inf],
    }.items():
        yield step(f"{name}, 12x80", scores(12, 1, 81), rates, share=1.0)
        yield step(f"{name}, odd", scores(9, 1, 91), rates, share=1.0, change=odd)
        yield step(f"{name}, odd, guided", scores(9, 2, 91), rates, weights=[[-1.0, 2.0]], share=1.0, change=odd)
    yield step("no rate", scores(4, 1, 20), [torch.nan, -1.0, 0.5, torch.inf], share=1.0)
    yield step(
        "a branch without weight",
        scores(8, 2, 30),
        [0.5],
        weights=[[1.0, 0.0]],
        change=lambda x: x[:, 1, ::2].fill_(-torch.inf),
    )
    yield step("none masked", scores(3, 4, 1, 20), [0.5], share=0.0)
    yield step("five branches", scores(2, 4, 3, 5, 65), [0.5, 0.2], weights=[[-4.5, 1.9, 1.0, 1.0, 1.6]])
    each = [[0.2 * i, 1 - 0.2 * i] for i in range(16)]
    yield step("a rate and weights each", scores(16, 2, 65), [0.05 * i for i in range(16)], weights=each)


# ---- Entropies -------------------------------------------------------------------------------------------------------


def entropy(
    label: str,
    make: Scores,
    sigma: list[float],
    *,
    share: float = 0.6,
    change: Change = lambda x: None,
    near: float = 0,
) -> Case:
    """``near``: the score of the target is so far from the true one, and the others are small."""

    def build(g: torch.Generator) -> list[Any]:
        x = make(g)
        targets = torch.randint(0, x.shape[-1] - 1, x.shape[:-1], generator=g)
        is_masked = torch.rand(targets.shape, generator=g) < share
        change(x)
        total = torch.tensor(sigma, dtype=torch.float64)
        if near:
            own = log_ratio(total).reshape(-1, *[1] * targets.dim()) + near * randn(g, *targets.shape, 1)
            x = (x - 15).scatter(-1, targets[..., None], own.expand(*targets.shape, 1))
        return [_masked(g, x, is_masked), targets, is_masked, total]

    return Case(ENTROPY, label, build, wide=(3,))


def _entropies() -> Iterator[Case]:
    for sizes, size in SIZES:
        yield entropy("x".join(map(str, (*sizes, size))), scores(*sizes, size + 1), [0.5])
    for name, make in _layouts(70).items():
        yield entropy(name, lambda g, make=make: make(g)[..., 0, :], [0.1, 2.0])
    for near in (1e-3, 0.3, 3.0):
        yield entropy(f"near by {near}", scores(3, 4, 33), [0.01, 0.7, 5.0], near=near)
    yield entropy("no noise", scores(2, 6, 33), [0.0, 0.3])
    yield entropy("little noise", scores(2, 6, 33), [1e-6, 1e-3])
    yield entropy("much noise", scores(2, 6, 33), [30.0, 1e3])
    yield entropy("far scores", scores(3, 4, 50), [0.4], share=1.0, change=_far)
    yield entropy("none masked", scores(3, 4, 50), [0.4], share=0.0)
    yield entropy("all masked", scores(3, 4, 50), [0.4, 0.5, 0.6], share=1.0)


def _far(x: Tensor) -> None:
    x[0, 0, 7], x[0, 1, 3], x[0, 2, 9], x[1, 0], x[1, 1], x[2, 0, -1] = (
        95.0,
        -torch.inf,
        torch.nan,
        -60.0,
        -torch.inf,
        torch.nan,
    )


def _loss(entropy: Case) -> Case:
    """The sum of weighted entropies, and its gradient."""

    def build(g: torch.Generator) -> list[Any]:
        given = entropy.build(g)
        return [*given, 0.1 + torch.rand(given[3].shape, generator=g, dtype=torch.float64)]

    return Case(LOSS, entropy.label, build, wide=(3, 4))


STEPS, ENTROPIES = list(_steps()), list(_entropies())
CASES = [*STEPS, *ENTROPIES, *map(_loss, ENTROPIES)]
