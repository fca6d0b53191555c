"""Beam search of CTC: the numerics contract, all labellings by enumeration, torch's ctc_loss, and use."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmkern import ops
from mmkern.ops._define import OPS
from tests import contract
from tests.cases.case import Case
from tests.cases.ctc import BEAMS, flat, mixed
from tests.test_ctc import collapsed

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RUNS = [
    (case, dtype)
    for case in BEAMS
    for dtype in DTYPES
    if dtype == torch.float32 or case.label in ("some", "all of 3 labels", "mixed", "strided")
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    op = OPS[case.op]
    found = contract.check_forward(case, op, dtype, device)
    for out, expected in zip(found, op.reference(*case.arguments(dtype, device)), strict=True):
        assert out.is_floating_point() or torch.equal(out, expected)


@pytest.mark.parametrize("case", [c for c in BEAMS if c.label in ("some", "strided")], ids=str)
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(torch.ops.mmkern.ctc_beam_decode.default, tuple(case.arguments(torch.float32)))


@pytest.mark.parametrize(("frames", "labels"), [(1, 2), (4, 2), (7, 2), (6, 3), (5, 4), (7, 4)])
def test_all_labellings(frames: int, labels: int) -> None:
    """A beam for all: each labelling has the sum of its paths, the likeliest first."""
    log_probs = flat(1, frames, labels)(torch.Generator().manual_seed(frames))[0]
    expected: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(labels), repeat=frames):
        labelling = tuple(collapsed(list(path), 0)[0])
        p = math.exp(sum(log_probs[t, c].item() for t, c in enumerate(path)))
        expected[labelling] = expected.get(labelling, 0.0) + p
    found = ops.ctc_beam_decode(log_probs[None], beam=len(expected), nbest=len(expected))
    rows = zip(found.tokens[0].tolist(), found.lengths[0].tolist(), strict=True)
    labellings = [tuple(row[:count]) for row, count in rows]
    assert set(labellings) == set(expected)
    assert found.scores[0].exp().tolist() == pytest.approx([expected[x] for x in labellings], rel=1e-10)
    assert (found.scores[0].diff() <= 0).all()


def test_scores_are_those_of_ctc_loss() -> None:
    log_probs = flat(5, 6, 4)(torch.Generator().manual_seed(3))
    lengths = torch.tensor([6, 5, 4, 3, 2])
    found = ops.ctc_beam_decode(log_probs, lengths, beam=2000, nbest=3)
    for n in range(3):
        loss = torch.nn.functional.ctc_loss(
            log_probs.transpose(0, 1), found.tokens[:, n].clamp_min(0), lengths, found.lengths[:, n], reduction="none"
        )
        torch.testing.assert_close(found.scores[:, n], -loss)


def test_a_wide_beam_is_no_worse() -> None:
    log_probs = flat(3, 60, 8)(torch.Generator().manual_seed(4)).float()
    scores = [ops.ctc_beam_decode(log_probs, beam=width).scores for width in (1, 10, 200)]
    assert (scores[0] <= scores[1]).all()
    assert (scores[1] <= scores[2] + 1e-4).all()
    assert (ops.ctc_greedy_decode(log_probs).scores <= scores[2][:, 0]).all()


def test_tokens_come_in_the_order_of_their_frames() -> None:
    log_probs = flat(2, 50, 6)(torch.Generator().manual_seed(5)).float()
    found = ops.ctc_beam_decode(log_probs, beam=20)
    for times, count in zip(found.times[:, 0], found.lengths[:, 0].tolist(), strict=True):
        assert (times[:count].diff() > 0).all()
        assert (times[count:] == -1).all()


def test_a_long_row_keeps_its_digits() -> None:
    """10 000 frames: the score is near -1e4, of which float32 has four digits behind the point."""
    log_probs = flat(1, 10_000, 4)(torch.Generator().manual_seed(6))
    wide = ops.ctc_beam_decode(log_probs, beam=10)
    found = ops.ctc_beam_decode(log_probs.float(), beam=10)
    assert torch.equal(found.tokens, wide.tokens)
    torch.testing.assert_close(found.scores.double(), wide.scores, rtol=2e-7, atol=0)


def test_same_bits_for_any_number_of_threads() -> None:
    log_probs = flat(5, 60, 12)(torch.Generator().manual_seed(7)).float()
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(ops.ctc_beam_decode(log_probs, beam=30, nbest=5))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- Use -------------------------------------------------------------------------------------------------------------


def test_rows_with_nan_raise_or_are_marked() -> None:
    x, lengths = mixed(torch.Generator().manual_seed(1)).float(), torch.tensor([8, 8, 6, 8, 5])
    with pytest.raises(ValueError, match=r"ctc_beam_decode: log_probs has NaN or \+inf in rows 0, 1"):
        ops.ctc_beam_decode(x, lengths)
    found = ops.ctc_beam_decode(x, lengths, nbest=2, errors="mark")
    assert found.scores.isnan()[:, 0].tolist() == [True, True, False, False, False]
    assert (found.tokens[:2] == -1).all()
    assert (found.scores[3] == -torch.inf).all()


def test_compiled() -> None:
    compiled = torch.compile(lambda x: ops.ctc_beam_decode(x, beam=6, nbest=2), fullgraph=True, backend="aot_eager")
    for frames in (7, 9):
        x = flat(3, frames, 5)(torch.Generator().manual_seed(2)).float()
        expected = ops.ctc_beam_decode(x, beam=6, nbest=2)
        assert all(torch.equal(a, b) for a, b in zip(compiled(x), expected, strict=True))


X = torch.zeros(2, 5, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.ctc_beam_decode(X[0]), ValueError, r"log_probs has shape \[5, 4\], expected \[B, T, C\]"),
        (lambda: ops.ctc_beam_decode(X, blank=4), ValueError, "blank is 4, expected an int from 0 to 3"),
        (
            lambda: ops.ctc_beam_decode(X, torch.tensor([5, 6])),
            ValueError,
            "lengths has 6, expected a number from 0 to 5",
        ),
        (lambda: ops.ctc_beam_decode(X, beam=0), ValueError, "beam is 0, expected an int from 1 to"),
        (
            lambda: ops.ctc_beam_decode(X, beam=2**31),
            ValueError,
            "beam is 2147483648, expected an int from 1 to 429496729",
        ),
        (lambda: ops.ctc_beam_decode(X, beam=2.0), TypeError, "beam is float, expected an int"),
        (lambda: ops.ctc_beam_decode(X, nbest=0), ValueError, "nbest is 0, expected an int from 1 to 100, the beam"),
        (
            lambda: ops.ctc_beam_decode(X, beam=3, nbest=4),
            ValueError,
            "nbest is 4, expected an int from 1 to 3, the beam",
        ),
        (
            lambda: ops.ctc_beam_decode(X, prune_log_prob="a"),
            TypeError,
            "prune_log_prob is str, expected a number or None",
        ),
        (lambda: ops.ctc_beam_decode(X, errors="no"), ValueError, "errors is 'no'"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
