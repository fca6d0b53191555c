"""Results that the last cache does not hold are stored past the caches: here it holds nothing, so all are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("modulation", "diffusion", "gated", "group_norm", "hyperbolic")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_past_the_caches(family: str) -> None:
    """In a process of its own, which looks once at how large the cache is."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"tests/test_{family}.py", "-k", "test_forward or test_backward"],
        env=os.environ | {"MMKERN_LAST_CACHE_BYTES": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
