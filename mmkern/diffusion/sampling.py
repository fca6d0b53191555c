"""From noise to data, a step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from torch import Tensor
from typing_extensions import Unpack

from mmkern.ops.diffusion import Coefficients, Outputs, StepOptions, take_step
from mmkern.reference.diffusion import MAX_HISTORY

from .schedule import Step


class Sampler:
    """Takes the steps of a solver, and keeps what its next ones ask for.

    Args:
        keeps_x0: asks every solver for its x₀.
    Attributes:
        x0: the estimate of the clean sample in the last step, of a solver that needs it, or where it is kept.
        corrected: the corrected sample of the last step, or, of ``lcm``, the denoised one where x₀ is kept.
        taken: how many steps.
    """

    def __init__(self, keeps_x0: bool = False) -> None:
        self._keeps_x0 = keeps_x0
        self.x0: Tensor | None = None
        self.corrected: Tensor | None = None
        self.taken = 0
        self._before: list[Tensor] = []  # x₀, the last one first
        self._first: tuple[Tensor, ...] = ()  # sample and x₀ of a first stage

    def step(
        self, model_output: Outputs, sample: Tensor, coefficients: Coefficients, **options: Unpack[StepOptions]
    ) -> Tensor:
        """The next sample, by the solver that the coefficients are made for."""
        solver = coefficients.solver
        results, history = self._asks_for(solver)
        out, *rest = take_step(results, model_output, sample, coefficients, options, history)
        self.x0, self.corrected = (*rest, None, None)[:2]
        if self.x0 is not None:
            self._before = [self.x0, *self._before[: MAX_HISTORY - 2]]
            self._first = (sample, self.x0) if solver == "heun" and not coefficients.history else ()
        self.taken += 1
        return out

    def _asks_for(self, solver: str) -> tuple[Literal[1, 2, 3], Sequence[Tensor | None]]:
        if solver == "unipc":
            return 3, (self.corrected, *self._before)
        if solver == "heun":
            return 2, self._first
        if solver.startswith("dpm_solver_pp"):
            return 2, self._before
        if solver == "lcm" and self._keeps_x0:
            return 3, ()
        return (2 if self._keeps_x0 else 1), ()


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
