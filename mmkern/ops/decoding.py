"""From a wide row of logits to one integer, without a sort."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mmkern.reference import decoding as reference
from mmkern.reference.decoding import NEUTRAL, Filter

from ._checks import LARGEST, Arguments, accumulation_dtype, check_number, check_tensor, floating_rows, is_readable
from ._define import define, named
from ._outputs import indices, rows_of, summed
from ._random import seed_tensor

_WORD = 32
_LEAST = 2.0**-126  # of float32
_RANGES = {
    Filter.TOP_K: ("an int of at least 1", 1, LARGEST),
    Filter.TEMPERATURE: ("0, or a number of at least 2**-126", 0.0, LARGEST),
    Filter.TOP_P: ("a number from 0 to 1", 0.0, 1.0),
    Filter.MIN_P: ("a number from 0 to 1", 0.0, 1.0),
    Filter.TYPICAL_P: ("a number from 0 to 1", 0.0, 1.0),
    Filter.REPETITION_PENALTY: ("a number above 0", _LEAST, LARGEST),
}


def _check(op: str, args: Arguments) -> None:
    logits = args["logits"]
    floating_rows("logits")(op, args)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{op}: logits has shape {list(logits.shape)}, expected [B, V] with V of at least 1")
    wide = accumulation_dtype(logits.dtype)
    widths = {"seed": 2, "filters": len(Filter), "history": None, "allowed": -(-logits.shape[1] // (2 * _WORD))}
    for name, width in widths.items():
        x = args[name]
        dtype = wide if name == "filters" else torch.int64
        check_tensor(op, name, x, logits, (dtype,), None, "logits")
        if x is None:
            continue
        if x.dim() != 2 or x.shape[0] not in (1, logits.shape[0]) or (width is not None and x.shape[1] != width):
            columns = "H" if width is None else width
            expected = f"[{logits.shape[0]}, {columns}] or [1, {columns}]"
            raise ValueError(f"{op}: {name} has shape {list(x.shape)}, expected {expected}")


draw_tokens = define(
    "sample_tokens(Tensor logits, Tensor seed, Tensor filters, Tensor? history, Tensor? allowed) -> (Tensor, Tensor)",
    family="decoding",
    reference=reference.sample_tokens,
    from_indices=reference.log_probs_of_tokens,
    output=(summed(rows_of(0)), indices(rows_of(0))),
    requires=[_check],
    kinds=dict.fromkeys(("seed", "filters", "history", "allowed"), "fixed"),
    differentiable=1,
    autocast="keep",
)


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    typical_p: float | Tensor | None = None,
    allowed: Tensor | None = None,
    repetition_penalty: float | Tensor | None = None,
    history: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    return_log_prob: bool = False,
    errors: Literal["raise", "mark"] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One token of each row: ``argmax_i w_i / E_i`` over those kept, ``w = softmax(z / temperature)``, E exponential.

    Filters act in this order, each on what the ones before it have left: penalty, allowed, top_k, top_p, min_p,
    typical_p. Of equal tokens the lower index counts as the larger, so that no more are kept than asked for.

    Args:
        logits: z ``[B, V]``.
        temperature: at least 0; at 0 the largest logit is chosen. This and the other numbers are one for all rows, or
            a tensor ``[B]``, one for each.
        top_k: keep the k largest, at least 1.
        top_p: keep the fewest whose probabilities come to p, the largest first.
        min_p: keep those of at least so many times the probability of the likeliest.
        typical_p: keep the fewest of that mass whose surprise is nearest to the entropy of what is left.
        allowed: int32 ``[B or 1, ⌈V/32⌉]``: bit i of word w says whether token 32 w + i may be chosen.
        repetition_penalty: above 0: divides positive logits of tokens in ``history``, multiplies negative ones.
        history: int64 ``[B, H]``, or ``[H]`` for all rows; tokens below 0 or from V on are none.
        generator, seed, offset: where a seed comes from, as in ``cross_attention``. A seed ``[B]`` is a key for each
            row, which then draws as it would alone. Token i of row b has word i mod 4 of counter
            ``offset + ⌊i/4⌋``, plus ``b·⌈V/4⌉`` where the rows share one key.
        return_log_prob: return the token's log-probability among those kept too.
        errors: what becomes of a row that has NaN or +∞, or no token left: "raise", or "mark" it by -1 and NaN. By
            default "raise" on the CPU and "mark" on a GPU, which raising would wait for.
    Returns: int64 ``[B]``; with ``return_log_prob`` also ``[B]`` in float32 (float64 beside that), which has a gradient
        for logits.
    Raises: TypeError or ValueError where an argument does not fit, with its name; ValueError where a row has no token.
    Source: Holtzman et al. 2020 (top-p); Fan et al. 2018 (top-k); Nguyen et al. 2024 (min-p); Meister et al. 2023
        (typical); Keskar et al. 2019, §4.1 (penalty).
    """
    op = "sample_tokens"
    floating_rows("logits")(op, {"logits": logits})
    if logits.dim() != 2:
        raise ValueError(f"{op}: logits has shape {list(logits.shape)}, expected [B, V]")
    if errors not in (None, "raise", "mark"):
        raise ValueError(f'{op}: errors is {errors!r}, expected "raise" or "mark"')
    if (history is None) != (repetition_penalty is None):
        raise ValueError(f"{op}: history and repetition_penalty come together, got one of them")
    given = (top_k, temperature, top_p, min_p, typical_p, repetition_penalty)
    log_probs, tokens = named(
        op,
        draw_tokens,
        draw_tokens,
        logits,
        seeds_of_rows(op, logits, generator, seed, offset),
        _filters(op, logits, given),
        history[None] if isinstance(history, Tensor) and history.dim() == 1 else history,
        None if allowed is None else _long_words(op, logits, allowed),
    )
    if errors == "raise" or (errors is None and logits.is_cpu):
        raise_if_marked(op, "logits", tokens < 0, "nothing that is allowed and above -inf")
    return (tokens, log_probs) if return_log_prob else tokens


def raise_if_marked(op: str, name: str, is_marked: Tensor, nothing: str) -> None:
    """Where there are such rows, of an argument of that name."""
    if is_readable(is_marked) and is_marked.any():
        rows = torch.nonzero(is_marked.flatten()).flatten().tolist()
        more = ", ..." if len(rows) > 8 else ""
        where = f"{', '.join(map(str, rows[:8]))}{more}"
        raise ValueError(f"{op}: {name} has no token to choose in rows {where}: NaN, +inf, or {nothing}")


def seeds_of_rows(
    op: str, rows: Tensor, generator: torch.Generator | None, seed: int | Tensor | None, offset: int
) -> Tensor:
    """``[B or 1, 2]``: a key and an offset for each row of ``rows``, or one for all."""
    if isinstance(seed, Tensor) and seed.dim() == 1 and generator is None:
        check_tensor(op, "seed", seed, rows, (torch.int64,), rows.shape[:1], "logits")
        check_number(op, "offset", offset, "an int of at least 0", 0, 2**63 - 1)
        return torch.stack([seed, torch.full_like(seed, offset)], 1)
    return seed_tensor(op, rows, generator, seed, offset)[None]


def _filters(op: str, logits: Tensor, given: tuple[Any, ...]) -> Tensor:
    """``[B or 1, 6]``."""
    for column, value in zip(Filter, given, strict=True):
        if value is not None:
            _check_filter(op, logits, column, value)
    numbers = tuple(
        NEUTRAL[column] if value is None or isinstance(value, Tensor) else float(value)
        for column, value in zip(Filter, given, strict=True)
    )
    shared = torch.tensor([numbers], dtype=accumulation_dtype(logits.dtype), device=logits.device)
    if not any(isinstance(value, Tensor) for value in given):
        return shared
    filters = shared.repeat(logits.shape[0], 1)
    for column, value in zip(Filter, given, strict=True):
        if isinstance(value, Tensor):
            filters[:, column] = value
    return filters


def _check_filter(op: str, logits: Tensor, column: Filter, value: Any) -> None:
    name = column.name.lower()
    expected, low, high = _RANGES[column]
    check_of_rows(op, name, value, ("logits", logits), expected, low, high, column is Filter.TOP_K)
    if column is not Filter.TEMPERATURE:
        return
    if isinstance(value, Tensor):
        if is_readable(value) and (tiny := value[(value > 0) & (value < _LEAST)]).numel():
            raise ValueError(f"{op}: {name} has {tiny[0].item()}, expected {expected} in each row")
    elif 0 < value < _LEAST:
        raise ValueError(f"{op}: {name} is {value}, expected {expected}")


def check_of_rows(
    op: str,
    name: str,
    value: Any,
    beside: tuple[str, Tensor],
    expected: str,
    low: float,
    high: float,
    is_integer: bool = False,
) -> None:
    """A number, or a tensor ``[]`` or ``[B]`` of them, of any dtype, for the rows of ``beside``, by name."""
    of, rows = beside
    if not isinstance(value, Tensor):
        if is_integer and not isinstance(value, int):
            raise TypeError(f"{op}: {name} is {type(value).__name__}, expected {expected}")
        check_number(op, name, value, expected, low, high)
        return
    if value.shape not in ((), rows.shape[:1]):
        raise ValueError(f"{op}: {name} has shape {list(value.shape)}, expected {[rows.shape[0]]} or []")
    if value.device != rows.device:
        raise ValueError(f"{op}: {name} is on {value.device}, expected {rows.device} as {of}")
    if value.dtype == torch.bool or value.is_complex() or (is_integer and value.is_floating_point()):
        raise TypeError(f"{op}: {name} has dtype {value.dtype}, expected {expected} in each row")
    if is_readable(value):
        wrong = value[~((value >= low) & (value <= high))]
        if wrong.numel():
            raise ValueError(f"{op}: {name} has {wrong.flatten()[0].item()}, expected {expected} in each row")


def _long_words(op: str, logits: Tensor, allowed: Tensor) -> Tensor:
    """Two words of 32 bits in one of 64."""
    check_tensor(op, "allowed", allowed, logits, (torch.int32,), None, "logits")
    width = -(-logits.shape[1] // _WORD)
    if allowed.dim() != 2 or allowed.shape[0] not in (1, logits.shape[0]) or allowed.shape[1] != width:
        expected = f"{[logits.shape[0], width]} or {[1, width]}"
        raise ValueError(f"{op}: allowed has shape {list(allowed.shape)}, expected {expected}")
    if width % 2:
        allowed = torch.nn.functional.pad(allowed, (0, 1))
    return allowed.contiguous().view(torch.int64)
