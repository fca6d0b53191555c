"""The decoding family's CUDA kernels on the host: the numerics contract, and the tokens of the reference."""

from __future__ import annotations

import pytest
import torch

from mmkern import testing
from mmkern.ops._define import OPS
from mmkern.reference import decoding as reference
from mmkern.reference.decoding import Filter
from tests.cases.case import Case
from tests.cases.decoding import CASES, case, whole
from tests.cuda_on_host import calls

pytestmark = pytest.mark.usefixtures("on_host")
# Ties end after the first stretch.
_LONG = case("several stretches, ties", whole(2, 9000), [{Filter.TOP_K: 5000}])
RUNS = [
    (each, dtype)
    for each in (*CASES, _LONG)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype == torch.float32 or each.label in ("3x111, all", "all, mixed", "a request a row", "4x64")
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype) -> None:
    op = OPS[case.op]
    args = op._prepare(case.arguments(dtype))
    outs = calls.forward(case.op, *args)
    testing.verify_forward(op, args, outs)
    assert torch.equal(outs[1], reference.sample_tokens(*args)[1])
