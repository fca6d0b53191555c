"""What the CUDA kernels ask of a GPU, found out without one: nvcc compiles them, and their machine code is read.

Registers, stack and static shared memory are ptxas's, to which comes the shared memory that a launch asks for; spills
are also counted as local loads and stores in the machine code. Occupancy is the share of a multiprocessor's warps that
fit, which these alone decide. Nothing here is a speed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmkern.backends import (
    cuda_attention,
    cuda_diffusion,
    cuda_gated,
    cuda_group_norm,
    cuda_launch,
    cuda_modulation,
    cuda_tensors,
)
from mmkern.reference.activations import Activation
from mmkern.reference.diffusion import MAX_HISTORY, MAX_OUTPUTS, Column
from tests.cuda_on_host.harness import Build, HostLauncher, build
from tools.gpu_report_rows import MULTIPROCESSORS, occupancy

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
BUILD = ROOT / "build" / "gpu_report"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
NVCC_FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr")
MATRIX_INSTRUCTIONS = ("HMMA", "IMMA", "HGMMA", "UTCHMMA", "UTCQMMA")


@dataclass(frozen=True)
class CudaKernel:
    """One kernel compiled for one architecture."""

    name: str
    architecture: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    local_accesses: int  # LDL and STL in the machine code
    shared_bytes: int
    threads: int  # of a block, for the occupancy
    occupancy: float
    instructions: int
    matrix_instructions: int
    global_accesses: int  # loads and stores of global memory in the machine code, and those of 16 bytes
    wide_accesses: int

    @property
    def spills(self) -> bool:
        return bool(self.spill_bytes or self.stack_bytes or self.local_accesses)


def launched_with(name: str) -> tuple[int, int]:
    """Threads of a block, and bytes of dynamic shared memory; see mmkern/backends/cuda*.py.

    The tile kernels' only size, the row kernels' smallest and commonest, attention's largest with as many channels as
    its values may have, the norms' for rows of NORM_COLUMNS.
    """
    attention = re.fullmatch(r"attention<(\w+), (\d+)>", name)
    if attention:
        dtype = next(dtype for dtype, name in cuda_attention.TYPES.items() if name == attention[1])
        plan = cuda_attention.Plan.of(dtype, 1, 1024, 512, int(attention[2]), int(attention[2]))
        return plan.warps * 32, plan.shared_bytes
    norm = NormCall.of(name)
    if norm is not None:
        rows = cuda_modulation.Plan.of(4096, norm.cols, 4096, norm.in_vectors, 512)
        return rows.threads, rows.bytes_of_sums(norm.cols) if norm.backward else 0
    return (512 if name == "sum_partials" or name.startswith("group_norm_act") else 128), 0


TYPES = {access: dtype for dtype, access in cuda_tensors.ACCESS.items()}
NORM_COLUMNS = {1: 1152, 2: 5120, 0: 16384}  # by the chunks that a thread holds


@dataclass(frozen=True)
class NormCall:
    """A call that launches one of the kernels of adaptive_norm*.cuh."""

    backward: bool
    dtype: torch.dtype
    cols: int
    in_vectors: bool

    @classmethod
    def of(cls, kernel: str) -> NormCall | None:
        name = re.fullmatch(r"adaptive_norm(_backward)?<(\w+), (\d)>", kernel)
        if name is None:
            return None
        dtype = TYPES.get(name[2])
        in_vectors = dtype is not None
        return cls(bool(name[1]), dtype or torch.float32, NORM_COLUMNS[int(name[3])] + (not in_vectors), in_vectors)

    def traffic(self, launcher: HostLauncher) -> tuple[int, int]:
        """Bytes of rows that are read and written, from a cache or from memory, and the least possible.

        Of y from x, and of the gradient of x; what rows share is read once a block beside them.
        """
        x, out = torch.ones(2, 16, self.cols, dtype=self.dtype)
        gradient, modulators = torch.empty_like(x), torch.ones(4, self.cols)
        options = [*modulators[:2], *modulators[2:, None], None, 1e-6, True]

        def run() -> None:
            if self.backward:
                cuda_modulation.ada_layer_norm_backward(out, x, *options, gradient, *[None] * 5)
            else:
                cuda_modulation.ada_layer_norm(x, *options, out)

        rows = [x, out, gradient] if self.backward else [x, out]
        with cuda_launch.replaced(launcher):
            return launcher.bytes_moved(run, rows), sum(tensor.nbytes for tensor in rows)


GROUP_POSITIONS = {5: 4096, 10: 10240, 0: 16384}  # by the pieces that a thread holds of four channels


@dataclass(frozen=True)
class GroupNormCall:
    """A call that launches one of the kernels of group_norm.cuh."""

    backward: bool
    dtype: torch.dtype
    positions: int

    @classmethod
    def of(cls, kernel: str) -> GroupNormCall | None:
        name = re.fullmatch(r"group_norm_act(_backward)?<(\w+), (\d+)>", kernel)
        if name is None:
            return None
        dtype = TYPES.get(name[2], torch.float32)
        return cls(bool(name[1]), dtype, GROUP_POSITIONS[int(name[3])] - (name[2] == "OneByOne"))

    def traffic(self, launcher: HostLauncher) -> tuple[int, int]:
        """Bytes that are read and written, from a cache or from memory, but for numbers of channels; and the least."""
        x, out, gradient = torch.ones(3, 1, 2, 4, self.positions, dtype=self.dtype)
        of_groups, of_samples = torch.ones(2, 2, 4), torch.ones(2, 1, 2, 4)
        options = [*of_groups, *of_samples, 1e-5, Activation.SILU]

        def run() -> None:
            if self.backward:
                cuda_group_norm.group_norm_act_backward(out, x, *options, gradient, *[None] * 4)
            else:
                cuda_group_norm.group_norm_act(x, *options, out)

        elements = [x, out, gradient] if self.backward else [x, out]
        with cuda_launch.replaced(launcher):
            return launcher.bytes_moved(run, elements), sum(tensor.nbytes for tensor in elements)


@dataclass(frozen=True)
class StepCall:
    """A call that launches one of the kernels of denoise_step.cuh, with all that there is but noise of its own."""

    dtype: torch.dtype
    output_dtype: torch.dtype
    cols: int

    @classmethod
    def of(cls, kernel: str) -> StepCall | None:
        name = re.fullmatch(r"denoise_step<(\w+)>", kernel)
        if name is None:
            return None
        dtype = TYPES.get(name[1], torch.float32)
        return cls(dtype, torch.bfloat16 if name[1] == "EightNeighbours" else dtype, 64 + (name[1] == "OneByOne"))

    def traffic(self, launcher: HostLauncher) -> tuple[int, int]:
        """Bytes that are read and written but for a few numbers a sample, and the least possible."""
        shape = 2, 16, self.cols
        x, *others = torch.ones(1 + MAX_HISTORY + 6, *shape, dtype=self.dtype)
        outputs = torch.ones(MAX_OUTPUTS, *shape, dtype=self.output_dtype)
        masks, weights = torch.ones(2, *shape), torch.ones(2, 2 * MAX_OUTPUTS)
        history, (noise, known, known_noise), results = others[:MAX_HISTORY], others[MAX_HISTORY:-3], others[-3:]
        given = [x, *outputs, masks[0], *history, noise, None, masks[1], known, known_noise]
        numbers = [weights, None, torch.ones(2, len(Column)), torch.ones(2, 2)]
        elements = [x, *others, *outputs, *masks]
        with cuda_launch.replaced(launcher):
            moved = launcher.bytes_moved(lambda: cuda_diffusion.corrected_step(*given, *numbers, *results), elements)
        return moved, sum(tensor.nbytes for tensor in elements)


@dataclass(frozen=True)
class ElementCall:
    """A call that launches one of the kernels of affine_activation.cuh, gated_activation.cuh or denoising_loss.cuh."""

    op: str
    backward: bool
    dtype: torch.dtype
    other_dtype: torch.dtype  # of what an element has beside the first tensor
    cols: int

    @classmethod
    def of(cls, kernel: str) -> ElementCall | None:
        name = re.fullmatch(r"(affine_activation|gated_activation|masked_squared_error)(_backward)?<(\w+)>", kernel)
        if name is None:
            return None
        dtype = TYPES.get(name[3], torch.float32)
        other = torch.bfloat16 if name[3] == "EightNeighbours" else dtype
        return cls(name[1], bool(name[2]), dtype, other, 64 + (name[3] == "OneByOne"))

    def traffic(self, launcher: HostLauncher) -> tuple[int, int]:
        """Bytes that are read and written but for what rows and samples share, and the least possible."""
        run, elements = getattr(self, f"_{self.op}")()
        with cuda_launch.replaced(launcher):
            return launcher.bytes_moved(run, elements), sum(tensor.nbytes for tensor in elements)

    def _tensors(self, count: int) -> Sequence[torch.Tensor]:
        return torch.ones(count, 2, 16, self.cols, dtype=self.dtype).unbind()

    def _affine_activation(self) -> tuple[Callable[[], None], list[torch.Tensor]]:
        """Of a scale that rows share, and a shift for each element."""
        x, out, dx = self._tensors(3)
        scale, dscale, dshift = torch.ones(2, 1, self.cols), torch.ones(2, 1, self.cols), torch.ones(x.shape)
        given = x, scale, torch.ones(x.shape, dtype=self.other_dtype), 1.0, Activation.SILU
        if not self.backward:
            return lambda: cuda_gated.affine_activation(*given, out), [x, given[2], out]
        gradients = dx, dscale, dshift
        return lambda: cuda_gated.affine_activation_backward(out, *given, *gradients), [out, x, given[2], dx, dshift]

    def _gated_activation(self) -> tuple[Callable[[], None], list[torch.Tensor]]:
        out, *halves = self._tensors(5)
        x, dx = torch.cat(halves[:2], -1), torch.cat(halves[2:], -1)
        if not self.backward:
            return lambda: cuda_gated.gated_activation(x, Activation.GELU, out), [x, out]
        return lambda: cuda_gated.gated_activation_backward(out, x, Activation.GELU, dx), [out, x, dx]

    def _masked_squared_error(self) -> tuple[Callable[[], None], list[torch.Tensor]]:
        """Of a mask for each element."""
        pred, dpred = self._tensors(2)
        target, dtarget = torch.ones(2, *pred.shape, dtype=self.other_dtype)
        sums, mask = torch.ones(2), torch.ones(pred.shape)
        if not self.backward:
            return lambda: cuda_diffusion.masked_squared_error(pred, target, mask, sums), [pred, target, mask]
        gradients = [dpred, dtarget]
        return (
            lambda: cuda_diffusion.masked_squared_error_backward(sums, pred, target, mask, *gradients),
            [pred, target, mask, *gradients],
        )


def find_tool(name: str) -> str:
    """A tool of the CUDA toolkit, or of the copy that Triton brings."""
    found = shutil.which(name)
    if found:
        return found
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        candidate = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        if candidate.exists():
            return str(candidate)
    raise FileNotFoundError(f"{name} is neither in the CUDA toolkit nor in Triton's package")


def families() -> list[Path]:
    return sorted((SOURCES / "cuda").glob("*.cu"))


def compile_cubin(source: Path, architecture: str) -> tuple[Path, str]:
    """The cubin and what ptxas said; both kept until a source changes."""
    key = hashlib.sha256(" ".join((architecture, *NVCC_FLAGS)).encode())
    for path in sorted([*SOURCES.glob("*.h"), *(SOURCES / "cuda").iterdir()]):
        key.update(path.read_bytes())
    cubin = BUILD / f"{source.stem}-{architecture}-{key.hexdigest()[:16]}.cubin"
    log = cubin.with_suffix(".txt")
    if not (cubin.exists() and log.exists()):
        BUILD.mkdir(parents=True, exist_ok=True)
        for old in BUILD.glob(f"{source.stem}-{architecture}-*"):
            old.unlink()
        command = [
            "nvcc",
            *NVCC_FLAGS,
            f"-arch={architecture}",
            "-Xptxas",
            "-v",
            "-cubin",
            "-o",
            str(cubin),
            str(source),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        log.write_text(done.stderr, encoding="utf-8")
    return cubin, log.read_text(encoding="utf-8")


def readable(mangled: Sequence[str]) -> dict[str, str]:
    """The names that mmkern/backends uses: void mmkern::device::rows<...>(RowArgs) is rows<...>."""
    plain = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout.splitlines()
    names = [re.sub(r"\(mmkern::device::\w+\)$", "", name.removeprefix("void ")) for name in plain]
    return {key: name.replace("mmkern::device::", "") for key, name in zip(mangled, names, strict=True)}


_RESOURCES = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def instruction_counts(cubin: Path) -> dict[str, Counter[str]]:
    """How often each kernel's machine code has each opcode, such as LDG.E.128."""
    listing = subprocess.run([find_tool("cuobjdump"), "-sass", str(cubin)], capture_output=True, text=True, check=True)
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in listing.stdout.splitlines():
        header = re.match(r"\s*Function : (\w+)", line)
        if header:
            current = counts.setdefault(header[1], Counter())
            continue
        opcode = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line)
        if opcode:
            current[opcode[1]] += 1
    return counts


def count(opcodes: Counter[str], *names: str) -> int:
    """Of all opcodes that begin so, up to a dot."""
    return sum(n for opcode, n in opcodes.items() if opcode.split(".")[0] in names)


def kernels(architectures: Sequence[str] = ARCHITECTURES) -> list[CudaKernel]:
    """Every CUDA kernel on every architecture."""
    found = []
    for source in families():
        for architecture in architectures:
            cubin, log = compile_cubin(source, architecture)
            counts = instruction_counts(cubin)
            entries = list(_RESOURCES.finditer(log))
            names = readable([entry["name"] for entry in entries])
            for entry in entries:
                name, registers = names[entry["name"]], int(entry["registers"])
                shared = re.search(r"(\d+) bytes smem", entry["rest"])
                threads, dynamic_bytes = launched_with(name)
                shared_bytes = dynamic_bytes + (int(shared[1]) if shared else 0)
                opcodes = counts[entry["name"]]
                found.append(
                    CudaKernel(
                        name=name,
                        architecture=architecture,
                        registers=registers,
                        stack_bytes=int(entry["stack"]),
                        spill_bytes=int(entry["stores"]) + int(entry["loads"]),
                        local_accesses=count(opcodes, "LDL", "STL"),
                        shared_bytes=shared_bytes,
                        threads=threads,
                        occupancy=occupancy(
                            MULTIPROCESSORS[architecture.rstrip("a")], registers, shared_bytes, threads
                        ),
                        instructions=opcodes.total(),
                        matrix_instructions=count(opcodes, *MATRIX_INSTRUCTIONS),
                        global_accesses=count(opcodes, "LDG", "STG"),
                        wide_accesses=sum(opcodes[name] for name in opcodes if re.match(r"(LDG|STG)\b.*\.128", name)),
                    )
                )
    return sorted(found, key=lambda k: (k.name, ARCHITECTURES.index(k.architecture)))


def traffic(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Bytes moved, and the least possible, of the kernels whose accesses the host harness counts."""
    counts: dict[str, tuple[int, int]] = {}
    kinds: tuple[type[NormCall | GroupNormCall | StepCall | ElementCall], ...]
    kinds = NormCall, GroupNormCall, StepCall, ElementCall
    for source in ("modulation.cpp", "diffusion.cpp"):
        launcher = HostLauncher(build(source, Build.counted))
        for name, kind in itertools.product(names, kinds):
            call = kind.of(name)
            if call is not None and name in launcher.kernels:
                counts[name] = call.traffic(launcher)
    return counts
