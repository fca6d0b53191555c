"""multi_source_attention in one launch: the numerics contract, and the same result as source by source."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mmkern
from mmkern import ops
from mmkern.ops._define import OPS
from mmkern.reference.attention import MAX_SOURCES
from tests import contract
from tests.cases.case import Case
from tests.cases.multi_source import CASES

OP = "multi_source_attention"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RUNS = [
    (case, dtype)
    for case in CASES
    for dtype in DTYPES
    if dtype == torch.float32 or case.label.startswith(("gates", "inside"))
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_forward(case, OPS[OP], dtype, device)


@pytest.mark.parametrize("case", [case for case in CASES if case.label.startswith(("gates", "biases"))], ids=str)
def test_backward(case: Case, device: str) -> None:
    contract.check_backward(case, contract.by_autograd(OPS[OP]), torch.float32, device)


def sources(count: int, **fields: Any) -> list[ops.Source]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    return [ops.Source(randn(2, 2, 5 + i, 8), randn(2, 2, 5 + i, 16), gate=0.5 - i, **fields) for i in range(count)]


@pytest.mark.parametrize("mode", ["sum", "joint"])
@pytest.mark.parametrize("count", [1, 2, MAX_SOURCES, MAX_SOURCES + 1])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_with_and_without_a_gradient_the_result_is_the_same(mode: Any, count: int, dropout_p: float) -> None:
    q = torch.randn(2, 4, 9, 8)
    options: dict[str, Any] = {"mode": mode, "dropout_p": dropout_p, "seed": 3, "offset": 7, "softcap": 4.0}
    found = ops.multi_source_attention(q, sources(count), **options)
    recorded = ops.multi_source_attention(q.requires_grad_(), sources(count), **options)
    assert recorded.requires_grad
    torch.testing.assert_close(found, recorded.detach())


def test_up_to_four_sources_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    for name in (OP, "cross_attention"):
        run = OPS[name].run
        monkeypatch.setattr(OPS[name], "run", lambda *args, run=run, name=name: launches.append(name) or run(*args))
        monkeypatch.setattr(OPS[name], "_direct", None)
    q = torch.randn(2, 4, 9, 8)
    ops.multi_source_attention(q, sources(MAX_SOURCES))
    assert launches == [OP]
    ops.multi_source_attention(q, sources(MAX_SOURCES + 1))
    assert launches == [OP, *["cross_attention"] * (MAX_SOURCES + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sum", "joint"])
def test_opcheck(mode: str) -> None:
    case = next(case for case in CASES if case.label.startswith("gates") and case.label.endswith(mode))
    args = case.arguments(torch.float32)
    torch.library.opcheck(torch.ops.mmkern.multi_source_attention, args)


@pytest.mark.parametrize("mode", ["sum", "joint"])
def test_compiles_whole(mode: Any) -> None:
    q, of = torch.randn(2, 4, 9, 8), sources(3)
    compiled = torch.compile(ops.multi_source_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, of, mode=mode), ops.multi_source_attention(q, of, mode=mode))


def test_autocast_lowers_all_sources() -> None:
    q, of = torch.randn(2, 4, 9, 8), sources(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.multi_source_attention(q, of)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), ops.multi_source_attention(q, of), atol=2e-2, rtol=2e-2)


def test_the_reference_takes_one_source_after_another() -> None:
    q, of = torch.randn(2, 4, 9, 8), sources(2)
    found = ops.multi_source_attention(q, of)
    with mmkern.use_backend("reference"):
        torch.testing.assert_close(found, ops.multi_source_attention(q, of))


_NUMBER = torch.ones(1, 1, 1, 1)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"sources\[1\]: k has shape", {"k1": torch.randn(2, 2, 6, 9)}),
        (r"sources\[1\]: v is NoneType", {"v1": None}),
        (r"sources\[2\] is there, expected sources\[1\]", {"k1": None, "v1": None, "gate1": None, "gate2": _NUMBER}),
        (r"sources\[0\]: key_mask has shape", {"key_mask0": torch.ones(2, 4, dtype=torch.bool)}),
    ],
)  # fmt: skip
def test_a_wrong_call_of_the_registered_op_is_refused(message: str, change: dict[str, Any]) -> None:
    op = OPS[OP]
    case = next(case for case in CASES if case.label.startswith("gates-2x2x1"))
    args = dict(zip(op.names, case.arguments(torch.float32), strict=True)) | change
    with pytest.raises((TypeError, ValueError), match=f"{OP}: {message}"):
        torch.ops.mmkern.multi_source_attention(*args.values())
