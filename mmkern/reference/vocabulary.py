"""What the vocabulary family means, in plain PyTorch: the logits of all tokens, and what losses need to know of them.

With the log-sum-exp of the other tokens and the logit of the right one, ``−log softmax`` is
``softplus(others − positive)``: no digits are lost where the right token outweighs the rest.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


def linear_logsumexp(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    softcap: float,
    inverse_temperature: float,
    ignore_index: int,
    sums_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``l_v = cap(input·linear_weight_v + bias_v) / temperature``, ``cap(z) = softcap·tanh(z / softcap)``.

    Of each row of ``[N, D]``: ``log Σ exp(l_v)`` over the tokens that are not its target, the target's logit, and
    ``Σ weight_v·l_v`` over all, if it is asked for, else 0. A row without a target has zeros; the logit of a target
    that is no token is NaN.
    """
    seen = target != ignore_index
    rows = _wide(input).where(seen.unsqueeze(-1), 0.0)
    logits = functional.linear(rows, _wide(linear_weight), None if linear_bias is None else _wide(linear_bias))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if inverse_temperature != 1:
        logits = logits * inverse_temperature
    is_token = (target >= 0) & (target < logits.shape[-1])
    index = target.where(is_token, 0).unsqueeze(-1)
    is_target = torch.arange(logits.shape[-1], device=logits.device) == index
    others = logits.masked_fill(is_target, -torch.inf).logsumexp(-1)
    positive = logits.gather(-1, index).squeeze(-1).where(is_token, torch.nan)
    totals = (logits if weight is None else logits * weight).sum(-1)
    return others.where(seen, 0.0), positive.where(seen, 0.0), totals.where(seen & sums_logits, 0.0)


def cross_entropy(
    others: Tensor,
    positive: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    target: Tensor,
    *,
    vocabulary: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: Literal["mean", "sum", "none"],
) -> Tensor:
    """``(1 − ε)·w_t·(lse − l_t) + ε/V·Σ_v w_v·(lse − l_v) + z·lse²`` of each row, by what ``linear_logsumexp`` finds.

    A mean is over the sum of the targets' weights, that of ``z·lse²`` over the number of rows with a target.
    """
    seen = target != ignore_index
    weights = weights_of_targets(weight, target, vocabulary, ignore_index).to(others.dtype)
    losses = -functional.logsigmoid(positive - others) * weights
    log_sums = torch.logaddexp(others, positive) if label_smoothing or z_loss else others
    if label_smoothing:
        whole = vocabulary if weight is None else weight.sum()
        smooth = (whole * log_sums - totals) / vocabulary
        losses = torch.lerp(losses, smooth.where(seen, 0.0), label_smoothing)
    penalties = (z_loss * log_sums.square()).where(seen, 0.0) if z_loss else None
    if reduction == "mean":
        mean = losses.sum() / weights.sum()
        return mean if penalties is None else mean + penalties.sum() / seen.sum()
    whole = losses if penalties is None else losses + penalties
    return whole if reduction == "none" else whole.sum()


def weights_of_targets(weight: Tensor | None, target: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    """1 for each without weights, 0 for a row without a target."""
    seen = target != ignore_index
    return seen.float() if weight is None else weight[target.clamp(0, vocabulary - 1)].where(seen, 0.0)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    softcap: float,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    mean: bool,
) -> tuple[Tensor, ...]:
    """Both in one, with the mean or the sum; then the gradients for input, linear_weight and linear_bias.

    Without a bias the last is empty.
    """

    def loss(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None = None) -> Tensor:
        tensors = (input, linear_weight, linear_bias, weight, target)
        found = linear_logsumexp(*tensors, softcap, 1.0, ignore_index, sums_logits=bool(label_smoothing))
        return cross_entropy(
            *found,
            weight,
            target,
            vocabulary=linear_weight.shape[0],
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            reduction="mean" if mean else "sum",
        )

    given = [x for x in (input, linear_weight, linear_bias) if x is not None]
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in given]
        gradients = list(torch.autograd.grad(loss(*leaves), leaves))
    if linear_bias is None:
        gradients.append(input.new_zeros(0))
    gradients[2] = _wide(gradients[2])
    return loss(*given), *gradients


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
