"""The history: one JSON file a run, and the comparison of two revisions."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .measure import Measurement

SCHEMA = 1


@dataclass(frozen=True)
class Run:
    """What one run measured, where, and of which revision ("+" marks uncommitted changes)."""

    revision: str
    time: str
    machine: Mapping[str, Any]
    cases: Mapping[str, Measurement]

    def as_json(self) -> dict[str, Any]:
        cases = {name: measured.as_json() for name, measured in self.cases.items()}
        head = {"schema": SCHEMA, "revision": self.revision, "time": self.time, "machine": dict(self.machine)}
        return head | {"cases": cases}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Run:
        cases = {name: Measurement.from_json(case) for name, case in fields["cases"].items()}
        return cls(fields["revision"], fields["time"], fields["machine"], cases)


def new_run(machine: Mapping[str, Any], cases: Mapping[str, Measurement], checkout: Path) -> Run:
    return Run(revision(checkout), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), machine, cases)


def append(folder: Path, run: Run) -> Path:
    """Write a run as a file of its own, whole or not at all. The folder tells git to ignore it."""
    folder.mkdir(parents=True, exist_ok=True)
    ignore = folder / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n")
    stamp = run.time.translate(str.maketrans("", "", "-:"))
    target = folder / f"{stamp}-{time.time_ns() % 10**9:09d}-{run.revision}.json"
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False) as file:
        json.dump(run.as_json(), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, target)
    return target


def load(folder: Path) -> list[Run]:
    """Every run of a folder, oldest first. Raises ValueError for a file that is none."""
    runs = []
    for path in sorted(folder.glob("*.json")):
        try:
            fields = json.loads(path.read_text())
            if fields["schema"] == SCHEMA:
                runs.append(Run.from_json(fields))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a run of the benchmarks: {error}") from error
    return runs


def revision(checkout: Path, name: str = "HEAD") -> str:
    """The short hash of a revision, with "+" for HEAD with uncommitted changes; "unknown" outside git."""
    found = _git(checkout, "rev-parse", "--verify", "--quiet", "--short=12", f"{name}^{{commit}}")
    if not found:
        return "unknown"
    return found + ("+" if name == "HEAD" and _git(checkout, "status", "--porcelain") else "")


def _git(checkout: Path, *command: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(checkout), *command], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def runs_of(runs: list[Run], name: str, checkout: Path) -> Run:
    """All cases of a revision, each from its latest run. ``name`` is what git takes, or a revision as recorded.

    Raises ValueError where the history has no such revision.
    """
    resolved = revision(checkout, name)
    hashes = tuple(h.rstrip("+") for h in (name, resolved if resolved != "unknown" else name))
    found = [run for run in runs if run.revision.startswith(hashes)]
    if not found:
        known = ", ".join(dict.fromkeys(run.revision for run in runs)) or "none"
        raise ValueError(f"the history has no run of {name}; it has {known}")
    cases: dict[str, Measurement] = {}
    for run in found:
        cases |= run.cases
    return Run(found[-1].revision, found[-1].time, found[-1].machine, cases)
