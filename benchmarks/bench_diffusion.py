"""Why one-pass denoising steps are worth having: each beside its formula, a copy and the step of diffusers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals import diffusion as rivals
from mmkern import ops
from mmkern.bench.case import Case, Family, Peer, Shape, load_shapes
from mmkern.diffusion import Level, solvers

SHAPES = load_shapes(Path(__file__).with_name("shapes.yaml"))
INPUTS = {"ddim_step": 3, "dpm_solver_pp_2m_step": 3, "euler_step": 2, "flow_match_euler_step": 2}
FLOPS = {"ddim_step": 8, "dpm_solver_pp_2m_step": 7, "euler_step": 6, "flow_match_euler_step": 2}


def coefficients() -> dict[str, ops.Coefficients]:
    """Of the steps that the rivals take, as a sampler prepares them."""
    n = rivals.Numbers
    ends = (Level(bar**0.5, (1 - bar) ** 0.5) for bar in (n.bar, n.next_bar))
    before, here, there = (Level(*rivals.level(sigma)) for sigma in n.sigmas)
    exploding = (Level(1.0, sigma) for sigma in n.sigmas[1:])
    flow = (Level(1 - sigma, sigma) for sigma in n.flow)
    made = [
        solvers.ddim(*ends),
        solvers.euler(*exploding),
        solvers.dpm_solver_pp(here, there, [before]),
        solvers.flow_match_euler(*flow),
    ]
    return {f"{each.solver}_step": each.to("cpu", torch.float32) for each in made}


NUMBERS = coefficients()
GUIDANCE = ops.Guidance("cfg", rivals.GUIDANCE)


def arguments(task: str, shape: Shape, generator: torch.Generator) -> list[Any]:
    return [torch.randn(shape.sizes, generator=generator) for _ in range(INPUTS[task])]


def diffusers(task: str, args: Any) -> Peer:
    return Peer(rivals.diffusers_step(task, args), args, [], lambda out: out)


def two_step(output: Tensor, x: Tensor, previous: Tensor) -> Tensor:
    return ops.dpm_solver_pp_2m_step(output, x, NUMBERS["dpm_solver_pp_2m_step"], [previous])[0]


DIFFUSION = Family(
    name="diffusion",
    arguments=arguments,
    rivals=rivals.FORMULAS,
    flops=lambda op, backward: FLOPS[op],
    few=lambda x: x[:1],
    peer_name="diffusers",
    peer=diffusers,
    ours={
        "ddim_step": lambda u, c, x: ops.ddim_step((u, c), x, NUMBERS["ddim_step"], guidance=GUIDANCE),
        "euler_step": lambda output, x: ops.euler_step(output, x, NUMBERS["euler_step"]),
        "dpm_solver_pp_2m_step": two_step,
        "flow_match_euler_step": lambda output, x: ops.flow_match_euler_step(
            output, x, NUMBERS["flow_match_euler_step"]
        ),
    },
    made_of={**dict.fromkeys(INPUTS, "denoise_step"), "dpm_solver_pp_2m_step": "multistep"},
)

CASES = [
    Case(DIFFUSION, "ddim_step", SHAPES["latents_of_eight"]),
    *(
        Case(DIFFUSION, op, SHAPES[shape], with_peer=True)
        for op in ("dpm_solver_pp_2m_step", "euler_step", "flow_match_euler_step")
        for shape in ("latents_of_four", "latent")
    ),
    Case(DIFFUSION, "ddim_step", SHAPES["latents_of_eight"], threads=2, level="full"),
    Case(DIFFUSION, "ddim_step", SHAPES["latents_of_eight"], dtype=torch.bfloat16, level="full"),
]


def test_diffusion(case: Case, side: str, timed: Any) -> None:
    """Times one side of a case; fails only where a result is wrong (see conftest.py)."""
    timed(case, side)
