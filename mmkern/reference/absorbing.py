"""Absorbing-state discrete diffusion (SEDD) in plain PyTorch: a step of its samplers, and the loss of its network.

Of V + 1 tokens the last one, V, is MASK. The network gives the logarithms of concrete scores: at a masked position, how
many times likelier than x the same x with token j there is. The last column, of MASK, would be 0; it is not read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decoding import exponential


def absorbing_step(
    log_scores: Tensor, tokens: Tensor, seed: Tensor, rates: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The log-probability of what becomes of each token, and that: a draw for MASK, and any other token as it is.

    Args:
        log_scores: ``[..., K, V + 1]``, of K branches.
        tokens: int64 ``[...]``.
        seed: int64 ``[2]``: key and offset. Row r has counters ``offset + r·⌈(V + 1)/4⌉`` and on.
        rates: ``[B or 1]``, of the first axis: see ``step_log_probs``.
        weights: ``[B or 1, K]``, of the branches; None for one branch.
    Returns: ``[...]`` and int64 ``[...]``; NaN and −1 where no token can be told: a guided score is NaN or +∞, or none
        is above −∞ where MASK may not stay, or the rate is no number from 0 on.
    """
    log_p, is_bad, is_masked = _of_rows(log_scores, tokens, rates, weights)
    rows = log_p.reshape(-1, log_p.shape[-1])
    race = rows.exp() / exponential(seed[None], rows.shape[0], rows.shape[1], rows.dtype)
    drawn = race.argmax(-1).view(tokens.shape).masked_fill(is_bad, -1).where(is_masked, tokens)
    return _chosen(log_p, drawn, is_masked), drawn


def log_probs_of_step(
    log_scores: Tensor, tokens: Tensor, seed: Tensor, rates: Tensor, weights: Tensor | None, _: Tensor, drawn: Tensor
) -> Tensor:
    """Of what has become of each token; NaN for −1."""
    log_p, _, is_masked = _of_rows(log_scores, tokens, rates, weights)
    return _chosen(log_p, drawn, is_masked)


def _chosen(log_p: Tensor, drawn: Tensor, is_masked: Tensor) -> Tensor:
    chosen = log_p.gather(-1, drawn.where(is_masked, 0).clamp_min(0)[..., None]).squeeze(-1)
    return chosen.masked_fill(drawn < 0, torch.nan).where(is_masked, 0.0)


def _of_rows(
    log_scores: Tensor, tokens: Tensor, rates: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, which rows have none, and which are masked; of the others nothing is looked at."""
    is_masked = tokens == log_scores.shape[-1] - 1
    branches = log_scores[..., :-1].where(is_masked[..., None, None], 0.0)
    scores = guided(branches, None if weights is None else of_samples(weights, tokens))
    rates = of_samples(rates[:, None], tokens).to(scores.dtype)
    no_token = (rates == torch.inf) & (scores == -torch.inf)
    is_bad = (~(scores < torch.inf) | no_token.all(-1, keepdim=True) | ~(rates >= 0)).any(-1)
    return step_log_probs(scores, rates), is_bad & is_masked, is_masked


def of_samples(numbers: Tensor, beside: Tensor) -> Tensor:
    """``[B or 1, n]`` as ``[B or 1, 1, ..., n]``, for each of ``beside`` ``[B, ...]``."""
    axes = beside.dim() - 1
    return numbers.reshape(-1, *[1] * axes, numbers.shape[1]) if axes >= 0 else numbers[0]


def guided(log_scores: Tensor, weights: Tensor | None) -> Tensor:
    """``Σ_k weights_k·log_scores_k`` of ``[..., K, V]``; a score that is 0 in any branch stays 0."""
    wide = log_scores.to(torch.promote_types(log_scores.dtype, torch.float32))
    if weights is None:
        return wide.squeeze(-2)
    total = (weights.to(wide.dtype)[..., None] * wide).sum(-2)
    return total.masked_fill((log_scores == -torch.inf).any(-2), -torch.inf)


def step_log_probs(log_scores: Tensor, rates: Tensor) -> Tensor:
    """``[..., V + 1]``: of a step at a masked position to each token, ``log p_j = log(a·s_j)``, and to stay.

    MASK stays with what is left of 1. Where ``a·Σ s`` is beyond 1, nothing is left, and each is divided by that.

    Args:
        log_scores: log s, ``[..., V]``.
        rates: a, ``[..., 1]``: ``Δt·σ(t)`` of a step of Euler, ``exp(Δσ̄) − 1`` of an analytic one, ∞ of the last step.
    """
    log_total, log_rates = log_scores.logsumexp(-1, keepdim=True), rates.log()
    log_p = log_scores - torch.maximum(log_total, -log_rates)
    return torch.cat([log_p, torch.log(-torch.expm1((log_total + log_rates).clamp_max(0)))], -1)


def absorbing_score_entropy(log_scores: Tensor, targets: Tensor, masked: Tensor, sigma: Tensor) -> Tensor:
    """``Σ_{j≠y} s_j + (s_y − r·log s_y + r·(log r − 1))`` at each masked position, y its target; 0 at the others.

    ``r = 1 / (exp(σ̄) − 1)`` is the score of y where x₀ is known, with which the loss is 0: its bracket is
    ``r·(exp(d) − 1 − d)``, ``d = log s_y − log r``.

    Args:
        log_scores: log s, ``[..., V + 1]``.
        targets: int64 ``[...]``.
        masked: bool ``[...]``.
        sigma: σ̄, ``[B or 1]``, of the first axis.
    Returns: ``[...]``, in float32 at least; NaN where a target is none of V tokens.
    """
    wide = log_scores.to(torch.promote_types(log_scores.dtype, torch.float32))
    scores = wide[..., :-1].where(masked[..., None], 0.0)
    size = scores.shape[-1]
    is_token = (targets >= 0) & (targets < size)
    others = scores.masked_fill(torch.arange(size, device=scores.device) == targets[..., None], -torch.inf)
    own = scores.gather(-1, targets.where(is_token, 0)[..., None]).squeeze(-1).where(is_token, torch.nan)
    sigma = of_samples(sigma[:, None], targets).squeeze(-1).to(scores.dtype)
    entropy = others.exp().sum(-1) + _divergence(own, 1 / torch.expm1(sigma), log_ratio(sigma))
    return entropy.where(masked, 0.0)


def absorbing_score_loss(
    log_scores: Tensor, targets: Tensor, masked: Tensor, sigma: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum of all entropies, each times the weight of its sample ``[B or 1]``; and its gradient for log_scores."""

    def loss(log_scores: Tensor) -> Tensor:
        entropy = absorbing_score_entropy(log_scores, targets, masked, sigma)
        return (entropy * of_samples(weights[:, None], targets).squeeze(-1)).sum()

    with torch.enable_grad():
        leaf = log_scores.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    return loss(log_scores), gradient


def log_ratio(sigma: Tensor) -> Tensor:
    """``−log(exp(σ̄) − 1)``, also where the exponential has no room."""
    return -sigma - torch.log(-torch.expm1(-sigma))


def _divergence(own: Tensor, ratio: Tensor, log_ratio: Tensor) -> Tensor:
    """``s − r·log s + r·(log r − 1)``; near its zero without the difference of s and r, far from it without s / r."""
    d = own - log_ratio
    is_near = d.abs() < 1
    near, far = d.where(is_near, 0.0), d.where(~is_near, 0.0)
    return torch.where(is_near, ratio * (torch.expm1(near) - near), own.where(~is_near, 0.0).exp() - ratio * (1 + far))
