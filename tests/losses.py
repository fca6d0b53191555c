"""What tests of contrastive losses share: rows, a formula, and the comparison of losses and gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def pair(n: int = 20, width: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x, y = torch.randn(2, n, width, generator=generator, dtype=dtype)
    return x.requires_grad_(), y.requires_grad_()


def clip_loss(scores: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    """The formula of open_clip's ClipLoss."""
    target = torch.arange(len(scores))
    ways = (
        functional.cross_entropy(s, target, label_smoothing=label_smoothing, reduction=reduction)
        for s in (scores, scores.T)
    )
    return sum(ways) / 2


def check(got: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(0), dtype=got.dtype)
    found, wanted = (torch.autograd.grad(out, inputs, upstream) for out in (got, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
