"""CTC: the numerics contract, tokens as the definition has them, and use."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkern import backends, ops
from mmkern.ops._define import OPS
from tests import contract
from tests.cases.case import Case
from tests.cases.ctc import BEYOND, CASES, mixed, tokens

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RUNS = [
    (case, dtype)
    for case in CASES
    for dtype in (DTYPES if case.op == "ctc_greedy_decode" else DTYPES[:1])
    if dtype == torch.float32 or case.label in ("3x21x64", "2x40x17, lengths", "mixed", "frames first", "3x9x2")
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    op = OPS[case.op]
    found = contract.check_forward(case, op, dtype, device)
    for out, expected in zip(found, op.reference(*op._prepare(case.arguments(dtype, device))), strict=True):
        if not out.is_floating_point():
            assert torch.equal(out, expected)


@pytest.mark.parametrize("case", BEYOND, ids=str)
def test_kernels_stay_within_a_row(case: Case) -> None:
    op, args = OPS[case.op], case.arguments(torch.float32)
    outs = op.empty_outputs(args)
    backends.BACKENDS[0].find(op.family, op.name)(*args, *outs)
    for out, expected in zip(outs, op.reference(*args), strict=True):
        assert torch.allclose(out, expected)


@pytest.mark.parametrize("case", [c for c in CASES if c.label in ("3x21x64", "strided", "transposed")], ids=str)
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(getattr(torch.ops.mmkern, case.op).default, tuple(case.arguments(torch.float32)))


def collapsed(path: list[int], blank: int | None) -> tuple[list[int], list[int]]:
    """Tokens, and where each run begins."""
    runs = [(token, [at for at, _ in run]) for token, run in itertools.groupby(enumerate(path), key=lambda x: x[1])]
    kept = [(token, places[0]) for token, places in runs if token != blank]
    return [token for token, _ in kept], [at for _, at in kept]


@pytest.mark.parametrize("blank", [None, 0, 2])
def test_runs_collapse(blank: int | None) -> None:
    g = torch.Generator().manual_seed(4)
    paths = tokens(g, 50, 40, 3)
    lengths = torch.randint(0, 41, (50,), generator=g)
    found = ops.collapse_repeats(paths, lengths, blank)
    for b, n in enumerate(lengths.tolist()):
        expected, places = collapsed(paths[b, :n].tolist(), blank)
        count = int(found.lengths[b])
        assert found.tokens[b, :count].tolist() == expected
        assert found.times[b, :count].tolist() == places
        assert (found.tokens[b, count:] == -1).all()
        assert (found.times[b, count:] == -1).all()


def test_greedy_takes_the_likeliest_path() -> None:
    g = torch.Generator().manual_seed(5)
    log_probs = torch.randn(6, 5, 3, generator=g).double().log_softmax(-1)
    found = ops.ctc_greedy_decode(log_probs, blank=1)
    for b in range(6):
        paths = {
            p: sum(log_probs[b, t, c].item() for t, c in enumerate(p)) for p in itertools.product(range(3), repeat=5)
        }
        best = max(paths, key=lambda p: paths[p])
        expected, places = collapsed(list(best), 1)
        assert found.tokens[b, : int(found.lengths[b])].tolist() == expected
        assert found.times[b, : int(found.lengths[b])].tolist() == places
        assert found.scores[b].item() == pytest.approx(paths[best], abs=1e-12)


def test_the_path_of_a_label_is_no_likelier_than_the_label() -> None:
    """The score is one term of the sum that torch's ctc_loss takes."""
    g = torch.Generator().manual_seed(6)
    log_probs = torch.randn(4, 30, 6, generator=g).double().log_softmax(-1)
    found = ops.ctc_greedy_decode(log_probs)
    loss = torch.nn.functional.ctc_loss(
        log_probs.transpose(0, 1), found.tokens.clamp_min(0), torch.full((4,), 30), found.lengths, reduction="none"
    )
    assert (found.scores <= -loss + 1e-9).all()


def test_same_bits_for_any_number_of_threads() -> None:
    log_probs = torch.randn(9, 300, 40, generator=torch.Generator().manual_seed(7)).log_softmax(-1)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(ops.ctc_greedy_decode(log_probs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- Use -------------------------------------------------------------------------------------------------------------


def test_rows_with_nan_raise_or_are_marked() -> None:
    x = mixed(torch.Generator().manual_seed(1)).float()
    lengths = torch.tensor([8, 8, 6, 8, 5])
    with pytest.raises(ValueError, match=r"ctc_greedy_decode: log_probs has NaN or \+inf in rows 0, 1"):
        ops.ctc_greedy_decode(x, lengths)
    found = ops.ctc_greedy_decode(x, lengths, errors="mark")
    assert found.scores.isnan().tolist() == [True, True, False, False, False]
    assert found.lengths[:2].tolist() == [0, 0]
    assert (found.tokens[:2] == -1).all()
    assert found.scores[3] == -torch.inf
    with pytest.raises(ValueError, match="in rows 0, 1"):
        ops.ctc_greedy_decode(x, lengths, errors="raise")


def test_no_gradient() -> None:
    x = torch.randn(2, 5, 4).requires_grad_()
    assert not ops.ctc_greedy_decode(x).scores.requires_grad
    assert not torch.ops.mmkern.ctc_greedy_decode(x, None, 0)[0].requires_grad


def test_compiled() -> None:
    def run(x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        found = ops.ctc_greedy_decode(x.log_softmax(-1), lengths)
        return (*found, *ops.collapse_repeats(found.tokens, found.lengths))

    g = torch.Generator().manual_seed(2)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for frames in (7, 9):
        x, lengths = torch.randn(3, frames, 5, generator=g), torch.tensor([frames, 2, 0])
        assert all(torch.equal(a, b) for a, b in zip(compiled(x, lengths), run(x, lengths), strict=True))


def test_vmap() -> None:
    x = torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(3))
    found = torch.func.vmap(lambda each: ops.ctc_greedy_decode(each, errors="mark"))(x)
    expected = ops.ctc_greedy_decode(x.flatten(0, 1))
    torch.testing.assert_close(found.scores.flatten(), expected.scores)
    assert all(torch.equal(a.flatten(0, 1), b) for a, b in zip(found[:3], expected[:3], strict=True))


X = torch.zeros(2, 5, 4)
PATH = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.ctc_greedy_decode([1.0]), TypeError, "log_probs is list, expected a Tensor"),
        (lambda: ops.ctc_greedy_decode(X.long()), TypeError, "log_probs has dtype torch.int64"),
        (lambda: ops.ctc_greedy_decode(X[0]), ValueError, r"log_probs has shape \[5, 4\], expected \[B, T, C\]"),
        (
            lambda: ops.ctc_greedy_decode(X[..., :0]),
            ValueError,
            r"log_probs has shape \[2, 5, 0\], expected .* C of at",
        ),
        (lambda: ops.ctc_greedy_decode(X, blank=4), ValueError, "blank is 4, expected an int from 0 to 3"),
        (lambda: ops.ctc_greedy_decode(X, blank=-1), ValueError, "blank is -1, expected an int from 0 to 3"),
        (lambda: ops.ctc_greedy_decode(X, blank=1.0), TypeError, "blank is float, expected an int"),
        (lambda: ops.ctc_greedy_decode(X, errors="no"), ValueError, "errors is 'no'"),
        (lambda: ops.ctc_greedy_decode(X, torch.tensor([5])), ValueError, r"lengths has shape \[1\], expected \[2\]"),
        (
            lambda: ops.ctc_greedy_decode(X, torch.tensor([5, 6])),
            ValueError,
            "lengths has 6, expected a number from 0 to 5",
        ),
        (
            lambda: ops.ctc_greedy_decode(X, torch.tensor([-1, 5])),
            ValueError,
            "lengths has -1, expected a number from 0",
        ),
        (lambda: ops.ctc_greedy_decode(X, torch.ones(2)), TypeError, "lengths has dtype torch.float32, expected int64"),
        (lambda: ops.ctc_greedy_decode(X, [5, 5]), TypeError, "lengths is list, expected a Tensor or None"),
        (lambda: ops.collapse_repeats([1]), TypeError, "tokens is list, expected a Tensor"),
        (lambda: ops.collapse_repeats(PATH.int()), TypeError, "tokens has dtype torch.int32, expected int64"),
        (lambda: ops.collapse_repeats(PATH[0]), ValueError, r"tokens has shape \[5\], expected \[B, T\]"),
        (lambda: ops.collapse_repeats(PATH, blank="a"), TypeError, "blank is str, expected an int or None"),
        (
            lambda: ops.collapse_repeats(PATH, torch.tensor([9, 1])),
            ValueError,
            "lengths has 9, expected a number from 0",
        ),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
