"""CUDA kernels of rows and elements without a device, of every family: threads in any order, outputs of any layout,
gradients one by one. See test_cuda_on_host.py."""

from __future__ import annotations

import pytest

from mmkern.backends import cuda_attention_rows, cuda_diffusion, cuda_gated, cuda_modulation
from tests.cases import attention_rows, diffusion, gated, group_norm, modulation
from tests.cases.case import Case
from tests.cuda_on_host import frame
from tests.cuda_on_host.harness import HostLauncher

pytestmark = pytest.mark.usefixtures("on_host")
CASES = [case for family in (attention_rows, diffusion, gated, group_norm, modulation) for case in family.odd()]
# Lowered, so that blocks take several rows or walk on over them, and samples are measured in several parts.
LIMITS = [
    *((module, "_MAX_BLOCKS") for module in (cuda_attention_rows, cuda_gated, cuda_modulation)),
    *((module, "_MAX_BLOCKS_OF_SUMS") for module in (cuda_attention_rows, cuda_gated, cuda_modulation)),
    (cuda_diffusion, "_MAX_PARTS"),
]


@pytest.mark.parametrize("limit", [2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_order_of_threads_changes_nothing(
    case: Case, limit: int, launcher: HostLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in LIMITS:
        monkeypatch.setattr(module, name, limit)
    frame.check_any_order(case, launcher)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_of_any_layout(case: Case) -> None:
    frame.check_outputs_of_any_layout(case)


@pytest.mark.parametrize("case", [case for case in CASES if frame.has_backward(case.op)], ids=str)
def test_gradients_one_by_one(case: Case) -> None:
    frame.check_gradients_one_by_one(case)
