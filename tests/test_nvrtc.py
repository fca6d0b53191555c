"""NVRTC takes the CUDA sources as they are: all kernels are compiled to machine code, for which no device is needed."""

from __future__ import annotations

from types import ModuleType

import pytest

from mmkern.backends import cuda_launch
from tests.cuda_on_host.harness import every_family

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
SOME = (
    "rows<Radial<LorentzExpMap0>::Forward>",
    "rows<PairScalar<LorentzDistance>::Backward>",
    "centroid",
    "pairwise_product",
    "log_sum_weights",
    "merge_sums<LogSum>",
    "sum_partials",
    "attention<Bfloat16, 64>",
    "attention<Float32, 64>",
    "merge_attention",
    "merge_parts_backward",
    "rotary_backward<true>",
    "adaptive_norm<Bfloat16Vectors, 1>",
    "adaptive_norm_backward<Float32Vectors, 2>",
    "denoise_step<Float16Vectors>",
    "measure_outputs<OneByOne>",
    "find_factors",
    "affine_activation_backward<EightNeighbours>",
    "gated_activation<Float32Vectors>",
    "masked_squared_error_backward<Bfloat16Vectors>",
)


@pytest.fixture(scope="module")
def nvrtc() -> ModuleType:
    found: ModuleType = pytest.importorskip(
        "cupy_backends.cuda.libs.nvrtc", reason="CuPy is not installed (pip install mmkern[cupy])", exc_type=ImportError
    )
    try:
        found.getVersion()
    except Exception as error:
        pytest.skip(f"CuPy finds no NVRTC (pip install nvidia-cuda-nvrtc): {error}")
    return found


def compiled(nvrtc: ModuleType, kernels: tuple[str, ...], architecture: str, *options: str) -> tuple[bytes, list[str]]:
    """The cubin (of a virtual architecture: the PTX), and the names of the kernels in it."""
    program = nvrtc.createProgram(cuda_launch.nvrtc_source(), "mmkern.cu", [], [])
    try:
        for kernel in kernels:
            nvrtc.addNameExpression(program, kernel)
        try:
            nvrtc.compileProgram(program, (*cuda_launch.NVRTC_OPTIONS, *options, f"--gpu-architecture={architecture}"))
        except nvrtc.NVRTCError:
            pytest.fail(nvrtc.getProgramLog(program))
        names = [nvrtc.getLoweredName(program, kernel) for kernel in kernels]
        code = nvrtc.getCUBIN(program) if architecture.startswith("sm") else nvrtc.getPTX(program)
        return (code if isinstance(code, bytes) else code.encode()), names
    finally:
        nvrtc.destroyProgram(program)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code(nvrtc: ModuleType, architecture: str) -> None:
    cubin, names = compiled(nvrtc, SOME, architecture)
    assert cubin[:4] == b"\x7fELF"
    for name in names:
        assert name.encode() in cubin


@pytest.mark.slow
def test_every_kernel(nvrtc: ModuleType) -> None:
    kernels = tuple(every_family().kernels)
    ptx, names = compiled(nvrtc, kernels, "compute_90", "--Ofast-compile=max")
    assert len(set(names)) == len(kernels)
    for name in names:
        assert f".entry {name}(".encode() in ptx


def test_the_source_is_whole() -> None:
    source = cuda_launch.nvrtc_source()
    assert "#include" not in source
    assert source.count("struct LorentzExpMap0 ") == 1
