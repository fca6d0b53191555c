"""Absorbing-state discrete diffusion (SEDD): a step of its samplers, and the loss that trains its network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmkern.reference import absorbing as reference

from ._checks import (
    FLOATING,
    LARGEST,
    NUMBER,
    Arguments,
    accumulation_dtype,
    check_number,
    check_tensor,
    floating_rows,
    is_readable,
)
from ._define import define, may_make_gradients, named, needs_gradient
from ._outputs import indices, like, summed
from ._random import seed_tensor
from ._samples import of_samples, tensor_of
from .decoding import raise_if_marked

GuidanceWeights = float | Sequence[float] | Tensor
Method = Literal["euler", "analytic", "denoise"]


def _of_tokens(args: Sequence[Any]) -> tuple[int, ...]:
    shape: tuple[int, ...] = args[1].shape
    return shape


def _batch_of(tokens: Tensor) -> int:
    return tokens.shape[0] if tokens.dim() else 1


def _check_numbers(op: str, name: str, numbers: Any, beside: Tensor, samples: Tensor, width: int | None = None) -> None:
    """``[B or 1]``, or ``[B or 1, width]``, in the dtype of sums."""
    if numbers is None:
        return
    check_tensor(op, name, numbers, beside, (accumulation_dtype(beside.dtype),), None, "log_scores")
    after = () if width is None else (width,)
    batch = _batch_of(samples)
    if numbers.shape not in ((1, *after), (batch, *after)):
        expected = f"{[batch, *after]} or {[1, *after]}"
        raise ValueError(f"{op}: {name} has shape {list(numbers.shape)}, expected {expected}")


def _check_columns(op: str, log_scores: Tensor, expected: str) -> None:
    if log_scores.shape[-1] < 2:
        raise ValueError(f"{op}: log_scores has shape {list(log_scores.shape)}, expected {expected}, V at least 1")


# ---- A step ----------------------------------------------------------------------------------------------------------


def _check_step(op: str, args: Arguments) -> None:
    floating_rows("log_scores", axes=2)(op, args)
    log_scores, tokens = args["log_scores"], args["tokens"]
    branches = log_scores.shape[-2]
    _check_columns(op, log_scores, "[..., K, V + 1]")
    if branches < 1 or (branches > 1) != (args["weights"] is not None):
        raise ValueError(f"{op}: log_scores has {branches} branches, expected 1 without weights, more with them")
    check_tensor(op, "tokens", tokens, log_scores, (torch.int64,), log_scores.shape[:-2], "log_scores")
    check_tensor(op, "seed", args["seed"], log_scores, (torch.int64,), (2,), "log_scores")
    _check_numbers(op, "rates", args["rates"], log_scores, tokens)
    _check_numbers(op, "weights", args["weights"], log_scores, tokens, branches)


def _arrange_step(args: Arguments) -> Arguments:
    for name in ("tokens", "seed", "rates", "weights"):
        args[name] = None if args[name] is None else args[name].contiguous()
    return args


_absorbing_step = define(
    "absorbing_step(Tensor log_scores, Tensor tokens, Tensor seed, Tensor rates, Tensor? weights) -> (Tensor, Tensor)",
    family="decoding",
    reference=reference.absorbing_step,
    from_indices=reference.log_probs_of_step,
    output=(summed(_of_tokens), indices(_of_tokens)),
    requires=[_check_step],
    kinds={"log_scores": "grid", **dict.fromkeys(("tokens", "seed", "rates", "weights"), "fixed")},
    arrange=_arrange_step,
    differentiable=1,
    autocast="keep",
    is_checked_by_signature=False,
)


def absorbing_step(
    log_scores: Tensor,
    tokens: Tensor,
    sigma: float | Tensor | None = None,
    step: float | Tensor | None = None,
    *,
    guidance: GuidanceWeights | None = None,
    method: Method = "euler",
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    return_log_prob: bool = False,
    errors: Literal["raise", "mark"] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One reverse step of absorbing-state diffusion: tokens in, tokens out, those that are MASK drawn anew.

    MASK is token V. With its concrete scores ``s = exp(log_scores)`` a masked position becomes token j with probability
    ``p_j = a·s_j``, and stays with what is left of 1; where ``Σ p`` is beyond 1 nothing is left, and each is over that
    sum. One pass: drawn is who has the largest ``p / E``, E an exponential number of its own. Positions that are not
    masked keep their token; nothing of them is read.

    Args:
        log_scores: ``[..., V + 1]``, for tokens ``[...]``; with ``guidance`` ``[K, ..., V + 1]`` of K branches. The
            column of MASK is not read.
        tokens: int64 ``[...]`` with any axes, of which the first is the batch.
        sigma: σ, the rate of noise ``dσ̄/dt``, at least 0: a number, or ``[B]``. By "euler" that at t, by "analytic" its
            mean over the step, ``(σ̄(t) − σ̄(t − Δt)) / Δt``. It takes no gradient.
        step: Δt, how far time goes back, at least 0: a number, or ``[B]``. It takes no gradient.
        guidance: w of the branches after the first: a number, or K − 1 of them; as a tensor ``[K − 1]`` or
            ``[B, K − 1]``. Scores then are ``log s = l₀ + Σ_k w_k·(l_k − l₀)``; one that is 0 in any branch stays 0.
        method: "euler", where a is ``σ·Δt``; "analytic", where it is ``exp(σ·Δt) − 1``; "denoise", the last step, which
            takes neither: MASK may not stay, ``p = s / Σ s``.
        generator, seed, offset: where a seed comes from, as in ``cross_attention``. Token j of position r, counted over
            all axes, has word j mod 4 of counter ``offset + r·⌈(V + 1)/4⌉ + ⌊j/4⌋``.
        return_log_prob: return the log-probability of what became of each position too; 0 where it was not masked.
        errors: what becomes of a masked position with a score of NaN or +∞, or without one above 0 to "denoise" by:
            "raise", or "mark" it by -1 and NaN. By default "raise" on the CPU and "mark" on a GPU, which raising would
            wait for.
    Returns: int64 ``[...]``; with ``return_log_prob`` also ``[...]`` in float32 (float64 beside that), which has a
        gradient for log_scores.
    Raises: TypeError or ValueError where an argument does not fit, with its name; ValueError where there is no token.
    Source: Lou et al. 2023 (SEDD), §4 (Euler, and Tweedie τ-leaping, "analytic"); the sum over branches is our
        reconstruction of the guidance of ImaginTalk (Ye and Shan 2025).
    """
    op = "absorbing_step"
    floating_rows("log_scores")(op, {"log_scores": log_scores})
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{op}: tokens is {type(tokens).__name__}, expected a Tensor")
    if errors not in (None, "raise", "mark"):
        raise ValueError(f'{op}: errors is {errors!r}, expected "raise" or "mark"')
    _check_shape(op, log_scores, tokens, guidance)
    log_probs, drawn = named(
        op,
        _absorbing_step,
        _absorbing_step,
        log_scores.unsqueeze(-2) if guidance is None else log_scores.movedim(0, -2),
        tokens,
        seed_tensor(op, log_scores, generator, seed, offset),
        _rates(op, log_scores, tokens, {"sigma": sigma, "step": step}, method),
        None if guidance is None else _weights(op, log_scores, tokens, guidance),
    )
    if errors == "raise" or (errors is None and log_scores.is_cpu):
        raise_if_marked(op, "log_scores", (drawn < 0) & (drawn != tokens), "nothing above -inf to denoise by")
    return (drawn, log_probs) if return_log_prob else drawn


def _check_shape(op: str, log_scores: Tensor, tokens: Tensor, guidance: GuidanceWeights | None) -> None:
    first = () if guidance is None else log_scores.shape[:1]
    got, wanted = list(log_scores.shape), [*first, *tokens.shape]
    _check_columns(op, log_scores, f"{str(wanted)[:-1]}, V + 1]")
    if got[:-1] != wanted:
        raise ValueError(
            f"{op}: log_scores has shape {got}, expected {str(wanted)[:-1]}, V + 1] for tokens {list(tokens.shape)}"
        )


def _rates(
    op: str, log_scores: Tensor, tokens: Tensor, numbers: dict[str, float | Tensor | None], method: str
) -> Tensor:
    if method not in ("euler", "analytic", "denoise"):
        raise ValueError(f'{op}: method is {method!r}, expected "euler", "analytic" or "denoise"')
    factors = []
    for name, number in numbers.items():
        if method == "denoise":
            if number is not None:
                raise ValueError(f"{op}: {name} is {number}, expected None with method {method!r}, the last step")
        elif number is None:
            raise ValueError(f"{op}: {name} is None, expected a number or a tensor with method {method!r}")
        else:
            factors.append(of_samples(op, name, number, ("log_scores", log_scores), _batch_of(tokens)))
    if not factors:
        return log_scores.new_full((1,), torch.inf, dtype=accumulation_dtype(log_scores.dtype))
    rates = factors[0] * factors[1]
    rates = rates.expm1() if method == "analytic" else rates
    return rates.clamp(max=torch.finfo(rates.dtype).max)  # by infinity MASK could not stay


def _weights(op: str, log_scores: Tensor, tokens: Tensor, guidance: GuidanceWeights) -> Tensor:
    """``[B or 1, K]``: of the first branch what is left of 1."""
    if not isinstance(guidance, Tensor):
        numbers = (guidance,) if isinstance(guidance, NUMBER) else tuple(guidance)
        for number in numbers:
            check_number(op, "guidance", number, "finite numbers", -LARGEST, LARGEST)
        guidance = tensor_of(numbers, log_scores.device, accumulation_dtype(log_scores.dtype))
    check_tensor(op, "guidance", guidance, log_scores, FLOATING, None, "log_scores")
    count, batch = log_scores.shape[0] - 1, _batch_of(tokens)
    if count < 1 or guidance.shape not in ((count,), (batch, count)):
        expected = (
            f"{[count]} or {[batch, count]}, of the branches after the first" if count > 0 else "two branches or more"
        )
        raise ValueError(f"{op}: guidance has shape {list(guidance.shape)}, expected {expected}")
    after = guidance.to(accumulation_dtype(log_scores.dtype)).reshape(-1, count)
    return torch.cat([1 - after.sum(1, keepdim=True), after], 1)


# ---- The loss --------------------------------------------------------------------------------------------------------


def _check_entropy(op: str, args: Arguments) -> None:
    floating_rows("log_scores")(op, args)
    log_scores, targets, masked = args["log_scores"], args["targets"], args["masked"]
    _check_columns(op, log_scores, "[..., V + 1]")
    for name, x, dtype in (("targets", targets, torch.int64), ("masked", masked, torch.bool)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} is {type(x).__name__}, expected a Tensor")
        check_tensor(op, name, x, log_scores, (dtype,), log_scores.shape[:-1], "log_scores")
    for name in ("sigma", "weights"):
        _check_numbers(op, name, args.get(name), log_scores, targets)
    if is_readable(targets) and is_readable(masked):
        size = log_scores.shape[-1] - 1
        outside = masked & ((targets < 0) | (targets >= size))
        if outside.any():
            raise ValueError(f"{op}: targets has {int(targets[outside][0])}, expected a token from 0 to {size - 1}")


def _arrange_entropy(args: Arguments) -> Arguments:
    for name in ("targets", "masked", "sigma", "weights"):
        if name in args:
            args[name] = args[name].contiguous()
    return args


_ENTROPY: dict[str, Any] = {
    "family": "decoding",
    "kinds": {"log_scores": "grid", **dict.fromkeys(("targets", "masked", "sigma", "weights"), "fixed")},
    "requires": [_check_entropy],
    "arrange": _arrange_entropy,
    "autocast": "keep",
    "is_checked_by_signature": False,
}

_absorbing_score_entropy = define(
    "absorbing_score_entropy(Tensor log_scores, Tensor targets, Tensor masked, Tensor sigma) -> Tensor",
    reference=reference.absorbing_score_entropy,
    output=summed(_of_tokens),
    **_ENTROPY,
)

_absorbing_score_loss = define(
    "absorbing_score_loss(Tensor log_scores, Tensor targets, Tensor masked, Tensor sigma, Tensor weights) "
    "-> (Tensor, Tensor)",
    reference=reference.absorbing_score_loss,
    output=(summed(lambda args: ()), like(0)),
    makes_gradients=True,
    **_ENTROPY,
)


def absorbing_score_loss(
    log_scores: Tensor,
    targets: Tensor,
    masked: Tensor,
    sigma: float | Tensor,
    dsigma: float | Tensor,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Denoising score entropy of absorbing-state diffusion, ``σ·Σ_masked (Σ_j s_j − r·log s_y + r·(log r − 1))``.

    ``s = exp(log_scores)`` over the V tokens, y is the target and ``r = 1 / (exp(σ̄) − 1)`` its true score, with which,
    and with 0 for all other tokens, the loss is 0. Neither forward nor backward keeps ``s``; near its zero the loss is
    computed without the difference of sums that are equal there. On a CPU the forward of a mean or a sum makes the
    gradient too.

    Args:
        log_scores: ``[B, ..., V + 1]``. The column of MASK, the last one, is not read, and has no gradient.
        targets: y, int64 ``[B, ...]``: the tokens before they were masked.
        masked: bool ``[B, ...]``: where x is MASK. Nothing is read of other positions, which have no loss.
        sigma: σ̄, the total noise: a number of at least 0, or ``[B]``. It takes no gradient. At 0 nothing can be masked:
            the loss of a masked position is ∞.
        dsigma: σ, the rate of noise ``dσ̄/dt``, which weighs a sample: a number of at least 0, or ``[B]``.
        reduction: "mean" over samples of the sums of their positions, "sum" of all, or "none".
    Returns: 0-d, or with "none" ``[B, ...]``; float32, or float64 for that. NaN as "mean" of no samples.
    Raises: TypeError or ValueError where an argument does not fit, with its name; on a CPU for a target that is no
        token too. On a GPU the loss of such a position is NaN.
    Source: Lou et al. 2023 (SEDD), §3 (denoising score entropy, with the weight of the likelihood bound), for the
        absorbing transition.
    """
    op = "absorbing_score_loss"
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{op}: reduction is {reduction!r}, expected "mean", "sum" or "none"')
    floating_rows("log_scores")(op, {"log_scores": log_scores})
    if not isinstance(targets, Tensor):
        raise TypeError(f"{op}: targets is {type(targets).__name__}, expected a Tensor")
    total, rate = (
        of_samples(op, name, value, ("log_scores", log_scores), _batch_of(targets))
        for name, value in (("sigma", sigma), ("dsigma", dsigma))
    )
    given = (log_scores, targets, masked, total)
    samples = _batch_of(targets)
    if reduction != "none" and samples and not needs_gradient(rate) and may_make_gradients(log_scores):
        weights = rate / samples if reduction == "mean" else rate
        loss: Tensor = named(op, _absorbing_score_loss, _absorbing_score_loss, *given, weights)[0]
        return loss
    entropy = named(op, _absorbing_score_entropy, _absorbing_score_entropy, *given)
    losses: Tensor = entropy * reference.of_samples(rate[:, None], entropy).squeeze(-1)
    if reduction == "none":
        return losses
    return losses.sum() / samples if reduction == "mean" else losses.sum()
