"""The decoding family: the numerics contract, what is kept of a row, the statistics of what is drawn, and use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmkern import ops
from mmkern.ops._define import OPS
from mmkern.reference import decoding as reference
from mmkern.reference.decoding import Filter
from tests import contract
from tests.cases.case import Case
from tests.cases.decoding import CASES, row_of_filters
from tests.draws import chi_square

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RUNS = [
    (case, dtype)
    for case in CASES
    for dtype in DTYPES
    if dtype == torch.float32 or case.label in ("3x111", "3x111, all", "all, mixed", "strided", "a request a row")
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    _, tokens = contract.check_forward(case, OPS[case.op], dtype, device)
    logits, *given = case.arguments(dtype, device)
    _, expected = reference.sample_tokens(logits, *given)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("case", [c for c in CASES if "mixed" not in c.label and "0x" not in c.label], ids=str)
def test_backward(case: Case, device: str) -> None:
    def run(*args: Any) -> Any:
        return OPS[case.op](args[0], *(a.detach() if isinstance(a, Tensor) else a for a in args[1:]))

    contract.check_backward(case, contract.by_autograd(run), torch.float32, device)


@pytest.mark.parametrize("case", [c for c in CASES if c.label in ("3x111, all", "a request a row")], ids=str)
def test_opcheck(case: Case) -> None:
    logits, *given = case.arguments(torch.float32)
    torch.library.opcheck(torch.ops.mmkern.sample_tokens.default, (logits.requires_grad_(), *given))


# ---- What is kept ----------------------------------------------------------------------------------------------------


def kept(row: list[float], top_k: int, top_p: float, min_p: float, typical_p: float) -> set[int]:
    """The tokens that are left, as the definitions say it, one after another."""

    def probabilities(tokens: list[int]) -> dict[int, float]:
        top = max(row[t] for t in tokens)
        weights = {t: math.exp(row[t] - top) for t in tokens}
        return {t: w / math.fsum(weights.values()) for t, w in weights.items()}

    def until(tokens: list[int], p: dict[int, float], least: float) -> list[int]:
        found: list[int] = []
        for t in tokens:
            if found and least < 1 and math.fsum(p[f] for f in found) >= least:
                break
            found.append(t)
        return found

    left = sorted((t for t in range(len(row)) if row[t] > -math.inf), key=lambda t: (-row[t], t))[:top_k]
    left = until(left, probabilities(left), top_p)
    p = probabilities(left)
    left = [t for t in left if p[t] >= min_p * p[left[0]]]
    p = probabilities(left)
    entropy = -math.fsum(q * math.log(q) for q in p.values() if q > 0)
    return set(until(sorted(left, key=lambda t: (abs(-math.log(p[t]) - entropy), t)), p, typical_p))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7, 111])
def test_what_is_kept(size: int, ties: bool) -> None:
    g = torch.Generator().manual_seed(size)
    for trial in range(60):
        row = 2 * torch.randn(size, generator=g, dtype=torch.float64)
        if ties:
            row = row.round()
        row[torch.rand(size, generator=g) < 0.1] = -torch.inf
        row[0] = 0.25
        share = torch.rand(4, generator=g).tolist()
        asked: dict[str, Any] = {
            "top_k": 1 + int(share[0] * size) if trial % 2 else size,
            "top_p": share[1] if trial % 3 else 1.0,
            "min_p": share[2] * 0.3 if trial % 5 else 0.0,
            "typical_p": share[3] if trial % 7 else 1.0,
        }
        filters = row_of_filters({Filter[name.upper()]: value for name, value in asked.items()})
        found = reference.kept_logits(row[None], torch.tensor([filters], dtype=torch.float64))[0]
        assert set(torch.nonzero(found > -torch.inf).flatten().tolist()) == kept(row.tolist(), **asked), asked
        assert torch.equal(found[found > -torch.inf], row[found > -torch.inf])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "asked", [{"top_k": 700}, {"top_k": 40}, {"top_p": 0.9}, {"typical_p": 0.6}, {"top_k": 900, "top_p": 0.5}], ids=str
)
def test_the_kept_set_is_that_of_a_sort_in_float64(asked: dict[str, Any], ties: bool) -> None:
    """With as many draws as it takes for each token of a flat row to come up."""
    g = torch.Generator().manual_seed(len(str(asked)))
    row = torch.randn(1500, generator=g)
    row = row.round() if ties else row
    tokens = ops.sample_tokens(row.expand(60_000, -1), seed=3, temperature=4.0, **asked)
    filters = row_of_filters({Filter[name.upper()]: value for name, value in asked.items()} | {Filter.TEMPERATURE: 4.0})
    is_kept = reference.kept_logits(row[None].double(), torch.tensor([filters], dtype=torch.float64))[0] > -torch.inf
    assert torch.equal(torch.bincount(tokens, minlength=1500) > 0, is_kept)


# ---- What is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"top_k": 4}, {"top_p": 0.8}, {"temperature": 0.6}], ids=str)
@pytest.mark.parametrize("size", [7, 111])
def test_tokens_come_as_often_as_they_should(size: int, given: dict[str, Any]) -> None:
    row = torch.randn(size, generator=torch.Generator().manual_seed(3))
    tokens, log_probs = ops.sample_tokens(row.expand(1_000_000, -1), seed=5, return_log_prob=True, **given)
    filters = row_of_filters({Filter[name.upper()]: value for name, value in given.items()})
    p = reference.kept_logits(row[None].double(), torch.tensor([filters], dtype=torch.float64))[0].softmax(0)
    assert chi_square(tokens.bincount(minlength=size), p) > 1e-3
    torch.testing.assert_close(log_probs.double(), p.log()[tokens])


def test_tokens_of_a_large_vocabulary_come_as_often_as_they_should() -> None:
    row = 3 * torch.randn(32000, generator=torch.Generator().manual_seed(3))
    counts = torch.zeros(32000, dtype=torch.int64)
    for seed in range(100):
        counts += ops.sample_tokens(row.expand(200, -1), seed=seed).bincount(minlength=32000)
    assert chi_square(counts, row.double().softmax(0)) > 1e-3


def test_few_tokens_are_told_apart_by_rounding() -> None:
    """The same tokens as by the reference, but for one in 1e5."""
    logits = 2 * torch.randn(20_000, 50, generator=torch.Generator().manual_seed(1))
    filters = torch.tensor([row_of_filters({Filter.TOP_P: 0.95})])
    differing = 0
    for seed in range(5):
        _, expected = reference.sample_tokens(logits, torch.tensor([[seed, 0]]), filters)
        differing += int((ops.sample_tokens(logits, seed=seed, top_p=0.95) != expected).sum())  # type: ignore[attr-defined]
    assert differing <= 1


def test_a_row_with_a_key_of_its_own_draws_as_it_would_alone() -> None:
    logits, seeds = torch.randn(40, 9), torch.arange(40)
    together = ops.sample_tokens(logits, seed=seeds, offset=7)
    alone = [ops.sample_tokens(row[None], seed=int(seed), offset=7) for row, seed in zip(logits, seeds, strict=True)]
    assert torch.equal(together, torch.cat(alone))  # type: ignore[arg-type]
    assert not torch.equal(together, ops.sample_tokens(logits, seed=seeds, offset=8))  # type: ignore[arg-type]


def test_the_tokens_do_not_hang_on_threads() -> None:
    logits = torch.randn(300, 500)
    tokens = ops.sample_tokens(logits, seed=3)
    with torch.profiler.profile():  # the long way
        assert torch.equal(ops.sample_tokens(logits, seed=3), tokens)  # type: ignore[arg-type]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.sample_tokens(logits, seed=3), tokens)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)


# ---- Use -------------------------------------------------------------------------------------------------------------


def test_penalties_and_what_is_allowed() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 3.0, 1.0]])
    filters = torch.tensor([row_of_filters({Filter.REPETITION_PENALTY: 2.0})])
    found = reference.kept_logits(logits, filters, torch.tensor([[3, 1, 3, -1, 9]]), torch.tensor([[0b01111]]))
    assert found.tolist() == [[2.0, -2.0, 0.5, 1.5, -math.inf]]


def test_what_is_allowed_by_words_of_32_bits() -> None:
    logits = torch.zeros(2, 70)
    allowed = torch.zeros(2, 3, dtype=torch.int32)
    allowed[0, 1], allowed[1, 0], allowed[1, 2] = 1 << 5, -(2**31), 1 << 3
    tokens = torch.stack([ops.sample_tokens(logits, allowed=allowed, seed=seed) for seed in range(40)])  # type: ignore[arg-type]
    assert set(tokens[:, 0].tolist()) == {37}
    assert set(tokens[:, 1].tolist()) == {31, 67}


def test_the_largest_at_temperature_0_and_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0], [-5.0, -4.0, -torch.inf, -4.0]])
    tokens, log_probs = ops.sample_tokens(logits, temperature=0.0, return_log_prob=True)
    assert tokens.tolist() == [1, 1]
    torch.testing.assert_close(log_probs, logits.log_softmax(-1)[:, 1])


def test_a_number_for_each_request() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    tokens = ops.sample_tokens(
        logits, temperature=torch.tensor([0.0, 1.0, 0.0]), top_k=torch.tensor([50, 1, 7]), top_p=torch.tensor(0.5)
    )
    assert torch.equal(tokens, logits.argmax(-1))  # type: ignore[arg-type]


def test_a_tracer_leaves_nothing_behind() -> None:
    with FakeTensorMode():
        tokens = ops.sample_tokens(torch.empty(3, 9), top_k=4, seed=1)
    assert tokens.shape == (3,)  # type: ignore[union-attr]
    assert ops.sample_tokens(torch.zeros(3, 9), top_k=4, seed=1).max() < 4  # type: ignore[union-attr]


def test_rows_without_a_token() -> None:
    logits = torch.zeros(4, 3)
    logits[0, 1], logits[1, 2], logits[2] = torch.nan, torch.inf, -torch.inf
    tokens, log_probs = ops.sample_tokens(logits, errors="mark", return_log_prob=True)
    assert tokens[:3].tolist() == [-1, -1, -1]
    assert log_probs[:3].isnan().all()
    assert tokens[3] >= 0
    with pytest.raises(ValueError, match=r"sample_tokens: logits has no token to choose in rows 0, 1, 2: NaN, \+inf"):
        ops.sample_tokens(logits)


_X = torch.zeros(2, 40)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.sample_tokens([1.0]), TypeError, "logits is list, expected a Tensor"),  # type: ignore[arg-type]
    (lambda: ops.sample_tokens(_X[0]), ValueError, r"logits has shape \[40\], expected \[B, V\]"),
    (lambda: ops.sample_tokens(_X[:, :0]), ValueError, r"logits has shape \[2, 0\], expected \[B, V\] with V of at"),
    (lambda: ops.sample_tokens(_X.int()), TypeError, "logits has dtype torch.int32"),
    (lambda: ops.sample_tokens(_X, temperature=-1.0), ValueError, "temperature is -1.0, expected 0, or a number of at"),
    (lambda: ops.sample_tokens(_X, temperature=1e-40), ValueError, "temperature is 1e-40, expected 0, or"),
    (lambda: ops.sample_tokens(_X, top_k=0), ValueError, "top_k is 0, expected an int of at least 1"),
    (lambda: ops.sample_tokens(_X, top_k=2.0), TypeError, "top_k is float, expected an int"),  # type: ignore[arg-type]
    (lambda: ops.sample_tokens(_X, top_p=1.5), ValueError, "top_p is 1.5, expected a number from 0 to 1"),
    (lambda: ops.sample_tokens(_X, min_p=math.nan), ValueError, "min_p is nan, expected a number from 0 to 1"),
    (lambda: ops.sample_tokens(_X, typical_p=torch.ones(3)), ValueError, r"typical_p has shape \[3\], expected \[2\]"),
    (lambda: ops.sample_tokens(_X, top_p=torch.tensor([0.5, 2])), ValueError, "top_p has 2.0, expected a number from"),
    (lambda: ops.sample_tokens(_X, top_k=torch.ones(2)), TypeError, "top_k has dtype torch.float32, expected an int"),
    (lambda: ops.sample_tokens(_X, repetition_penalty=2.0), ValueError, "history and repetition_penalty come together"),
    (
        lambda: ops.sample_tokens(_X, repetition_penalty=2.0, history=torch.zeros(3, 4).long()),
        ValueError,
        r"history has shape \[3, 4\], expected \[2, H\] or \[1, H\]",
    ),
    (
        lambda: ops.sample_tokens(_X, allowed=torch.ones(2, 1).int()),
        ValueError,
        r"allowed has shape \[2, 1\], expected \[2, 2\] or \[1, 2\]",
    ),
    (lambda: ops.sample_tokens(_X, allowed=torch.ones(2, 40).bool()), TypeError, "allowed has dtype torch.bool"),
    (lambda: ops.sample_tokens(_X, seed=torch.zeros(3).long()), ValueError, r"seed has shape \[3\], expected \[2\]"),
    (lambda: ops.sample_tokens(_X, seed=1, generator=torch.Generator()), ValueError, "got generator and seed"),
    (lambda: ops.sample_tokens(_X, errors="ignore"), ValueError, "errors is 'ignore', expected \"raise\" or"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"sample_tokens: {message}"):
        call()
