"""Sines and cosines of a timestep, as diffusion models are given it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkern.reference import timestep_embedding as reference

from ._checks import LARGEST, Arguments, boolean, check_number, floating_rows
from ._define import define
from ._outputs import summed


def _check(op: str, args: Arguments) -> None:
    t, width, shift = args["timesteps"], args["embedding_dim"], args["downscale_freq_shift"]
    if t.dim() != 1:
        raise ValueError(f"{op}: timesteps has shape {list(t.shape)}, expected [samples]")
    if not isinstance(width, int) or isinstance(width, bool):
        raise TypeError(f"{op}: embedding_dim is {type(width).__name__}, expected an int")
    if width < 1:
        raise ValueError(f"{op}: embedding_dim is {width}, expected at least 1")
    for name in ("downscale_freq_shift", "scale"):
        check_number(op, name, args[name], "a finite number", -LARGEST, LARGEST)
    if width > 1 and width // 2 == shift:
        raise ValueError(f"{op}: downscale_freq_shift is {shift}, expected another number than half of embedding_dim")
    check_number(op, "max_period", args["max_period"], "a number above 0", 5e-324, LARGEST)


def _width(args: Any) -> tuple[int, ...]:
    return args[0].shape[0], args[1]


_timestep_embedding = define(
    "timestep_embedding(Tensor timesteps, int embedding_dim, bool flip_sin_to_cos, float downscale_freq_shift, "
    "float scale, float max_period) -> Tensor",
    family="modulation",
    reference=reference.timestep_embedding,
    output=summed(_width),
    requires=[floating_rows("timesteps"), boolean("flip_sin_to_cos"), _check],
    kinds={},
    is_checked_by_signature=False,
)


def timestep_embedding(
    timesteps: Tensor,
    embedding_dim: int,
    *,
    flip_sin_to_cos: bool = False,
    downscale_freq_shift: float = 1,
    scale: float = 1,
    max_period: float = 10000,
) -> Tensor:
    """Sinusoidal embedding: ``[sin(a), cos(a)]`` with ``a = scale·t·max_period^(−i / (n − downscale_freq_shift))``.

    i counts the ``n = embedding_dim // 2`` frequencies, which are kept from call to call.

    Args:
        timesteps: ``[B]``, of an integer or floating dtype, taken as float32.
        embedding_dim: numbers of a timestep; of an odd one the last is 0.
        flip_sin_to_cos: cosines first.
        downscale_freq_shift: 0 for DiT and Stable Diffusion, 1 for Ho et al.
        scale: of the angles.
        max_period: of the slowest wave, in 2π steps.
    Returns: ``[B, embedding_dim]``, float32; on the CPU with the bits of diffusers' ``get_timestep_embedding``.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Ho et al. 2020, appendix B; Vaswani et al. 2017, §3.5.
    """
    op = "timestep_embedding"
    if not isinstance(timesteps, Tensor):
        raise TypeError(f"{op}: timesteps is {type(timesteps).__name__}, expected a Tensor")
    if timesteps.is_complex() or timesteps.dtype == torch.bool:
        raise TypeError(f"{op}: timesteps has dtype {timesteps.dtype}, expected an integer or a floating dtype")
    options = embedding_dim, flip_sin_to_cos, downscale_freq_shift, scale, max_period
    return _timestep_embedding(timesteps.float(), *options)
