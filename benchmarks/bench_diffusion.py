"""Why one-pass denoising steps are worth having: each beside its formula, a copy and the step of diffusers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals import diffusion as rivals
from mmkern import ops
from mmkern.bench.case import Case, Family, Peer, Shape, load_shapes
from mmkern.diffusion import Level, Schedule, solvers

SHAPES = load_shapes(Path(__file__).with_name("shapes.yaml"))
# Tensors that a task takes, and additions and multiplications for each element.
TASKS = {
    "add_noise": (2, 3),
    "ddim_step": (3, 8),
    "ddpm_step": (3, 7),
    "denoising_loss": (2, 3),
    "dpm_solver_pp_2m_step": (3, 7),
    "dpm_solver_pp_3m_step": (4, 9),
    "euler_ancestral_step": (3, 7),
    "euler_step": (2, 6),
    "flow_match_euler_step": (2, 2),
    "heun_step": (4, 9),
    "lcm_step": (3, 7),
    "unipc_step": (4, 12),
    "velocity": (2, 3),
}


def coefficients() -> dict[str, ops.Coefficients]:
    """Of the steps that the rivals take, as a sampler prepares them."""
    n = rivals.Numbers
    here, there = (Level(bar**0.5, (1 - bar) ** 0.5) for bar in (n.bar, n.next_bar))
    oldest, before, now, after = (Level(*rivals.level(sigma)) for sigma in n.four_sigmas)
    exploding = [Level(1.0, sigma) for sigma in n.sigmas[1:]]
    made = [
        solvers.ddim(here, there),
        solvers.ddpm(here, there),
        solvers.lcm(here, there, timestep=rivals.TIMESTEP),
        solvers.euler(*exploding),
        solvers.euler_ancestral(*exploding),
        solvers.heun(*exploding, is_second=True),
        solvers.dpm_solver_pp(now, after, [before]),
        solvers.dpm_solver_pp(now, after, [before, oldest], order=3),
        solvers.unipc(now, after, [before], order=2, corrector_order=1),
        solvers.flow_match_euler(*(Level(1 - sigma, sigma) for sigma in n.flow)),
    ]
    return {f"{each.solver}_step": each.to("cpu", torch.float32) for each in made}


NUMBERS = coefficients()
GUIDANCE = ops.Guidance("cfg", rivals.GUIDANCE)
SCHEDULE = Schedule.from_alphas_cumprod(rivals.Numbers.bars)


def arguments(task: str, shape: Shape, generator: torch.Generator) -> list[Any]:
    return [torch.randn(shape.sizes, generator=generator) for _ in range(TASKS[task][0])]


def diffusers(task: str, args: Any) -> Peer:
    return Peer(rivals.diffusers_step(task, args), args, [], lambda out: out)


def step(task: str) -> Callable[..., Tensor]:
    """``task(output, x, what it keeps, ...)``; only the next sample is compared."""
    take: Any = getattr(ops, task)

    def run(output: Tensor, x: Tensor, *more: Tensor) -> Tensor:
        if task.startswith("dpm"):
            return take(output, x, NUMBERS[task], more)[0]  # type: ignore[no-any-return]
        if task == "unipc_step":
            return take(output, x, NUMBERS[task], more[0], more[1:])[0]  # type: ignore[no-any-return]
        if task == "heun_step":
            return take(output, x, NUMBERS[task], more)[0]  # type: ignore[no-any-return]
        return take(output, x, NUMBERS[task], **({"noise": more[0]} if more else {}))  # type: ignore[no-any-return]

    return run


def timesteps(x0: Tensor) -> Tensor:
    return rivals.TIMESTEP + torch.arange(len(x0))


DIFFUSION = Family(
    name="diffusion",
    arguments=arguments,
    rivals=rivals.FORMULAS,
    flops=lambda op, backward: TASKS[op][1],
    few=lambda x: x[:1],
    peer_name="diffusers",
    peer=diffusers,
    ours={
        **{task: step(task) for task in NUMBERS},
        "ddim_step": lambda u, c, x: ops.ddim_step((u, c), x, NUMBERS["ddim_step"], guidance=GUIDANCE),
        "add_noise": lambda x0, noise: ops.add_noise(x0, timesteps(x0), SCHEDULE, noise=noise),
        "velocity": lambda x0, noise: ops.velocity(x0, noise, timesteps(x0), SCHEDULE),
        "denoising_loss": lambda predicted, target: ops.denoising_loss(predicted, target, reduction="none"),
    },
    made_of={
        **dict.fromkeys(TASKS, "denoise_step"),
        **dict.fromkeys(("heun_step", "dpm_solver_pp_2m_step", "dpm_solver_pp_3m_step"), "multistep"),
        "unipc_step": "corrected_step",
        "denoising_loss": "masked_squared_error",
    },
)
BESIDE_DIFFUSERS = ("dpm_solver_pp_2m_step", "euler_step", "flow_match_euler_step")

CASES = [
    Case(DIFFUSION, "ddim_step", SHAPES["latents_of_eight"]),
    *(
        Case(DIFFUSION, op, SHAPES[shape], with_peer=True)
        for op in BESIDE_DIFFUSERS
        for shape in ("latents_of_four", "latent")
    ),
    Case(DIFFUSION, "ddim_step", SHAPES["latents_of_eight"], threads=2, level="full"),
    Case(DIFFUSION, "ddim_step", SHAPES["latents_of_eight"], dtype=torch.bfloat16, level="full"),
    Case(DIFFUSION, "denoising_loss", SHAPES["latents_of_eight"], mode="forward+backward", level="full"),
    *(
        Case(DIFFUSION, task, SHAPES["latents_of_four"], level="full")
        for task in TASKS
        if task not in (*BESIDE_DIFFUSERS, "ddim_step", "denoising_loss")
    ),
]


def test_diffusion(case: Case, side: str, timed: Any) -> None:
    """Times one side of a case; fails only where a result is wrong (see conftest.py)."""
    timed(case, side)
