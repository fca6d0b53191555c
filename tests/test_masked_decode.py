"""Masked iterative decoding: the numerics contract, what is drawn and masked again, a loop, and a detector's gate."""

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
from mmkern.reference import masked_decode as reference
from mmkern.reference.decoding import exponential
from tests import contract
from tests.cases.case import Case
from tests.cases.masked_decode import CASES, STEP
from tests.draws import chi_square

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_IN_EACH = ("2x3x7x111, MaskGCT", "odd", "sliced", "columns", "settings and a count each")
RUNS = [(case, dtype) for case in CASES for dtype in DTYPES if dtype == torch.float32 or case.label in _IN_EACH]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    found = contract.check_forward(case, OPS[case.op], dtype, device)
    expected = OPS[case.op].reference(*case.arguments(dtype, device))
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])


@pytest.mark.parametrize("case", [c for c in CASES if c.label in ("3x9x40, MaskGCT", "sliced", "rows inside")], ids=str)
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(getattr(torch.ops.mmkern, STEP).default, tuple(case.arguments(torch.float32)))


# ---- What is drawn and masked again ----------------------------------------------------------------------------------


def test_a_step_as_it_is_written() -> None:
    """The formulas one after another, as the papers have them."""
    g = torch.Generator().manual_seed(0)
    batch, length, size, key, offset = 3, 40, 30, 11, 5
    logits = torch.randn(batch, length, size, generator=g, dtype=torch.float64)
    masked = torch.rand(batch, length, generator=g) < 0.6
    tokens = torch.randint(size, (batch, length), generator=g).masked_fill(masked, size)
    ratio, top_k, temperature, noise = 0.3, 7, 0.9, 0.4
    found = ops.masked_decode_step(
        logits, tokens, masked, ratio=ratio, keep_top_k=top_k, temperature=temperature, confidence_noise=noise,
        seed=key, offset=offset,
    )  # fmt: skip

    kept = torch.full_like(logits, -torch.inf).scatter(-1, *reversed(logits.topk(top_k)))
    race = exponential(torch.tensor([[key, offset]]), batch * length, size, torch.float64).view_as(logits)
    drawn = ((kept / temperature).softmax(-1) / race).argmax(-1)
    p = kept.softmax(-1).gather(-1, drawn[..., None]).squeeze(-1)
    after = torch.tensor([[key, offset + batch * length * 8]])
    score = p - noise * exponential(after, 1, batch * length, torch.float64).view_as(p).log()
    for b in range(batch):
        order = sorted(torch.nonzero(masked[b]).flatten().tolist(), key=lambda i, b=b: float(score[b, i]))
        again = set(order[: int(ratio * length)])
        for i in range(length):
            assert bool(found.masked[b, i]) == (i in again)
            is_new = masked[b, i] and i not in again
            assert found.tokens[b, i] == (drawn if is_new else tokens)[b, i]
    torch.testing.assert_close(found.log_probs, p.log().where(masked, 0.0))


@pytest.mark.parametrize("size", [7, 111])
@pytest.mark.parametrize(("top_k", "temperature"), [(None, 1.0), (5, 0.7)])
def test_tokens_come_as_often_as_they_should(size: int, top_k: int | None, temperature: float) -> None:
    draws = 1_000_000
    row = torch.randn(size, generator=torch.Generator().manual_seed(3))
    masked = torch.ones(1, draws, dtype=torch.bool)
    found = ops.masked_decode_step(
        row.expand(1, draws, -1), masked.long(), masked, ratio=0.0, keep_top_k=top_k, temperature=temperature, seed=5
    )
    kept = row.double() if top_k is None else row.double().where(row >= row.topk(top_k).values[-1], -torch.inf)
    p = (kept / temperature).softmax(0)
    assert chi_square(found.tokens[0].bincount(minlength=size), p) > 1e-3
    torch.testing.assert_close(found.log_probs[0].double(), kept.log_softmax(0)[found.tokens[0]])
    assert not found.masked.any()


def test_equal_positions_are_masked_again_as_often_as_each_other() -> None:
    """By noise alone: each of twelve is among the five."""
    masked = torch.ones(60_000, 12, dtype=torch.bool)
    found = ops.masked_decode_step(
        torch.zeros(60_000, 12, 3), masked.long(), masked, ratio=5 / 12, confidence_noise=1.0, seed=2
    )
    assert (found.masked.sum(1) == 5).all()
    assert chi_square(found.masked.sum(0), torch.full((12,), 1 / 12)) > 1e-3


def test_few_are_told_apart_by_rounding() -> None:
    """The same tokens and positions as by the reference, but for one in 1e5."""
    logits = 2 * torch.randn(100, 200, 50, generator=torch.Generator().manual_seed(1))
    masked = torch.ones(100, 200, dtype=torch.bool)
    settings, counts = torch.tensor([[21.0, 0.8, 0.5]]), torch.tensor([90])
    differing = 0
    for seed in range(5):
        args = logits, masked.long(), masked, torch.tensor([seed, 0]), settings, counts
        for mine, theirs in zip(OPS[STEP](*args)[1:], reference.masked_decode_step(*args)[1:], strict=True):
            differing += int((mine != theirs).sum())
    assert differing <= 2


def test_the_result_does_not_hang_on_threads() -> None:
    logits, masked = torch.randn(4, 90, 200), torch.rand(4, 90) < 0.7

    def run() -> tuple[Tensor, ...]:
        return ops.masked_decode_step(logits, masked.long(), masked, ratio=0.4, confidence_noise=0.3, seed=3)

    expected = run()
    with torch.profiler.profile():  # the long way
        assert all(map(torch.equal, run(), expected))
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_num_threads(threads)


# ---- Use -------------------------------------------------------------------------------------------------------------


def test_a_loop_ends_without_masks() -> None:
    """MaskGIT's: as many are left as its schedule says, and what was kept stays."""
    batch, length, size, steps = 2, 30, 16, 8
    tokens, masked = torch.full((batch, length), size), torch.ones(batch, length, dtype=torch.bool)
    for i in range(steps):
        ratio = math.cos(math.pi / 2 * (i + 1) / steps)
        before, was_masked = tokens, masked
        tokens, masked, _ = ops.masked_decode_step(
            torch.randn(batch, length, size), tokens, masked, ratio=max(ratio, 0.0), keep_top_k=5,
            temperature=max(1.5 * ratio, 0.0), confidence_noise=max(ratio, 0.0), seed=1, offset=i * 1000,
        )  # fmt: skip
        assert (masked.sum(1) == math.floor(max(ratio, 0.0) * length)).all()
        assert torch.equal(tokens[~was_masked], before[~was_masked])
        assert (tokens[masked] == size).all()
    assert ((tokens >= 0) & (tokens < size)).all()


def test_numbers_of_each_sample() -> None:
    logits, masked = torch.randn(3, 20, 12), torch.ones(3, 20, dtype=torch.bool)
    numbers = {
        "ratio": [0.0, 0.25, 1.0],
        "temperature": [0.0, 0.5, 1.0],
        "confidence_noise": [0.0, 1.0, 2.0],
    }
    together = ops.masked_decode_step(
        logits, masked.long(), masked, seed=4, **{name: torch.tensor(each) for name, each in numbers.items()}
    )
    assert together.masked.sum(1).tolist() == [0, 5, 20]
    assert torch.equal(together.tokens[0], logits[0].argmax(-1))
    for b in range(3):
        one = {name: each[b] for name, each in numbers.items()}
        alone = ops.masked_decode_step(logits, masked.long(), masked, seed=4, **one)
        assert torch.equal(alone.tokens[b], together.tokens[b])
        assert torch.equal(alone.masked[b], together.masked[b])


@pytest.mark.parametrize("ratio", [0.7, 0.3, 0.1, 0.6])
def test_shares_that_binary_fractions_miss(ratio: float) -> None:
    masked = torch.ones(1, 10, dtype=torch.bool)
    for given in (ratio, torch.tensor(ratio), torch.tensor(ratio, dtype=torch.float64)):
        found = ops.masked_decode_step(torch.randn(1, 10, 4), masked.long(), masked, ratio=given, seed=0)
        assert found.masked.sum() == math.floor(ratio * 10)


def test_rows_without_a_token() -> None:
    logits, masked = torch.zeros(1, 5, 4), torch.tensor([[True, True, True, True, False]])
    logits[0, 0, 1], logits[0, 1, 2], logits[0, 2], logits[0, 4] = torch.nan, torch.inf, -torch.inf, torch.nan
    tokens = torch.tensor([[9, 9, 9, 9, 2]])
    found = ops.masked_decode_step(logits, tokens, masked, ratio=0.4, errors="mark", seed=0)
    assert found.masked.tolist() == [[True, True, False, False, False]]
    assert found.tokens[0, :3].tolist() == [9, 9, -1]
    assert found.log_probs[0, :3].isnan().all()
    assert found.tokens[0, 4] == 2
    with pytest.raises(ValueError, match=r"masked_decode_step: logits has no token to choose in rows 0, 1, 2: NaN"):
        ops.masked_decode_step(logits, tokens, masked, ratio=0.4)


def test_a_tracer_leaves_nothing_behind() -> None:
    with FakeTensorMode():
        masked = torch.ones(2, 3, dtype=torch.bool)
        found = ops.masked_decode_step(torch.empty(2, 3, 9), masked.long(), masked, ratio=0.5, seed=1)
    assert found.tokens.shape == found.masked.shape == found.log_probs.shape == (2, 3)


def test_a_compiled_step() -> None:
    logits, masked = torch.randn(2, 20, 30), torch.rand(2, 20) < 0.8

    def step(logits: Tensor, masked: Tensor, ratio: float, noise: float, seed: Tensor) -> Any:
        return ops.masked_decode_step(
            logits, masked.long(), masked, ratio=ratio, keep_top_k=7, confidence_noise=noise, seed=seed
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for i in range(4):
        args = logits, masked, 0.1 + 0.2 * i, 0.5 * i, torch.tensor(i)
        assert all(map(torch.equal, compiled(*args), step(*args)))


_X, _M = torch.zeros(2, 4, 9), torch.ones(2, 4, dtype=torch.bool)
_T = _M.long()
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.masked_decode_step([1.0], _T, _M, ratio=0.5), TypeError, "logits is list, expected a Tensor"),  # type: ignore[arg-type]
    (lambda: ops.masked_decode_step(_X.int(), _T, _M, ratio=0.5), TypeError, "logits has dtype torch.int32"),
    (lambda: ops.masked_decode_step(_X[..., :0], _T, _M, ratio=0.5), ValueError, r"logits has shape \[2, 4, 0\]"),
    (lambda: ops.masked_decode_step(_X[0, 0], _T, _M, ratio=0.5), ValueError, r"logits has shape \[9\], expected at"),
    (lambda: ops.masked_decode_step(_X, 3, _M, ratio=0.5), TypeError, "tokens is int, expected a Tensor"),  # type: ignore[arg-type]
    (lambda: ops.masked_decode_step(_X, _T.int(), _M, ratio=0.5), TypeError, "tokens has dtype torch.int32, expected"),
    (lambda: ops.masked_decode_step(_X, _T[:1], _M, ratio=0.5), ValueError, r"tokens has shape \[1, 4\], expected \[2"),
    (lambda: ops.masked_decode_step(_X, _T, _T, ratio=0.5), TypeError, "masked has dtype torch.int64, expected bool"),
    (lambda: ops.masked_decode_step(_X, _T, None, ratio=0.5), TypeError, "masked is NoneType, expected a Tensor"),  # type: ignore[arg-type]
    (lambda: ops.masked_decode_step(_X, _T, _M, ratio=1.5), ValueError, "ratio is 1.5, expected a number from 0 to 1"),
    (lambda: ops.masked_decode_step(_X, _T, _M, ratio=math.nan), ValueError, "ratio is nan, expected a number from 0"),
    (lambda: ops.masked_decode_step(_X, _T, _M, ratio="1"), TypeError, "ratio is str, expected a number"),  # type: ignore[arg-type]
    (
        lambda: ops.masked_decode_step(_X, _T, _M, ratio=torch.tensor([0.5, 2.0])),
        ValueError,
        "ratio has 2.0, expected a number from 0 to 1 in each sample",
    ),
    (
        lambda: ops.masked_decode_step(_X, _T, _M, ratio=torch.ones(3)),
        ValueError,
        r"ratio has shape \[3\], expected \[2\] or \[\]",
    ),
    (
        lambda: ops.masked_decode_step(_X, _T, _M, ratio=0.5, keep_top_k=0),
        ValueError,
        "keep_top_k is 0, expected an int of at least 1, or None",
    ),
    (
        lambda: ops.masked_decode_step(_X, _T, _M, ratio=0.5, keep_top_k=2.0),  # type: ignore[arg-type]
        TypeError,
        "keep_top_k is float, expected an int of at least 1",
    ),
    (
        lambda: ops.masked_decode_step(_X, _T, _M, ratio=0.5, temperature=-1.0),
        ValueError,
        "temperature is -1.0, expected a number of at least 0",
    ),
    (
        lambda: ops.masked_decode_step(_X, _T, _M, ratio=0.5, temperature=1e-40),
        ValueError,
        "temperature is 1e-40, expected 0, or a number",
    ),
    (
        lambda: ops.masked_decode_step(_X, _T, _M, ratio=0.5, confidence_noise=torch.ones(2).long()),
        TypeError,
        "confidence_noise has dtype torch.int64",
    ),
    (
        lambda: ops.masked_decode_step(_X, _T, _M, ratio=0.5, errors="ignore"),  # type: ignore[arg-type]
        ValueError,
        "errors is 'ignore', expected",
    ),
    (
        lambda: ops.masked_decode_step(_X, _T, _M, ratio=0.5, seed=1, generator=torch.Generator()),
        ValueError,
        "got generator and seed",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"masked_decode_step: {message}"):
        call()


# ---- A detector's gate -----------------------------------------------------------------------------------------------


def test_the_gate_is_the_formula() -> None:
    error_logits = 3 * torch.randn(4, 50, dtype=torch.float64)
    log_probs = -3 * torch.rand(4, 50, dtype=torch.float64)
    for threshold in (0.0, 0.2, 0.5, 0.9, 1.0):
        e = error_logits.sigmoid()
        assert torch.equal(ops.error_gate(None, error_logits, threshold), e > threshold)
        expected = 1 - log_probs.exp() * (1 - e) > threshold
        assert torch.equal(ops.error_gate(log_probs, error_logits, threshold), expected)
        assert torch.equal(ops.error_gate(log_probs.float(), error_logits.bfloat16().double(), threshold),
                           ops.error_gate(log_probs.float(), error_logits.bfloat16(), threshold))  # fmt: skip


def test_the_gate_of_numbers_at_the_ends() -> None:
    error_logits = torch.tensor([torch.nan, 100.0, -100.0, torch.inf, -torch.inf, 0.0, 0.0])
    log_probs = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, torch.nan, -torch.inf])
    assert ops.error_gate(log_probs, error_logits).tolist() == [True, True, False, True, False, True, True]
    assert ops.error_gate(None, error_logits[:5], 1.0).tolist() == [True, False, False, False, False]
    assert ops.error_gate(None, torch.tensor([9.0, -9.0, -torch.inf]), 0.0).tolist() == [True, True, False]


BAD_GATES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.error_gate(None, 3.0), TypeError, "error_logits is float, expected a Tensor"),  # type: ignore[arg-type]
    (lambda: ops.error_gate(None, torch.zeros(3).long()), TypeError, "error_logits has dtype torch.int64"),
    (lambda: ops.error_gate(torch.zeros(2), torch.zeros(3)), ValueError, r"token_log_probs has shape \[2\], expected"),
    (lambda: ops.error_gate(None, torch.zeros(3), 1.5), ValueError, "threshold is 1.5, expected a number from 0 to 1"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_GATES, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_of_the_gate_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"error_gate: {message}"):
        call()
