"""Probabilities of tokens: the logarithm of one, those of the largest made to sum to 1, and drafts held to them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmkern.reference import probabilities as reference
from mmkern.reference.decoding import NEUTRAL, Filter
from mmkern.reference.philox import philox
from mmkern.reference.probabilities import Kept

from ._checks import LARGEST, Arguments, accumulation_dtype, check_tensor, floating_rows, is_readable
from ._define import define, named
from ._outputs import like, rows_of, summed
from .decoding import check_of_rows, draw_tokens, raise_if_marked, seeds_of_rows

# ---- The logarithm of one --------------------------------------------------------------------------------------------


def _check_log_prob(op: str, args: Arguments) -> None:
    floating_rows("logits")(op, args)
    logits, tokens = args["logits"], args["tokens"]
    if logits.shape[-1] == 0:
        raise ValueError(f"{op}: logits has shape {list(logits.shape)}, expected [..., V] with V of at least 1")
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{op}: tokens is {type(tokens).__name__}, expected a Tensor")
    check_tensor(op, "tokens", tokens, logits, (torch.int64,), logits.shape[:-1], "logits")
    if is_readable(tokens):
        outside = (tokens < 0) | (tokens >= logits.shape[-1])
        if outside.any():
            most = logits.shape[-1] - 1
            raise ValueError(f"{op}: tokens has {int(tokens[outside][0])}, expected a token from 0 to {most}")


def _dense_tokens(args: Arguments) -> Arguments:
    return args | {"tokens": args["tokens"].contiguous()}


_token_log_prob = define(
    "token_log_prob(Tensor logits, Tensor tokens) -> (Tensor, Tensor, Tensor)",
    family="decoding",
    reference=reference.token_log_prob,
    output=(summed(rows_of(0)),) * 3,
    requires=[_check_log_prob],
    kinds={"tokens": "fixed"},
    arrange=_dense_tokens,
    autocast="keep",
    backward_reads_outputs=True,
    differentiable=1,
    is_checked_by_signature=False,
)


def token_log_prob(logits: Tensor, tokens: Tensor) -> Tensor:
    """``log softmax(logits)`` of one token a row, without the others in memory.

    Args:
        logits: ``[..., V]``.
        tokens: int64 ``[...]``, from 0 to V − 1.
    Returns: ``[...]``, in float32 (float64 beside that), with a gradient for logits; NaN where a logit is NaN or +∞, or
        all are −∞, and on a GPU, where tokens are not read, for one that is none.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: the usual definition, ``z_token − log Σ_j exp z_j``.
    """
    return named("token_log_prob", _token_log_prob, _token_log_prob, logits, tokens)[0]  # type: ignore[no-any-return]


# ---- Those of the largest --------------------------------------------------------------------------------------------


def _check_renormalize(op: str, args: Arguments) -> None:
    floating_rows("probs")(op, args)
    probs, filters = args["probs"], args["filters"]
    if probs.dim() != 2 or probs.shape[1] == 0:
        raise ValueError(f"{op}: probs has shape {list(probs.shape)}, expected [B, V] with V of at least 1")
    check_tensor(op, "filters", filters, probs, (accumulation_dtype(probs.dtype),), None, "probs")
    if filters.shape not in ((1, len(Kept)), (probs.shape[0], len(Kept))):
        raise ValueError(f"{op}: filters has shape {list(filters.shape)}, expected {[probs.shape[0], len(Kept)]}")


_renormalize = define(
    "renormalize(Tensor probs, Tensor filters) -> Tensor",
    family="decoding",
    reference=reference.renormalize,
    output=like(0),
    requires=[_check_renormalize],
    kinds={"filters": "fixed"},
    autocast="keep",
)


def renormalize_top_k(probs: Tensor, top_k: int | Tensor) -> Tensor:
    """``p_i / Σ_kept p`` of the k largest of each row, 0 of the others; of equal ones the lower index is the larger.

    Args:
        probs: ``[B, V]``, at least 0; they need not sum to 1.
        top_k: at least 1, one for all rows, or integers ``[B]``, one for each.
    Returns: as ``probs``, with a gradient for them. A row with NaN, ∞ or less than 0, or whose sum is 0, has no result:
        on the CPU that raises, on a GPU, where raising would wait, it is NaN.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Fan et al. 2018 (top-k).
    """
    return _renormalized("renormalize_top_k", probs, Kept.TOP_K, top_k)


def renormalize_top_p(probs: Tensor, top_p: float | Tensor) -> Tensor:
    """``p_i / Σ_kept p`` of the fewest of each row whose sum is ``top_p`` of all, the largest first, 0 of the others.

    Args:
        probs: as in :func:`renormalize_top_k`.
        top_p: from 0 to 1, one for all rows, or ``[B]``, one for each; one token is kept in any case.
    Returns, raises: as :func:`renormalize_top_k`.
    Source: Holtzman et al. 2020 (top-p).
    """
    return _renormalized("renormalize_top_p", probs, Kept.TOP_P, top_p)


_RANGES = {
    Kept.TOP_K: ("an int of at least 1", 1, LARGEST, True),
    Kept.TOP_P: ("a number from 0 to 1", 0.0, 1.0, False),
}


def _renormalized(op: str, probs: Tensor, column: Kept, value: float | Tensor) -> Tensor:
    floating_rows("probs")(op, {"probs": probs})
    if probs.dim() != 2:
        raise ValueError(f"{op}: probs has shape {list(probs.shape)}, expected [B, V]")
    check_of_rows(op, column.name.lower(), value, ("probs", probs), *_RANGES[column])
    neutral = {Kept.TOP_K: torch.inf, Kept.TOP_P: 1.0}
    filters = torch.tensor(
        [[neutral[each] for each in Kept]], dtype=accumulation_dtype(probs.dtype), device=probs.device
    )
    if isinstance(value, Tensor):
        filters = filters.repeat(probs.shape[0], 1)
    filters[:, column] = value
    found: Tensor = named(op, _renormalize, _renormalize, probs, filters)
    if probs.is_cpu and is_readable(found) and (is_bad := found.detach()[:, 0].isnan()).any():
        rows = torch.nonzero(is_bad).flatten().tolist()
        raise ValueError(f"{op}: probs has no sum in rows {rows[:8]}: NaN, infinite or negative numbers, or only zeros")
    return found


# ---- Drafts ----------------------------------------------------------------------------------------------------------


class Verified(NamedTuple):
    """Of each request the tokens, −1 behind the last, and how many they are."""

    tokens: Tensor
    lengths: Tensor


def verify_draft_tokens(
    target_probs: Tensor,
    draft_probs: Tensor | None,
    draft_tokens: Tensor,
    *,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    errors: Literal["raise", "mark"] | None = None,
) -> Verified:
    """The tokens of a draft that a larger model takes, and one of its own: speculative sampling, exact in distribution.

    Token i is taken with probability ``min(1, p_i / q_i)``, p the target's probability of it and q the draft's. At the
    first that is not, a token is drawn from ``max(p − q, 0)``, made to sum to 1; after the last one that is, from p. So
    each is distributed as the target alone would have it.

    Args:
        target_probs: p ``[B, S + 1, V]``, after temperature and filters.
        draft_probs: q ``[B, S, V]``, by which the tokens were drawn; or None: they were not drawn, but chosen (q is 1).
        draft_tokens: int64 ``[B, S]``.
        generator, seed, offset: where a seed comes from, as in ``sample_tokens``, with a key for all or ``[B]``. Token
            j of request b is drawn with the word that ``sample_tokens`` would take; behind the n counters of all
            requests token i is taken or not by word ``i mod 4`` of counter ``offset + n + b·⌈S/4⌉ + ⌊i/4⌋``. With a key
            of its own a request counts as the only one.
        errors: as in ``sample_tokens``, of the row that a token is drawn from.
    Returns: tokens ``[B, S + 1]``, −1 behind the last, and lengths ``[B]`` from 1 to S + 1, in int64. No gradient.
    Raises: TypeError or ValueError where an argument does not fit, with its name; ValueError where a row has no token.
    Source: Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2.
    """
    op = "verify_draft_tokens"
    _check_drafts(op, target_probs, draft_probs, draft_tokens)
    if errors not in (None, "raise", "mark"):
        raise ValueError(f'{op}: errors is {errors!r}, expected "raise" or "mark"')
    with torch.no_grad():
        batch, drafts = draft_tokens.shape
        size = target_probs.shape[-1]
        seeds = seeds_of_rows(op, target_probs[:, 0], generator, seed, offset)
        p = _of_tokens(target_probs[:, :drafts], draft_tokens)
        q = torch.ones_like(p) if draft_probs is None else _of_tokens(draft_probs, draft_tokens)
        is_taken = _uniform(seeds, batch, drafts, size) * q.double() < p.double()
        taken = is_taken.long().cumprod(1).sum(1)
        logits = _left(target_probs, draft_probs, draft_tokens, taken).log()
        own = _drawn(op, logits, seeds, errors)
        place = torch.arange(drafts + 1, device=taken.device)
        tokens = torch.nn.functional.pad(draft_tokens, (0, 1)).where(place < taken[:, None], -1)
        return Verified(tokens.scatter(1, taken[:, None], own[:, None]), taken + 1)


def _check_drafts(op: str, target: Any, draft: Any, tokens: Any) -> None:
    floating_rows("target_probs")(op, {"target_probs": target})
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{op}: draft_tokens is {type(tokens).__name__}, expected a Tensor")
    if target.dim() != 3 or target.shape[1] == 0 or target.shape[2] == 0:
        raise ValueError(f"{op}: target_probs has shape {list(target.shape)}, expected [B, S + 1, V], V at least 1")
    batch, rows, size = target.shape
    check_tensor(op, "draft_tokens", tokens, target, (torch.int64,), (batch, rows - 1), "target_probs")
    check_tensor(op, "draft_probs", draft, target, (target.dtype,), (batch, rows - 1, size), "target_probs")
    if is_readable(tokens):
        outside = (tokens < 0) | (tokens >= size)
        if outside.any():
            raise ValueError(f"{op}: draft_tokens has {int(tokens[outside][0])}, expected a token from 0 to {size - 1}")


def _of_tokens(probs: Tensor, tokens: Tensor) -> Tensor:
    """On a GPU a token that is none has probability 0."""
    is_token = (tokens >= 0) & (tokens < probs.shape[-1])
    return probs.gather(-1, tokens.where(is_token, 0)[..., None]).squeeze(-1).where(is_token, 0.0)


def _uniform(seeds: Tensor, batch: int, drafts: int, size: int) -> Tensor:
    """``[batch, drafts]``, above 0 and below 1, in float64."""
    fours, of_row = -(-drafts // 4), -(-size // 4)
    counters = seeds[:, 1:] + torch.arange(fours, device=seeds.device)
    if len(seeds) == 1:
        counters = counters + batch * of_row + fours * torch.arange(batch, device=seeds.device)[:, None]
    else:
        counters = counters + of_row
    words = philox(seeds[:, :1], counters).flatten(-2)[:, :drafts]
    return (words.double() + 0.5) * 2.0**-32


def _left(target: Tensor, draft: Tensor | None, tokens: Tensor, taken: Tensor) -> Tensor:
    """``[B, V]``: what a token of one's own is drawn from; the target's row where rounding has left nothing."""
    drafts = tokens.shape[1]
    index = taken[:, None, None].expand(-1, -1, target.shape[-1])
    p = target.gather(1, index)[:, 0].to(accumulation_dtype(target.dtype))
    if drafts == 0:
        return p
    at = taken.clamp_max(drafts - 1)
    if draft is None:
        rest = p.scatter(1, tokens.gather(1, at[:, None]).clamp(0, p.shape[1] - 1), 0.0)
    else:
        rest = (p - draft.gather(1, index.clamp_max(drafts - 1))[:, 0]).clamp_min(0)
    is_all = (taken == drafts)[:, None] | (rest == 0).all(1, keepdim=True)
    return p.where(is_all, rest)


def _drawn(op: str, logits: Tensor, seeds: Tensor, errors: str | None) -> Tensor:
    neutral = logits.new_tensor([[NEUTRAL[column] for column in Filter]])
    tokens = draw_tokens(logits, seeds, neutral, None, None)[1]
    if errors == "raise" or (errors is None and logits.is_cpu):
        raise_if_marked(op, "target_probs", tokens < 0, "nothing above 0")
    return tokens
