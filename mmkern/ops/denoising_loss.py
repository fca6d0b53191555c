"""What a denoising model is trained with: noisy samples, velocities, and the loss."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mmkern.reference import diffusion as reference
from mmkern.reference.diffusion import MAX_HISTORY, MAX_OUTPUTS

from ._checks import FLOATING, Arguments, accumulation_dtype, check_broadcast, check_tensor, floating_rows
from ._define import define
from ._outputs import summed
from ._random import seed_tensor
from .diffusion import _denoise_step


class NoiseLevels(Protocol):
    """A ``mmkern.diffusion.Schedule``."""

    def __len__(self) -> int: ...

    def noise_coefficients(self, timesteps: Tensor, x: Tensor, what: Any) -> Tensor:
        """``[B, 19]``, for ``denoise_step``."""
        ...


def _noisy(
    op: str, what: str, x0: Tensor, t: Tensor | int, schedule: NoiseLevels, noise: Tensor | None, seed: Tensor | None
) -> Tensor:
    samples = x0.shape[0] if x0.dim() > 1 else 1
    timesteps = torch.as_tensor(t, device=x0.device)
    if timesteps.is_floating_point() or timesteps.dim() > 1 or (timesteps.dim() == 1 and len(timesteps) != samples):
        got = f"shape {list(timesteps.shape)} and dtype {timesteps.dtype}"
        raise ValueError(f"{op}: t has {got}, expected whole numbers [{samples}], or one")
    if timesteps.device.type == "cpu" and timesteps.numel() and not torch.compiler.is_compiling():
        low, high = timesteps.min().item(), timesteps.max().item()
        if low < 0 or high >= len(schedule):
            raise ValueError(f"{op}: t runs from {low} to {high}, expected numbers from 0 to {len(schedule) - 1}")
    numbers = schedule.noise_coefficients(timesteps.reshape(-1), x0, what)
    nothing = [None] * (MAX_OUTPUTS + 1 + MAX_HISTORY)
    try:
        return _denoise_step(x0, *nothing, noise, seed, None, None, None, None, None, numbers, None)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}: {str(error).removeprefix('denoise_step: ')}") from error


def add_noise(
    x0: Tensor,
    t: Tensor | int,
    schedule: NoiseLevels,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """The sample at a timestep: ``x = alpha(t)·x₀ + sigma(t)·noise``.

    Args:
        x0: ``[B, ...]``.
        t: training timesteps, ``[B]`` or one.
        schedule: a ``mmkern.diffusion.Schedule``.
        noise: of the shape and dtype of x₀; else it is drawn, and not kept:
        generator, seed, offset: as in ``StepOptions``.
    Returns: of the shape and dtype of x₀.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Ho et al. 2020, eq. 4.
    """
    floating_rows("x0")("add_noise", {"x0": x0})
    drawn = None if noise is not None else seed_tensor("add_noise", x0, generator, seed, offset)
    return _noisy("add_noise", "sample", x0, t, schedule, noise, drawn)


def velocity(x0: Tensor, noise: Tensor, t: Tensor | int, schedule: NoiseLevels) -> Tensor:
    """What a model of velocities predicts: ``v = alpha(t)·noise − sigma(t)·x₀``; of a flow, ``noise − x₀``.

    Args:
        x0, noise: ``[B, ...]``, of one shape and dtype.
        t: training timesteps, ``[B]`` or one.
        schedule: a ``mmkern.diffusion.Schedule``.
    Returns: of the shape and dtype of x₀.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Salimans and Ho 2022, appendix D; Lipman et al. 2023, eq. 23.
    """
    floating_rows("x0", "noise")("velocity", {"x0": x0, "noise": noise})
    return _noisy("velocity", "velocity", x0, t, schedule, noise, None)


# ---- The loss --------------------------------------------------------------------------------------------------------


def _check(op: str, args: Arguments) -> None:
    pred = args["pred"]
    floating_rows("pred")(op, args)
    if not isinstance(args["target"], Tensor):
        raise TypeError(f"{op}: target is {type(args['target']).__name__}, expected a Tensor")
    check_tensor(op, "target", args["target"], pred, FLOATING, pred.shape, "pred")
    check_broadcast(op, "mask", args["mask"], pred, (*FLOATING, torch.bool), tuple(pred.shape), "pred")


def _arrange(args: Arguments) -> Arguments:
    pred = args["pred"]
    wide = accumulation_dtype(pred.dtype)
    if (args["target"].dtype == torch.float64) != (wide == torch.float64):
        args["target"] = args["target"].to(pred.dtype)
    if args["mask"] is not None:
        mask = args["mask"].to(wide)
        args["mask"] = mask.reshape(*[1] * (pred.dim() - mask.dim()), *mask.shape).contiguous()
    return args


_masked_squared_error = define(
    "masked_squared_error(Tensor pred, Tensor target, Tensor? mask) -> Tensor",
    family="diffusion",
    reference=reference.masked_squared_error,
    output=summed(lambda args: (args[0].shape[0] if args[0].dim() > 1 else 1,)),
    requires=[_check],
    kinds={"pred": "grid", "target": "grid", "mask": "fixed"},
    arrange=_arrange,
    autocast="keep",
    decomposes=lambda args: True,
)


def denoising_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """The weighted mean of squared errors: ``L_b = w_b·Σ mask·(pred − target)² / Σ mask``, and the mean of these.

    The difference is never a tensor of its own, forward nor backward.

    Args:
        pred, target: ``[B, ...]``, of one shape and any floating dtypes.
        weight: ``[B]``, such as ``Schedule.min_snr_weights``; None for ones. Takes a gradient.
        mask: bool or floating, broadcastable to pred, such as ``[B, T, 1]`` of sequences with padding. A sample
            without any gives 0.
        reduction: "mean" over the samples, or "none".
    Returns: 0-d, or ``[B]``; float32, or float64 for that.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Ho et al. 2020, eq. 14; Hang et al. 2023 (min-SNR weights), eq. 8.
    """
    name = "denoising_loss"
    if reduction not in ("mean", "none"):
        raise ValueError(f"{name}: reduction is {reduction!r}, expected 'mean' or 'none'")
    try:
        sums = _masked_squared_error(pred, target, mask)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {str(error).removeprefix('masked_squared_error: ')}") from error
    check_tensor(name, "weight", weight, pred, FLOATING, tuple(sums.shape), "pred")
    elements = pred.numel() // max(len(sums), 1)
    if mask is None:
        of_samples = sums / elements
    else:
        kept = _sum_of_samples(mask.to(sums.dtype), pred)
        of_samples = sums / kept.where(kept > 0, 1.0)
    if weight is not None:
        of_samples = of_samples * weight
    return of_samples.mean() if reduction == "mean" else of_samples


def _sum_of_samples(mask: Tensor, pred: Tensor) -> Tensor:
    """``[1 or B]``: of the mask as if it were expanded to the shape of pred."""
    samples = mask.shape[0] if mask.dim() == pred.dim() > 1 else 1
    own = mask.reshape(samples, -1).sum(1)
    elements = pred.numel() // max(pred.shape[0] if pred.dim() > 1 else 1, 1)
    return own * (elements / max(mask.numel() // max(samples, 1), 1))
