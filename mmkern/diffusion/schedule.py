"""How much noise a sample has at each timestep, and the steps that lead from noise to data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmkern.ops.diffusion import Coefficients
from mmkern.reference.diffusion import Column

from . import solvers
from .solvers import Level, Prediction

Spacing = Literal["leading", "trailing", "linspace"]
Solver = Literal[
    "ddpm",
    "ddim",
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_solver_pp_2m",
    "dpm_solver_pp_3m",
    "unipc",
    "flow_match_euler",
    "lcm",
]
_CLEAN = Level(1.0, 0.0)


class Step(NamedTuple):
    """One call of the model and of the solver's step.

    Args:
        timestep: what the model is told, in training timesteps.
        level: of the sample that the model is given.
        coefficients: what the solver's step takes.
    """

    timestep: float
    level: Level
    coefficients: Coefficients


class Schedule:
    """The noise levels ``x = alpha·x₀ + sigma·ε`` of a model, by training timestep, and steps through them.

    Args:
        alphas, sigmas: ``[T]``, with less noise first.
        is_flow: levels lie on a straight flow, ``alpha = 1 − sigma``, and timesteps are ``T·sigma``.
    """

    def __init__(self, alphas: Tensor, sigmas: Tensor, *, is_flow: bool = False) -> None:
        if alphas.dim() != 1 or alphas.shape != sigmas.shape or len(alphas) < 2:
            shapes = f"{list(alphas.shape)} and {list(sigmas.shape)}"
            raise ValueError(f"Schedule: alphas and sigmas have shapes {shapes}, expected [T] with T of at least 2")
        self.alphas, self.sigmas = alphas.double().cpu(), sigmas.double().cpu()
        self.is_flow = is_flow
        self._ratios = self.sigmas / self.alphas
        if not (self._ratios[1:] > self._ratios[:-1]).all():
            raise ValueError("Schedule: expected more noise at each timestep than at the one before")
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    # ---- Kinds of schedules --------------------------------------------------------------------------------------

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> Schedule:
        """``alpha = √ᾱ, sigma = √(1 − ᾱ)``."""
        wide = alphas_cumprod.double()
        return cls(wide.sqrt(), (1 - wide).sqrt())

    @classmethod
    def from_betas(cls, betas: Tensor) -> Schedule:
        """``ᾱ`` is the running product of ``1 − β``."""
        return cls.from_alphas_cumprod((1 - betas.double()).cumprod(0))

    @classmethod
    def linear(cls, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """β from one to the other in equal steps. Source: Ho et al. 2020, §4."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
        """√β in equal steps. Source: Rombach et al. 2022 (latent diffusion)."""
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float64)
        return cls.from_betas(roots**2)

    @classmethod
    def cosine(cls, timesteps: int = 1000, max_beta: float = 0.999) -> Schedule:
        """``ᾱ(t) = cos²((t + 0.008)/1.008·π/2)``. Source: Nichol and Dhariwal 2021, eq. 17."""
        t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        bars = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls.from_betas((1 - bars[1:] / bars[:-1]).clamp_max(max_beta))

    @classmethod
    def flow(cls, timesteps: int = 1000, shift: float = 1.0) -> Schedule:
        """``sigma = shift·s/(1 + (shift − 1)·s)`` with s from 1/T to 1. Source: Esser et al. 2024, eq. 23."""
        s = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
        sigmas = _shifted(s, shift)
        return cls(1 - sigmas, sigmas, is_flow=True)

    def zero_terminal_snr(self) -> Schedule:
        """√ᾱ is moved and scaled so that the last timestep is noise alone. Source: Lin et al. 2024, algorithm 1."""
        first, last = self.alphas[0], self.alphas[-1]
        return Schedule.from_alphas_cumprod(((self.alphas - last) * first / (first - last)) ** 2)

    # ---- Which levels to step through ----------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.alphas)

    def timesteps(self, count: int, spacing: Spacing = "leading", offset: int = 0) -> list[int]:
        """``count`` of the training timesteps, from noise to data.

        Args:
            spacing: "leading" starts at 0, "trailing" ends at the last one, "linspace" has both ends.
            offset: added to those of "leading".
        Source: Lin et al. 2024, table 2.
        """
        _check_count(count, len(self))
        ratio = len(self) / count
        if spacing == "leading":
            return [i * (len(self) // count) + offset for i in reversed(range(count))]
        if spacing == "trailing":
            return [round(len(self) - i * ratio) - 1 for i in range(count)]
        if spacing == "linspace":
            return torch.linspace(len(self) - 1, 0, count, dtype=torch.float64).round().long().tolist()
        raise ValueError(f"spacing is {spacing!r}, expected 'leading', 'trailing' or 'linspace'")

    def karras(self, count: int, rho: float = 7.0) -> list[float]:
        """``count`` levels σ/alpha between those of the schedule, even in their 1/ρ-th power.

        Source: Karras et al. 2022, eq. 5.
        """
        _check_count(count, None)
        low, high = (ratio ** (1 / rho) for ratio in self._ends())
        return [(high + (low - high) * i / max(count - 1, 1)) ** rho for i in range(count)]

    def exponential(self, count: int) -> list[float]:
        """``count`` levels σ/alpha between those of the schedule, even in their logarithm."""
        _check_count(count, None)
        low, high = map(math.log, self._ends())
        return [math.exp(high + (low - high) * i / max(count - 1, 1)) for i in range(count)]

    def _ends(self) -> tuple[float, float]:
        low, high = self._ratios[0].item(), self._ratios[-1].item()
        if math.isinf(high):
            raise ValueError(
                "the last timestep is noise alone, and has no σ/alpha; expected timesteps instead of levels"
            )
        return low, high

    def level(self, timestep: int) -> Level:
        """Of a training timestep."""
        if not 0 <= timestep < len(self):
            raise ValueError(f"timestep is {timestep}, expected a number from 0 to {len(self) - 1}")
        return Level(self.alphas[timestep].item(), self.sigmas[timestep].item())

    def level_of_ratio(self, ratio: float) -> tuple[float, Level]:
        """The timestep, between training timesteps, at which σ/alpha is ``ratio``; and that level."""
        if self.is_flow:
            sigma = ratio / (1 + ratio)
            return sigma * len(self), Level(1 - sigma, sigma)
        logs = self._ratios.log()
        place = math.log(ratio)
        above = int(torch.searchsorted(logs, place).clamp(1, len(self) - 1))
        low, high = logs[above - 1].item(), logs[above].item()
        share = min(max((place - low) / (high - low), 0.0), 1.0)
        alpha = 1 / math.hypot(1, ratio)
        return above - 1 + share, Level(alpha, ratio * alpha)

    # ---- Steps ---------------------------------------------------------------------------------------------------

    def steps(
        self,
        solver: Solver,
        count: int,
        *,
        prediction: Prediction | None = None,
        spacing: Spacing | None = None,
        offset: int = 0,
        ratios: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> list[Step]:
        """``count`` steps of a solver from noise to data.

        Args:
            solver: the name of a step without ``_step``.
            count: how many; ``heun`` calls its model twice in each but the last.
            prediction: what the model puts out; by default "flow" for a flow, else "epsilon".
            spacing, offset: which timesteps, as in ``timesteps``; by default "trailing" for a flow, else "leading".
            ratios: the levels σ/alpha instead, from noise to data, as of ``karras`` or ``exponential``.
            device, dtype: of the coefficients: where the samples are, float32 or, for float64, that.
            options: of the solver's function in ``mmkern.diffusion.solvers``, such as ``eta``.
        Returns: the steps in their order.
        Raises: ValueError where an argument does not fit, with its name.
        """
        if solver not in _ROWS:
            raise ValueError(f"solver is {solver!r}, expected {', '.join(map(repr, _ROWS))}")
        if ratios is not None:
            path = [self.level_of_ratio(ratio) for ratio in ratios]
        else:
            chosen = self.timesteps(count, spacing or ("trailing" if self.is_flow else "leading"), offset)
            path = [(self._told(t), self.level(t)) for t in chosen]
        if len(path) != count:
            raise ValueError(f"ratios has {len(path)} levels, expected {count}")
        prediction = prediction or ("flow" if self.is_flow else "epsilon")
        steps = list(_ROWS[solver](path, prediction, options))
        table = torch.cat([step.coefficients.numbers for step in steps]).to(device, dtype)
        return [
            step._replace(coefficients=replace(step.coefficients, numbers=row))
            for step, row in zip(steps, table.split(1), strict=True)
        ]

    def _told(self, timestep: int) -> float:
        return self.sigmas[timestep].item() * len(self) if self.is_flow else timestep

    # ---- Training ------------------------------------------------------------------------------------------------

    def noise_coefficients(self, timesteps: Tensor, x: Tensor, what: Literal["sample", "velocity"]) -> Tensor:
        """``[B, 19]``: of x₀ and noise, what makes the sample of each timestep, or its velocity."""
        key = what, x.device, x.dtype
        if key not in self._tables:
            of_x0, of_noise = (self.alphas, self.sigmas) if what == "sample" else (-self.sigmas, self.alphas)
            if self.is_flow and what == "velocity":
                of_x0, of_noise = -torch.ones_like(of_x0), torch.ones_like(of_noise)
            table = torch.zeros(len(self), len(Column), dtype=torch.float64)
            table[:, Column.SAMPLE], table[:, Column.NOISE] = of_x0, of_noise
            self._tables[key] = table.to(x.device, torch.promote_types(x.dtype, torch.float32))
        return self._tables[key][timesteps]

    def min_snr_weights(self, timesteps: Tensor, gamma: float = 5.0, prediction: Prediction | None = None) -> Tensor:
        """``[B]`` weights of a loss on what the model predicts: ``min(SNR, γ)`` of x₀, in its units.

        Source: Hang et al. 2023, §3.4.
        """
        prediction = prediction or ("flow" if self.is_flow else "epsilon")
        snr = (1 / self._ratios**2).to(timesteps.device)[timesteps]
        limited = snr.clamp_max(gamma)
        by = {"sample": torch.ones_like(snr), "epsilon": snr, "v": snr + 1}
        if prediction not in by:
            raise ValueError(f"prediction is {prediction!r}, expected {', '.join(map(repr, by))}")
        return (limited / by[prediction]).float()


def _shifted(s: Tensor, shift: float) -> Tensor:
    return shift * s / (1 + (shift - 1) * s)


def _check_count(count: int, most: int | None) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1 or (most is not None and count > most):
        raise ValueError(f"count is {count}, expected an int from 1{'' if most is None else f' to {most}'}")


# ---- The path of each solver -----------------------------------------------------------------------------------------

_Path = Sequence[tuple[float, Level]]


def _pairs(path: _Path) -> list[tuple[float, Level, Level]]:
    """Each timestep with its level and the next one."""
    ends = [level for _, level in path[1:]] + [_CLEAN]
    return [(t, level, to) for (t, level), to in zip(path, ends, strict=True)]


def _of_pairs(solver: Callable[..., Coefficients]) -> Any:
    def rows(path: _Path, prediction: Prediction, options: dict[str, Any]) -> Iterator[Step]:
        for t, level, to in _pairs(path):
            yield Step(t, level, solver(level, to, prediction, **options))

    return rows


def _lcm(path: _Path, prediction: Prediction, options: dict[str, Any]) -> Iterator[Step]:
    for i, (t, level, to) in enumerate(_pairs(path)):
        is_last = i == len(path) - 1
        yield Step(t, level, solvers.lcm(level, None if is_last else to, prediction, timestep=t, **options))


def _heun(path: _Path, prediction: Prediction, options: dict[str, Any]) -> Iterator[Step]:
    after = [t for t, _ in path[1:]]
    for i, (t, level, to) in enumerate(_pairs(path)):
        yield Step(t, level, solvers.heun(level, to, prediction, **options))
        if i < len(after):
            yield Step(after[i], to, solvers.heun(level, to, prediction, is_second=True, **options))


def _before(path: _Path, i: int) -> list[Level]:
    return [level for _, level in path[:i]][::-1]


def _dpm_solver_pp(order: int) -> Any:
    def rows(path: _Path, prediction: Prediction, options: dict[str, Any]) -> Iterator[Step]:
        for i, (t, level, to) in enumerate(_pairs(path)):
            is_near_end = len(path) < _FEW_STEPS and i == len(path) - 2
            before = _before(path, i)[: 1 if is_near_end else order - 1]
            yield Step(t, level, solvers.dpm_solver_pp(level, to, before, prediction, order=order, **options))  # type: ignore[arg-type]

    return rows


def _unipc(path: _Path, prediction: Prediction, options: dict[str, Any]) -> Iterator[Step]:
    options = dict(options)
    most, order = options.pop("order", 2), 0
    for i, (t, level, to) in enumerate(_pairs(path)):
        corrector_order, order = order, min(most, len(path) - i, i + 1)
        orders = {"order": order, "corrector_order": corrector_order}
        yield Step(t, level, solvers.unipc(level, to, _before(path, i), prediction, **orders, **options))


_FEW_STEPS = 15  # below which the last steps are of a lower order
_ROWS: dict[str, Any] = {
    "ddpm": _of_pairs(solvers.ddpm),
    "ddim": _of_pairs(solvers.ddim),
    "euler": _of_pairs(solvers.euler),
    "euler_ancestral": _of_pairs(solvers.euler_ancestral),
    "heun": _heun,
    "dpm_solver_pp_2m": _dpm_solver_pp(2),
    "dpm_solver_pp_3m": _dpm_solver_pp(3),
    "unipc": _unipc,
    "flow_match_euler": _of_pairs(solvers.flow_match_euler),
    "lcm": _lcm,
}
