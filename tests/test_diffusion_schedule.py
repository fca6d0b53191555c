"""Noise schedules and the steps through them, beside diffusers; noisy samples, velocities and the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkern import ops
from mmkern.diffusion import Level, Schedule, sample, solvers
from mmkern.reference.diffusion import Column

diffusers = pytest.importorskip("diffusers")

BETAS = {
    "linear": (Schedule.linear(), {"beta_schedule": "linear"}),
    "scaled_linear": (
        Schedule.scaled_linear(),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (Schedule.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
}


def model(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(1.3 * x + 0.3 * torch.cos(torch.as_tensor(t, dtype=x.dtype)))


@pytest.mark.parametrize("kind", BETAS)
def test_kinds(kind: str) -> None:
    schedule, config = BETAS[kind]
    expected = diffusers.DDPMScheduler(**config).alphas_cumprod.double()
    torch.testing.assert_close(schedule.alphas**2, expected, rtol=2e-4, atol=1e-7)  # theirs are float32 products
    torch.testing.assert_close(schedule.alphas**2 + schedule.sigmas**2, torch.ones(1000, dtype=torch.float64))


def test_zero_terminal_snr() -> None:
    schedule = Schedule.scaled_linear().zero_terminal_snr()
    config = {**BETAS["scaled_linear"][1], "rescale_betas_zero_snr": True}
    expected = diffusers.DDIMScheduler(**config).alphas_cumprod.double()
    torch.testing.assert_close(schedule.alphas**2, expected, rtol=1e-4, atol=1e-6)
    assert schedule.level(999) == Level(0.0, 1.0)


@pytest.mark.parametrize("count", [1, 7, 20, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacing(spacing: Any, count: int) -> None:
    expected = diffusers.DDIMScheduler(timestep_spacing=spacing)
    if spacing == "linspace" and count == 1:
        return  # theirs is the first timestep, which has no noise to take off
    expected.set_timesteps(count)
    assert Schedule.linear().timesteps(count, spacing) == expected.timesteps.tolist()


def test_levels_of_karras_and_exponential() -> None:
    schedule = Schedule.scaled_linear()
    for name, ratios in (("karras", schedule.karras(20)), ("exponential", schedule.exponential(20))):
        theirs = diffusers.EulerDiscreteScheduler(**BETAS["scaled_linear"][1], **{f"use_{name}_sigmas": True})
        theirs.set_timesteps(1000)  # whose sigmas run over the whole schedule
        theirs.set_timesteps(20)
        steps = schedule.steps("euler", 20, ratios=ratios)
        low, high = theirs.sigmas[-2].item(), theirs.sigmas[0].item()
        assert ratios[0] == pytest.approx(high, rel=1e-3)
        assert ratios[-1] == pytest.approx(schedule.level(0).ratio)
        assert low >= ratios[-1] * 0.999
        for step, ratio in zip(steps, ratios, strict=True):
            assert step.level.ratio == pytest.approx(ratio)
            below, above = schedule.level(math.floor(step.timestep)), schedule.level(math.ceil(step.timestep))
            assert below.ratio <= ratio * (1 + 1e-9)
            assert above.ratio >= ratio * (1 - 1e-9)


def test_flow() -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=[1 - i / 20 for i in range(20)])
    steps = Schedule.flow(shift=3.0).steps("flow_match_euler", 20)
    torch.testing.assert_close(torch.tensor([step.level.sigma for step in steps]), theirs.sigmas[:-1])
    torch.testing.assert_close(torch.tensor([step.timestep for step in steps]), theirs.timesteps)
    x = y = torch.randn(2, 3, 8, 8)
    for t in theirs.timesteps:
        x = theirs.step(model(x, t), t, x).prev_sample
    torch.testing.assert_close(sample(model, y, steps), x, rtol=1e-4, atol=1e-5)


SAMPLERS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}, {}),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "leading"}, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {"timestep_spacing": "leading"}, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {"timestep_spacing": "leading"}, {}),
}


@pytest.mark.parametrize("solver", SAMPLERS)
def test_sample(solver: Any) -> None:
    """Whole paths where the variance is preserved; Euler and Heun of diffusers walk those where it explodes."""
    made, config, options = SAMPLERS[solver]
    theirs = made(**BETAS["scaled_linear"][1], **config)
    theirs.set_timesteps(20)
    steps = Schedule.scaled_linear().steps(solver, 20, spacing="leading", dtype=torch.float64, **options)
    assert [step.timestep for step in steps] == theirs.timesteps.tolist()
    explodes = hasattr(theirs, "sigmas")
    start = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    x = start / steps[0].level.alpha if explodes else start
    noises: list[Tensor] = []
    for i, t in enumerate(theirs.timesteps):
        generator = {} if solver in ("ddim", "heun") else {"generator": torch.Generator().manual_seed(i)}
        noises.append(torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64))
        x = theirs.step(model(theirs.scale_model_input(x, t), t), t, x, **generator).prev_sample.double()
    if solver in ("ddpm", "euler_ancestral"):
        y = start
        for step, noise in zip(steps, noises, strict=True):
            take = ops.ddpm_step if solver == "ddpm" else ops.euler_ancestral_step
            y = take(model(y, step.timestep), y, step.coefficients, noise=noise)
    else:
        y = sample(model, start, steps)
    torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-3)  # theirs have float32 levels


@pytest.mark.parametrize("solver", ["dpm_solver_pp_2m", "dpm_solver_pp_3m", "unipc", "heun", "ddim"])
def test_solvers_agree_in_the_limit(solver: Any) -> None:
    """They solve one equation: the finer the steps, the nearer they are; those of higher order sooner."""
    schedule, start = Schedule.cosine(), torch.randn(4, 6, dtype=torch.float64)

    def velocity(x: Tensor, t: float) -> Tensor:
        return torch.tanh(x) * (1 + 0.1 * math.cos(t / 300))

    def run(solver: Any, count: int) -> Tensor:
        ratios = schedule.exponential(count)
        return sample(
            velocity, start, schedule.steps(solver, count, ratios=ratios, prediction="v", dtype=torch.float64)
        )

    exact = run("unipc", 800)
    coarse, fine = ((run(solver, count) - exact).abs().max().item() for count in (25, 100))
    assert fine < 0.05
    assert fine < coarse / (3 if solver == "ddim" else 5)


def test_noise_of_a_sampler_differs_from_step_to_step() -> None:
    steps = Schedule.linear().steps("ddpm", 3)
    x = torch.randn(2, 5)
    first, again, other = (sample(model, x, steps, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_lcm() -> None:
    steps = Schedule.scaled_linear().steps("lcm", 4, spacing="trailing")
    assert [step.coefficients.adds_noise for step in steps] == [True, True, True, False]
    assert sample(model, torch.randn(1, 4), steps, seed=0).isfinite().all()


# ---- Training --------------------------------------------------------------------------------------------------------


def test_noisy_samples_and_velocities() -> None:
    schedule, config = BETAS["scaled_linear"]
    theirs = diffusers.DDPMScheduler(**config)
    x0, noise = torch.randn(2, 5, 3, 4, 4).unbind()
    t = torch.tensor([0, 10, 500, 998, 999])
    got = ops.add_noise(x0, t, schedule, noise=noise)
    torch.testing.assert_close(got, theirs.add_noise(x0, noise, t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        ops.velocity(x0, noise, t, schedule), theirs.get_velocity(x0, noise, t), rtol=1e-4, atol=1e-5
    )
    flow = Schedule.flow()
    torch.testing.assert_close(ops.velocity(x0, noise, 3, flow), noise - x0)
    torch.testing.assert_close(ops.add_noise(x0, 499, flow, noise=noise), 0.5 * x0 + 0.5 * noise)


def test_noise_that_nobody_keeps() -> None:
    x0, schedule = torch.zeros(2, 30), Schedule.linear()
    a, b = (ops.add_noise(x0, torch.tensor([5, 900]), schedule, seed=3) for _ in range(2))
    assert torch.equal(a, b)
    assert a[1].std() > 3 * a[0].std()


def test_min_snr_weights() -> None:
    schedule = Schedule.linear()
    t = torch.tensor([0, 100, 400, 999])
    snr = ((schedule.alphas / schedule.sigmas) ** 2)[t].float()
    limited = snr.clamp_max(5.0)
    torch.testing.assert_close(schedule.min_snr_weights(t, prediction="sample"), limited)
    torch.testing.assert_close(schedule.min_snr_weights(t), limited / snr)
    torch.testing.assert_close(schedule.min_snr_weights(t, prediction="v"), limited / (snr + 1))


@pytest.mark.parametrize("shape", [None, (3, 5, 1), (1, 5, 1), (5, 1), (3, 1, 1), (3, 5, 7)])
def test_loss(shape: tuple[int, ...] | None) -> None:
    pred, target = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True).unbind()
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)
    mask = None if shape is None else torch.rand(shape) > 0.4
    got = ops.denoising_loss(pred, target, weight, mask)
    kept = torch.ones_like(pred) if mask is None else mask.expand(pred.shape).double()
    each = (kept * (pred - target) ** 2).sum((1, 2)) / kept.sum((1, 2)).clamp_min(1)
    expected = (weight * each).mean()
    torch.testing.assert_close(got, expected)
    inputs = pred, target, weight
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ops.denoising_loss(pred, target, mask=mask, reduction="none"), each)


def test_loss_of_padding_alone() -> None:
    pred, target = torch.randn(2, 2, 6, requires_grad=True).unbind()
    loss = ops.denoising_loss(pred, target, mask=torch.tensor([[False], [True]]), reduction="none")
    assert loss[0] == 0
    (grad,) = torch.autograd.grad(loss.sum(), pred)
    assert (grad[0] == 0).all()
    torch.testing.assert_close(loss[1], (pred - target)[1].square().mean())


def test_loss_of_several_dtypes() -> None:
    pred, target = torch.randn(2, 700).bfloat16().requires_grad_(), torch.randn(2, 700)
    loss = ops.denoising_loss(pred, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (pred.float() - target).square().mean())
    (grad,) = torch.autograd.grad(loss, pred)
    torch.testing.assert_close(grad, (2 / 1400 * (pred.float() - target)).bfloat16())


_X = torch.randn(2, 3)
_SCHEDULE = Schedule.linear()
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Schedule(torch.ones(3), torch.ones(4)), ValueError, r"shapes \[3\] and \[4\], expected \[T\]"),
    (lambda: Schedule(torch.ones(3), torch.ones(3)), ValueError, "expected more noise at each timestep"),
    (lambda: _SCHEDULE.timesteps(0), ValueError, "count is 0, expected an int from 1 to 1000"),
    (lambda: _SCHEDULE.timesteps(5, "even"), ValueError, "spacing is 'even', expected 'leading'"),  # type: ignore[arg-type]
    (lambda: _SCHEDULE.steps("rk4", 5), ValueError, "solver is 'rk4', expected 'ddpm', 'ddim'"),  # type: ignore[arg-type]
    (lambda: _SCHEDULE.steps("ddim", 5, ratios=[1.0]), ValueError, "ratios has 1 levels, expected 5"),
    (lambda: _SCHEDULE.level(1000), ValueError, "timestep is 1000, expected a number from 0 to 999"),
    (lambda: _SCHEDULE.zero_terminal_snr().karras(5), ValueError, "the last timestep is noise alone"),
    (lambda: ops.add_noise(_X, torch.tensor([1, 1000]), _SCHEDULE), ValueError, "t runs from 1 to 1000, expected"),
    (lambda: ops.add_noise(_X, torch.tensor([1, 2, 3]), _SCHEDULE), ValueError, r"t has shape \[3\]"),
    (lambda: ops.add_noise(_X.int(), 3, _SCHEDULE), TypeError, "add_noise: x0 has dtype torch.int32"),
    (
        lambda: ops.velocity(_X, _X[:1], 3, _SCHEDULE),
        ValueError,
        r"velocity: noise has shape \[1, 3\], expected \[2, 3\]",
    ),
    (
        lambda: ops.denoising_loss(_X, _X[:1]),
        ValueError,
        r"denoising_loss: target has shape \[1, 3\], expected \[2, 3\]",
    ),
    (lambda: ops.denoising_loss(_X, _X, torch.ones(3)), ValueError, r"weight has shape \[3\], expected \[2\]"),
    (
        lambda: ops.denoising_loss(_X, _X, mask=torch.ones(2)),
        ValueError,
        r"mask has shape \[2\], expected to broadcast",
    ),
    (lambda: ops.denoising_loss(_X, _X, reduction="sum"), ValueError, "reduction is 'sum', expected 'mean' or 'none'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_coefficients_of_one_solver_are_refused_by_another() -> None:
    row = solvers.coefficients("heun", {Column.SAMPLE: 1.0})
    with pytest.raises(ValueError, match="coefficients are those of heun_step, expected of ddim_step"):
        ops.ddim_step(_X, _X, row)
