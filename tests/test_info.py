"""``python -m mmkern info`` tells what is there, what is not, and why."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmkern
from mmkern import info
from mmkern.__main__ import main
from mmkern.backends import BACKENDS

PACKAGE = Path(mmkern.__file__).parent


# `python -m mmkern`, but for one module: an editable install would find it whatever the path says.
WITHOUT_EXTENSION = """
import runpy, sys
sys.modules["mmkern._C"] = None
runpy.run_module("mmkern", run_name="__main__", alter_sys=True)
"""


def run_info(folder: Path, *command: str) -> str:
    """The command's output, with the package taken from ``folder``."""
    finished = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "300"},
        capture_output=True,
        text=True,
        check=True,
    )
    return finished.stdout


@pytest.fixture(scope="module")
def without_extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an install without a compiler leaves: the package, no mmkern._C, and the reason on record."""
    folder = tmp_path_factory.mktemp("no_compiler")
    shutil.copytree(PACKAGE, folder / "mmkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    record = {"mmkern._C": {"built": False, "detail": "MissingToolError: no C++ compiler: g++ was not found"}}
    (folder / "mmkern" / "_build.json").write_text(json.dumps(record))
    return folder


@pytest.mark.slow
def test_runs_as_a_command() -> None:
    text = run_info(PACKAGE.parent, "-m", "mmkern", "info")
    assert mmkern.__version__ in text
    assert "backend reference" in text


@pytest.mark.slow
def test_says_what_is_missing_and_why(without_extension: Path) -> None:
    text = run_info(without_extension, "-c", WITHOUT_EXTENSION, "info")
    lines = {line.strip().split("  ")[0]: line for line in text.splitlines() if line.strip()}
    assert "import of mmkern._C halted" in lines["CPU kernels"]
    assert "mmkern._C is not built" in lines["backend cpu"]
    assert "no: MissingToolError: no C++ compiler: g++ was not found" in lines["built mmkern._C"]
    assert "available" in lines["backend reference"]


@pytest.mark.slow
def test_json_of_an_install_without_compiler(without_extension: Path) -> None:
    found = json.loads(run_info(without_extension, "-c", WITHOUT_EXTENSION, "info", "--json"))
    assert found["isa"].startswith("none: ")
    assert "mmkern._C is not built" in found["backends"]["cpu"]
    assert found["build"]["mmkern._C"]["built"] is False


def test_json_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == mmkern.__version__
    assert found["torch"].startswith(torch.__version__)
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert found["backends"] == {backend.name: backend.missing() for backend in BACKENDS} | {"reference": None}
    assert "allocator" in found["memory"]
    if found["backends"]["cpu"] is None:
        assert found["isa"]["in_use"] in found["isa"]["built"]


def test_plain_text_where_rich_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert info.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["mmkern", mmkern.__version__]
    starts = {len(line) - len(line.lstrip()) for line in lines if line.startswith(" ")}
    assert len(starts) <= 3  # continued values stay in their column


def test_no_record_of_a_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(info, "BUILD_RECORD", tmp_path / "_build.json")
    assert "not installed" in str(info.collect()["build"])


def test_extras_with_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = [
        "torch>=2.9",
        'pytest==9; extra == "bench"',
        "no-such-package[all]; python_version < '4' and extra == 'gpu'",
        'mmkern[bench]; extra == "dev"',
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)
    assert info.collect()["extras"] == {"bench": {"pytest": pytest.__version__}, "gpu": {"no-such-package": None}}


def test_a_copy_that_was_not_installed_knows_no_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert "not installed" in str(info.collect()["extras"])


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["infos"])
    assert stopped.value.code == 2
    assert "info" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "demo", "bench"])
def test_each_command_has_its_own_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"python -m mmkern {command}" in capsys.readouterr().out
