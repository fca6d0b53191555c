"""All that needs a GPU, in one command: correctness on each backend, compute-sanitizer, timings; one result file.

Writes gpu-results/<device>.json. Without a device it says so and returns 1.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
FAMILIES = ("hyperbolic", "attention", "attention_rows", "modulation", "gated", "diffusion")
SUITES = tuple(f"tests/test_{family}.py" for family in FAMILIES)
TRITON_ALONE = tuple(
    f"tests/test_{family}.py"
    for family in (
        "attention_varlen",
        "multi_source",
        "group_norm",
        "contrastive",
        "quantization",
        "retrieval",
        "vocabulary",
    )
)
_OF_GPUS = "(test_forward or test_backward) and not float64"
SANITIZED = "float32 and (9x123 or many or bias)"
SHAPES = ((16384, 512), (2048, 512), (256, 128))
TIMED = (
    "lorentz_exp_map0",
    "lorentz_log_map0",
    "lorentz_distance",
    "lorentz_entailment_loss",
    "lorentz_pairwise_distance",
)


def main() -> int:
    if not torch.cuda.is_available():
        print("make gpu: no CUDA device here")
        return 1
    name = torch.cuda.get_device_name()
    results: dict[str, Any] = {
        "device": name,
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "revision": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }
    for backend in ("triton", "cuda"):
        suites = (*SUITES, *TRITON_ALONE) if backend == "triton" else SUITES
        results[f"correctness {backend}"] = _pytest(*suites, "-k", _OF_GPUS, "--device", "cuda", "--backend", backend)
    results["compute-sanitizer"] = _sanitize()
    results["timings, ms"] = [row for backend in ("triton", "cuda") for row in _timings(backend)]
    target = ROOT / "gpu-results" / f"{name.replace(' ', '-')}.json"
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, target)
    print(json.dumps(results, indent=1))
    return 0 if all(results[key]["passed"] for key in results if key.startswith(("correctness", "compute"))) else 1


def _run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return {"passed": done.returncode == 0, "tail": (done.stdout + done.stderr).splitlines()[-8:]}


def _pytest(*options: str) -> dict[str, Any]:
    return _run([sys.executable, "-m", "pytest", "-q", *options])


def _sanitize() -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer")
    if not tool:
        return {"passed": False, "tail": ["compute-sanitizer was not found"]}
    test = [sys.executable, "-m", "pytest", "-q", *SUITES, "--device", "cuda", "--backend", "cuda"]
    return _run([tool, "--error-exitcode", "1", *test, "-k", f"(test_forward or test_backward) and {SANITIZED}"])


def _timings(backend: str) -> list[dict[str, Any]]:
    from triton.testing import do_bench

    import mmkern
    from mmkern import ops
    from mmkern.reference import hyperbolic as reference

    rows = []
    for op in TIMED:
        for n, d in SHAPES:
            if "pairwise" in op and n > 4096:
                continue
            x, y = torch.randn(2, n, d, device="cuda") / d**0.5
            args = (x, 1.0) if op.endswith("map0") else (x, y, 1.0)
            options = (0.1,) if "entailment" in op else ()
            fused, eager = getattr(ops, op), getattr(reference, op)
            compiled = torch.compile(eager)
            row = {"op": op, "shape": [n, d], "backend": backend}
            with mmkern.use_backend(backend):
                row["mmkern"] = do_bench(lambda f=fused, a=args: f(*a))
            row["reference"] = do_bench(lambda f=eager, a=(*args, *options): f(*a))
            row["torch.compile"] = do_bench(lambda f=compiled, a=(*args, *options): f(*a))
            row["clone"] = do_bench(x.clone)
            rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
