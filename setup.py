"""Builds mmkern._C (every ISA level of the CPU kernels) and, where nvcc is found, mmkern._cuda.

A compiler that fails or is missing never breaks the install: the reason goes to mmkern/_build.json, `python -m mmkern
info` shows it, and the pure-Python reference remains. MMKERN_REQUIRE_NATIVE=1 turns such a failure into an error.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
X86 = platform.machine() in ("x86_64", "AMD64")
# Best last; the binding picks the last one that the CPU runs.
ISA_LEVELS = (
    {"v2": "-march=x86-64-v2", "avx2": "-march=x86-64-v3", "avx512": "-march=x86-64-v4"} if X86 else {"baseline": ""}
)
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -ffp-contract=off -Wall -Wextra"
CUDA_ARCHITECTURES = "80;90a;100+PTX"  # as in TORCH_CUDA_ARCH_LIST: +PTX serves newer devices


class Ninja:
    """A build.ninja in the making."""

    def __init__(self, build: Path) -> None:
        self.build = build
        self.lines: list[str] = []

    def rule(self, name: str, command: str, depfile: bool) -> None:
        self.lines += [f"rule {name}", f"  command = {command}"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: Path, tag: str, flags: str) -> str:
        output = f"{source.stem}.{tag}.o"
        self.lines += [f"build {output}: {rule} {_escape(source)}", f"  flags = {flags}"]
        return output

    def link(self, rule: str, target: Path, objects: list[str]) -> None:
        self.lines.append(f"build {_escape(target)}: {rule} {' '.join(objects)}")

    def run(self) -> None:
        self.build.mkdir(parents=True, exist_ok=True)
        (self.build / "build.ninja").write_text("\n".join(self.lines) + "\n")
        done = subprocess.run([_ninja(), "-C", str(self.build)], stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout, file=sys.stderr)
        if done.returncode:
            errors = [line for line in done.stdout.splitlines() if "error" in line.lower()]
            raise RuntimeError("the compiler failed: " + "; ".join(errors[:3] or done.stdout.splitlines()[-3:]))


def _escape(path: Path) -> str:
    return str(path.resolve()).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja() -> str:
    found = shutil.which("ninja")
    if found:
        return found
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


def _include_flags() -> str:
    import pybind11

    return f"-isystem {shlex.quote(pybind11.get_include())} -isystem {shlex.quote(sysconfig.get_paths()['include'])}"


class BuildNative(build_ext):
    """Each extension in turn; what happened is recorded, not raised."""

    def run(self) -> None:
        report = {}
        for extension in self.extensions:
            try:
                report[extension.name] = {"built": True, "detail": self._build(extension.name)}
            except Exception as error:
                if os.environ.get("MMKERN_REQUIRE_NATIVE") == "1" and not isinstance(error, MissingToolError):
                    raise
                report[extension.name] = {"built": False, "detail": f"{type(error).__name__}: {error}"}
                print(f"mmkern: {extension.name} was not built: {error}", file=sys.stderr)
        package = ROOT if self.inplace else Path(self.build_lib)
        (package / "mmkern").mkdir(parents=True, exist_ok=True)
        (package / "mmkern" / "_build.json").write_text(json.dumps(report, indent=1) + "\n")

    def _build(self, name: str) -> str:
        target = Path(self.get_ext_fullpath(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the sources, so that a second build compiles only what changed.
        ninja = Ninja(ROOT / "build" / "native" / name.rpartition(".")[2].strip("_"))
        return {"mmkern._C": _cpu, "mmkern._cuda": _cuda}[name](ninja, target)


class MissingToolError(RuntimeError):
    pass


def _cpu(ninja: Ninja, target: Path) -> str:
    compiler = os.environ.get("CXX", "g++")
    if sys.platform != "linux":
        raise MissingToolError(f"the CPU kernels are built on Linux; {sys.platform} runs the reference")
    if not shutil.which(shlex.split(compiler)[0]):
        raise MissingToolError(f"no C++ compiler: {compiler} was not found (set CXX, or install g++)")
    extra = os.environ.get("MMKERN_CXX_FLAGS", "")
    ninja.rule("cxx", f"{compiler} {CXX_FLAGS} {extra} $flags -MMD -MF $out.d -c $in -o $out", depfile=True)
    ninja.rule("link", f"{compiler} -shared -fopenmp {extra} $in -o $out", depfile=False)
    objects = []
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        if source.stem == "pool":  # not a kernel: compiled once
            objects.append(ninja.compile("cxx", source, "o", ""))
            continue
        for level, march in ISA_LEVELS.items():
            objects.append(ninja.compile("cxx", source, level, f"{march} -DMMKERN_ISA={level}"))
    each_level = "".join(f" F({level})" for level in ISA_LEVELS)
    for source in (ROOT / "bindings" / "cpu.cpp", ROOT / "bindings" / "memory.cpp"):
        flags = f"{_include_flags()} '-DMMKERN_FOR_EACH_LEVEL(F)={each_level}'"
        objects.append(ninja.compile("cxx", source, "binding", flags))
    ninja.link("link", target, objects)
    ninja.run()
    return f"{compiler}, levels {', '.join(ISA_LEVELS)}"


def _cuda(ninja: Ninja, target: Path) -> str:
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if not nvcc:
        raise MissingToolError("nvcc was not found; with CuPy installed the same kernels are compiled at run time")
    architectures = os.environ.get("MMKERN_CUDA_ARCHITECTURES", CUDA_ARCHITECTURES).split(";")
    codes = " ".join(_gencode(architecture) for architecture in architectures)
    ninja.rule(
        "nvcc",
        f"{nvcc} -std=c++17 -O3 --expt-relaxed-constexpr {codes} -Xcompiler -fPIC,-fvisibility=hidden "
        "$flags -MMD -MF $out.d -c $in -o $out",
        depfile=True,
    )
    ninja.rule("link", f"{nvcc} -shared -cudart static $in -o $out", depfile=False)
    objects = [ninja.compile("nvcc", source, "cuda", "") for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    objects.append(ninja.compile("nvcc", ROOT / "bindings" / "cuda.cpp", "binding", _include_flags()))
    ninja.link("link", target, objects)
    ninja.run()
    return f"{nvcc}, sm_{', sm_'.join(architectures)}"


def _gencode(architecture: str) -> str:
    number, _, also = architecture.partition("+")
    code = f"-gencode arch=compute_{number},code=sm_{number}"
    return f"{code} -gencode arch=compute_{number},code=compute_{number}" if also == "PTX" else code


extensions = [Extension("mmkern._C", sources=[])]
if os.environ.get("MMKERN_NO_CUDA") != "1":
    extensions.append(Extension("mmkern._cuda", sources=[]))

setup(
    packages=[*find_packages(include=["mmkern", "mmkern.*"]), "mmkern.kernels", "mmkern.csrc", "mmkern.csrc.cuda"],
    ext_modules=extensions,
    cmdclass={"build_ext": BuildNative},
)
