"""The row-wise companions of attention as the field writes them in PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor

EPS = 1e-6


def merge_attention(out: Tensor, other: Tensor, lse: Tensor, other_lse: Tensor) -> Tensor:
    total = torch.logaddexp(lse, other_lse)
    return (lse - total).exp()[..., None] * out + (other_lse - total).exp()[..., None] * other


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * torch.cat((cos, cos), -1) + torch.cat((-b, a), -1) * torch.cat((sin, sin), -1)


def qk_norm_rotary(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    normalized = weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS))
    return rotary_embedding(normalized, cos, sin)


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "merge_attention": merge_attention,
    "rotary_embedding": rotary_embedding,
    "qk_norm_rotary": qk_norm_rotary,
}
