"""The row-wise companions of attention, in plain PyTorch: merging of partial results, rotary embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """``lse = log(exp(lse₁) + exp(lse₂))``, ``out = exp(lse₁ − lse) out₁ + exp(lse₂ − lse) out₂``.

    A part whose lse is −∞ has seen no key: its out is not read. Two such parts give 0 and −∞.
    """
    top = torch.maximum(lse, other_lse).detach()  # any number here leaves the result what it is
    top = top.masked_fill(top == -torch.inf, 0.0)
    shares = [torch.exp(part - top) for part in (lse, other_lse)]
    total = shares[0] + shares[1]
    sees_none = total == 0
    total = total.masked_fill(sees_none, 1.0)
    merged = [
        (share / total)[..., None] * part.masked_fill((part_lse == -torch.inf)[..., None], 0.0)
        for share, part, part_lse in zip(shares, (out, other), (lse, other_lse), strict=True)
    ]
    return (merged[0] + merged[1]).to(out.dtype), (top + total.log()).masked_fill(sees_none, -torch.inf)


def rotary_embedding(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, normalize: bool, interleaved: bool
) -> Tensor:
    """``(a cos − b sin, a sin + b cos)`` of each pair (a, b) of the first channels of x, as many as cos and sin have.

    ``normalize``: of ``x / √(mean(x²) + eps) · weight`` instead of x.
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if normalize:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    pairs = cos.shape[-1]
    rotated, rest = y[..., : 2 * pairs], y[..., 2 * pairs :]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = rotated[..., :pairs], rotated[..., pairs:]
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return torch.cat((turned, rest), -1).to(x.dtype)
