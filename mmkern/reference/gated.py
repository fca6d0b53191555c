"""Activations beside a scale, a shift or a gate, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import FUNCTIONS, Activation


def affine_activation(x: Tensor, scale: Tensor | None, shift: Tensor | None, offset: float, activation: int) -> Tensor:
    """``act((offset + scale)·x + shift)``; a scale or a shift that is None is 0."""
    wide = torch.promote_types(x.dtype, torch.float32)
    factor = offset if scale is None else offset + scale.to(wide)
    y = factor * x.to(wide)
    if shift is not None:
        y = y + shift
    return FUNCTIONS[Activation(activation)](y).to(x.dtype)


def gated_activation(x: Tensor, activation: int) -> Tensor:
    """``hidden·act(gate)`` of the halves ``[hidden, gate]`` of the last axis."""
    hidden, gate = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return (hidden * FUNCTIONS[Activation(activation)](gate)).to(x.dtype)
