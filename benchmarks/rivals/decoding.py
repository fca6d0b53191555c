"""Sampling as one writes it in PyTorch: a sort, or topk first. Both race with exponential numbers that they are given,
where ``torch.multinomial`` would draw them, so that tokens can be compared. And a step of SEDD, which draws its numbers
itself, and its loss."""

import torch
from torch import Tensor

TOP_K = 50
TOP_P = 0.9
STEP = 1e-12
GUIDANCE = (1.9, 1.0, 1.0, 1.6)
SIGMA, DSIGMA = torch.linspace(0.1, 2.0, 8), torch.linspace(0.5, 1.5, 8)  # of up to 8 samples


def sample_top_p(logits: Tensor, noise: Tensor) -> Tensor:
    values, order = logits.sort(dim=-1, descending=True)
    return _race(values.softmax(-1), order, noise)


def sample_top_k(logits: Tensor, noise: Tensor) -> Tensor:
    values, order = logits.topk(min(TOP_K, logits.shape[-1]), dim=-1)
    return _race(values.softmax(-1), order, noise)


def _race(p: Tensor, order: Tensor, noise: Tensor) -> Tensor:
    """Of those of the mass, the largest first."""
    p = p.where(p.cumsum(-1) - p < TOP_P, 0.0)
    winner = (p / noise.gather(-1, order)).argmax(-1, keepdim=True)
    return order.gather(-1, winner).squeeze(-1).float()


def absorbing_step(branches: Tensor, tokens: Tensor) -> Tensor:
    """By Euler's method, with the race of SEDD's ``sample_categorical``."""
    others = torch.tensor(GUIDANCE, dtype=branches.dtype).view(-1, *[1] * (branches.dim() - 1))
    log_scores = branches[0] + (others * (branches[1:] - branches[0])).sum(0)
    p = STEP * log_scores.exp()
    p[..., -1] = 0
    p[..., -1] = 1 - p.sum(-1)
    drawn = (p / (1e-10 - (torch.rand_like(p) + 1e-10).log())).argmax(-1)
    return drawn.where(tokens == branches.shape[-1] - 1, tokens).float()


def absorbing_score_loss(log_scores: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
    sigma, rate = (noise[: len(targets)].view(-1, *[1] * (targets.dim() - 1)) for noise in (SIGMA, DSIGMA))
    ratio = 1 / sigma.expm1()
    scores = log_scores[..., :-1].to(torch.promote_types(log_scores.dtype, torch.float32))
    own = scores.gather(-1, targets[..., None]).squeeze(-1)
    entropy = scores.exp().sum(-1) - ratio * own + ratio * (ratio.log() - 1)
    return (rate * entropy.where(masked, 0)).sum() / len(log_scores)
