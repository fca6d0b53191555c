"""diffusers with the ops of mmkern: ``accelerate_scheduler`` and ``accelerate_model`` for parts of its pipelines."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from mmkern.diffusion import Level, Sampler, solvers
from mmkern.diffusion.solvers import Prediction
from mmkern.ops._checks import accumulation_dtype
from mmkern.ops.diffusion import Coefficients, Threshold

from .diffusers_modules import REPLACEMENTS, activate_output_norm, replacement_of

_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "sample": "sample",
    "original_sample": "sample",
    "v_prediction": "v",
    "flow_prediction": "flow",
}


def accelerate_scheduler(scheduler: Any) -> Any:
    """Make a scheduler of diffusers take its steps in one pass over memory.

    Its ``step`` is replaced, on this instance alone, by one of the same signature and results; ``del scheduler.step``
    undoes that. Noise comes from the same generator as before. What no step here does goes to the replaced one: churn,
    and timesteps of each token.

    Args:
        scheduler: a DDIM, DDPM, Euler, Euler-ancestral, Heun, DPM-Solver++ or SDE-DPM-Solver++ multistep, UniPC, LCM or
            flow-match Euler scheduler.
    Returns: the scheduler.
    Raises: TypeError for another one; ValueError where its configuration asks for what no step here does.
    """
    name = type(scheduler).__name__
    if name not in _ADAPTERS:
        raise TypeError(f"accelerate_scheduler: scheduler is {name}, expected one of {', '.join(_ADAPTERS)}")
    adapter = _ADAPTERS[name]
    for entry, allowed in adapter.supports(scheduler.config).items():
        if scheduler.config[entry] not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"accelerate_scheduler: {entry} is {scheduler.config[entry]!r}, expected {expected}")
    if "step" not in vars(scheduler):
        scheduler.step = _Steps(scheduler, adapter)
    return scheduler


def accelerate_model(model: nn.Module) -> nn.Module:
    """Make the norms, activations and blocks of a diffusers model take fewer passes over memory.

    Done in place: modules of exactly these classes get another ``forward``, and keep their parameters, buffers, hooks
    and keys of the state_dict.

    * ``LayerNorm``, ``FP32LayerNorm``, ``GroupNorm`` and diffusers' ``RMSNorm``; the scale and shift of
      ``AdaLayerNormZero`` and ``AdaLayerNormContinuous`` with them;
    * feed-forward's ``GELU`` (with the bias before it), ``GEGLU`` and ``SwiGLU``;
    * ``BasicTransformerBlock`` with "ada_norm_zero" or "layer_norm": the gated residual, the norm behind it and that
      norm's scale and shift in one pass, and the last gated residual;
    * ``ResnetBlock2D``: group norm, the scale and shift of its timestep, and activation in one pass;
    * the output norm of ``UNet2DConditionModel`` and ``UNet2DModel``, with its activation (``conv_act`` becomes an
      identity);
    * ``Timesteps``.

    Other modules, subclasses and modules whose ``forward`` was replaced before are left alone. Where a hook or an
    adapter sits on a module that one pass would skip, the block runs as diffusers has it.

    Args:
        model: such as a ``DiTTransformer2DModel`` or a ``UNet2DConditionModel``.
    Returns: the model.
    Raises: TypeError where it is no module; ValueError where it has none of these.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate_model: model is {type(model).__name__}, expected a torch.nn.Module")
    modules = list(model.modules())
    for module in modules:
        replacement = replacement_of(module)
        if replacement is not None:
            module.__class__ = replacement
    for module in modules:
        if type(module) in (UNet2DConditionModel, UNet2DModel):
            activate_output_norm(module)
    if not any(type(module) in REPLACEMENTS for module in modules):
        expected = ", ".join(replacement.__name__ for replacement in REPLACEMENTS)
        raise ValueError(f"accelerate_model: model is {type(model).__name__} without any of {expected}")
    return model


@dataclass(frozen=True)
class _Place:
    """Where in its path a scheduler stands."""

    index: int  # of the timestep in the path, or, of a scheduler that does not count, the timestep
    taken: int  # steps so far


@dataclass(frozen=True)
class _Adapter:
    """What is particular to a scheduler."""

    coefficients: Callable[..., Coefficients]  # of the scheduler, the place and the options of the call
    output: str  # the class of its results
    fields: tuple[str, ...] = ("prev_sample", "pred_original_sample")
    counts: bool = True  # its steps
    supports: Callable[[Any], dict[str, tuple[Any, ...]]] = lambda config: {}  # entries of the configuration
    declines: Callable[[Any, dict[str, Any]], bool] = lambda timestep, options: False


class _Steps:
    """``scheduler.step``."""

    def __init__(self, scheduler: Any, adapter: _Adapter) -> None:
        self._scheduler, self._adapter = scheduler, adapter
        self._replaced = scheduler.step
        self._names = list(inspect.signature(scheduler.step).parameters)[3:]
        self._result = getattr(sys.modules[type(scheduler).__module__], adapter.output)
        config = scheduler.config
        self._clip: float | Threshold | None = None
        if config.get("thresholding"):
            self._clip = Threshold(config.dynamic_thresholding_ratio, config.sample_max_value)
        elif config.get("clip_sample"):
            self._clip = config.clip_sample_range
        self._start()

    def _start(self) -> None:
        self._timesteps = self._scheduler.timesteps
        self._sampler = Sampler(keeps_x0=len(self._adapter.fields) > 1)
        self._made: dict[Any, Coefficients] = {}

    def __call__(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        options = dict(zip(self._names, args, strict=False)) | kwargs
        scheduler, adapter = self._scheduler, self._adapter
        if scheduler.num_inference_steps is None or adapter.declines(timestep, options):
            return self._replaced(model_output, timestep, sample, **options)
        if scheduler.timesteps is not self._timesteps:
            self._start()
        coefficients = self._coefficients(self._place(timestep), sample, options)
        noise = options.get("variance_noise")
        if coefficients.adds_noise and noise is None:
            shape, generator = model_output.shape, options.get("generator")
            noise = randn_tensor(shape, generator, model_output.device, model_output.dtype)
        noise = noise if noise is None else noise.to(sample.dtype)
        out = self._sampler.step(model_output, sample, coefficients, clip=self._clip, noise=noise)
        if adapter.counts:
            scheduler._step_index += 1
        more = self._sampler.corrected if adapter.fields[-1] == "denoised" else self._sampler.x0
        found = (out.to(model_output.dtype), more)[: len(adapter.fields)]
        if not options.get("return_dict", True):
            return found
        return self._result(**dict(zip(adapter.fields, found, strict=True)))

    def _place(self, timestep: Any) -> _Place:
        scheduler = self._scheduler
        if not self._adapter.counts:
            return _Place(int(timestep), self._sampler.taken)
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        return _Place(scheduler.step_index, self._sampler.taken)

    def _coefficients(self, place: _Place, sample: Tensor, options: dict[str, Any]) -> Coefficients:
        key = place, sample.dtype, sample.device, options.get("eta"), options.get("use_clipped_model_output")
        if key not in self._made:
            made = self._adapter.coefficients(self._scheduler, place, options)
            self._made[key] = made.to(sample.device, accumulation_dtype(sample.dtype))
        return self._made[key]


# ---- From the state of a scheduler to coefficients -------------------------------------------------------------------


def _prediction(scheduler: Any) -> Prediction:
    return _PREDICTIONS[scheduler.config.prediction_type]


def _of_bar(alpha_cumprod: Any) -> Level:
    """Of ᾱ."""
    bar = float(alpha_cumprod)
    return Level(bar**0.5, (1 - bar) ** 0.5)


def _exploding(scheduler: Any, index: int) -> Level:
    return Level(1.0, float(scheduler.sigmas[index]))


def _normalised(scheduler: Any, index: int) -> Level:
    sigma = float(scheduler.sigmas[index])
    if scheduler.config.get("use_flow_sigmas"):
        return Level(1 - sigma, sigma)
    alpha = (sigma**2 + 1) ** -0.5
    return Level(alpha, sigma * alpha)


def _before(scheduler: Any, place: _Place, count: int) -> list[Level]:
    return [_normalised(scheduler, place.index - i) for i in range(1, 1 + min(count, place.taken))]


def _ddim(scheduler: Any, place: _Place, options: dict[str, Any]) -> Coefficients:
    bars, before = (
        scheduler.alphas_cumprod,
        place.index - len(scheduler.alphas_cumprod) // scheduler.num_inference_steps,
    )
    return solvers.ddim(
        _of_bar(bars[place.index]),
        _of_bar(bars[before] if before >= 0 else scheduler.final_alpha_cumprod),
        _prediction(scheduler),
        eta=options.get("eta", 0.0),
        from_clipped=options.get("use_clipped_model_output", False),
    )


def _ddpm(scheduler: Any, place: _Place, options: dict[str, Any]) -> Coefficients:
    bars, before = scheduler.alphas_cumprod, int(scheduler.previous_timestep(place.index))
    to = _of_bar(bars[before]) if before >= 0 else Level(1.0, 0.0)
    variance = "fixed_large" if scheduler.variance_type == "fixed_large" else "fixed_small"
    return solvers.ddpm(_of_bar(bars[place.index]), to, _prediction(scheduler), variance=variance)  # type: ignore[arg-type]


def _euler(scheduler: Any, place: _Place, options: dict[str, Any]) -> Coefficients:
    ends = _exploding(scheduler, place.index), _exploding(scheduler, place.index + 1)
    return solvers.euler(*ends, _prediction(scheduler))


def _euler_ancestral(scheduler: Any, place: _Place, options: dict[str, Any]) -> Coefficients:
    ends = _exploding(scheduler, place.index), _exploding(scheduler, place.index + 1)
    return solvers.euler_ancestral(*ends, _prediction(scheduler))


def _heun(scheduler: Any, place: _Place, options: dict[str, Any]) -> Coefficients:
    is_second = place.taken % 2 == 1
    start = place.index - is_second
    ends = _exploding(scheduler, start), _exploding(scheduler, start + 1)
    return solvers.heun(*ends, _prediction(scheduler), is_second=is_second)


def _dpm_solver(scheduler: Any, place: _Place, options: dict[str, Any]) -> Coefficients:
    config, last = scheduler.config, len(scheduler.timesteps) - 1
    few = config.lower_order_final and len(scheduler.timesteps) < 15
    order = config.solver_order
    if place.index == last and (config.euler_at_final or few or config.final_sigmas_type == "zero"):
        order = 1
    elif place.index == last - 1 and few:
        order = min(order, 2)
    return solvers.dpm_solver_pp(
        _normalised(scheduler, place.index),
        _normalised(scheduler, place.index + 1),
        _before(scheduler, place, order - 1),
        _prediction(scheduler),
        order=3 if config.solver_order == 3 else 2,
        kind=config.solver_type,
        stochastic=config.algorithm_type == "sde-dpmsolver++",
    )


def _unipc(scheduler: Any, place: _Place, options: dict[str, Any]) -> Coefficients:
    config = scheduler.config

    def order(index: int, taken: int) -> int:
        most = config.solver_order
        if config.lower_order_final:
            most = min(most, len(scheduler.timesteps) - index)
        return int(min(most, taken + 1))

    corrects = place.taken > 0 and place.index - 1 not in scheduler.disable_corrector
    return solvers.unipc(
        _normalised(scheduler, place.index),
        _normalised(scheduler, place.index + 1),
        _before(scheduler, place, 3),
        _prediction(scheduler),
        order=order(place.index, place.taken),
        corrector_order=order(place.index - 1, place.taken - 1) if corrects else 0,
        kind=config.solver_type,
    )


def _lcm(scheduler: Any, place: _Place, options: dict[str, Any]) -> Coefficients:
    bars, timesteps = scheduler.alphas_cumprod, [int(t) for t in scheduler.timesteps]
    timestep = timesteps[place.index]
    is_last = place.index == scheduler.num_inference_steps - 1
    return solvers.lcm(
        _of_bar(bars[timestep]),
        None if is_last else _of_bar(bars[timesteps[place.index + 1]]),
        _prediction(scheduler),
        timestep=timestep,
        timestep_scaling=scheduler.config.timestep_scaling,
    )


def _flow(scheduler: Any, place: _Place, options: dict[str, Any]) -> Coefficients:
    here, there = (float(scheduler.sigmas[place.index + i]) for i in range(2))
    stochastic = scheduler.config.stochastic_sampling
    return solvers.flow_match_euler(Level(1 - here, here), Level(1 - there, there), stochastic=stochastic)


def _is_whole(timestep: Any, options: dict[str, Any]) -> bool:
    """What diffusers refuses where timesteps are not whole numbers."""
    return isinstance(timestep, int | torch.IntTensor | torch.LongTensor)


def _churns(timestep: Any, options: dict[str, Any]) -> bool:
    return _is_whole(timestep, options) or options.get("s_churn", 0.0) > 0


def _is_of_tokens(timestep: Any, options: dict[str, Any]) -> bool:
    return _is_whole(timestep, options) or options.get("per_token_timesteps") is not None


def _of_ddpm(config: Any) -> dict[str, tuple[Any, ...]]:
    return {"variance_type": ("fixed_small", "fixed_small_log", "fixed_large")}


def _of_dpm_solver(config: Any) -> dict[str, tuple[Any, ...]]:
    orders = (1, 2) if config.algorithm_type == "sde-dpmsolver++" else (1, 2, 3)
    return {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "solver_order": orders,
        "variance_type": (None,),
    }


def _of_unipc(config: Any) -> dict[str, tuple[Any, ...]]:
    return {"predict_x0": (True,), "solver_p": (None,), "solver_order": (1, 2, 3)}


_ADAPTERS = {
    "DDIMScheduler": _Adapter(_ddim, "DDIMSchedulerOutput", counts=False),
    "DDPMScheduler": _Adapter(_ddpm, "DDPMSchedulerOutput", counts=False, supports=_of_ddpm),
    "EulerDiscreteScheduler": _Adapter(_euler, "EulerDiscreteSchedulerOutput", declines=_churns),
    "EulerAncestralDiscreteScheduler": _Adapter(
        _euler_ancestral, "EulerAncestralDiscreteSchedulerOutput", declines=_is_whole
    ),
    "HeunDiscreteScheduler": _Adapter(_heun, "HeunDiscreteSchedulerOutput"),
    "DPMSolverMultistepScheduler": _Adapter(_dpm_solver, "SchedulerOutput", ("prev_sample",), supports=_of_dpm_solver),
    "UniPCMultistepScheduler": _Adapter(_unipc, "SchedulerOutput", ("prev_sample",), supports=_of_unipc),
    "LCMScheduler": _Adapter(_lcm, "LCMSchedulerOutput", ("prev_sample", "denoised")),
    "FlowMatchEulerDiscreteScheduler": _Adapter(
        _flow, "FlowMatchEulerDiscreteSchedulerOutput", ("prev_sample",), declines=_is_of_tokens
    ),
}
