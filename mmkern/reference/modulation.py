"""Norms and their modulation, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def ada_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    frame_scale: Tensor | None,
    eps: float,
    centered: bool,
) -> Tensor:
    """``f·((n·w + b)·(1 + s) + h)`` with ``n = (x − mean(x)) / √(var(x) + eps)`` along the last axis.

    Not ``centered``: ``n = x / √(mean(x²) + eps)``. What is None is left out.
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if centered:
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    if scale is not None:
        y = y * (1 + scale)
    if shift is not None:
        y = y + shift
    if frame_scale is not None:
        y = y * frame_scale
    return y.to(x.dtype)


def residual_ada_layer_norm(
    x: Tensor,
    residual: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    frame_scale: Tensor | None,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`ada_layer_norm` of ``r = residual + gate·x``, and r."""
    wide = torch.promote_types(x.dtype, torch.float32)
    gated = x.to(wide) if gate is None else gate * x.to(wide)
    total = residual.to(wide) + gated
    out = ada_layer_norm(total, weight, bias, scale, shift, frame_scale, eps, centered)
    return out.to(x.dtype), total.to(x.dtype)
