"""Masked iterative decoding: a step that draws tokens and masks the least certain again, and a detector's gate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmkern.reference import masked_decode as reference
from mmkern.reference.masked_decode import Setting

from ._checks import LARGEST, Arguments, accumulation_dtype, check_number, check_tensor, floating_rows, is_readable
from ._define import define, named
from ._outputs import indices, summed
from ._random import seed_tensor
from ._samples import of_samples, tensor_of
from .decoding import raise_if_marked

_LEAST = 2.0**-126  # of float32


class MaskedDecoded(NamedTuple):
    """The tokens, where they are masked again, and the log-probability of each that was drawn."""

    tokens: Tensor
    masked: Tensor
    log_probs: Tensor


def _of_tokens(args: Sequence[Any]) -> tuple[int, ...]:
    shape: tuple[int, ...] = args[1].shape
    return shape


def _check(op: str, args: Arguments) -> None:
    floating_rows("logits", axes=2)(op, args)
    logits = args["logits"]
    if logits.shape[-1] == 0:
        raise ValueError(f"{op}: logits has shape {list(logits.shape)}, expected [B, ..., V] with V of at least 1")
    for name, dtype in (("tokens", torch.int64), ("masked", torch.bool)):
        if not isinstance(args[name], Tensor):
            raise TypeError(f"{op}: {name} is {type(args[name]).__name__}, expected a Tensor")
        check_tensor(op, name, args[name], logits, (dtype,), logits.shape[:-1], "logits")
    check_tensor(op, "seed", args["seed"], logits, (torch.int64,), (2,), "logits")
    dtypes = {"settings": accumulation_dtype(logits.dtype), "counts": torch.int64}
    for name, after in (("settings", (len(Setting),)), ("counts", ())):
        x = args[name]
        check_tensor(op, name, x, logits, (dtypes[name],), None, "logits")
        if x.shape not in ((1, *after), (logits.shape[0], *after)):
            expected = f"{[logits.shape[0], *after]} or {[1, *after]}"
            raise ValueError(f"{op}: {name} has shape {list(x.shape)}, expected {expected}")


def _arrange(args: Arguments) -> Arguments:
    return {name: x if name == "logits" else x.contiguous() for name, x in args.items()}


_masked_decode_step = define(
    "masked_decode_step(Tensor logits, Tensor tokens, Tensor masked, Tensor seed, Tensor settings, Tensor counts) "
    "-> (Tensor, Tensor, Tensor)",
    family="decoding",
    reference=reference.masked_decode_step,
    output=(summed(_of_tokens), indices(_of_tokens), indices(_of_tokens)),
    requires=[_check],
    kinds={"logits": "grid", **dict.fromkeys(("tokens", "masked", "seed", "settings", "counts"), "fixed")},
    arrange=_arrange,
    differentiable=0,
    autocast="keep",
    is_checked_by_signature=False,
)


def masked_decode_step(
    logits: Tensor,
    tokens: Tensor,
    masked: Tensor,
    *,
    ratio: float | Tensor,
    keep_top_k: int | None = None,
    temperature: float | Tensor = 1.0,
    confidence_noise: float | Tensor = 0.0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    errors: Literal["raise", "mark"] | None = None,
) -> MaskedDecoded:
    """Draws a token for each masked position, and leaves the least certain of them masked.

    A token is drawn as ``sample_tokens`` draws it. Its score is ``p + confidence_noise·g``: p its probability among the
    ``keep_top_k`` at temperature 1, g a standard Gumbel number. The ``⌊ratio·L⌋`` masked positions of least score, of
    equal ones the first, stay masked; L is how many positions a sample has.

    Args:
        logits: ``[B, ..., V]``, for positions ``[B, ...]``. Rows of positions that are not masked are not read.
        tokens: int64 ``[B, ...]``. Positions that are not masked, or stay so, keep theirs.
        masked: bool ``[B, ...]``.
        ratio: γ of the step to come, from 0 to 1: what share of all positions it is to find masked. This and the next
            but one are a number, or ``[B]``.
        keep_top_k: draw among so many largest logits, at least 1; None: all.
        temperature: divides the logits of the draw, at least 0; at 0 the largest is chosen.
        confidence_noise: at least 0; 0 keeps the likeliest.
        generator, seed, offset: where a seed comes from, as in ``cross_attention``. Token j of position r, counted over
            all axes, has word j mod 4 of counter ``offset + r·⌈V/4⌉ + ⌊j/4⌋``; g of position r has word r mod 4 of
            ``offset + R·⌈V/4⌉ + ⌊r/4⌋``, R positions in all.
        errors: what becomes of a masked position with a logit of NaN or +∞, or none above −∞: "raise", or "mark": its
            token is −1 and its log-probability NaN, unless it stays masked, as the least certain of all. By default
            "raise" on the CPU and "mark" on a GPU, which raising would wait for.
    Returns: tokens int64, masked bool and log_probs, ``[B, ...]``; ``log p`` of what was drawn, also where it was not
        kept, and 0 where nothing was. In float32 (float64 beside that), without a gradient.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Chang et al. 2022 (MaskGIT), §3.2; Wang et al. 2024 (MaskGCT), §3.2.3, whose score this is.
    """
    op = "masked_decode_step"
    floating_rows("logits", axes=2)(op, {"logits": logits})
    if errors not in (None, "raise", "mark"):
        raise ValueError(f'{op}: errors is {errors!r}, expected "raise" or "mark"')
    seed = seed_tensor(op, logits, generator, seed, offset)
    settings = _settings(op, logits, keep_top_k, temperature, confidence_noise)
    log_probs, found, stays = named(
        op,
        _masked_decode_step,
        _masked_decode_step,
        logits,
        tokens,
        masked,
        seed,
        settings,
        _counts(op, logits, ratio),
    )
    if errors == "raise" or (errors is None and logits.is_cpu):
        raise_if_marked(op, "logits", log_probs.isnan(), "nothing above -inf")
    return MaskedDecoded(found, stays != 0, log_probs)


def _settings(op: str, logits: Tensor, top_k: int | None, temperature: float | Tensor, noise: float | Tensor) -> Tensor:
    expected = "an int of at least 1, or None"
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool)):
        raise TypeError(f"{op}: keep_top_k is {type(top_k).__name__}, expected {expected}")
    if top_k is not None:
        check_number(op, "keep_top_k", top_k, expected, 1, LARGEST)
    beside, batch = ("logits", logits), logits.shape[0]
    dtype = accumulation_dtype(logits.dtype)
    columns = {
        Setting.TOP_K: tensor_of((math.inf if top_k is None else float(top_k),), logits.device, dtype),
        Setting.TEMPERATURE: of_samples(op, "temperature", temperature, beside, batch),
        Setting.NOISE: of_samples(op, "confidence_noise", noise, beside, batch),
    }
    t = columns[Setting.TEMPERATURE]
    if is_readable(t) and ((t > 0) & (t < _LEAST)).any():
        raise ValueError(f"{op}: temperature is {temperature}, expected 0, or a number of at least 2**-126")
    return torch.stack(torch.broadcast_tensors(*(columns[column] for column in Setting)), 1)


def _counts(op: str, logits: Tensor, ratio: float | Tensor) -> Tensor:
    """``[B or 1]``: how many positions of a sample are to be masked."""
    expected, positions = "a number from 0 to 1", math.prod(logits.shape[1:-1])
    if isinstance(ratio, Tensor):
        of_samples(op, "ratio", ratio, ("logits", logits), logits.shape[0], expected, 0, 1)
        return (ratio.reshape(-1) * positions).floor().long()
    check_number(op, "ratio", ratio, expected, 0, 1)
    return (tensor_of((ratio,), logits.device, torch.float64) * positions).floor().long()


def error_gate(token_log_probs: Tensor | None, error_logits: Tensor, threshold: float = 0.5) -> Tensor:
    """Which tokens to mask and predict again: those that are wrong with a probability above ``threshold``.

    A token is taken for right with probability ``p·(1 − e)``: p its own, ``e = sigmoid(error_logits)`` a detector's
    opinion that it is wrong. Without ``token_log_probs`` the detector alone decides, ``e > threshold``.

    Args:
        token_log_probs: log p, ``[...]``, such as those of ``masked_decode_step`` or ``sample_tokens``; or None.
        error_logits: ``[...]``, floating.
        threshold: τ, from 0 to 1.
    Returns: bool ``[...]``; true where a number is NaN too. On each device by PyTorch's own ops: a few bytes a token.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: ImaginTalk (Ye and Shan 2025), whose masked tokens are ``e > τ``; the product with p is our reconstruction.
    """
    op = "error_gate"
    given = {"error_logits": error_logits, "token_log_probs": token_log_probs}
    for name, x in given.items():
        if x is not None:
            floating_rows(name, axes=0)(op, {name: x})
            check_tensor(op, name, x, error_logits, (x.dtype,), error_logits.shape, "error_logits")
    check_number(op, "threshold", threshold, "a number from 0 to 1", 0, 1)
    log_right = torch.nn.functional.logsigmoid(-error_logits.to(accumulation_dtype(error_logits.dtype)))
    if token_log_probs is not None:
        log_right = log_right + token_log_probs
    return ~(log_right >= (math.log1p(-threshold) if threshold < 1 else -math.inf))
