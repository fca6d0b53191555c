"""The decoding family's CUDA kernels on the host: the numerics contract, and the tokens of the reference."""

from __future__ import annotations

import pytest
import torch

from mmkern import testing
from mmkern.ops._define import OPS
from mmkern.reference.decoding import Filter
from tests.cases.absorbing import STEPS
from tests.cases.case import Case
from tests.cases.decoding import CASES, case, whole
from tests.cases.masked_decode import CASES as MASKED
from tests.cuda_on_host import calls

pytestmark = pytest.mark.usefixtures("on_host")
# Ties end after the first stretch.
_LONG = case("several stretches, ties", whole(2, 9000), [{Filter.TOP_K: 5000}])
_IN_16_BITS = (
    "3x111, all",
    "all, mixed",
    "a request a row",
    "4x64",
    "sliced, guided",
    "last, odd, guided",
    "2x4500, guided",
    "2x3x7x111, MaskGCT",
    "odd",
)
RUNS = [
    (each, dtype)
    for each in (*CASES, _LONG, *STEPS, *MASKED)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype == torch.float32 or each.label in _IN_16_BITS
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype) -> None:
    op = OPS[case.op]
    args = op._prepare(case.arguments(dtype))
    outs = calls.forward(case.op, *args)
    testing.verify_forward(op, args, outs)
    for mine, theirs in zip(outs[1:], op.reference(*args)[1:], strict=True):
        assert torch.equal(mine, theirs)
