"""Schedulers of diffusers with the steps of mmkern: the same signature, results and noise, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmkern import testing

diffusers = pytest.importorskip("diffusers")
from mmkern.integrations import diffusers as integration  # noqa: E402
from mmkern.integrations.diffusers import accelerate_scheduler  # noqa: E402

STEPS = 20
ORDERS = (1, 2, 3)
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def _configurations() -> list[tuple[str, dict[str, Any]]]:
    dpm, unipc = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
    found: list[tuple[str, dict[str, Any]]] = [
        *(("DDIMScheduler", {"prediction_type": p}) for p in PREDICTIONS),
        ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
        ("DDIMScheduler", {"thresholding": True, "sample_max_value": 1.5}),
        (
            "DDIMScheduler",
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        ),
        *(("DDPMScheduler", {"prediction_type": p}) for p in PREDICTIONS),
        ("DDPMScheduler", {"variance_type": "fixed_large", "beta_schedule": "squaredcos_cap_v2"}),
        ("DDPMScheduler", {"variance_type": "fixed_small_log", "thresholding": True}),
        *(("EulerDiscreteScheduler", {"prediction_type": p}) for p in PREDICTIONS),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        *(("EulerAncestralDiscreteScheduler", {"prediction_type": p}) for p in ("epsilon", "v_prediction")),
        *(("HeunDiscreteScheduler", {"prediction_type": p}) for p in PREDICTIONS),
        ("HeunDiscreteScheduler", {"clip_sample": True, "use_karras_sigmas": True}),
        *((dpm, {"solver_order": n, "prediction_type": p}) for n in ORDERS for p in PREDICTIONS),
        *((dpm, {"solver_order": n, "solver_type": "heun"}) for n in ORDERS[1:]),
        *((dpm, {"solver_order": n, "algorithm_type": "sde-dpmsolver++"}) for n in ORDERS[:2]),
        (dpm, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "use_karras_sigmas": True}),
        (dpm, {"thresholding": True, "final_sigmas_type": "sigma_min", "euler_at_final": True}),
        (dpm, {"final_sigmas_type": "sigma_min"}),
        (dpm, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}),
        *((unipc, {"solver_order": n, "prediction_type": p}) for n in ORDERS for p in PREDICTIONS),
        *((unipc, {"solver_order": n, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}) for n in ORDERS),
        (unipc, {"disable_corrector": [0, 1, 7], "thresholding": True}),
        (unipc, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
        *(("LCMScheduler", {"prediction_type": p}) for p in PREDICTIONS),
        ("LCMScheduler", {"clip_sample": True}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ]
    return found


CONFIGURATIONS = _configurations()
IDS = [f"{name.removesuffix('Scheduler')}-{'-'.join(map(str, config.values()))}" for name, config in CONFIGURATIONS]


def scheduler(name: str, config: dict[str, Any], steps: int = STEPS) -> Any:
    made = getattr(diffusers, name)(**config)
    made.set_timesteps(steps)
    return made


def model(x: Tensor, t: Any) -> Tensor:
    """Stands for one: bounded, and different at each timestep."""
    return torch.tanh(1.3 * x + 0.3 * torch.cos(torch.as_tensor(t, dtype=x.dtype)))


def start(of: Any, samples: int = 2) -> Tensor:
    x: Tensor = torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * getattr(
        of, "init_noise_sigma", 1.0
    )
    return x


def options(of: Any, i: int) -> dict[str, Any]:
    """The noise of step i, where it takes any."""
    draws = not isinstance(of, diffusers.HeunDiscreteScheduler | diffusers.UniPCMultistepScheduler)
    return {"generator": torch.Generator().manual_seed(i)} if draws else {}


def told(of: Any, x: Tensor, t: Any) -> Tensor:
    return model(of.scale_model_input(x, t) if hasattr(of, "scale_model_input") else x, t)


@pytest.fixture(autouse=True)
def _same_noise_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = integration.randn_tensor

    def draw(shape: Any, generator: Any, device: Any, dtype: torch.dtype) -> Tensor:
        return drawn(shape, generator, device, torch.float32).to(dtype)

    monkeypatch.setattr(integration, "randn_tensor", draw)


@pytest.mark.parametrize(("name", "config"), CONFIGURATIONS, ids=IDS)
def test_every_step_gives_what_diffusers_gives(name: str, config: dict[str, Any]) -> None:
    """All results of all steps; the oracle is the step in float64, from the same sample."""
    theirs = scheduler(name, config)
    ours, oracle = (accelerate_scheduler(scheduler(name, config)) for _ in range(2))
    x = start(theirs)
    for i, t in enumerate(theirs.timesteps):
        output = told(theirs, x, t)
        expected = theirs.step(output, t, x, **options(theirs, i))
        got = ours.step(output, t, x, **options(theirs, i))
        exact = oracle.step(output.double(), t, x.double(), **options(theirs, i))
        assert type(got) is type(expected)
        for key, value in expected.items():
            error = testing.relative_error(value, exact[key]).max().item()
            what = f"{key} of step {i}"
            testing.check_contract(what, got[key], exact[key], error, factor=2.0, longest_sum=1)
        x = expected.prev_sample


@pytest.mark.parametrize(("name", "config"), CONFIGURATIONS, ids=IDS)
def test_a_loop_gives_what_diffusers_gives(name: str, config: dict[str, Any]) -> None:
    """Each along its own path: as near to that in float64 as diffusers."""

    def run(of: Any, dtype: torch.dtype) -> Tensor:
        x = start(of, samples=16).to(dtype)
        for i, t in enumerate(of.timesteps):
            x = of.step(told(of, x, t), t, x, return_dict=False, **options(of, i))[0]
        return x

    theirs = run(scheduler(name, config), torch.float32)
    ours = run(accelerate_scheduler(scheduler(name, config)), torch.float32)
    oracle = run(accelerate_scheduler(scheduler(name, config)), torch.float64)
    # On the average: a model may drive a path away from its neighbour, so the largest error is a matter of luck.
    expected, got = ((x.double() - oracle).abs().mean() for x in (theirs, ours))
    assert got <= 2 * expected + torch.finfo(torch.float32).eps * oracle.abs().mean()


def test_other_numbers_of_steps_and_new_starts() -> None:
    ours, theirs = (
        accelerate_scheduler(scheduler("UniPCMultistepScheduler", {})),
        scheduler("UniPCMultistepScheduler", {}),
    )
    for steps in (3, 7):
        for of in (ours, theirs):
            of.set_timesteps(steps)
        x = y = start(theirs)
        for t in theirs.timesteps:
            x, y = theirs.step(model(x, t), t, x).prev_sample, ours.step(model(y, t), t, y).prev_sample
        torch.testing.assert_close(y, x)


def test_a_start_in_the_middle() -> None:
    """As image-to-image pipelines do."""
    ours, theirs = (scheduler("DPMSolverMultistepScheduler", {}) for _ in range(2))
    accelerate_scheduler(ours)
    x = y = start(theirs)
    for of in (ours, theirs):
        of.set_begin_index(9)
    for t in theirs.timesteps[9:]:
        x, y = theirs.step(model(x, t), t, x).prev_sample, ours.step(model(y, t), t, y).prev_sample
    torch.testing.assert_close(y, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_samples_of_fewer_bits(dtype: torch.dtype) -> None:
    theirs, ours, oracle = (scheduler("EulerDiscreteScheduler", {}) for _ in range(3))
    accelerate_scheduler(ours)
    accelerate_scheduler(oracle)
    x = start(theirs).to(dtype)
    t = theirs.timesteps[0]
    for of in (ours, theirs, oracle):
        of.scale_model_input(x, t)
    output = model(x, t)
    expected, got = (of.step(output, t, x).prev_sample for of in (theirs, ours))
    exact = oracle.step(output.double(), t, x.double()).prev_sample
    error = testing.relative_error(expected, exact).max().item()
    assert expected.dtype == dtype
    testing.check_contract("the sample", got, exact, error, factor=2.0, longest_sum=1)


def test_what_no_step_does_goes_to_the_scheduler() -> None:
    ours, theirs = (scheduler("EulerDiscreteScheduler", {}) for _ in range(2))
    accelerate_scheduler(ours)
    x = start(theirs)
    t = theirs.timesteps[0]
    output = told(theirs, x, t)
    told(ours, x, t)
    churn = {"s_churn": 5.0}
    expected = theirs.step(output, t, x, **churn, generator=torch.Generator().manual_seed(0))
    got = ours.step(output, t, x, **churn, generator=torch.Generator().manual_seed(0))
    assert torch.equal(got.prev_sample, expected.prev_sample)
    with pytest.raises(ValueError, match="integer indices"):
        ours.step(output, 3, x)


def test_it_can_be_undone() -> None:
    of = scheduler("DDIMScheduler", {})
    accelerate_scheduler(of)
    assert accelerate_scheduler(of) is of
    del of.step
    assert of.step.__func__ is type(of).step


def test_positional_arguments() -> None:
    ours, theirs = (scheduler("DDIMScheduler", {}) for _ in range(2))
    accelerate_scheduler(ours)
    x, t = start(theirs), theirs.timesteps[3]
    noise = torch.randn_like(x)
    arguments = model(x, t), t, x, 0.5, True, None, noise, False
    for a, b in zip(ours.step(*arguments), theirs.step(*arguments), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("name", "config", "error", "message"),
    [
        ("PNDMScheduler", {}, TypeError, "scheduler is PNDMScheduler, expected one of DDIMScheduler"),
        (
            "DDPMScheduler",
            {"variance_type": "learned"},
            ValueError,
            "variance_type is 'learned', expected 'fixed_small'",
        ),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            ValueError,
            "solver_order is 3, expected 1 or 2",
        ),
        ("UniPCMultistepScheduler", {"predict_x0": False}, ValueError, "predict_x0 is False, expected True"),
    ],
)
def test_what_is_not_supported_is_named(
    name: str, config: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        accelerate_scheduler(getattr(diffusers, name)(**config))
