"""Group norm, its modulation and an activation, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import FUNCTIONS, Activation


def group_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: int,
) -> Tensor:
    """``act((n·w + b)·(1 + s) + h)`` with ``n = (x − mean(x)) / √(var(x) + eps)`` along the last two axes.

    x is ``[B, G, D, S]``: G groups of D channels. w and b are ``[G, D]``, s and h ``[B, G, D]``. What is None is left
    out.
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y - y.mean((2, 3), keepdim=True)
    y = y * torch.rsqrt(y.square().mean((2, 3), keepdim=True) + eps)
    if weight is not None:
        y = y * weight[..., None]
    if bias is not None:
        y = y + bias[..., None]
    if scale is not None:
        y = y * (1 + scale[..., None])
    if shift is not None:
        y = y + shift[..., None]
    return FUNCTIONS[Activation(activation)](y).to(x.dtype)
