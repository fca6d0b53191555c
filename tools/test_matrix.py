"""Run the suite against the oldest supported torch, the pinned one and the newest, with the one build that is there.

Each torch gets a virtual environment of its own under build/matrix; mmkern itself is taken from this tree, not rebuilt.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
REQUIREMENTS = (ROOT / "requirements-test.txt").read_text()
PINNED = re.search(r"^torch==(.+)$", REQUIREMENTS, re.MULTILINE)
TORCHES = ("2.9.1", PINNED[1] if PINNED else "", "2.14.1")
NEEDS = ("numpy", "pytest", "pytest-timeout", "hypothesis", "mpmath")
SUITES = tuple(f"tests/test_{name}.py" for name in ("attention", "hyperbolic", "dispatch", "memory"))


def run(torch: str) -> int:
    where = ROOT / "build" / "matrix" / torch
    python = where / "bin" / "python"
    if not (where / "ready").exists():
        venv.create(where, with_pip=True, clear=True)
        pins = [line for line in REQUIREMENTS.splitlines() if line.partition("==")[0] in NEEDS]
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"torch=={torch}"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *pins], check=True)
        (where / "ready").touch()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    suite = [python, "-m", "pytest", "-q", *SUITES, *sys.argv[1:]]
    return subprocess.run(suite, cwd=ROOT, env=environment, check=False).returncode


def main() -> int:
    results = {torch: run(torch) for torch in TORCHES}
    for torch, code in results.items():
        print(f"torch {torch}: {'passed' if code == 0 else f'failed ({code})'}")
    return max(results.values())


if __name__ == "__main__":
    sys.exit(main())
