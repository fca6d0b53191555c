"""Forced alignment of CTC: the numerics contract, all paths by enumeration, and use."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkern import ops
from mmkern.ops._define import OPS
from tests import contract
from tests.cases.case import Case
from tests.cases.ctc_align import ALIGN, BEYOND, CASES
from tests.test_ctc import collapsed

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RUNS = [
    (case, dtype)
    for case in CASES
    for dtype in DTYPES
    if dtype == torch.float32 or case.label in ("some", "repeats", "mixed", "strided")
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    op = OPS[case.op]
    found = contract.check_forward(case, op, dtype, device)
    for out, expected in zip(found[1:], op.reference(*case.arguments(dtype, device))[1:], strict=True):
        assert torch.equal(out, expected)


@pytest.mark.parametrize("case", [c for c in CASES if c.label not in ("mixed", "too few frames")], ids=str)
def test_backward(case: Case, device: str) -> None:
    def run(log_probs: Tensor, *given: Any) -> Any:
        return OPS[ALIGN](log_probs, *given)

    contract.check_backward(case, contract.by_autograd(run), torch.float32, device)


@pytest.mark.parametrize("case", [c for c in CASES if c.label in ("some", "strided")], ids=str)
def test_opcheck(case: Case) -> None:
    log_probs, *given = case.arguments(torch.float32)
    torch.library.opcheck(torch.ops.mmkern.ctc_forced_align.default, (log_probs.requires_grad_(), *given))


@pytest.mark.parametrize("case", BEYOND, ids=str)
def test_kernels_stay_within_a_row(case: Case) -> None:
    """Of what the op refuses on a CPU."""
    op, args = OPS[case.op], case.arguments(torch.float32)
    outs = op.empty_outputs(args)
    __import__("mmkern._C")._C.ctc_forced_align(*args, *outs, 1)
    for out, expected in zip(outs, op.reference(*args), strict=True):
        torch.testing.assert_close(out, expected, equal_nan=True)
    with pytest.raises(ValueError, match=r"ctc_forced_align: (targets|lengths) has"):
        ops.ctc_forced_align(*args)


@pytest.mark.parametrize(("frames", "labels"), [(1, 2), (4, 3), (6, 3), (5, 4)])
def test_the_path_is_the_likeliest_of_all(frames: int, labels: int) -> None:
    g = torch.Generator().manual_seed(frames)
    for _ in range(20):
        log_probs = torch.randn(1, frames, labels, generator=g, dtype=torch.float64).log_softmax(-1)
        best: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
        for path in itertools.product(range(labels), repeat=frames):
            score = sum(float(log_probs[0, t, label]) for t, label in enumerate(path))
            found = tuple(collapsed(list(path), 0)[0])
            best[found] = max(best.get(found, (-torch.inf, ())), (score, path))
        for tokens, (score, path) in best.items():
            aligned = ops.ctc_forced_align(log_probs, torch.tensor([tokens], dtype=torch.int64))
            assert aligned.labels[0].tolist() == list(path)
            torch.testing.assert_close(aligned.scores.sum().item(), score)
            kept = [tokens[p] for p, _ in itertools.groupby(aligned.places[0].tolist()) if p >= 0]
            assert tuple(kept) == tokens


def test_a_long_row_keeps_its_digits() -> None:
    for seed in (0, 3):
        g = torch.Generator().manual_seed(seed)
        log_probs = torch.randn(1, 8000, 30, generator=g).log_softmax(-1)
        targets = torch.randint(1, 30, (1, 900), generator=g)
        narrow, wide = ops.ctc_forced_align(log_probs, targets), ops.ctc_forced_align(log_probs.double(), targets)
        assert (narrow.labels != wide.labels).sum() <= 2  # 5 and 19 of numbers that are not kept beside the likeliest


def test_the_gradient_is_that_of_the_path() -> None:
    log_probs = torch.randn(3, 12, 7, dtype=torch.float64).log_softmax(-1).requires_grad_()
    targets = torch.randint(1, 7, (3, 4))
    aligned = ops.ctc_forced_align(log_probs, targets, torch.tensor([12, 9, 10]))
    gradient = torch.autograd.grad(aligned.scores.sum(), log_probs)[0]
    expected = torch.nn.functional.one_hot(aligned.labels.clamp_min(0), 7) * (aligned.labels >= 0)[..., None]
    assert torch.equal(gradient, expected.double())


def test_rows_without_a_path() -> None:
    log_probs = torch.zeros(3, 3, 4)
    log_probs[1, 1, 2] = torch.nan
    targets = torch.tensor([[1, 1, 2], [1, 2, 3], [1, 2, 3]])
    aligned = ops.ctc_forced_align(log_probs, targets, errors="mark")
    assert (aligned.labels[:2] == -1).all()
    assert aligned.scores[:2].isnan().all()
    assert aligned.labels[2].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="ctc_forced_align: log_probs has no path in rows 0, 1: too few frames"):
        ops.ctc_forced_align(log_probs, targets)


def test_compiled() -> None:
    log_probs, targets = torch.randn(2, 9, 5).log_softmax(-1), torch.randint(1, 5, (2, 3))
    compiled = torch.compile(ops.ctc_forced_align, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(log_probs, targets), ops.ctc_forced_align(log_probs, targets)))


_X, _T = torch.zeros(2, 4, 9), torch.ones(2, 2).long()
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.ctc_forced_align([1.0], _T), TypeError, "log_probs is list, expected a Tensor"),  # type: ignore[arg-type]
    (lambda: ops.ctc_forced_align(_X[0], _T), ValueError, r"log_probs has shape \[4, 9\], expected \[B, T, C\]"),
    (lambda: ops.ctc_forced_align(_X, 3), TypeError, "targets is int, expected a Tensor"),  # type: ignore[arg-type]
    (lambda: ops.ctc_forced_align(_X, _T[:1]), ValueError, r"targets has shape \[1, 2\], expected \[2, S\]"),
    (lambda: ops.ctc_forced_align(_X, _T.int()), TypeError, "targets has dtype torch.int32"),
    (lambda: ops.ctc_forced_align(_X, _T + 8), ValueError, "targets has 9, expected a label from 0 to 8 that is not"),
    (lambda: ops.ctc_forced_align(_X, _T - 1), ValueError, "targets has 0, expected a label from 0 to 8 that is not"),
    (lambda: ops.ctc_forced_align(_X, _T, blank=9), ValueError, "blank is 9, expected an int from 0 to 8"),
    (
        lambda: ops.ctc_forced_align(_X, _T, torch.tensor([5, 1])),
        ValueError,
        "lengths has 5, expected a number from 0 to 4",
    ),
    (
        lambda: ops.ctc_forced_align(_X, _T, None, torch.tensor([3, 1])),
        ValueError,
        "target_lengths has 3, expected a number from 0 to 2",
    ),
    (
        lambda: ops.ctc_forced_align(_X, _T, errors="ignore"),  # type: ignore[arg-type]
        ValueError,
        "errors is 'ignore', expected",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"ctc_forced_align: {message}"):
        call()
