"""Sines and cosines of a timestep, in plain PyTorch."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def timestep_embedding(
    timesteps: Tensor,
    embedding_dim: int,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    scale: float,
    max_period: float,
) -> Tensor:
    """``[sin(a), cos(a)]``, or cosines first, with ``a = scale·t·max_period^(−i / (n − downscale_freq_shift))``.

    i counts the n frequencies, half of ``embedding_dim``; an odd one ends with a zero. Rounded as diffusers has it,
    whose bits these are for float32.
    """
    t = timesteps.to(torch.promote_types(timesteps.dtype, torch.float32))
    half = embedding_dim // 2
    angles = scale * (t[:, None] * _frequencies_for(t, half, downscale_freq_shift, max_period))
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    if embedding_dim % 2:
        parts.append(t.new_zeros(t.shape[0], 1))
    return torch.cat(parts, 1)


def _frequencies_for(t: Tensor, half: int, shift: float, max_period: float) -> Tensor:
    """From the cache, where it may hold what is made here: no stand-in of a compiler, a transform or a mode."""
    is_plain = (
        type(t) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._functorch.maybe_current_level() is None
        and not torch._C._len_torch_dispatch_stack()
    )
    make = _kept_frequencies if is_plain else _frequencies
    return make(half, shift, max_period, t.dtype, t.device)


def _frequencies(half: int, shift: float, max_period: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    exponent = -math.log(max_period) * torch.arange(0, half, dtype=dtype, device=device)
    return torch.exp(exponent / (half - shift))


@lru_cache(maxsize=16)
def _kept_frequencies(half: int, shift: float, max_period: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # autograd may save them later
        return _frequencies(half, shift, max_period, dtype, device)
