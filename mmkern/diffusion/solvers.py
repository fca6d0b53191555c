"""The coefficients of each solver's step: what makes one step kernel a sampler.

A level is where a sample stands between data and noise, ``x = alpha·x₀ + sigma·ε``: ``(√ᾱ, √(1 − ᾱ))`` where the
variance is preserved, ``(1, σ)`` where it explodes, ``(1 − σ, σ)`` on a straight flow. A step goes from one level to
the next, and every solver here is linear in its samples, so a row of numbers says all of it: made once, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch

from mmkern.ops.diffusion import Coefficients
from mmkern.reference.diffusion import Column

Prediction = Literal["epsilon", "sample", "v", "flow"]
PREDICTIONS = ("epsilon", "sample", "v", "flow")


class Level(NamedTuple):
    """``x = alpha·x₀ + sigma·ε``."""

    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """σ of the sample whose x₀ has the weight 1."""
        return math.inf if self.alpha == 0 else self.sigma / self.alpha

    @property
    def half_log_snr(self) -> float:
        """λ."""
        return math.inf if self.sigma == 0 else -math.inf if self.alpha == 0 else -math.log(self.ratio)


Row = Mapping[Column, float]


def coefficients(
    solver: str, row: Row, known: Level | None = None, *, adds_noise: bool = False, history: int = 0
) -> Coefficients:
    """Of a row: float64, one for all samples. ``known`` is the level of the result."""
    numbers = torch.zeros(1, len(Column), dtype=torch.float64)
    for column, value in row.items():
        numbers[0, column] = value
    if known is not None:
        numbers[0, Column.KNOWN], numbers[0, Column.KNOWN_NOISE] = known
    return Coefficients(solver, numbers, adds_noise, history)


# ---- What the model predicts -----------------------------------------------------------------------------------------


def x0_from(level: Level, prediction: Prediction) -> tuple[float, float, float]:
    """a, b and s of ``x₀ = s·(a·x + b·output)``: what is small beside its terms is not made of rounded ones."""
    alpha, sigma = level
    if prediction == "epsilon":
        if alpha == 0:
            raise ValueError(
                "prediction 'epsilon' says nothing of x₀ where alpha is 0, expected 'v', 'sample' or 'flow'"
            )
        return 1.0, -sigma, 1 / alpha
    if prediction == "v":
        square = alpha**2 + sigma**2
        return alpha, -sigma * math.sqrt(square), 1 / square
    if prediction == "flow":
        return 1.0, -sigma, 1 / (alpha + sigma)
    if prediction == "sample":
        return 0.0, 1.0, 1.0
    raise ValueError(f"prediction is {prediction!r}, expected {', '.join(map(repr, PREDICTIONS))}")


def noise_from(level: Level, prediction: Prediction) -> tuple[float, float]:
    """a and b of ``ε = a·x + b·output``."""
    alpha, sigma = level
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction == "v":
        square = alpha**2 + sigma**2
        return sigma / square, alpha / math.sqrt(square)
    if prediction == "flow":
        return 1 / (alpha + sigma), alpha / (alpha + sigma)
    x0_from(level, prediction)
    return 1 / sigma, -alpha / sigma


def _x0_row(level: Level, prediction: Prediction) -> dict[Column, float]:
    columns = Column.X0_SAMPLE, Column.X0_OUTPUT, Column.X0_SCALE
    return dict(zip(columns, x0_from(level, prediction), strict=True))


def _along(level: Level, to: Level) -> dict[Column, float]:
    """``next = alpha'·x₀ + sigma'·(x − alpha·x₀)/sigma``."""
    share = to.sigma / level.sigma
    return {Column.SAMPLE: share, Column.X0: to.alpha - share * level.alpha}


# ---- One sample, one step --------------------------------------------------------------------------------------------


def ddim(
    level: Level,
    to: Level,
    prediction: Prediction = "epsilon",
    *,
    eta: float = 0.0,
    from_clipped: bool = False,
) -> Coefficients:
    """Of ``ddim_step``, where variance is preserved.

    Args:
        level, to: of the sample and of the result.
        prediction: what the model puts out.
        eta: noise, as a share of that of DDPM.
        from_clipped: ε is what is left of the sample beside the clipped x₀, not what the model says.
    Source: Song et al. 2021, eq. 12 and 16.
    """
    std = eta * _posterior_std(level, to)
    rest = math.sqrt(max(to.sigma**2 - std**2, 0.0))
    row = _x0_row(level, prediction)
    if from_clipped:
        row |= _along(level, Level(to.alpha, rest))
    else:
        of_sample, of_output = noise_from(level, prediction)
        row |= {Column.X0: to.alpha, Column.SAMPLE: rest * of_sample, Column.OUTPUT: rest * of_output}
    return coefficients("ddim", row | {Column.NOISE: std}, to, adds_noise=std > 0)


def _posterior_std(level: Level, to: Level) -> float:
    """Of the sample at ``to``, given that at ``level`` and x₀."""
    if level.sigma == 0 or to.alpha == 0:
        return 0.0
    return to.sigma / level.sigma * math.sqrt(max(1 - (level.alpha / to.alpha) ** 2, 0.0))


def ddpm(
    level: Level,
    to: Level,
    prediction: Prediction = "epsilon",
    *,
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small",
) -> Coefficients:
    """Of ``ddpm_step``, where variance is preserved.

    Args:
        level, to: of the sample and of the result.
        prediction: what the model puts out.
        variance: of the noise: that of the sample before, given x₀ and this one, or β.
    Source: Ho et al. 2020, eq. 7 and §3.2.
    """
    if variance not in ("fixed_small", "fixed_large"):
        raise ValueError(f"variance is {variance!r}, expected 'fixed_small' or 'fixed_large'")
    kept = (level.alpha / to.alpha) ** 2  # α of one step
    std = 0.0
    if to.sigma > 0:
        std = max(_posterior_std(level, to), 1e-10) if variance == "fixed_small" else math.sqrt(1 - kept)
    row = _x0_row(level, prediction) | {
        Column.X0: to.alpha * (1 - kept) / level.sigma**2,
        Column.SAMPLE: math.sqrt(kept) * to.sigma**2 / level.sigma**2,
        Column.NOISE: std,
    }
    return coefficients("ddpm", row, to, adds_noise=std > 0)


def euler(level: Level, to: Level, prediction: Prediction = "epsilon") -> Coefficients:
    """Of ``euler_step``, on levels of any kind.

    Source: Karras et al. 2022, algorithm 1 without churn.
    """
    return coefficients("euler", _x0_row(level, prediction) | _along(level, to), to)


def euler_ancestral(level: Level, to: Level, prediction: Prediction = "epsilon", *, eta: float = 1.0) -> Coefficients:
    """Of ``euler_ancestral_step``: down to less noise than that of ``to``, and up again with fresh one.

    Args:
        level, to: of the sample and of the result.
        prediction: what the model puts out.
        eta: how much of the most noise that keeps the level.
    Source: crowsonkb/k-diffusion, get_ancestral_step.
    """
    here, there = level.ratio, to.ratio
    up = min(there, eta * there * math.sqrt(max(1 - (there / here) ** 2, 0.0)))
    down = Level(to.alpha, to.alpha * math.sqrt(max(there**2 - up**2, 0.0)))
    row = _x0_row(level, prediction) | _along(level, down) | {Column.NOISE: to.alpha * up}
    return coefficients("euler_ancestral", row, to, adds_noise=True)


def flow_match_euler(
    level: Level, to: Level, prediction: Prediction = "flow", *, stochastic: bool = False
) -> Coefficients:
    """Of ``flow_match_euler_step``, on levels ``(1 − σ, σ)``.

    Args:
        level, to: of the sample and of the result.
        prediction: what the model puts out.
        stochastic: to x₀, and back to the level of ``to`` with fresh noise.
    Source: Esser et al. 2024, §2.
    """
    there = {Column.X0: to.alpha, Column.NOISE: to.sigma} if stochastic else _along(level, to)
    return coefficients("flow_match_euler", _x0_row(level, prediction) | there, to, adds_noise=stochastic)


def lcm(
    level: Level,
    to: Level | None,
    prediction: Prediction = "epsilon",
    *,
    timestep: float,
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
) -> Coefficients:
    """Of ``lcm_step``; ``to`` is None for the last one, which adds no noise.

    Args:
        level, to: of the sample and of the result.
        prediction: what the model puts out.
        timestep: of the sample, which with ``timestep_scaling`` and ``sigma_data`` says how much of it is kept.
    Source: Luo et al. 2023, §3 and algorithm 3.
    """
    scaled = timestep * timestep_scaling
    skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    out = scaled / math.sqrt(scaled**2 + sigma_data**2)
    alpha, sigma = to or Level(1.0, 0.0)
    row = _x0_row(level, prediction) | {
        Column.SAMPLE: alpha * skip,
        Column.X0: alpha * out,
        Column.NOISE: sigma,
        Column.CORRECTED_SAMPLE: skip,
        Column.CORRECTED_X0: out,
    }
    return coefficients("lcm", row, to or Level(1.0, 0.0), adds_noise=to is not None)


def heun(level: Level, to: Level, prediction: Prediction = "epsilon", *, is_second: bool = False) -> Coefficients:
    """Of one stage of ``heun_step``: both go from ``level`` to ``to``, and the second one has its output at ``to``.

    Source: Karras et al. 2022, algorithm 1 without churn.
    """
    if not is_second:
        return coefficients("heun", _x0_row(level, prediction) | _along(level, to), to)
    half = (to.ratio - level.ratio) / 2
    row = _x0_row(to, prediction) | {
        Column.SAMPLE: half / to.ratio,
        Column.X0: -to.alpha * half / to.ratio,
        Column.HISTORY0: to.alpha / level.alpha * (1 + half / level.ratio),
        Column.HISTORY1: -to.alpha * half / level.ratio,
    }
    return coefficients("heun", row, to, history=2)


# ---- Several steps ---------------------------------------------------------------------------------------------------


def _steps_back(level: Level, to: Level, before: Sequence[Level]) -> tuple[float, list[float]]:
    """h, the step in λ, and how far the levels before lie behind, in units of it."""
    here = level.half_log_snr
    h = to.half_log_snr - here
    back = [(here - past.half_log_snr) / h for past in before]
    if h <= 0 or any(near >= far for near, far in zip([0.0, *back], back, strict=False)):
        levels = [tuple(each) for each in (*reversed(before), level, to)]
        raise ValueError(f"levels are {levels}, expected less noise in each")
    return h, back


def _history(weights: Sequence[float], first: Column) -> dict[Column, float]:
    return {Column(first + i): weight for i, weight in enumerate(weights)}


def dpm_solver_pp(
    level: Level,
    to: Level,
    before: Sequence[Level] = (),
    prediction: Prediction = "epsilon",
    *,
    order: Literal[2, 3] = 2,
    kind: Literal["midpoint", "heun"] = "midpoint",
    stochastic: bool = False,
) -> Coefficients:
    """Of ``dpm_solver_pp_2m_step`` or ``dpm_solver_pp_3m_step``.

    Args:
        level, to: of the sample and of the result.
        before: the levels of the steps before, the last one first. With fewer than ``order − 1`` of them, as at first,
            the step is of a lower order; one to no noise is of the first.
        prediction: what the model puts out.
        order: 2 or 3.
        kind: of the second order.
        stochastic: solves the stochastic equation, with fresh noise; of the second order.
    Source: Lu et al. 2022b, algorithm 2 (midpoint) and appendix A.
    """
    if order not in (2, 3) or (order == 3 and stochastic):
        raise ValueError(f"order is {order}, expected 2{'' if stochastic else ' or 3'}")
    if kind not in ("midpoint", "heun"):
        raise ValueError(f"kind is {kind!r}, expected 'midpoint' or 'heun'")
    before = [past for past in before[: order - 1] if past.alpha > 0] if to.sigma > 0 else []
    shrink = to.ratio / level.ratio  # e^-h
    rest = 1 - shrink**2 if stochastic else 1 - shrink
    weights = [to.alpha * rest]  # of x₀, and of those before
    if before:
        h, back = _steps_back(level, to, before)
        h = 2 * h if stochastic else h
        slope = to.alpha * (rest / 2 if kind == "midpoint" and len(before) == 1 else 1 - rest / h)
        difference = [1 / back[0], -1 / back[0]]  # of x₀ and the one before, per step
        if len(before) == 1:
            weights = [weights[0] + slope * difference[0], slope * difference[1]]
        else:
            distance = back[1]
            older = [1 / (distance - back[0]), -1 / (distance - back[0])]
            bend = to.alpha * ((rest - h) / h**2 + 0.5)
            newest, oldest = slope * (1 + back[0] / distance) + bend / distance, -(slope * back[0] + bend) / distance
            weights = [
                weights[0] + newest * difference[0],
                newest * difference[1] + oldest * older[0],
                oldest * older[1],
            ]
    row = _x0_row(level, prediction) | _history(weights[1:], Column.HISTORY0)
    row |= {
        Column.SAMPLE: to.sigma / level.sigma * (shrink if stochastic else 1.0),
        Column.X0: weights[0],
        Column.NOISE: to.sigma * math.sqrt(rest) if stochastic else 0.0,
    }
    return coefficients(f"dpm_solver_pp_{order}m", row, to, adds_noise=stochastic, history=len(before))


def unipc(
    level: Level,
    to: Level,
    before: Sequence[Level] = (),
    prediction: Prediction = "epsilon",
    *,
    order: int = 2,
    corrector_order: int | None = None,
    kind: Literal["bh1", "bh2"] = "bh2",
) -> Coefficients:
    """Of ``unipc_step``.

    Args:
        level, to: of the sample and of the result.
        before: the levels of the steps before, the last one first. With fewer than an order asks for, it is lower.
        prediction: what the model puts out.
        order: of the prediction, 1 to 3. A step to no noise is of the first.
        corrector_order: of the correction, as the order of the step before was; 0 for none. By default, ``order``.
        kind: B(h) is −h, or e^-h − 1.
    Source: Zhao et al. 2023, algorithms 1 and 2, B(h) of §3.3.
    """
    if kind not in ("bh1", "bh2"):
        raise ValueError(f"kind is {kind!r}, expected 'bh1' or 'bh2'")
    corrector_order = order if corrector_order is None else corrector_order
    if order not in (1, 2, 3) or corrector_order not in (0, 1, 2, 3):
        raise ValueError(f"order is {order}, corrector_order {corrector_order}, expected 1 to 3 and 0 to 3")
    before = [past for past in before if past.alpha > 0]
    order = min(order, 1 + len(before)) if to.sigma > 0 else 1
    corrector_order = min(corrector_order, len(before))
    predicted = _bh_weights(level, to, before[: order - 1], kind, is_corrector=False)
    corrected = {Column.CORRECTED_SAMPLE: 1.0}
    row = _x0_row(level, prediction)
    if corrector_order:
        sample, weights, new = _bh_weights(before[0], level, before[1:corrector_order], kind, is_corrector=True)
        corrected = {Column.CORRECTED_X0: new, Column.CORRECTED_HISTORY0: sample}
        corrected |= _history(weights, Column.CORRECTED_HISTORY1)
    sample, weights, _ = predicted
    row |= corrected | {Column.X0: weights[0]} | _history(weights[1:], Column.HISTORY1)
    for column, value in corrected.items():
        of_next = Column[column.name.removeprefix("CORRECTED_")]
        row[of_next] = row.get(of_next, 0.0) + sample * value
    used = max(corrector_order, order - 1)
    return coefficients("unipc", row, to, history=1 + used if used else 0)


def _bh_weights(
    level: Level, to: Level, before: Sequence[Level], kind: str, *, is_corrector: bool
) -> tuple[float, list[float], float]:
    """From ``level`` to ``to``: the weights of the sample, of x₀ there and before, and of x₀ at ``to``."""
    sample, first = to.sigma / level.sigma, to.alpha * (1 - to.ratio / level.ratio)
    if not before and not is_corrector:
        return sample, [first], 0.0
    h, back = _steps_back(level, to, before)
    places = torch.tensor([*(-b for b in back), 1.0], dtype=torch.float64)
    scale = -h if kind == "bh1" else math.expm1(-h)
    order = len(places)
    sides, phi, factorial = [], math.expm1(-h) / -h - 1, 1.0
    for i in range(1, order + 1):
        sides.append(phi * factorial / scale)
        factorial *= i + 1
        phi = phi / -h - 1 / factorial
    powers = torch.stack([places**i for i in range(order)])
    if is_corrector:
        shares = [0.5] if order == 1 else torch.linalg.solve(powers, powers.new_tensor(sides)).tolist()
    else:
        known = order - 1
        shares = (
            [0.5]
            if known == 1
            else torch.linalg.solve(powers[:known, :known], powers.new_tensor(sides[:known])).tolist()
        )
    of_differences = [-to.alpha * scale * share / place for share, place in zip(shares, places.tolist(), strict=False)]
    new = of_differences[-1] if is_corrector else 0.0
    of_past = of_differences[: len(before)]
    return sample, [first - sum(of_differences), *of_past], new
