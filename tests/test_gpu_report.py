"""The report on GPU kernels without a GPU: what it says of a few of them, and that it sees a spill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tools import gpu_report, gpu_report_triton
from tools.gpu_report_passes import LOSS, PASSES
from tools.gpu_report_rows import KernelRow, Multiprocessor, occupancy, write_atomically
from tools.gpu_report_triton import Variant

pytestmark = pytest.mark.slow
OF_TILES = (
    *("pair_kernel", "weight_kernel", "product_kernel", "topk_kernel"),
    *("log_sums_kernel", "logit_gradients_kernel"),
)
HEAVIEST = Variant("lorentz_parallel_transport", "float32", backward=True)


@pytest.fixture
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path


@pytest.mark.parametrize("target", gpu_report_triton.TARGETS)
def test_the_heaviest_row_kernel_does_not_spill(target: str, private_cache: Path) -> None:
    (row,) = gpu_report_triton.compile_variant(HEAVIEST, target)
    assert not row.spilled
    assert row.registers > 32
    assert 0 < row.occupancy <= 1
    assert row.note == ("compiled only" if target == "gfx942" else "")


@pytest.mark.parametrize(("target", "opcode"), [("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "MFMA")])
def test_pairwise_uses_matrix_instructions(target: str, opcode: str, private_cache: Path) -> None:
    rows = gpu_report_triton.compile_variant(Variant("lorentz_pairwise_inner", "bfloat16", rows=512), target)
    (pair,) = [row for row in rows if row.kernel == "pair_kernel"]
    assert pair.matrix[opcode] > 0
    assert not pair.spilled


@pytest.mark.parametrize(("target", "opcode"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("gfx942", "MFMA")])
@pytest.mark.parametrize(
    "variant",
    [
        Variant("lorentz_pairwise_logsumexp, positives", "bfloat16", rows=512),
        Variant("lorentz_pairwise_logsumexp, positives", "float16", backward=True, rows=512),
        Variant("labelled_pairwise_logsumexp", "bfloat16", backward=True, rows=512),
        Variant("sigmoid_loss", "bfloat16", rows=512),
        Variant("lorentz_pairwise_topk", "bfloat16", rows=512),
        Variant("linear_logsumexp, few rows", "float16", rows=512),
        Variant("linear_logsumexp, everything", "bfloat16", backward=True, rows=512),
    ],
    ids=str,
)
def test_tiles_of_scores_use_matrix_instructions(
    variant: Variant, target: str, opcode: str, private_cache: Path
) -> None:
    rows = gpu_report_triton.compile_variant(variant, target)
    assert not any(row.spilled for row in rows)
    of_tiles = [row for row in rows if row.kernel in OF_TILES]
    assert of_tiles
    assert all(row.matrix[opcode] > 0 for row in of_tiles)


@pytest.mark.parametrize(("target", "opcode"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("gfx942", "MFMA")])
def test_attention_uses_matrix_instructions(target: str, opcode: str, private_cache: Path) -> None:
    variant = Variant(gpu_report_triton.ATTENTION, "bfloat16", 64, backward=True, rows=512, masked=True)
    rows = {row.kernel: row for row in gpu_report_triton.compile_variant(variant, target)}
    short = Variant(gpu_report_triton.ATTENTION, "bfloat16", 64, backward=True, rows=512, keys=77)
    rows |= {row.kernel: row for row in gpu_report_triton.compile_variant(short, target)}
    assert set(rows) == {"queries_kernel", "keys_kernel", "bias_kernel", "one_pass_kernel"}
    for name, row in rows.items():
        assert not row.spilled, name
        assert row.matrix[opcode] > 0, name


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_spill_is_seen(target: str) -> None:
    with gpu_report_triton.recorded() as launches:
        gpu_report_triton.call(HEAVIEST)[0]()
    ((kernel, args, kwargs),) = launches
    compiled = gpu_report_triton.compile_launch(kernel, args, kwargs | {"maxnreg": 32}, target)
    row = gpu_report_triton.read_machine_code("row_kernel", "squeezed", target, compiled)
    assert row.spills > 0
    assert row.spilled


def _row(**changes: object) -> KernelRow:
    return KernelRow(**{**gpu_report_row(), **changes})  # type: ignore[arg-type]


def gpu_report_row() -> dict[str, object]:
    return {
        "backend": "triton",
        "kernel": "row_kernel",
        "variant": "some op",
        "target": "sm_90",
        "registers": 64,
        "stack_bytes": 0,
        "spills": 0,
        "shared_bytes": 0,
        "threads": 32,
        "occupancy": 0.5,
    }


@pytest.mark.parametrize(("changes", "code"), [({}, 0), ({"spills": 3}, 1), ({"stack_bytes": 8}, 1)])
def test_exit_code(
    changes: dict[str, int],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_report, "OUTPUT", tmp_path)
    monkeypatch.setattr(gpu_report_triton, "triton_rows", lambda everything: [_row(**changes)])
    monkeypatch.setattr(gpu_report, "cuda_rows", lambda: [])
    monkeypatch.setattr("sys.argv", ["gpu_report.py"])
    assert gpu_report.main() == code
    assert json.loads((tmp_path / "report.json").read_text())[0]["kernel"] == "row_kernel"
    assert "row_kernel" in (tmp_path / "report.md").read_text()
    assert "some op" in capsys.readouterr().out


def test_bytes_are_counted_exactly(private_cache: Path) -> None:
    """A row that fits in registers is read once and written once; a longer one is read twice."""
    short, long = Variant("lorentz_exp_map0", "float32"), Variant("lorentz_exp_map0", "float32", 10000)
    counts = gpu_report_triton.traffic([short, long])
    moved, least = counts[str(short)]
    programs = 8
    assert least == 8 * 512 * 4 * 2 + 4
    assert moved - least == 4 * (programs - 1)  # each program reads the curvature
    moved, least = counts[str(long)]
    assert moved - least == 8 * 10000 * 4 + 4 * (programs - 1)


def test_attention_reads_its_inputs_once(private_cache: Path) -> None:
    """Where a head's queries are one tile; the gradients where its keys are one."""
    forward = Variant(gpu_report_triton.ATTENTION, "float16", 64, rows=512)
    short = Variant(gpu_report_triton.ATTENTION, "float16", 64, backward=True, rows=512, keys=77)
    for variant, (moved, least) in gpu_report_triton.traffic([forward, short]).items():
        assert moved <= 1.1 * least, variant


@pytest.mark.parametrize(("dtype", "wide"), [("float32", 2), ("bfloat16", 1)])
def test_a_step_reads_and_writes_16_bytes_at_a_time(dtype: str, wide: int, private_cache: Path) -> None:
    """The sample, two outputs and the result, 8 elements of each; scalars are the numbers of the step."""
    (row,) = gpu_report_triton.compile_variant(Variant("denoise_step, two outputs", dtype), "sm_90")
    assert not row.spilled
    assert row.wide_accesses == 4 * wide
    assert row.accesses is not None
    assert row.accesses <= 4 * wide + 8


def test_a_step_moves_each_element_once(private_cache: Path) -> None:
    steps = [Variant(op, dtype) for op in gpu_report_triton.STEPS for dtype in ("float32", "bfloat16")]
    for variant, (moved, least) in gpu_report_triton.traffic(steps).items():
        assert moved <= 1.05 * least, variant


def test_activations_and_the_loss_move_each_element_once(private_cache: Path) -> None:
    """Beside what rows share, which several programs read, and sums of its gradients, which they write."""
    passes = [v for v in gpu_report_triton.variants() if v.op in PASSES]
    assert {v.op for v in passes if v.backward} == set(PASSES)
    for variant, (moved, least) in gpu_report_triton.traffic(passes).items():
        assert moved <= 1.1 * least, variant


@pytest.mark.parametrize(
    ("variant", "wide"),
    [
        (Variant("film, silu", "float32", 1152, rows=128), 2 * 2),
        (Variant("film, silu", "bfloat16", 1152, True, rows=128), 3),
        (Variant("film of images, gelu", "float32", 1152, True, rows=128), 2 * 3),
        (Variant("gated_residual", "bfloat16", 1152, rows=128), 3),
        (Variant("swiglu", "bfloat16", 1152, rows=128), 3),
        (Variant(LOSS, "bfloat16", 1152, rows=128), 2),
    ],
    ids=str,
)
def test_activations_and_the_loss_read_and_write_16_bytes_at_a_time(
    variant: Variant, wide: int, private_cache: Path
) -> None:
    """All elements, 8 a thread; the others are numbers that are shared, and sums."""
    (row,) = gpu_report_triton.compile_variant(variant, "sm_80")
    assert not row.spilled
    assert row.wide_accesses == wide
    assert row.accesses is not None
    assert row.accesses <= wide + 6


def test_occupancy() -> None:
    limits = Multiprocessor(64, 32, 65536, 228 << 10, 1024)
    assert occupancy(limits, 32, 0, 128) == 1
    assert occupancy(limits, 255, 0, 256) == 8 / 64
    assert occupancy(limits, 32, 100 << 10, 256) == 16 / 64


def test_files_are_written_whole(tmp_path: Path) -> None:
    target = tmp_path / "file"
    for text in ("first", "second"):
        write_atomically(target, text)
        assert target.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
