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
    four_sigmas = 2.2, *sigmas
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


def dpm_solver_pp_3m_step(noise: Tensor, x: Tensor, previous: Tensor, older: Tensor) -> Tensor:
    _, _, (alpha, sigma), (next_alpha, next_sigma) = map(level, Numbers.four_sigmas)
    lambdas = [-math.log(sigma) for sigma in Numbers.four_sigmas]
    h, near, far = lambdas[3] - lambdas[2], lambdas[2] - lambdas[1], lambdas[1] - lambdas[0]
    r0, r1 = near / h, far / h
    x0 = (x - sigma * noise) / alpha
    first, second = (x0 - previous) / r0, (previous - older) / r1
    slope, bend = first + r0 / (r0 + r1) * (first - second), (first - second) / (r0 + r1)
    phi = math.expm1(-h)
    return (
        next_sigma / sigma * x
        - next_alpha * phi * x0
        + next_alpha * (phi / h + 1) * slope
        - next_alpha * ((phi + h) / h**2 - 0.5) * bend
    )


def unipc_step(noise: Tensor, x: Tensor, last: Tensor, previous: Tensor) -> Tensor:
    """Corrected in the first order, predicted in the second."""
    (_, last_sigma), (alpha, sigma), (next_alpha, next_sigma) = map(level, Numbers.sigmas)
    lambdas = [-math.log(sigma) for sigma in Numbers.sigmas]
    back, h = lambdas[1] - lambdas[0], lambdas[2] - lambdas[1]
    x0 = (x - sigma * noise) / alpha
    x = sigma / last_sigma * last - alpha * math.expm1(-back) * (previous + 0.5 * (x0 - previous))
    slope = (previous - x0) / (-back / h)
    return next_sigma / sigma * x - next_alpha * math.expm1(-h) * (x0 + 0.5 * slope)


def heun_step(noise: Tensor, x: Tensor, first: Tensor, first_x0: Tensor) -> Tensor:
    """The second stage."""
    _, sigma, to = Numbers.sigmas
    x0 = x - to * noise
    return first + 0.5 * (to - sigma) * ((first - first_x0) / sigma + (x - x0) / to)


def ddpm_step(predicted: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    n = Numbers
    kept = n.bar / n.next_bar
    x0 = (x - math.sqrt(1 - n.bar) * predicted) / math.sqrt(n.bar)
    mean = math.sqrt(n.next_bar) * (1 - kept) / (1 - n.bar) * x0 + math.sqrt(kept) * (1 - n.next_bar) / (1 - n.bar) * x
    return mean + math.sqrt((1 - n.next_bar) / (1 - n.bar) * (1 - kept)) * noise


def euler_ancestral_step(predicted: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    _, sigma, to = Numbers.sigmas
    up = math.sqrt(to**2 * (sigma**2 - to**2) / sigma**2)
    x0 = x - sigma * predicted
    return x + (x - x0) / sigma * (math.sqrt(to**2 - up**2) - sigma) + up * noise


def lcm_step(predicted: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    n = Numbers
    scaled = 10.0 * TIMESTEP
    x0 = (x - math.sqrt(1 - n.bar) * predicted) / math.sqrt(n.bar)
    denoised = scaled / math.sqrt(scaled**2 + 0.25) * x0 + 0.25 / (scaled**2 + 0.25) * x
    return math.sqrt(n.next_bar) * denoised + math.sqrt(1 - n.next_bar) * noise


def add_noise(x0: Tensor, noise: Tensor) -> Tensor:
    bar = Numbers.bars.to(x0.dtype)[_timesteps(x0)].view(-1, *[1] * (x0.dim() - 1))
    return bar.sqrt() * x0 + (1 - bar).sqrt() * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    bar = Numbers.bars.to(x0.dtype)[_timesteps(x0)].view(-1, *[1] * (x0.dim() - 1))
    return bar.sqrt() * noise - (1 - bar).sqrt() * x0


def _timesteps(x0: Tensor) -> Tensor:
    return TIMESTEP + torch.arange(len(x0))


def denoising_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Of each sample."""
    return (predicted - target).square().flatten(1).mean(1)


def flow_match_euler_step(velocity: Tensor, x: Tensor) -> Tensor:
    sigma, to = Numbers.flow
    return x + (to - sigma) * velocity


def level(sigma: float) -> tuple[float, float]:
    alpha = 1 / math.sqrt(1 + sigma**2)
    return alpha, sigma * alpha


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "add_noise": add_noise,
    "ddim_step": ddim_step,
    "ddpm_step": ddpm_step,
    "denoising_loss": denoising_loss,
    "dpm_solver_pp_2m_step": dpm_solver_pp_2m_step,
    "dpm_solver_pp_3m_step": dpm_solver_pp_3m_step,
    "euler_ancestral_step": euler_ancestral_step,
    "euler_step": euler_step,
    "flow_match_euler_step": flow_match_euler_step,
    "heun_step": heun_step,
    "lcm_step": lcm_step,
    "unipc_step": unipc_step,
    "velocity": velocity,
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
