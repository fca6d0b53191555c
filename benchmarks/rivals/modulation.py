"""Norms and their modulation as the field writes them in PyTorch."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from mmkern.ops._outputs import Result

EPS = 1e-6
FRAMES_PER_SCALE = 25
EMBEDDING_DIM = 320


def ada_layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``modulate(norm(x), shift, scale)`` of facebookresearch/DiT."""
    return functional.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def ada_layer_norm_of_residual(
    x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Between the two halves of a block of facebookresearch/DiT."""
    residual = residual + gate[:, None] * x
    return ada_layer_norm(residual, scale, shift), residual


def dual_ada_layer_norm(x: Tensor, channel_scale: Tensor, channel_shift: Tensor, frame_scale: Tensor) -> Tensor:
    frames = frame_scale.repeat_interleave(FRAMES_PER_SCALE, 1)[:, : x.shape[1], None]
    return frames * ada_layer_norm(x, channel_scale, channel_shift)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' models have it."""
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS))


def groups_of(x: Tensor) -> int:
    """32, as in the U-Nets of diffusion models, where they divide the channels."""
    return math.gcd(32, x.shape[1])


def group_norm_act(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As diffusers' ResnetBlock2D has it."""
    return functional.silu(functional.group_norm(x, groups_of(x), weight, bias))


def timestep_embedding(timesteps: Tensor) -> Tensor:
    """As diffusers has it, with the options of Stable Diffusion's U-Nets."""
    half = EMBEDDING_DIM // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def film(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return functional.silu((1 + gamma[:, None]) * x + beta[:, None])


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    return residual + gate[:, None] * x


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(x + bias)


def geglu(x: Tensor) -> Tensor:
    """As diffusers' GEGLU has it, behind its projection."""
    hidden, gate = x.chunk(2, -1)
    return hidden * functional.gelu(gate)


def swiglu(x: Tensor) -> Tensor:
    hidden, gate = x.chunk(2, -1)
    return hidden * functional.silu(gate)


FORMULAS: dict[str, Callable[..., Result]] = {
    "ada_layer_norm": ada_layer_norm,
    "ada_layer_norm, residual": ada_layer_norm_of_residual,
    "bias_gelu": bias_gelu,
    "film": film,
    "gated_residual": gated_residual,
    "geglu": geglu,
    "group_norm_act": group_norm_act,
    "swiglu": swiglu,
    "timestep_embedding": timestep_embedding,
    "dual_ada_layer_norm": dual_ada_layer_norm,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
}
