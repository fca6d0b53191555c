"""The report on CUDA machine code: its arithmetic, and that no kernel spills."""

from __future__ import annotations

import shutil

import pytest

from tests.cuda_on_host.harness import every_family
from tools import gpu_report_cuda as report

H100 = report.MULTIPROCESSORS["sm_90"]


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "threads", "expected"),
    [
        (32, 0, 128, 1.0),  # 64 warps of 1024 registers
        (64, 0, 128, 0.5),  # 32 warps of 2048 registers
        (65, 0, 128, 28 / 64),  # 2304 registers a warp: 28 warps, 7 blocks of 4
        (32, 49 << 10, 128, 16 / 64),  # 4 blocks of 50 KiB in 228
        (32, 0, 32, 0.5),  # 32 blocks of one warp
        (255, 0, 1024, 0.0),  # does not fit at all
    ],
)
def test_occupancy(registers: int, shared_bytes: int, threads: int, expected: float) -> None:
    assert report.occupancy(H100, registers, shared_bytes, threads) == expected


def test_names_are_those_of_the_backend() -> None:
    mangled = "_ZN6mmkern6device4rowsINS0_7PairMapINS0_13LorentzLogMapENS0_8ComparedEE8BackwardEEEvNS0_7RowArgsE"
    assert report.readable([mangled]) == {mangled: "rows<PairMap<LorentzLogMap, Compared>::Backward>"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_no_kernel_spills_and_attention_has_matrix_instructions() -> None:
    found = {row.name: row for row in report.kernels(["sm_90a"])}
    assert set(found) == set(every_family().kernels)
    assert [row.name for row in found.values() if row.spills] == []
    assert all(row.instructions > 50 and 0 < row.registers <= 255 for row in found.values())
    for values in (64, 128, 256):
        keys = 32 if values == 256 else 64
        # Once for full tiles and once for others: a step of the channels for every 8 keys, and the whole of P V.
        expected = 2 * (keys // 8 + keys // 16 * values // 8)
        for dtype in ("Bfloat16", "Float16"):
            assert found[f"attention<{dtype}, {values}>"].matrix_instructions == expected
        assert found[f"attention<Float32, {values}>"].matrix_instructions == 0
    for name in (name for name in found if "adaptive_norm" in name and "Vectors" in name):
        numbers = 2 if "backward" in name else 1  # the frame's scale, and its gradient
        assert found[name].wide_accesses == found[name].global_accesses - numbers, name
    for name in (name for name in found if "denoise_step" in name and "OneByOne" not in name):
        # Of a sample's shape 13 tensors are read and 3 written, and two masks of float32 are read beside them; mixed
        # types have code for elements of 2 and of 4 bytes.
        each = {"Float32Vectors": 2, "EightNeighbours": 1 + 2}.get(name[len("denoise_step<") : -1], 1)
        masks = 2 * 2
        assert found[name].wide_accesses == (13 + 3) * each + masks, name
    for name in (name for name in found if "group_norm_act" in name and "Vectors" in name):
        # One by one: of each piece that is held, or once, four numbers of its channel; and its sums.
        held = int(name.split(", ")[1][:-1])
        numbers_of_channels = 4 * max(held, 1) + ("backward" in name) * (2 * held if held else 4 + 2)
        assert found[name].wide_accesses == found[name].global_accesses - numbers_of_channels, name
    # One by one: a row's scale and shift, each of 2 or of 4 bytes, and their sums; a row's mask and a sample's sum.
    numbers = {"affine_activation": 4, "affine_activation_backward": 4 + 2}
    numbers |= {"gated_activation": 0, "gated_activation_backward": 0}
    numbers |= {"masked_squared_error": 2, "masked_squared_error_backward": 2}
    for name, row in found.items():
        op, _, access = name.partition("<")
        if op in numbers and access != "OneByOne>":
            assert row.wide_accesses == row.global_accesses - numbers[op], name


@pytest.mark.slow
def test_everything_is_read_and_written_once() -> None:
    """Of a norm, a row or a group that is longer than registers hold in each pass again."""
    counts = report.traffic(list(every_family().kernels))
    assert len(counts) == 22 + 20 + 5 + 2 * (5 + 4 + 5)
    for name, (moved, least) in counts.items():
        longer = (7 / 3 if "backward" in name else 2) if name.endswith(", 0>") else 1
        assert moved == pytest.approx(longer * least), name
