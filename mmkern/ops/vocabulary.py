"""Losses over a vocabulary, whose logits are never a matrix in memory.

``linear_logsumexp`` gives, of each row, the log-sum-exp ``n`` of the tokens that are not its target and the target's
logit ``p``: ``−log softmax`` is ``−log σ(p − n)``, whose digits do not cancel. Its gradient takes one number a row for
each, so every reduction, smoothing and penalty is a formula of rows; logits are formed again for it: four products.
``linear_cross_entropy`` is such a formula in one kernel with its gradients, for a mean or a sum: on a CPU three.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmkern.reference import vocabulary as reference

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
from ._define import define, may_make_gradients, named
from ._outputs import like, rows_of, summed
from .hyperbolic import Reduction

# Fewer rows are not worth a pass over the tokens for each quarter of them: logits are formed again.
_FEWEST_ROWS = 256
_NO_TOKEN = -1 << 52  # as ignore_index: no row is left out
_LOG_PROB_NAMES = {"input": "h", "linear_weight": "weight", "target": "tokens"}

_ROWS = summed(rows_of(0))


def _check_vocabulary(op: str, args: Arguments) -> None:
    x, weight, bias = args["input"], args["linear_weight"], args["linear_bias"]
    if weight.shape[1] != x.shape[1] or not weight.shape[0]:
        got = list(weight.shape)
        raise ValueError(f"{op}: linear_weight has shape {got}, expected [V, {x.shape[1]}], V at least 1")
    check_tensor(op, "linear_bias", bias, x, (x.dtype,), weight.shape[:1], "input")
    check_tensor(op, "weight", args["weight"], x, FLOATING, weight.shape[:1], "input")


def _check_target(op: str, args: Arguments) -> None:
    x, target, ignored = args["input"], args["target"], args["ignore_index"]
    check_tensor(op, "target", target, x, (torch.int64,), x.shape[:1], "input")
    if is_readable(target) and target.numel():
        vocabulary = args["linear_weight"].shape[0]
        outside = ((target < 0) | (target >= vocabulary)) & (target != ignored)
        if outside.any():
            expected = f"a token from 0 to {vocabulary - 1}"
            if ignored != _NO_TOKEN:
                expected += f", or {ignored}, the ignore_index"
            raise ValueError(f"{op}: target has {int(target[outside][0])}, expected {expected}")


def _arrange(args: Arguments) -> Arguments:
    args["target"] = args["target"].contiguous()
    if args["weight"] is not None:
        args["weight"] = args["weight"].to(accumulation_dtype(args["input"].dtype)).contiguous()
    return args


_LOGITS: dict[str, Any] = {
    "family": "vocabulary",
    "requires": [floating_rows("input", "linear_weight", axes=2), _check_vocabulary, _check_target],
    "kinds": {"input": "matrix", "linear_weight": "matrix", "weight": "fixed", "target": "fixed"},
    "arrange": _arrange,
    "autocast": "lower",
    "second_derivative": False,
    "is_checked_by_signature": False,
}

_linear_logsumexp = define(
    "linear_logsumexp(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor? weight, Tensor target, "
    "float softcap, float inverse_temperature, int ignore_index, bool sums_logits) -> (Tensor, Tensor, Tensor)",
    reference=reference.linear_logsumexp,
    output=(_ROWS, _ROWS, _ROWS),
    backward_reads_outputs=True,
    **_LOGITS,
)

_linear_cross_entropy = define(
    "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor? weight, Tensor target, "
    "float softcap, int ignore_index, float label_smoothing, float z_loss, bool mean) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.linear_cross_entropy,
    output=(
        summed(lambda args: ()),
        like(0),
        like(1),
        summed(lambda args: (0,) if args[2] is None else args[2].shape),
    ),
    makes_gradients=True,
    **_LOGITS,
)


def _matrix(input: Tensor) -> Tensor:
    return input.flatten(0, -2) if input.dim() > 1 else input.unsqueeze(0)


def _check_call(
    op: str, input: Any, linear_weight: Any, target: Any, softcap: Any, names: Mapping[str, str] = MappingProxyType({})
) -> None:
    x, weight, tokens = (names.get(name, name) for name in ("input", "linear_weight", "target"))
    for name, given in ((x, input), (weight, linear_weight), (tokens, target)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{op}: {name} is {type(given).__name__}, expected a Tensor")
    of_input, of_target = list(input.shape), list(target.shape)
    if not of_input:
        raise ValueError(f"{op}: {x} has shape [], expected [..., D]")
    if linear_weight.dim() != 2:
        raise ValueError(f"{op}: {weight} has shape {list(linear_weight.shape)}, expected [V, {of_input[-1]}]")
    if of_target != of_input[:-1]:
        raise ValueError(f"{op}: {tokens} has shape {of_target}, expected {of_input[:-1]}, one for each row of {x}")
    if softcap is not None:
        check_number(op, "softcap", softcap, "a number above 0, or None", sys.float_info.min, LARGEST)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    shift: bool = False,
) -> Tensor:
    """Cross-entropy of a linear layer's logits, without the logits: ``−log softmax(l)_target``, ``l = W·x + b``.

    ``loss = (1 − ε)·w_t·(lse − l_t) + ε/V·Σ_v w_v·(lse − l_v) + z_loss·lse²`` with ``lse = log Σ_v exp(l_v)``.
    A mean or a sum of many rows on a CPU makes its gradients in forward; else the logits are formed again in backward.

    Args:
        input: ``[..., D]``, any strides.
        linear_weight: ``[V, D]``, one row a token; the dtype of ``input``.
        target: ``[...]`` int64, tokens; rows of ``ignore_index`` cost nothing, and have no loss and no gradient.
        linear_bias: ``[V]``, or None.
        weight: w, ``[V]``, of each token's loss, which takes no gradient; or None for ones.
        reduction: "none", "sum", or "mean": ``Σ loss / Σ w_t`` over rows with a target; ``z_loss`` over their number.
        ignore_index: the target of rows without one.
        label_smoothing: ε, from 0 to 1: the share of the target that is spread over all tokens.
        z_loss: the factor of ``lse²``, which keeps logits from drifting; 1e-4 in PaLM. Not weighted.
        softcap: logits become ``softcap·tanh(l / softcap)``; or None.
        shift: position s of ``input`` ``[..., S, D]`` predicts ``target[..., s + 1]``; there is no loss of the last.
    Returns: 0-d, or with "none" ``[...]``, zero where there is no target (``[..., S − 1]`` with ``shift``); float32, or
        float64 for that. NaN as "mean" of no targets. No second derivative.
    Raises: TypeError or ValueError where an argument does not fit, with its name; on a CPU for a target that is no
        token too. On a GPU the loss of such a row is NaN.
    Source: torch.nn.functional.linear_cross_entropy; Chowdhery et al. 2022 (PaLM), §5, for z_loss; Gemma Team 2024
        (Gemma 2), §2, for softcap.
    """
    op = "linear_cross_entropy"
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{op}: reduction is {reduction!r}, expected "mean", "sum" or "none"')
    check_number(op, "label_smoothing", label_smoothing, "a number from 0 to 1", 0, 1)
    check_number(op, "z_loss", z_loss, "a number of at least 0", 0, LARGEST)
    if not isinstance(shift, bool):
        raise TypeError(f"{op}: shift is {type(shift).__name__}, expected a bool")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"{op}: ignore_index is {type(ignore_index).__name__}, expected an int")
    _check_call(op, input, linear_weight, target, softcap)
    if shift:
        target = _next(op, target, ignore_index)
    x, tokens = _matrix(input), target.flatten()
    call = (x, linear_weight, linear_bias, weight, tokens, softcap or 0.0)
    if reduction != "none" and _makes_gradients(x, linear_weight, linear_bias):
        raw = _linear_cross_entropy
        loss: Tensor = named(op, raw, raw, *call, ignore_index, label_smoothing, z_loss, reduction == "mean")[0]
        return loss
    raw = _linear_logsumexp
    others, positive, totals = named(op, raw, raw, *call, 1.0, ignore_index, bool(label_smoothing))
    loss = reference.cross_entropy(
        others,
        positive,
        totals,
        weight,
        tokens,
        vocabulary=linear_weight.shape[0],
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
    )
    if reduction != "none":
        return loss
    return loss.view(target.shape)[..., :-1] if shift else loss.view(target.shape)


def _makes_gradients(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the op that makes them in forward takes a call: it keeps the logits of a quarter of the rows."""
    return len(x) >= _FEWEST_ROWS and may_make_gradients(x, *others)


def _next(op: str, target: Tensor, ignore_index: int) -> Tensor:
    """The target that follows each position; none after the last."""
    if target.dim() == 0 or target.shape[-1] == 0:
        raise ValueError(f"{op}: target has shape {list(target.shape)}, expected [..., S], S at least 1, with shift")
    return functional.pad(target[..., 1:], (0, 1), value=ignore_index)


def linear_log_prob(
    h: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probabilities of given tokens under a linear layer's logits: ``log softmax(cap(W·h + b) / temperature)``.

    Args:
        h: ``[..., D]``, any strides.
        weight: W, ``[V, D]``, one row a token; the dtype of ``h``.
        tokens: ``[...]`` int64.
        linear_bias: b, ``[V]``, or None.
        softcap: logits become ``softcap·tanh(l / softcap)``; or None.
        temperature: what they are divided by then.
    Returns: ``[...]``; float32, or float64 for that. No second derivative.
    Raises: TypeError or ValueError where an argument does not fit, with its name; on a CPU for what is no token too. On
        a GPU the result of such a row is NaN.
    Source: as ``linear_cross_entropy``, of which with ``reduction="none"`` this is the negative.
    """
    op = "linear_log_prob"
    if not isinstance(temperature, NUMBER) or isinstance(temperature, bool):
        raise TypeError(f"{op}: temperature is {type(temperature).__name__}, expected a float")
    if not temperature > 0:
        raise ValueError(f"{op}: temperature is {temperature}, expected a number above 0")
    _check_call(op, h, weight, tokens, softcap, _LOG_PROB_NAMES)
    rows = (_matrix(h), weight, linear_bias, None, tokens.flatten())
    call = (*rows, softcap or 0.0, 1.0 / temperature, _NO_TOKEN, False)
    others, positive, _ = named(op, _linear_logsumexp, _linear_logsumexp, *call, names=_LOG_PROB_NAMES)
    return functional.logsigmoid(positive - others).view(tokens.shape)
