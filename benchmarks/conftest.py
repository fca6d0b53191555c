"""``pytest benchmarks/``: every case checked, then timed in turns; pytest-benchmark's report, a table and the history.

A run whose allocator is not tuned restarts itself once in an environment where it is. Timings never fail a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmkern.bench import environment, history, table
from mmkern.bench.case import Case, by_name, select
from mmkern.bench.cli import measure_as_found
from mmkern.bench.measure import Measurement, Plan, measure

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mmkern", "mmkern benchmarks")
    group.addoption("--level", choices=("default", "full"), default="default", help="which cases; full has all shapes")
    group.addoption("--seconds", type=float, default=2.0, help="how long to time a case (default: 2)")
    group.addoption("--history", type=Path, default=HERE / "history", help="where runs are kept")
    group.addoption("--no-as-found", action="store_true", help="leave out the second run, without the tuned allocator")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    if not environment.is_tuned():
        capture = config.pluginmanager.getplugin("capturemanager")
        if capture:
            capture.stop_global_capturing()  # gives back the terminal, which the new process inherits
        print("benchmarks: restarting pytest under the tuned allocator", flush=True)
        environment.restart_tuned()
    config.pluginmanager.register(Session(config), "mmkern-benchmarks")


class Replay:
    """A clock for pytest-benchmark, which can only time one side after another: it reads samples taken before."""

    def load(self, samples: Sequence[float]) -> None:
        self.readings = iter([reading for sample in samples for reading in (0.0, sample)])

    def __call__(self) -> float:
        return next(self.readings)


replay = Replay()


class Session:
    """What this run measures, case by case, and what it says at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.suite: dict[str, Case] = {}
        self.measured: dict[str, Measurement] = {}
        self.errors: dict[str, Exception] = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "timed" not in metafunc.fixturenames:
            return
        cases = by_name(metafunc.module.CASES)
        self.suite |= cases
        chosen = [cases[name] for name in select(cases, self.config.getoption("--level"))]
        turns = [
            pytest.param(case, side, id=f"{case}-{side}", marks=pytest.mark.benchmark(timer=replay, group=str(case)))
            for case in chosen
            for side in case.sides
        ]
        metafunc.parametrize(("case", "side"), turns)

    def measure(self, case: Case) -> Measurement:
        name = str(case)
        if name not in self.measured and name not in self.errors:
            try:
                self.measured[name] = measure(case, Plan(seconds=self.config.getoption("--seconds")))
            except Exception as error:
                self.errors[name] = error
        if name in self.errors:
            raise self.errors[name]
        return self.measured[name]

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.measured:
            return
        if not self.config.getoption("--no-as-found"):
            terminalreporter.write_line("benchmarks: once more as found, without the tuned allocator")
            measure_as_found(HERE, self.suite, self.measured)
        run = history.new_run(environment.fingerprint(), self.measured, HERE)
        terminalreporter.write_line(f"benchmarks: kept as {history.append(self.config.getoption('--history'), run)}")
        table.console().print(table.results(self.measured.values()))


@pytest.fixture
def timed(request: pytest.FixtureRequest, benchmark: Any) -> Any:
    """``timed(case, side)`` checks and times a case once, and hands a side's samples to pytest-benchmark."""
    session: Session = request.config.pluginmanager.getplugin("mmkern-benchmarks")

    def report(case: Case, side: str) -> None:
        measured = session.measure(case)
        benchmark.name = side
        replay.load(measured.samples[side])
        benchmark.pedantic(lambda: None, rounds=len(measured.samples[side]))

    return report
