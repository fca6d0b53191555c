"""One step of a denoising sampler, and the loss that trains its model, in plain PyTorch.

With the outputs ``gₖ`` of the model put together by guidance, ``g = Σₖ (wₖ + Z·zₖ)·gₖ``, and the estimate of the clean
sample ``x₀ = clip(s·(a·x + b·g))``, a step of every solver here is one linear combination

    next = c·x + d·g + e·x₀ + Σᵢ hᵢ·historyᵢ + n·noise

and solvers differ in the numbers alone: see mmkern.diffusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .philox import normal

MAX_OUTPUTS = 5  # of a model, put together by guidance
MAX_HISTORY = 4


class Column(IntEnum):
    """What each number of a row of coefficients is multiplied by."""

    X0_SAMPLE = 0  # x₀ = X0_SCALE · (this · x
    X0_OUTPUT = 1  # + this · g)
    X0_SCALE = 2
    SAMPLE = 3  # next = this · x
    OUTPUT = 4
    X0 = 5
    HISTORY0 = 6
    HISTORY1 = 7
    HISTORY2 = 8
    HISTORY3 = 9
    NOISE = 10
    CORRECTED_SAMPLE = 11  # corrected = this · x
    CORRECTED_X0 = 12
    CORRECTED_HISTORY0 = 13
    CORRECTED_HISTORY1 = 14
    CORRECTED_HISTORY2 = 15
    CORRECTED_HISTORY3 = 16
    KNOWN = 17  # what is known of the next sample = this · known
    KNOWN_NOISE = 18


class StepArguments(NamedTuple):
    """Of the three ops, in the order of their schema."""

    x: Tensor
    outputs: Sequence[Tensor | None]
    mask: Tensor | None  # Z
    history: Sequence[Tensor | None]
    noise: Tensor | None
    seed: Tensor | None  # [seed, offset]: noise of one's own
    keep: Tensor | None  # of the next sample, how much is known
    known: Tensor | None
    known_noise: Tensor | None
    weights: Tensor | None  # [1 or B, 2·MAX_OUTPUTS]: w and z of each output
    rescale: Tensor | None  # [1 or B, 1]: how far the guided output goes to the standard deviation of output 1
    coefficients: Tensor  # [1 or B, len(Column)]
    limits: Tensor | None  # [1 or B, 2]: |x₀| is clipped at the first and multiplied by the second

    @classmethod
    def of(cls, args: Sequence[Any]) -> StepArguments:
        x, *rest = args
        outputs, rest = rest[:MAX_OUTPUTS], rest[MAX_OUTPUTS:]
        mask, *rest = rest
        return cls(x, outputs, mask, rest[:MAX_HISTORY], *rest[MAX_HISTORY:])


def _terms(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The next sample, x₀ and the corrected sample."""
    a = StepArguments.of(args)
    wide = torch.promote_types(a.x.dtype, torch.float32)

    def of_samples(numbers: Tensor) -> Tensor:
        return numbers.to(wide).reshape(-1, *[1] * (a.x.dim() - 1))

    def times(column: Column, tensor: Tensor | None) -> Tensor:
        if tensor is None:
            return a.x.new_zeros((), dtype=wide)
        return of_samples(a.coefficients[:, column]) * tensor.to(wide)

    guided: Tensor | None = None
    for k, output in enumerate(a.outputs):
        if output is None:
            continue
        term = output.to(wide)
        if a.weights is not None:
            weight = of_samples(a.weights[:, 2 * k])
            term = term * (weight if a.mask is None else weight + a.mask * of_samples(a.weights[:, 2 * k + 1]))
        guided = term if guided is None else guided + term
    if a.rescale is not None and guided is not None and a.outputs[1] is not None:
        ratio = _std(a.outputs[1].to(wide)) / _std(guided)
        guided = guided * (1 + of_samples(a.rescale) * (ratio - 1))
    x0 = times(Column.X0_SCALE, times(Column.X0_SAMPLE, a.x) + times(Column.X0_OUTPUT, guided))
    if a.limits is not None:
        limit, scale = (of_samples(a.limits[:, i]) for i in range(2))
        x0 = torch.minimum(torch.maximum(x0, -limit), limit) * scale
    noise = a.noise
    if a.seed is not None:
        noise = normal(a.seed, a.x.numel(), wide).reshape(a.x.shape)
    out = times(Column.SAMPLE, a.x) + times(Column.OUTPUT, guided) + times(Column.X0, x0) + times(Column.NOISE, noise)
    corrected = times(Column.CORRECTED_SAMPLE, a.x) + times(Column.CORRECTED_X0, x0)
    for i, past in enumerate(a.history):
        out = out + times(Column(Column.HISTORY0 + i), past)
        corrected = corrected + times(Column(Column.CORRECTED_HISTORY0 + i), past)
    if a.keep is not None:
        known = times(Column.KNOWN, a.known) + times(Column.KNOWN_NOISE, a.known_noise)
        out = out + a.keep * (known - out)
    return out.to(a.x.dtype), x0.to(a.x.dtype), corrected.to(a.x.dtype)


def _std(x: Tensor) -> Tensor:
    """Of each sample."""
    return x.std(tuple(range(1, x.dim())), correction=0, keepdim=True)


def denoise_step(*args: Any) -> Tensor:
    """The next sample."""
    return _terms(*args)[0]


def multistep(*args: Any) -> tuple[Tensor, Tensor]:
    """The next sample, and x₀."""
    return _terms(*args)[:2]


def corrected_step(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The next sample, x₀, and the sample that the next one was made of: this one, corrected."""
    return _terms(*args)


def masked_squared_error(pred: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """``[B]``: ``Σ mask·(pred − target)²`` of each sample, in float32 at least."""
    wide = torch.promote_types(pred.dtype, torch.float32)
    terms = (pred.to(wide) - target.to(wide)).square()
    if mask is not None:
        terms = mask * terms
    return terms.reshape(_samples(pred), -1).sum(1)


def _samples(x: Tensor) -> int:
    return x.shape[0] if x.dim() > 1 else 1
