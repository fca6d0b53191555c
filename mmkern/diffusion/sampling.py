"""From noise to data, a step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from mmkern import ops
from mmkern.ops.diffusion import Coefficients, Outputs, StepOptions
from mmkern.reference.diffusion import MAX_HISTORY

from .schedule import Step


class Sampler:
    """Takes the steps of a solver, and keeps what its next ones ask for.

    Attributes:
        x0: the estimate of the clean sample in the last step, of a solver that keeps it; else None.
    """

    def __init__(self) -> None:
        self.x0: Tensor | None = None
        self._first: tuple[Tensor, Tensor] | None = None  # the sample and x₀ of a first stage
        self._corrected: Tensor | None = None
        self._previous: list[Tensor] = []  # x₀, the last one first

    def step(
        self, model_output: Outputs, sample: Tensor, coefficients: Coefficients, **options: Unpack[StepOptions]
    ) -> Tensor:
        """The next sample, by the solver that the coefficients are made for."""
        given = model_output, sample, coefficients
        take: Any = getattr(ops, f"{coefficients.solver}_step")
        if coefficients.solver == "heun":
            out, self.x0 = take(*given, self._first if coefficients.history else None, **options)
            self._first = None if coefficients.history or self.x0 is None else (sample, self.x0)
        elif coefficients.solver.startswith("dpm_solver_pp"):
            out, self.x0 = take(*given, self._previous, **options)
        elif coefficients.solver == "unipc":
            out, self.x0, self._corrected = take(*given, self._corrected, self._previous, **options)
        else:
            return take(*given, **options)  # type: ignore[no-any-return]
        if self.x0 is not None:
            self._previous = [self.x0, *self._previous[: MAX_HISTORY - 2]]
        return out  # type: ignore[no-any-return]


def sample(
    model: Callable[[Tensor, float], Tensor | Sequence[Tensor]],
    x: Tensor,
    steps: Iterable[Step],
    **options: Unpack[StepOptions],
) -> Tensor:
    """The sample that a model makes of noise: ``model(x, timestep)`` and a step of the solver, in turns.

    Args:
        model: returns what the coefficients were told that it predicts; with guidance as many outputs as that takes.
        x: at the level of the first step, such as ``torch.randn``.
        steps: as ``Schedule.steps`` makes them.
        options: of every step. With a seed, step i takes the Philox counters after those of the steps before.
    Returns: at the level of the last step, of the shape and dtype of x.
    """
    sampler = Sampler()
    counters = -(-x.numel() // 4)
    offset = options.get("offset", 0)
    for i, step in enumerate(steps):
        options["offset"] = offset + i * counters
        x = sampler.step(model(x, step.timestep), x, step.coefficients, **options)
    return x
