"""A process of its own for measurements, so that each environment (tuned, as found) starts from nothing.

``run`` starts it and yields what it says; ``python -m mmkern.bench.worker`` is the other end: one JSON object a line.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .measure import Measurement, Plan


@dataclass(frozen=True)
class Event:
    """One line from the worker: a stage of a case, its measurement, or its failure; ``machine`` comes first."""

    case: str = ""
    stage: str = ""
    measured: Measurement | None = None
    failure: str = ""
    machine: Mapping[str, Any] | None = None


class WorkerError(RuntimeError):
    """The worker process died."""


def run(
    suite: Path, names: Sequence[str], plan: Plan, environment: Mapping[str, str], *, peak: bool = False
) -> Iterator[Event]:
    """Measure the named cases of a suite in a new process, and its multiply-add peak where ``peak`` asks for it.

    Raises WorkerError where the process dies.
    """
    request = json.dumps({"suite": str(suite), "cases": list(names), "plan": asdict(plan), "peak": peak})
    command = [sys.executable, "-m", "mmkern.bench.worker", request]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=dict(environment), stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield _event(json.loads(line))
        except BaseException:
            process.kill()
            raise
        if process.wait():
            errors.seek(0)
            tail = "".join(errors.readlines()[-20:])
            raise WorkerError(f"the process that measures ended with status {process.returncode}\n{tail}")


def _event(fields: dict[str, Any]) -> Event:
    measured = fields.pop("measured", None)
    return Event(measured=Measurement.from_json(measured) if measured else None, **fields)


def _serve(request: dict[str, Any]) -> None:
    # Only answers go to the parent; what libraries print goes to the error stream.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        _answer(request, lambda **fields: print(json.dumps(fields), file=answers))


def _answer(request: dict[str, Any], say: Callable[..., None]) -> None:
    from . import environment
    from .case import load_suite
    from .measure import measure

    suite = load_suite(Path(request["suite"]))
    plan = Plan(**request["plan"] | {"rivals": tuple(request["plan"]["rivals"])})
    say(machine=environment.fingerprint() | {"fma_peak": environment.fma_peak() if request["peak"] else None})
    for name in request["cases"]:
        say(case=name, stage="starting")
        try:
            measured = measure(suite[name], plan, functools.partial(_say_stage, say, name))
        except Exception as error:
            traceback.print_exc()
            say(case=name, failure=f"{type(error).__name__}: {error}")
        else:
            say(case=name, measured=measured.as_json())


def _say_stage(say: Callable[..., None], name: str, text: str) -> None:
    say(case=name, stage=text)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
