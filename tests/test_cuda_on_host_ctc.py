"""CTC's CUDA kernels on the host: the numerics contract, and the tokens of the reference."""

from __future__ import annotations

import pytest
import torch

from mmkern import testing
from mmkern.backends import cuda
from mmkern.ops._define import OPS
from tests.cases.case import Case
from tests.cases.ctc import BEAMS, BEYOND, CASES
from tests.cuda_on_host import calls

pytestmark = pytest.mark.usefixtures("on_host")
RUNS = [
    (case, dtype)
    for case in (*CASES, *BEAMS)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype == torch.float32
    or (case.op == "ctc_greedy_decode" and case.label in ("3x21x64", "2x12x500", "mixed"))
    or (case.op == "ctc_beam_decode" and case.label in ("some", "mixed"))
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype) -> None:
    op = OPS[case.op]
    args = case.arguments(dtype)
    outs = calls.forward(case.op, *args)
    testing.verify_forward(op, args, outs)
    for out, expected in zip(outs, op.reference(*op._prepare(args)), strict=True):
        assert out.is_floating_point() or torch.equal(out, expected)


@pytest.mark.parametrize("case", BEYOND, ids=str)
def test_kernels_stay_within_a_row(case: Case) -> None:
    op, args = OPS[case.op], case.arguments(torch.float32)
    with calls.GuardedOutputs() as guarded:
        outs = tuple(map(guarded.new, op.empty_outputs(args)))
        getattr(cuda, case.op)(*args, *outs)
    for out, expected in zip(outs, op.reference(*args), strict=True):
        assert torch.allclose(out, expected)
