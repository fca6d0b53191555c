"""The Triton kernels against the numerics contract, run by Triton's interpreter in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from tests.triton_interpreter.names import CHECKS

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
PARTS = 2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each check of ``tests/triton_interpreter/worker.py`` said; the workers run once, also under xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    found: dict[str, str] = {}
    with FileLock(folder / "interpreter.lock"):
        files = [folder / f"interpreter-{part}.json" for part in range(PARTS)]
        if not all(file.exists() for file in files):
            _run(files)
        for file in files:
            found |= json.loads(file.read_text())
    return found


def _run(files: list[Path]) -> None:
    command = [sys.executable, "-m", "tests.triton_interpreter.worker"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | {"TRITON_INTERPRET": "1"}
    workers = [
        subprocess.Popen(
            [*command, str(file), str(part), str(PARTS)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part, file in enumerate(files)
    ]
    outputs = [worker.communicate(timeout=600)[0] for worker in workers]
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output


@pytest.mark.parametrize("check", CHECKS)
def test_triton_interpreter(check: str, results: dict[str, str]) -> None:
    assert not results[check], results[check]
