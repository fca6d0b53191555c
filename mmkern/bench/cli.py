"""``python -m mmkern bench``: measure, show, draw, keep, compare, and hold to the floors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmkern.extras import MissingExtraError, require

from . import environment, floors, history, metrics, table, worker
from .case import Case, load_suite, select
from .measure import RIVALS, Measurement, Plan

if TYPE_CHECKING:
    from rich.console import Console

AS_FOUND = Plan(rivals=("eager",), seconds=0.5, check=False)


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    try:
        if options.compare:
            return _compare(options)
        return _check(options) if options.check else _measure(options)
    except (ValueError, OSError, MissingExtraError, worker.WorkerError) as error:
        print(f"python -m mmkern bench: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mmkern bench",
        description="Check each op, then time it beside PyTorch, torch.compile and other libraries, in turns.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="measure what the floor file names; status 1 below a floor")
    what.add_argument(
        "--set-floors", action="store_true", help="measure it, and set its floors to nine tenths, or the goal"
    )
    what.add_argument("--compare", nargs=2, metavar=("REV_A", "REV_B"), help="two revisions in the history")
    parser.add_argument("--level", choices=("default", "full"), default="default", help="full has all shapes")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--rivals", default=",".join(RIVALS), help="any of eager,compile,peer (default: all)")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to time a case (default: 2)")
    parser.add_argument("--no-as-found", action="store_true", help="leave out the run without the tuned allocator")
    parser.add_argument("--suite", type=Path, default=_default_suite(), help="folder with bench_*.py and floors.json")
    parser.add_argument("--history", type=Path, help="where runs are kept (default: history in the suite's folder)")
    parser.add_argument("--picture", type=Path, default=Path("bench.png"), help="where to draw (default: bench.png)")
    return parser


def _default_suite() -> Path:
    beside_package = Path(__file__).parents[2] / "benchmarks"
    return beside_package if beside_package.is_dir() else Path("benchmarks")


@dataclass
class Outcome:
    """What came back from a worker."""

    measured: dict[str, Measurement] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def isa(self) -> str:
        return str(self.machine.get("isa", ""))


def _measure(options: argparse.Namespace) -> int:
    console, suite = table.console(), load_suite(options.suite)
    bounds = _load_floors(options.suite, suite)
    names = _chosen(options, bounds if options.set_floors else select(suite, options.level))
    outcome = _run(console, options, names, _plan(options), "tuned")
    large = _large(suite, outcome.measured)
    if large and not options.no_as_found:
        add_as_found(outcome.measured, _run(console, options, large, AS_FOUND, "as found").measured)
    console.print(table.results(outcome.measured.values()))
    if outcome.measured:
        run = history.new_run(outcome.machine, outcome.measured, options.suite)
        console.print(f"kept as {history.append(options.history or options.suite / 'history', run)}")
        _draw(console, run, bounds, options.picture)
    if options.set_floors:
        floors.save(options.suite / "floors.json", floors.raised(bounds, outcome.measured, outcome.isa))
        console.print(f"set the floors in {options.suite / 'floors.json'}")
    return _report_failures(console, outcome)


def _chosen(options: argparse.Namespace, names: Iterable[str]) -> list[str]:
    chosen = [name for name in names if options.only in name]
    if not chosen:
        raise ValueError(f"no case contains {options.only!r}")
    return chosen


def _draw(console: Console, run: history.Run, bounds: floors.Floors, target: Path) -> None:
    from .picture import draw

    draw(run, bounds, target)
    console.print(f"drawn in {target}")


def _check(options: argparse.Namespace) -> int:
    console, suite = table.console(), load_suite(options.suite)
    bounds = _load_floors(options.suite, suite)
    names = _chosen(options, bounds)
    outcome = _run(console, options, names, _plan(options), "tuned")
    judged = dict(outcome.measured)
    verdicts = floors.judge(bounds, judged, names, outcome.isa)
    weak = dict.fromkeys(v.case for v in verdicts if not v.holds and v.case in judged)
    if weak:  # a busy moment, or a regression: a second run tells
        again = _run(console, options, list(weak), replace(_plan(options), check=False), "once more")
        judged |= {name: _better(judged[name], m) for name, m in again.measured.items()}
        outcome.measured |= again.measured
    found = floors.judge(bounds, judged, names, outcome.isa)
    console.print(table.verdicts(found))
    if outcome.measured:
        run = history.new_run(outcome.machine, outcome.measured, options.suite)
        history.append(options.history or options.suite / "history", run)
    without = sum(v.status == "no floor yet" for v in found)
    if without:
        console.print(f"[yellow]{without} figures have no floor yet: python -m mmkern bench --set-floors[/]")
    failed = _report_failures(console, outcome)
    return 1 if failed or not all(v.holds for v in found) else 0


def _better(a: Measurement, b: Measurement) -> Measurement:
    """Each metric from the run in which it was better."""
    best = {name: v if metrics.reaches(name, v, b.metrics[name]) else b.metrics[name] for name, v in a.metrics.items()}
    return replace(b, metrics=best)


def _compare(options: argparse.Namespace) -> int:
    runs = history.load(options.history or options.suite / "history")
    before, after = (history.runs_of(runs, name, options.suite) for name in options.compare)
    table.console().print(table.comparison(before, after))
    return 0


def _load_floors(folder: Path, suite: Mapping[str, Case]) -> dict[str, dict[str, floors.Bound]]:
    path = folder / "floors.json"
    bounds = floors.load(path) if path.exists() else {}
    unknown = [name for name in bounds if name not in suite]
    if unknown:
        raise ValueError(f"{path} names cases that the suite has not: {', '.join(unknown)}")
    return bounds


def _plan(options: argparse.Namespace) -> Plan:
    rivals = tuple(name for name in options.rivals.split(",") if name)
    if not set(rivals) <= set(RIVALS):
        raise ValueError(f"--rivals is {options.rivals!r}, expected any of {', '.join(RIVALS)}")
    return Plan(rivals=rivals, seconds=options.seconds)


def _large(suite: Mapping[str, Case], measured: Mapping[str, Measurement]) -> list[str]:
    """Those where the allocator matters."""
    return [name for name in measured if suite[name].yardstick in ("copy", "sgemm")]


def add_as_found(measured: dict[str, Measurement], as_found: Mapping[str, Measurement]) -> None:
    for name, m in as_found.items():
        measured[name] = replace(measured[name], as_found=m.metrics)


def measure_as_found(folder: Path, suite: Mapping[str, Case], measured: dict[str, Measurement]) -> None:
    """Measure once more, briefly, without the tuned allocator, and add the ratios."""
    events = worker.run(folder, _large(suite, measured), AS_FOUND, environment.plain_environment())
    add_as_found(measured, {event.case: event.measured for event in events if event.measured})


def _run(console: Console, options: argparse.Namespace, names: Sequence[str], plan: Plan, title: str) -> Outcome:
    as_found = plan is AS_FOUND
    env = environment.plain_environment() if as_found else environment.tuned_environment()
    outcome, progress = Outcome(), require("rich.progress", "rich", "bench")
    columns = (
        progress.TextColumn("{task.fields[title]:9}"),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.description}", style="dim"),
    )
    with progress.Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=len(names), title=title)
        for event in worker.run(options.suite, names, plan, env, peak=not as_found):
            if event.machine is not None:
                outcome.machine = event.machine
            if event.stage:
                bar.update(task, description=f"{event.case}: {event.stage}")
            if event.measured:
                outcome.measured[event.case] = event.measured
                bar.advance(task)
            if event.failure:
                outcome.failures[event.case] = event.failure
                bar.advance(task)
        bar.update(task, description=f"allocator: {outcome.machine.get('allocator', '')}")
    return outcome


def _report_failures(console: Console, outcome: Outcome) -> int:
    for name, failure in outcome.failures.items():
        console.print(f"[red]{name}[/]: {failure}", highlight=False)
    return 1 if outcome.failures else 0
