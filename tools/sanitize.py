"""Build the CPU kernels and their bindings under ASan and UBSan, in a copy of the tree, and run their suites there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPY = ROOT / "build" / "sanitize"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1"
FAMILIES = (
    "attention",
    "attention_rows",
    "attention_varlen",
    "multi_source",
    "contrastive",
    "ego_nce",
    "alignment_calibration",
    "decoding",
    "absorbing",
    "masked_decode",
    "probabilities",
    "ctc",
    "ctc_align",
    "ctc_beam",
    "edit_distance",
    "quantization",
    "residual_quantization",
    "codebooks",
    "retrieval",
    "vocabulary",
    "hyperbolic",
    "modulation",
    "gated",
    "group_norm",
    "diffusion",
)
SUITES = tuple(f"tests/test_{name}.py" for name in (*FAMILIES, "memory", "bindings", "dispatch"))


def main() -> int:
    listing = ["git", "ls-files", "-co", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in files.stdout.splitlines():
        target = COPY / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != (ROOT / name).read_bytes():
            shutil.copy2(ROOT / name, target)
    environment = os.environ | {"MMKERN_CXX_FLAGS": FLAGS, "MMKERN_NO_CUDA": "1", "MMKERN_REQUIRE_NATIVE": "1"}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=COPY, env=environment, check=True)
    libraries = [_runtime(name) for name in ("libasan.so", "libubsan.so")]
    environment |= {
        "PYTHONPATH": str(COPY),
        "LD_PRELOAD": ":".join(libraries),
        # Python and torch keep memory at exit; only errors count.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", *SUITES, *sys.argv[1:]]
    return subprocess.run(command, cwd=COPY, env=environment, check=False).returncode


def _runtime(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return str(Path(found.stdout.strip()).resolve())


if __name__ == "__main__":
    sys.exit(main())
