"""Probabilities of tokens: the numerics contract, what is kept, drafts held against a target, and use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkern import ops
from mmkern.ops._define import OPS
from mmkern.reference import probabilities as reference
from tests import contract
from tests.cases.case import Case
from tests.cases.probabilities import BEYOND, CASES, LOG_PROB
from tests.draws import chi_square

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_IN_EACH = ("3x111", "mixed", "sliced", "columns", "a filter a row", "both, ties", "odd")
RUNS = [(case, dtype) for case in CASES for dtype in DTYPES if dtype == torch.float32 or case.label in _IN_EACH]
# Of a float64 result there is no better oracle than the formula itself.
GRADIENTS = [(case, dtype) for case, dtype in RUNS if case.op == LOG_PROB or dtype == torch.float32]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_forward(case, OPS[case.op], dtype, device)


@pytest.mark.parametrize(("case", "dtype"), GRADIENTS, ids=str)
def test_backward(case: Case, dtype: torch.dtype, device: str) -> None:
    def run(*args: Any) -> Any:
        return OPS[case.op](args[0], *(a.detach() for a in args[1:]))

    contract.check_backward(case, contract.by_autograd(run), dtype, device)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.label in ("3x111", "2x3x40", "both, ties", "a filter a row")], ids=str
)
def test_opcheck(case: Case) -> None:
    x, *given = case.arguments(torch.float32)
    torch.library.opcheck(getattr(torch.ops.mmkern, case.op).default, (x.requires_grad_(), *given))


# ---- The logarithm of one --------------------------------------------------------------------------------------------


def test_gradcheck() -> None:
    logits, tokens = torch.randn(3, 4, 9, dtype=torch.float64).requires_grad_(), torch.randint(9, (3, 4))
    torch.autograd.gradcheck(lambda x: ops.token_log_prob(x, tokens), (logits,))
    torch.autograd.gradgradcheck(lambda x: ops.token_log_prob(x, tokens), (logits,))


def test_it_is_what_a_draw_says() -> None:
    logits = torch.randn(20, 300)
    tokens, log_probs = ops.sample_tokens(logits, return_log_prob=True)
    torch.testing.assert_close(ops.token_log_prob(logits, tokens), log_probs)


def test_nothing_is_saved_but_the_logits() -> None:
    logits, tokens = torch.randn(40, 300).requires_grad_(), torch.randint(300, (40,))
    saved = contract.saved_bytes(lambda: ops.token_log_prob(logits, tokens))
    assert sum(n >= logits.nbytes for n in saved) == 1


def test_a_token_that_is_none() -> None:
    """A kernel, which cannot raise, gives NaN, and no gradient."""
    logits, tokens = BEYOND.arguments(torch.float32)
    with pytest.raises(ValueError, match="token_log_prob: tokens has -1, expected a token from 0 to 59"):
        ops.token_log_prob(logits, tokens)
    kernels = __import__("mmkern._C")._C
    outs, gradient = OPS[LOG_PROB].empty_outputs([logits, tokens]), torch.empty_like(logits)
    kernels.token_log_prob(logits, tokens, *outs, 1)
    kernels.token_log_prob_backward(torch.ones(4), logits, tokens, *outs, gradient, 1)
    for mine, theirs in zip(outs, reference.token_log_prob(logits, tokens), strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)
    assert (gradient[:2] == 0).all()
    assert (gradient[2:] != 0).all()


# ---- Those of the largest --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_what_is_kept(ties: bool) -> None:
    g = torch.Generator().manual_seed(0)
    for trial in range(60):
        p = torch.randn(4, 80, generator=g, dtype=torch.float64)
        p = (p.round() if ties else p).softmax(-1)
        k, share = 1 + trial % 80, trial / 60
        by_k, by_p = ops.renormalize_top_k(p, k), ops.renormalize_top_p(p, share)
        for b, row in enumerate(p.tolist()):
            order = sorted(range(80), key=lambda i, row=row: (-row[i], i))
            until = next(n for n in range(1, 81) if math.fsum(row[i] for i in order[:n]) >= share * math.fsum(row))
            for found, kept in ((by_k[b], order[:k]), (by_p[b], order[:until])):
                total = math.fsum(row[i] for i in kept)
                expected = [row[i] / total if i in set(kept) else 0.0 for i in range(80)]
                torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_a_number_for_each_row() -> None:
    p = torch.rand(3, 20)
    found = ops.renormalize_top_k(p, torch.tensor([1, 5, 20]))
    assert (found > 0).sum(1).tolist() == [1, 5, 20]
    torch.testing.assert_close(found.sum(1), torch.ones(3))
    found = ops.renormalize_top_p(p, torch.tensor([0.0, 1.0, 0.5]))
    assert (found[:2] > 0).sum(1).tolist() == [1, 20]
    torch.testing.assert_close(found[2:], ops.renormalize_top_p(p[2:], 0.5))


def test_gradients_of_what_is_kept() -> None:
    p = torch.rand(3, 9, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda p: ops.renormalize_top_k(p, 4), (p,))
    torch.autograd.gradcheck(lambda p: ops.renormalize_top_p(p, 0.6), (p,))


# ---- Drafts ----------------------------------------------------------------------------------------------------------


def _softmax(g: torch.Generator, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=g).softmax(-1)


@pytest.mark.parametrize("is_drawn", [True, False], ids=["drawn", "chosen"])
def test_tokens_come_as_the_target_alone_would_have_them(is_drawn: bool) -> None:
    """The first token of 1e6 requests, and the second of those that took the first."""
    requests, size = 1_000_000, 7
    g = torch.Generator().manual_seed(1)
    p, q = _softmax(g, 1, 3, size), _softmax(g, 1, 2, size)
    drafts = torch.multinomial(q[0], requests, replacement=True, generator=g).T if is_drawn else torch.full((1, 2), 3)
    drafts = drafts.expand(requests, -1)
    target, draft = p.expand(requests, -1, -1), q.expand(requests, -1, -1) if is_drawn else None
    tokens, lengths = ops.verify_draft_tokens(target, draft, drafts, seed=4)
    for i in range(3):
        reached = tokens[lengths > i, i]
        assert len(reached) > 10_000
        assert chi_square(reached.bincount(minlength=size), p[0, i].double()) > 1e-3


def test_what_is_taken_is_the_draft_and_what_follows_is_not() -> None:
    g = torch.Generator().manual_seed(2)
    p, q, drafts = _softmax(g, 500, 5, 40), _softmax(g, 500, 4, 40), torch.randint(40, (500, 4), generator=g)
    tokens, lengths = ops.verify_draft_tokens(p, q, drafts, seed=1)
    place = torch.arange(5)
    taken = place[:4] < lengths[:, None] - 1
    assert torch.equal(tokens[:, :4][taken], drafts[taken])
    assert (tokens[place >= lengths[:, None]] == -1).all()
    own = tokens.gather(1, lengths[:, None] - 1)[:, 0]
    assert ((own >= 0) & (own < 40)).all()
    refused = lengths < 5
    at = lengths[refused] - 1
    rest = p[refused, at] - q[refused, at]
    assert (rest.gather(1, own[refused, None]) > 0).all()
    assert len(set(lengths.tolist())) == 5


def test_a_draft_like_the_target_is_taken_whole() -> None:
    p = torch.randn(50, 4, 30).softmax(-1)
    drafts = torch.multinomial(p[:, :3].flatten(0, 1), 1).view(50, 3)
    tokens, lengths = ops.verify_draft_tokens(p, p[:, :3], drafts)
    assert (lengths == 4).all()
    assert torch.equal(tokens[:, :3], drafts)


def test_a_request_with_a_key_of_its_own_is_verified_as_it_would_be_alone() -> None:
    g = torch.Generator().manual_seed(3)
    p, q, drafts = _softmax(g, 30, 4, 20), _softmax(g, 30, 3, 20), torch.randint(20, (30, 3), generator=g)
    together = ops.verify_draft_tokens(p, q, drafts, seed=torch.arange(30), offset=9)
    for b in range(30):
        alone = ops.verify_draft_tokens(p[b : b + 1], q[b : b + 1], drafts[b : b + 1], seed=b, offset=9)
        assert torch.equal(alone.tokens[0], together.tokens[b])


def test_no_drafts_and_no_requests() -> None:
    p = torch.randn(3, 1, 9).softmax(-1)
    tokens, lengths = ops.verify_draft_tokens(p, None, torch.zeros(3, 0).long(), seed=2)
    assert tokens.shape == (3, 1)
    assert (lengths == 1).all()
    assert ops.verify_draft_tokens(p[:0], None, torch.zeros(0, 0).long()).tokens.shape == (0, 1)


def test_rows_without_a_token() -> None:
    p = torch.full((2, 2, 3), 1 / 3)
    p[0, 0] = torch.nan
    tokens, lengths = ops.verify_draft_tokens(p, p[:, :1].nan_to_num(0.5), torch.ones(2, 1).long(), errors="mark")
    assert tokens[0].tolist() == [-1, -1]
    assert lengths[0] == 1
    with pytest.raises(ValueError, match="verify_draft_tokens: target_probs has no token to choose in rows 0: NaN"):
        ops.verify_draft_tokens(p, None, torch.ones(2, 1).long())


_X, _P = torch.zeros(2, 9), torch.full((2, 3, 9), 1 / 9)
_D = torch.zeros(2, 2).long()
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.token_log_prob([1.0], _D), TypeError, "token_log_prob: logits is list, expected a Tensor"),  # type: ignore[arg-type]
    (lambda: ops.token_log_prob(_X, 3), TypeError, "token_log_prob: tokens is int, expected a Tensor"),  # type: ignore[arg-type]
    (lambda: ops.token_log_prob(_X, _D), ValueError, r"token_log_prob: tokens has shape \[2, 2\], expected \[2\]"),
    (lambda: ops.token_log_prob(_X, _D[0].int()), TypeError, "token_log_prob: tokens has dtype torch.int32, expected"),
    (lambda: ops.token_log_prob(_X, _D[0] + 9), ValueError, "token_log_prob: tokens has 9, expected a token from 0 to"),
    (lambda: ops.token_log_prob(_X[:, :0], _D[0]), ValueError, r"token_log_prob: logits has shape \[2, 0\]"),
    (lambda: ops.renormalize_top_k(_X, 0), ValueError, "renormalize_top_k: top_k is 0, expected an int of at least 1"),
    (lambda: ops.renormalize_top_k(_X, 1.0), TypeError, "renormalize_top_k: top_k is float, expected an int"),  # type: ignore[arg-type]
    (lambda: ops.renormalize_top_k(_X, 3), ValueError, r"renormalize_top_k: probs has no sum in rows \[0, 1\]: NaN"),
    (lambda: ops.renormalize_top_k(_X[0], 3), ValueError, r"renormalize_top_k: probs has shape \[9\], expected \[B, V"),
    (lambda: ops.renormalize_top_k(_X.int(), 3), TypeError, "renormalize_top_k: probs has dtype torch.int32"),
    (lambda: ops.renormalize_top_p(_X + 1, 1.5), ValueError, "renormalize_top_p: top_p is 1.5, expected a number from"),
    (
        lambda: ops.renormalize_top_p(_X + 1, torch.tensor([0.5, -1])),
        ValueError,
        "renormalize_top_p: top_p has -1.0, expected a number from 0 to 1 in each row",
    ),
    (
        lambda: ops.renormalize_top_p(_X + 1, torch.ones(3)),
        ValueError,
        r"renormalize_top_p: top_p has shape \[3\], expected \[2\] or \[\]",
    ),
    (
        lambda: ops.verify_draft_tokens([1.0], None, _D),  # type: ignore[arg-type]
        TypeError,
        "verify_draft_tokens: target_probs is list, expected a Tensor",
    ),
    (
        lambda: ops.verify_draft_tokens(_P[0], None, _D),
        ValueError,
        r"verify_draft_tokens: target_probs has shape \[3, 9\], expected \[B, S \+ 1, V\]",
    ),
    (
        lambda: ops.verify_draft_tokens(_P, _P, _D),
        ValueError,
        r"verify_draft_tokens: draft_probs has shape \[2, 3, 9\], expected \[2, 2, 9\]",
    ),
    (
        lambda: ops.verify_draft_tokens(_P, None, _D[:, :1]),
        ValueError,
        r"verify_draft_tokens: draft_tokens has shape \[2, 1\], expected \[2, 2\]",
    ),
    (
        lambda: ops.verify_draft_tokens(_P, None, _D + 9),
        ValueError,
        "verify_draft_tokens: draft_tokens has 9, expected a token from 0 to 8",
    ),
    (
        lambda: ops.verify_draft_tokens(_P, None, 3),  # type: ignore[arg-type]
        TypeError,
        "verify_draft_tokens: draft_tokens is int, expected a Tensor",
    ),
    (
        lambda: ops.verify_draft_tokens(_P, None, _D, errors="ignore"),  # type: ignore[arg-type]
        ValueError,
        "verify_draft_tokens: errors is 'ignore', expected",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_compiled() -> None:
    logits, tokens = torch.randn(4, 30), torch.randint(30, (4,))
    p, q, drafts = torch.rand(4, 3, 30), torch.rand(4, 2, 30), torch.randint(30, (4, 2))

    def run(logits: Tensor, p: Tensor, seed: Tensor) -> Any:
        log_probs = ops.token_log_prob(logits, tokens)
        kept = ops.renormalize_top_p(ops.renormalize_top_k(logits.softmax(-1), 7), 0.8)
        return log_probs, kept, *ops.verify_draft_tokens(p, q, drafts, seed=seed)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(compiled(logits, p, torch.tensor(3)), run(logits, p, torch.tensor(3)), strict=True):
        assert torch.equal(mine, theirs)
