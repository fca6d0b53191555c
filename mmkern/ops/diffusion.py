"""Steps of denoising samplers, each in one pass over memory: what their models put out, guidance, the estimate of the
clean sample, the solver's combination, noise and what is known of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from mmkern.reference import diffusion as reference
from mmkern.reference.diffusion import MAX_HISTORY, MAX_OUTPUTS, Column, StepArguments

from ._checks import (
    FLOATING,
    LARGEST,
    Arguments,
    accumulation_dtype,
    broadcasts,
    check_broadcast,
    check_number,
    check_tensor,
    floating_rows,
)
from ._define import Op, define, renamed
from ._outputs import like
from ._random import seed_tensor
from .guidance import Guidance

Outputs = Tensor | Sequence[Tensor]


_OUTPUTS = tuple(f"output{i}" for i in range(MAX_OUTPUTS))
_HISTORY = tuple(f"history{i}" for i in range(MAX_HISTORY))
_OF_SHAPE_OF_X = (*_OUTPUTS, *_HISTORY, "noise", "known", "known_noise")
_BROADCAST = ("mask", "keep")
_OF_SAMPLES = {"weights": 2 * MAX_OUTPUTS, "rescale": 1, "coefficients": len(Column), "limits": 2}


# ---- What a step is given --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Coefficients:
    """The numbers of one step, as a solver of ``mmkern.diffusion`` makes them: float32, or float64 beside float64.

    Args:
        solver: whose they are.
        numbers: ``[1, 19]``, or a row for each sample: see ``mmkern.reference.diffusion.Column``.
        adds_noise: the step asks for noise.
        history: how many tensors of earlier steps it asks for.
    """

    solver: str
    numbers: Tensor
    adds_noise: bool = False
    history: int = 0

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Coefficients:
        """Where the samples are: float32, or float64 for that."""
        return replace(self, numbers=self.numbers.to(device, dtype))


class Known(NamedTuple):
    """What is known of the result, at the noise level of each step: ``keep·(α·sample + σ·noise) + (1 − keep)·next``.

    Args:
        keep: broadcastable to the sample; 1 where it is known, 0 where it is made.
        sample: clean, of the shape and dtype of the sample.
        noise: its noise, the same in each step.
    Source: Lugmayr et al. 2022 (RePaint), eq. 8.
    """

    keep: Tensor
    sample: Tensor
    noise: Tensor


class Threshold(NamedTuple):
    """Dynamic thresholding: x₀ is clipped at the quantile s of each sample's \\|x₀\\|, and divided by it.

    Args:
        quantile: of the magnitudes.
        largest: s lies from 1 to this.
    Source: Saharia et al. 2022 (Imagen), §2.3.
    """

    quantile: float = 0.995
    largest: float = 1.0


class StepOptions(TypedDict, total=False):
    """What every step takes beside outputs, sample and coefficients.

    Keys:
        guidance: how several outputs become one; without it there is one output.
        clip: a bound of \\|x₀\\|, in units of the sample, or a ``Threshold``.
        known: what is known of the result.
        noise: of the shape and dtype of the sample; else it is drawn, where the step asks for some:
        generator, seed, offset: where a seed comes from, as in ``cross_attention``. Number i of the sample, in the
            order of its axes, is normal number i of counter ``offset + ⌊i/4⌋``.
    """

    guidance: Guidance | None
    clip: float | Threshold | None
    known: Known | None
    noise: Tensor | None
    generator: torch.Generator | None
    seed: int | Tensor | None
    offset: int


_OPTIONS = dict.fromkeys(StepOptions.__annotations__).keys()
_NOTHING = (None,) * MAX_OUTPUTS


# ---- The ops ---------------------------------------------------------------------------------------------------------


def _check(op: str, args: Arguments) -> None:
    x = args["x"]
    floating_rows("x")(op, args)
    for name in _OF_SHAPE_OF_X:
        dtypes = FLOATING if name in _OUTPUTS else (x.dtype,)
        check_tensor(op, name, args[name], x, dtypes, x.shape, "x")
    for name in _BROADCAST:
        check_broadcast(op, name, args[name], x, (*FLOATING, torch.bool), tuple(x.shape), "x")
    check_tensor(op, "seed", args["seed"], x, (torch.int64,), (2,), "x")
    for name, size in _OF_SAMPLES.items():
        numbers = args[name]
        check_tensor(op, name, numbers, x, FLOATING, None, "x")
        if numbers is None:
            continue
        samples = x.shape[0] if x.dim() > 1 else 1
        if numbers.dim() != 2 or not broadcasts(numbers.shape[0], samples) or numbers.shape[1] != size:
            raise ValueError(f"{op}: {name} has shape {list(numbers.shape)}, expected {[samples, size]} or {[1, size]}")
    for first, second in (("keep", "known"), ("keep", "known_noise")):
        if (args[first] is None) != (args[second] is None):
            raise ValueError(f"{op}: {first} and {second} come together, got one of them")


def _arrange(args: Arguments) -> Arguments:
    x = args["x"]
    wide = accumulation_dtype(x.dtype)
    for name in _OUTPUTS:
        if args[name] is not None and (args[name].dtype == torch.float64) != (wide == torch.float64):
            args[name] = args[name].to(x.dtype)
    for name in _BROADCAST:
        if args[name] is not None:
            mask = args[name].to(wide)
            args[name] = mask.reshape(*[1] * (x.dim() - mask.dim()), *mask.shape)
    for name in _OF_SAMPLES:
        if args[name] is not None:
            args[name] = args[name].to(wide).contiguous()
    if args["seed"] is not None:  # numbers are drawn in the order of the axes
        for name in ("x", *_OF_SHAPE_OF_X):
            args[name] = None if args[name] is None else args[name].contiguous()
    return args


def _define(name: str, outputs: int, meaning: Any) -> Op:
    schema = (
        "Tensor x, "
        + "".join(f"Tensor? {output}, " for output in _OUTPUTS)
        + "Tensor? mask, "
        + "".join(f"Tensor? {history}, " for history in _HISTORY)
        + "Tensor? noise, Tensor? seed, Tensor? keep, Tensor? known, Tensor? known_noise, Tensor? weights, "
        "Tensor? rescale, Tensor coefficients, Tensor? limits"
    )
    result = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    return define(
        f"{name}({schema}) -> {result}",
        family="diffusion",
        reference=meaning,
        output=(like(0),) * outputs,
        requires=[_check],
        kinds={
            **dict.fromkeys(("x", *_OF_SHAPE_OF_X, *_BROADCAST), "grid"),
            **dict.fromkeys(("seed", *_OF_SAMPLES), "fixed"),
        },
        arrange=_arrange,
        autocast="keep",
        # Noise of one's own is slow by the reference.
        decomposes=lambda args: StepArguments.of(args).seed is None,
    )


_denoise_step = _define("denoise_step", 1, reference.denoise_step)
_multistep = _define("multistep", 2, reference.multistep)
_corrected_step = _define("corrected_step", 3, reference.corrected_step)
_PUBLIC_NAMES = {"x": "sample", "output0": "model_output"}
_STEPS = (_denoise_step, _multistep, _corrected_step)
_NOTHING_ELSE = (None,) * (len(_denoise_step.arguments) - 4)  # than x, output0, coefficients and limits


# ---- The steps -------------------------------------------------------------------------------------------------------


def take_step(
    results: Literal[1, 2, 3],
    model_output: Outputs,
    sample: Tensor,
    coefficients: Coefficients,
    options: StepOptions,
    history: Sequence[Tensor | None] = (),
) -> tuple[Tensor, ...]:
    """The next sample, x₀ and the corrected sample, or the first of these, by the solver of the coefficients."""
    op = _STEPS[results - 1]
    try:
        if options or coefficients.adds_noise or coefficients.history or type(model_output) is not Tensor:
            out = op(*_arguments(op.name, model_output, sample, coefficients, options, history))
        else:
            out = op(sample, model_output, *_NOTHING_ELSE, coefficients.numbers, None)
    except (TypeError, ValueError) as error:
        raise renamed(error, f"{coefficients.solver}_step", op, _PUBLIC_NAMES) from error
    return out if results > 1 else (out,)  # type: ignore[return-value]


def _arguments(
    op: str,
    model_output: Outputs,
    sample: Tensor,
    coefficients: Coefficients,
    options: StepOptions,
    history: Sequence[Tensor | None],
) -> list[Tensor | None]:
    if not isinstance(sample, Tensor):
        raise TypeError(f"sample is {type(sample).__name__}, expected a Tensor")
    if not options.keys() <= _OPTIONS:
        raise TypeError(f"got {', '.join(options.keys() - _OPTIONS)}, expected {', '.join(_OPTIONS)}")
    guidance, clip = options.get("guidance"), options.get("clip")
    outputs = _outputs(model_output, guidance)
    mask, weights, rescale = guidance.beside(sample) if guidance is not None else (None, None, None)
    wanted = coefficients.history
    past = [x for x in history[:wanted] if x is not None]
    if len(past) < wanted:
        raise ValueError(f"got {len(past)} tensors of earlier steps, expected {wanted}")
    noise = seed = None
    if coefficients.adds_noise:
        noise = options.get("noise")
        if noise is None:
            seed = seed_tensor(op, sample, options.get("generator"), options.get("seed"), options.get("offset", 0))
    args = [
        sample,
        *outputs,
        *_NOTHING[len(outputs) : MAX_OUTPUTS],
        mask,
        *past,
        *_NOTHING[wanted:MAX_HISTORY],
        noise,
        seed,
        *(options.get("known") or _NOTHING[:3]),
        weights,
        rescale,
        coefficients.numbers,
        None,
    ]
    if clip is not None:
        args[-1] = _limits(op, clip, args)
    return args


def _outputs(given: Any, guidance: Guidance | None) -> Sequence[Tensor]:
    """One tensor, or as many as guidance takes: in a sequence, or one after another along the first axis of one."""
    expected = 1 if guidance is None else guidance.outputs
    if isinstance(given, Tensor):
        if expected == 1:
            return (given,)
        if given.dim() == 0 or given.shape[0] % expected:
            shape = list(given.shape)
            raise ValueError(f"model_output has shape {shape}, expected {expected} outputs along its first axis")
        return given.chunk(expected)
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"model_output is {type(given).__name__}, expected a Tensor or a sequence of them")
    if len(given) != expected:
        asked = "without guidance" if guidance is None else f"for guidance of mode {guidance.mode!r}"
        raise ValueError(f"model_output has {len(given)} outputs, expected {expected} {asked}")
    return given


def _limits(op: str, clip: float | Threshold, args: list[Any]) -> Tensor:
    """``[1 or B, 2]``: where x₀ is clipped, and what it is multiplied by then."""
    sample = args[0]
    wide = accumulation_dtype(sample.dtype)
    if not isinstance(clip, Threshold):
        check_number(op, "clip", clip, "a number of at least 0, or a Threshold", 0.0, LARGEST)
        limits = torch.ones(1, 2, dtype=wide, device=sample.device)
        limits[0, 0] = clip
        return limits
    check_number(op, "clip.quantile", clip.quantile, "a number from 0 to 1", 0.0, 1.0)
    check_number(op, "clip.largest", clip.largest, "a number of at least 1", 1.0, LARGEST)
    x0 = _multistep(*args)[1].to(wide)
    s = torch.quantile(x0.reshape(len(x0), -1).abs(), clip.quantile, dim=1).clamp(1.0, clip.largest)
    return torch.stack([s, 1 / s], 1)


def _named(solver: str, results: Literal[1, 2, 3], *given: Any) -> Any:
    """A step by the name of its solver."""
    coefficients = given[2]
    if not isinstance(coefficients, Coefficients):
        raise TypeError(f"{solver}_step: coefficients is {type(coefficients).__name__}, expected Coefficients")
    if coefficients.solver != solver:
        raise ValueError(
            f"{solver}_step: coefficients are those of {coefficients.solver}_step, expected of {solver}_step"
        )
    out = take_step(results, *given)
    return out if results > 1 else out[0]


def ddpm_step(
    model_output: Outputs, sample: Tensor, coefficients: Coefficients, **options: Unpack[StepOptions]
) -> Tensor:
    """One ancestral step: ``next = (√ᾱ'·β/σ²)·x₀ + (√(1 − β)·σ'²/σ²)·x + √variance·noise``.

    Args:
        model_output: of the shape of the sample, in any floating dtype; with guidance several, in a sequence or one
            after another along the first axis.
        sample: x ``[B, ...]``.
        coefficients: of ``mmkern.diffusion.ddpm``, which is told what the model predicts.
        options: see ``StepOptions``.
    Returns: the next sample, of the shape and dtype of ``sample``.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Ho et al. 2020, eq. 7.
    """
    out: Tensor = _named("ddpm", 1, model_output, sample, coefficients, options)
    return out


def ddim_step(
    model_output: Outputs, sample: Tensor, coefficients: Coefficients, **options: Unpack[StepOptions]
) -> Tensor:
    """One implicit step: ``next = √ᾱ'·x₀ + √(1 − ᾱ' − std²)·ε + std·noise``, std being η times that of ``ddpm_step``.

    Args, Returns, Raises: as in ``ddpm_step``; coefficients of ``mmkern.diffusion.ddim``.
    Source: Song et al. 2021, eq. 12.
    """
    out: Tensor = _named("ddim", 1, model_output, sample, coefficients, options)
    return out


def euler_step(
    model_output: Outputs, sample: Tensor, coefficients: Coefficients, **options: Unpack[StepOptions]
) -> Tensor:
    """One step of Euler along the probability flow: ``next = x + (σ' − σ)·(x − x₀)/σ``.

    Args, Returns, Raises: as in ``ddpm_step``; coefficients of ``mmkern.diffusion.euler``.
    Source: Karras et al. 2022, algorithm 1 without churn.
    """
    out: Tensor = _named("euler", 1, model_output, sample, coefficients, options)
    return out


def euler_ancestral_step(
    model_output: Outputs, sample: Tensor, coefficients: Coefficients, **options: Unpack[StepOptions]
) -> Tensor:
    """One step of Euler down to ``√(σ'² − up²)``, and noise of the standard deviation up.

    Args, Returns, Raises: as in ``ddpm_step``; coefficients of ``mmkern.diffusion.euler_ancestral``.
    Source: crowsonkb/k-diffusion, sample_euler_ancestral.
    """
    out: Tensor = _named("euler_ancestral", 1, model_output, sample, coefficients, options)
    return out


def flow_match_euler_step(
    model_output: Outputs, sample: Tensor, coefficients: Coefficients, **options: Unpack[StepOptions]
) -> Tensor:
    """One step of Euler along a straight flow: ``next = x + (σ' − σ)·v``; or to x₀ and back with fresh noise.

    Args, Returns, Raises: as in ``ddpm_step``; coefficients of ``mmkern.diffusion.flow_match_euler``.
    Source: Lipman et al. 2023; Esser et al. 2024 (Stable Diffusion 3), §2.
    """
    out: Tensor = _named("flow_match_euler", 1, model_output, sample, coefficients, options)
    return out


def lcm_step(
    model_output: Outputs, sample: Tensor, coefficients: Coefficients, **options: Unpack[StepOptions]
) -> Tensor:
    """One step of a consistency model: ``next = √ᾱ'·(c_out·x₀ + c_skip·x) + √(1 − ᾱ')·noise``.

    Args, Returns, Raises: as in ``ddpm_step``; coefficients of ``mmkern.diffusion.lcm``.
    Source: Luo et al. 2023, algorithm 3.
    """
    out: Tensor = _named("lcm", 1, model_output, sample, coefficients, options)
    return out


def heun_step(
    model_output: Outputs,
    sample: Tensor,
    coefficients: Coefficients,
    first: tuple[Tensor, Tensor] | None = None,
    **options: Unpack[StepOptions],
) -> tuple[Tensor, Tensor]:
    """One of the two stages of a step of Heun: Euler to σ', then the mean of the slopes at both ends.

    Args:
        first: of the second stage: the sample and the x₀ of the first.
        model_output, sample, coefficients, options: as in ``ddpm_step``; coefficients of ``mmkern.diffusion.heun``.
    Returns: the next sample, and x₀.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Karras et al. 2022, algorithm 1 without churn.
    """
    out: tuple[Tensor, Tensor] = _named("heun", 2, model_output, sample, coefficients, options, first or ())
    return out


def dpm_solver_pp_2m_step(
    model_output: Outputs,
    sample: Tensor,
    coefficients: Coefficients,
    previous: Sequence[Tensor] = (),
    **options: Unpack[StepOptions],
) -> tuple[Tensor, Tensor]:
    """One step of the multistep DPM-Solver++ of second order.

    Args:
        previous: x₀ of the steps before, the last one first, as many as ``coefficients.history``.
        model_output, sample, coefficients, options: as in ``ddpm_step``; coefficients of
            ``mmkern.diffusion.dpm_solver_pp``.
    Returns: the next sample, and x₀.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Lu et al. 2022b, algorithm 2.
    """
    out: tuple[Tensor, Tensor] = _named("dpm_solver_pp_2m", 2, model_output, sample, coefficients, options, previous)
    return out


def dpm_solver_pp_3m_step(
    model_output: Outputs,
    sample: Tensor,
    coefficients: Coefficients,
    previous: Sequence[Tensor] = (),
    **options: Unpack[StepOptions],
) -> tuple[Tensor, Tensor]:
    """One step of the multistep DPM-Solver++ of third order.

    Args:
        previous: x₀ of the steps before, the last one first, as many as ``coefficients.history``.
        model_output, sample, coefficients, options: as in ``ddpm_step``; coefficients of
            ``mmkern.diffusion.dpm_solver_pp``.
    Returns: the next sample, and x₀.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Lu et al. 2022b, §3.3 (three points).
    """
    out: tuple[Tensor, Tensor] = _named("dpm_solver_pp_3m", 2, model_output, sample, coefficients, options, previous)
    return out


def unipc_step(
    model_output: Outputs,
    sample: Tensor,
    coefficients: Coefficients,
    last_sample: Tensor | None = None,
    previous: Sequence[Tensor] = (),
    **options: Unpack[StepOptions],
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of UniPC: the sample is corrected by what the model now says, then the next one is predicted.

    Args:
        last_sample: the corrected sample of the step before.
        previous: x₀ of the steps before, the last one first.
        model_output, sample, coefficients, options: as in ``ddpm_step``; coefficients of ``mmkern.diffusion.unipc``.
    Returns: the next sample, x₀, and the corrected sample.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Zhao et al. 2023, algorithms 1 and 2 (UniPC, B(h)).
    """
    history = (last_sample, *previous)
    out: tuple[Tensor, Tensor, Tensor] = _named("unipc", 3, model_output, sample, coefficients, options, history)
    return out
