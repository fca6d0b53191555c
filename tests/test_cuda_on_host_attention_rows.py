"""The row-wise companions of attention on CUDA without a device. See test_cuda_on_host.py."""

from __future__ import annotations

import math

import pytest
import torch

from mmkern import backends
from mmkern.backends import cuda_attention_rows
from mmkern.ops._define import OPS
from mmkern.ops._outputs import in_tuple
from tests.cases.attention_rows import CASES, wide
from tests.cases.case import Case
from tests.cuda_on_host import calls, frame

pytestmark = pytest.mark.usefixtures("on_host")
# The other dtypes differ in loads and stores alone: in blocks of 16 bytes, and one by one.
OF_16_BITS = ("1x2x9x128", "2x2x5x40", "heads inside", "part", "odd", "9x123-near")
RUNS = [
    *((case, torch.float32) for case in CASES),
    *(
        (case, dtype)
        for case in CASES
        for dtype in (torch.bfloat16, torch.float16)
        if case.label.startswith(OF_16_BITS)
    ),
]


@pytest.mark.parametrize(("case", "dtype"), [*RUNS, *((case, torch.float32) for case in wide())], ids=str)
def test_the_contract(case: Case, dtype: torch.dtype) -> None:
    frame.check_contract(case, dtype)


def test_unaligned_rows_give_the_same_bits() -> None:
    case = next(case for case in CASES if case.label == "1x2x9x128-weight")
    args = OPS[case.op]._prepare(case.arguments(torch.float32))
    wide = torch.full((1, 2, 9, 131), math.nan)
    wide[..., 1:129] = args[0]
    for one, other in zip(
        in_tuple(calls.forward(case.op, *args)),
        in_tuple(calls.forward(case.op, wide[..., 1:129], *args[1:])),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_nan_stays_in_its_row() -> None:
    for name, label in (("merge_attention", "9x123-near"), ("rotary_embedding", "1x2x9x128-weight")):
        case = next(case for case in CASES if case.op == name and case.label == label)
        args = case.arguments(torch.float32)
        clean = in_tuple(calls.forward(name, *args))[0].clone()
        rows = args[0].view(-1, args[0].shape[-1])
        rows[4, 7] = math.nan
        got = in_tuple(calls.forward(name, *args))[0].view(rows.shape)
        others = torch.arange(len(rows)) != 4
        assert got[4].isnan().any()
        assert torch.equal(got[others], clean.view(rows.shape)[others])


def test_heads_beyond_the_widest_are_refused() -> None:
    op = OPS["rotary_embedding"]
    assert cuda_attention_rows.limits(torch.empty(2, 4097)) == ["takes up to 4096 channels a head, got 4097"]
    assert cuda_attention_rows.limits(torch.empty(2, 4096)) == []
    on_device = next(backend for backend in backends.BACKENDS if backend.name == "cuda")
    assert on_device.limits(op.name) is on_device.limits(f"{op.name}_backward") is cuda_attention_rows.limits
