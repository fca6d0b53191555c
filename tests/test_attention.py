"""The attention family on every backend of this machine: the numerics contract, PyTorch's own attention, and use."""

from __future__ import annotations

import pytest
import torch

from mmkern.ops._define import OPS
from tests import contract
from tests.cases.attention import CASES
from tests.cases.case import Case

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Every case in float32; the other dtypes differ in loads and stores alone.
RUNS = [
    (case, dtype)
    for case in CASES
    for dtype in DTYPES
    if dtype == torch.float32 or case.label.startswith(("plain", "heads inside", "sliced", "all at once", "bias LS"))
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_forward(case, OPS[case.op], dtype, device)


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_backward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_backward(case, contract.by_autograd(OPS[case.op]), dtype, device)
