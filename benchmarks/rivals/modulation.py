"""Norms and their modulation as the field writes them in PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-6
FRAMES_PER_SCALE = 25


def ada_layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``modulate(norm(x), shift, scale)`` of facebookresearch/DiT."""
    return functional.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def dual_ada_layer_norm(x: Tensor, channel_scale: Tensor, channel_shift: Tensor, frame_scale: Tensor) -> Tensor:
    frames = frame_scale.repeat_interleave(FRAMES_PER_SCALE, 1)[:, : x.shape[1], None]
    return frames * ada_layer_norm(x, channel_scale, channel_shift)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' models have it."""
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS))


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


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "ada_layer_norm": ada_layer_norm,
    "bias_gelu": bias_gelu,
    "film": film,
    "gated_residual": gated_residual,
    "geglu": geglu,
    "swiglu": swiglu,
    "dual_ada_layer_norm": dual_ada_layer_norm,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
}
