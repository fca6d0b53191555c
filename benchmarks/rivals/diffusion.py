"""Denoising steps as samplers write them in PyTorch, and as diffusers takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

GUIDANCE = 7.5
STEPS, STEP = 20, 9
TIMESTEP = 500


class Numbers:
    """Of step 9 of 20, of the schedules that diffusers has by default."""

    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bars = (1 - betas).cumprod(0)
    bar, next_bar = bars[TIMESTEP].item(), bars[TIMESTEP - 1000 // STEPS].item()
    sigmas = 1.9, 1.6, 1.3  # of the step before, of this one and of the next
    flow = 0.6, 0.55


def ddim_step(uncond: Tensor, cond: Tensor, x: Tensor) -> Tensor:
    n = Numbers
    noise = uncond + GUIDANCE * (cond - uncond)
    x0 = (x - math.sqrt(1 - n.bar) * noise) / math.sqrt(n.bar)
    return math.sqrt(n.next_bar) * x0 + math.sqrt(1 - n.next_bar) * noise


def euler_step(noise: Tensor, x: Tensor) -> Tensor:
    _, sigma, to = Numbers.sigmas
    x0 = x - sigma * noise
    return x + (x - x0) / sigma * (to - sigma)


def dpm_solver_pp_2m_step(noise: Tensor, x: Tensor, previous: Tensor) -> Tensor:
    (alpha, sigma), (next_alpha, next_sigma) = map(level, Numbers.sigmas[1:])
    lambdas = [-math.log(sigma) for sigma in Numbers.sigmas]
    h, ratio = lambdas[2] - lambdas[1], (lambdas[1] - lambdas[0]) / (lambdas[2] - lambdas[1])
    x0 = (x - sigma * noise) / alpha
    slope = (x0 - previous) / ratio
    return next_sigma / sigma * x - next_alpha * math.expm1(-h) * (x0 + 0.5 * slope)


def flow_match_euler_step(velocity: Tensor, x: Tensor) -> Tensor:
    sigma, to = Numbers.flow
    return x + (to - sigma) * velocity


def level(sigma: float) -> tuple[float, float]:
    alpha = 1 / math.sqrt(1 + sigma**2)
    return alpha, sigma * alpha


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "ddim_step": ddim_step,
    "euler_step": euler_step,
    "dpm_solver_pp_2m_step": dpm_solver_pp_2m_step,
    "flow_match_euler_step": flow_match_euler_step,
}


# ---- diffusers -------------------------------------------------------------------------------------------------------


def diffusers_step(task: str, args: Sequence[Any]) -> Callable[..., Tensor]:
    """``scheduler.step`` in the middle of a path of these levels."""
    import diffusers

    sigmas = torch.tensor([2.5, *Numbers.sigmas, 0.5, 0.0])
    if task == "euler_step":
        scheduler: Any = diffusers.EulerDiscreteScheduler()
    elif task == "flow_match_euler_step":
        scheduler, sigmas = (
            diffusers.FlowMatchEulerDiscreteScheduler(),
            torch.tensor([1.0, 0.7, *Numbers.flow, 0.3, 0.0]),
        )
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(final_sigmas_type="sigma_min", lower_order_final=False)
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas, scheduler.is_scale_input_called = sigmas, True
    t = scheduler.timesteps[2]

    def step(output: Tensor, x: Tensor, *previous: Tensor) -> Tensor:
        scheduler._step_index = 2
        if previous:
            scheduler.model_outputs, scheduler.lower_order_nums = [None, *previous], 2
        found: Tensor = scheduler.step(output, t, x, return_dict=False)[0]
        return found

    return step
