"""What is available here and why the rest is not: ``python -m mmkern info``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import mmkern
from mmkern import memory
from mmkern.backends import BACKENDS

BUILD_RECORD = Path(__file__).with_name("_build.json")  # written by setup.py
_REQUIREMENT = re.compile(r"""(?P<package>[\w.-]+).*;.*extra == ["'](?P<extra>[\w-]+)["']""")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mmkern info", description="What is available here, and why the rest is not."
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(argv)
    found = collect()
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        _show(list(_rows(found)))
    return 0


def collect() -> dict[str, Any]:
    """Everything that ``info`` shows, as plain data. A reason why something is missing is a string."""
    return {
        "version": mmkern.__version__,
        "python": f"{platform.python_version()}, {platform.platform()}",
        "torch": f"{torch.__version__}{_torch_toolkit()}",
        "cpu": _cpu_name(),
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()},
        "isa": _isa(),
        "backends": {backend.name: backend.missing() for backend in BACKENDS} | {"reference": None},
        "build": _build_record(),
        "gpu": _gpus(),
        "memory": memory.describe(),
        "extras": _extras(),
    }


def _torch_toolkit() -> str:
    toolkit = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return f", ROCm {torch.version.hip}" if torch.version.hip else toolkit


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()


def _isa() -> dict[str, Any] | str:
    try:
        extension = importlib.import_module("mmkern._C")
    except ImportError as error:
        return f"none: {error}"
    return {
        "in_use": extension.isa,
        "built": list(extension.isa_levels),
        "MMKERN_CPU_ISA": os.environ.get("MMKERN_CPU_ISA"),
    }


def _build_record() -> dict[str, Any] | str:
    if not BUILD_RECORD.exists():
        return f"no record ({BUILD_RECORD.name} is written by an install; this copy was not installed)"
    record: dict[str, Any] = json.loads(BUILD_RECORD.read_text())
    return record


def _gpus() -> list[str] | str:
    if importlib.util.find_spec("pynvml") is None:
        if torch.cuda.is_available():
            return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return "torch finds none; nvidia-ml-py, which knows more, is not installed (pip install mmkern[gpu])"
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return f"NVML: {error}"
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    driver = nvml.nvmlSystemGetDriverVersion()
    found = [
        f"{nvml.nvmlDeviceGetName(each)}, {nvml.nvmlDeviceGetMemoryInfo(each).total / 2**30:.0f} GiB, "
        f"sm_{''.join(map(str, nvml.nvmlDeviceGetCudaComputeCapability(each)))}, driver {driver}"
        for each in handles
    ]
    nvml.nvmlShutdown()
    return found


def _extras() -> dict[str, dict[str, str | None]] | str:
    """Each optional extra's packages with their versions; None where one is missing."""
    try:
        requirements = importlib.metadata.requires("mmkern") or []
    except importlib.metadata.PackageNotFoundError:
        return "unknown: this copy was not installed, so nothing lists its extras"
    extras: dict[str, dict[str, str | None]] = {}
    for requirement in requirements:
        match = _REQUIREMENT.fullmatch(requirement)
        if match and match["package"] != "mmkern":
            extras.setdefault(match["extra"], {})[match["package"]] = _installed_version(match["package"])
    return extras


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- How it looks ----------------------------------------------------------------------------------------------------


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "mmkern", found["version"]
    yield "Python", found["python"]
    yield "torch", found["torch"]
    yield "CPU", f"{found['cpu']}, {found['threads']['cores']} cores, torch runs {found['threads']['torch']} threads"
    isa = found["isa"]
    yield "CPU kernels", isa if isinstance(isa, str) else _isa_text(isa)
    for name, missing in found["backends"].items():
        yield f"backend {name}", missing or "available"
    build = found["build"]
    if isinstance(build, str):
        yield "built", build
    else:
        for name, outcome in build.items():
            yield f"built {name}", f"{'yes' if outcome['built'] else 'no'}: {outcome['detail']}"
    gpu = found["gpu"]
    yield "GPU", gpu if isinstance(gpu, str) else "\n".join(gpu)
    yield "memory", found["memory"]
    extras = found["extras"]
    if isinstance(extras, str):
        yield "extras", extras
    else:
        for name, packages in extras.items():
            yield f"extra {name}", ", ".join(f"{each} {version or 'MISSING'}" for each, version in packages.items())


def _isa_text(isa: dict[str, Any]) -> str:
    override = isa["MMKERN_CPU_ISA"]
    because = f" (MMKERN_CPU_ISA={override})" if override else ""
    return f"{isa['in_use']} in use{because}; built: {', '.join(isa['built'])}"


def _show(rows: Sequence[tuple[str, str]]) -> None:
    if importlib.util.find_spec("rich") is None:
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"{name:<{width}}  " + value.replace("\n", "\n" + " " * (width + 2)))
        return
    rich_table = importlib.import_module("rich.table")
    table = rich_table.Table(show_header=False, box=importlib.import_module("rich.box").SIMPLE)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(importlib.import_module("rich.markup").escape, row))
    importlib.import_module("rich.console").Console().print(table)
