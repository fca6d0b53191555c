"""Edit distance: against a textbook table and the Levenshtein package, and use."""

from __future__ import annotations

from typing import Any

import Levenshtein
import pytest
import torch

from mmkern import backends, ops, testing
from mmkern.ops._define import OPS
from mmkern.reference import edit_distance as reference
from tests import contract
from tests.cases.case import Case
from tests.cases.edit_distance import BEYOND, CASES, LONG, tokens


@pytest.mark.parametrize("case", [*CASES, *LONG], ids=str)
def test_edits(case: Case, device: str) -> None:
    contract.check_forward(case, OPS[case.op], torch.float32, device)


def test_wrong_edits_are_seen() -> None:
    args = CASES[-1].arguments(torch.float32)
    wrong = ops.edit_distance(*args).substitutions + 1
    with pytest.raises(testing.ContractError, match="edit_distance, output 0"):
        testing.verify_forward(OPS["edit_distance"], args, [torch.stack([wrong, wrong, wrong], 1)])


def test_kernels_stay_within_a_row() -> None:
    args = BEYOND.arguments(torch.float32)
    op = OPS[BEYOND.op]
    outs = op.empty_outputs(args)
    backends.BACKENDS[0].find(op.family, op.name)(*args, *outs)
    assert torch.equal(outs[0], reference.edit_distance(*args))


@pytest.mark.parametrize("case", [c for c in CASES if c.label in ("20x7, 9, lengths", "strided")], ids=str)
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(torch.ops.mmkern.edit_distance.default, tuple(case.arguments(torch.float32)))


def table(a: list[int], b: list[int]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def pairs(case: Case) -> list[tuple[list[int], list[int]]]:
    a, b, of_a, of_b = case.arguments(torch.float32)
    count = [[x.shape[1]] * len(x) if n is None else n.tolist() for x, n in ((a, of_a), (b, of_b))]
    return [(a[r, : count[0][r]].tolist(), b[r, : count[1][r]].tolist()) for r in range(len(a))]


@pytest.mark.parametrize("case", [*CASES, *LONG], ids=str)
def test_distance_is_that_of_the_table(case: Case) -> None:
    found = ops.edit_distance(*case.arguments(torch.float32))
    assert found.distance.tolist() == [table(a, b) for a, b in pairs(case)]
    for (a, b), inserted, deleted in zip(pairs(case), found.insertions.tolist(), found.deletions.tolist(), strict=True):
        assert inserted - deleted == len(b) - len(a)


def counts(a: list[int], b: list[int]) -> list[int]:
    """Of the package; it takes hashable tokens."""
    kinds = [kind for kind, *_ in Levenshtein.editops(a, b)]
    return [kinds.count(kind) for kind in ("replace", "insert", "delete")]


def test_edits_are_those_of_the_package() -> None:
    """2000 pairs, few of which have one alignment alone."""
    g = torch.Generator().manual_seed(8)
    for labels in (2, 3, 6):
        a, b = tokens(g, 600, 24, labels), tokens(g, 600, 21, labels)
        n, m = torch.randint(0, 25, (600,), generator=g), torch.randint(0, 22, (600,), generator=g)
        found = ops.edit_distance(a, b, n, m)
        expected = [counts(x[:i].tolist(), y[:j].tolist()) for x, y, i, j in zip(a, b, n, m, strict=True)]
        assert torch.stack(found[1:], 1).tolist() == expected
    for case in CASES:
        found = ops.edit_distance(*case.arguments(torch.float32))
        assert torch.stack(found[1:], 1).tolist() == [counts(a, b) for a, b in pairs(case)]


def test_same_for_any_number_of_threads() -> None:
    g = torch.Generator().manual_seed(9)
    a, b = tokens(g, 300, 60), tokens(g, 300, 60)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(ops.edit_distance(a, b).distance)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_compiled() -> None:
    compiled = torch.compile(ops.edit_distance, fullgraph=True, backend="aot_eager")
    g = torch.Generator().manual_seed(10)
    for width in (5, 8):
        a, b = tokens(g, 4, width), tokens(g, 4, 6)
        assert all(torch.equal(x, y) for x, y in zip(compiled(a, b), ops.edit_distance(a, b), strict=True))


A = torch.zeros(3, 5, dtype=torch.int64)
B = torch.zeros(3, 7, dtype=torch.int64)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (([1], B), TypeError, "a is list, expected a Tensor"),
        ((A, None), TypeError, "b is NoneType, expected a Tensor"),
        ((A.float(), B), TypeError, "a has dtype torch.float32, expected int64"),
        ((A, B.int()), TypeError, "b has dtype torch.int32, expected int64"),
        ((A[0], B), ValueError, r"a has shape \[5\], expected \[B, T\]"),
        ((A, B[:2]), ValueError, r"b has shape \[2, 7\], expected \[3, T\]"),
        ((A, B, torch.tensor([1, 2, 6])), ValueError, "a_lengths has 6, expected a number from 0 to 5"),
        ((A, B, None, torch.tensor([1, -2, 6])), ValueError, "b_lengths has -2, expected a number from 0 to 7"),
        ((A, B, torch.tensor([1, 2])), ValueError, r"a_lengths has shape \[2\], expected \[3\]"),
        ((A, B, None, torch.ones(3)), TypeError, "b_lengths has dtype torch.float32, expected int64"),
    ],
)
def test_bad_input(given: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"edit_distance: {message}"):
        ops.edit_distance(*given)
