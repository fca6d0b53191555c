"""What a run says on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from mmkern.extras import require

from . import metrics
from .floors import Verdict
from .history import Run
from .measure import Measurement

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 132  # where the output is no terminal
_COLOURS = {"ok": "green", "below goal": "yellow", "no floor yet": "yellow"}  # else red


def console() -> Console:
    made: Console = require("rich.console", "rich", "bench").Console()
    if not made.is_terminal:
        made.width = WIDTH
    return made


def _table(title: str, caption: str, columns: Sequence[str]) -> Table:
    style = require("rich.box", "rich", "bench").SIMPLE_HEAD
    make = require("rich.table", "rich", "bench").Table
    table: Table = make(title=title or None, caption=caption or None, box=style, caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    return table


def results(measured: Iterable[Measurement]) -> Table:
    """A line a case: mmkern's time, how many times faster it is than each rival, its share of the machine's rate."""
    measured = list(measured)
    rivals = list(dict.fromkeys(name for m in measured for name in metrics.rivals(m.metrics)))
    at = rivals.index("eager") + 1 if "eager" in rivals else 0
    columns = ["case", "mmkern", *rivals[:at], "as found", *rivals[at:], "machine"]
    caption = (
        "times faster than each rival; as found: than eager, without the tuned allocator; machine: share of its rate"
    )
    table = _table("", caption, columns)
    for m in measured:
        ratios = {name: _ratio(value) for name, value in metrics.rivals(m.metrics).items()}
        found = m.as_found.get("eager")
        cells = [ratios.get(name, "") for name in rivals]
        cells.insert(at, f"[dim]{metrics.text('eager', found)}[/]" if found else "")
        name = m.case if m.backend != "reference" else f"{m.case} [red](reference)[/]"
        table.add_row(name, duration(m.medians["mmkern"]), *cells, machine(m))
    return table


def _ratio(value: float) -> str:
    colour = "green" if value >= 1 else "red"
    return f"[{colour}]{metrics.text('', value)}[/]"


def machine(m: Measurement) -> str:
    """``81 % copy``, ``2.1 µs over the kernel`` or ``1.60x of x * 2``."""
    words = {"copy": "copy", "sgemm": "sgemm", "overhead_us": "over the kernel", "of_mul": "of x * 2"}
    found = [name for name in words if name in m.metrics]
    return ", ".join(f"{metrics.text(name, m.metrics[name])} {words[name]}" for name in found)


def duration(seconds: float) -> str:
    unit, scale = next((u for u in (("s", 1.0), ("ms", 1e-3)) if seconds >= u[1]), ("µs", 1e-6))
    return f"{seconds / scale:.3g} {unit}"


def verdicts(found: Iterable[Verdict]) -> Table:
    """A line a bound: measured, floor, goal."""
    table = _table("", "", ["case", "against", "measured", "floor", "goal", ""])
    before = None
    for v in found:
        figures = (v.measured, v.bound.floor, v.bound.goal)
        cells = ["–" if value is None else metrics.text(v.metric, value) for value in figures]
        name = v.case if v.case != before else ""
        table.add_row(name, v.metric, *cells, f"[{_COLOURS.get(v.status, 'red')}]{v.status}[/]")
        before = v.case
    return table


def comparison(a: Run, b: Run) -> Table:
    """A line a case of both runs. The ratios compare across machines and loads, the times only on one."""
    other = "" if _same(a.machine, b.machine) else "different machines or versions: only the ratios compare"
    columns = ["case", "time before", "after", "faster", "eager before", "after", "better"]
    table = _table(f"{a.revision} → {b.revision}", other, columns)
    for name in a.cases:
        if name not in b.cases:
            continue
        before, after = a.cases[name], b.cases[name]
        times = before.medians["mmkern"], after.medians["mmkern"]
        cells = [*map(duration, times), _change(times[0] / times[1])]
        if "eager" in before.metrics and "eager" in after.metrics:
            ratios = before.metrics["eager"], after.metrics["eager"]
            cells += [*(metrics.text("eager", r) for r in ratios), _change(ratios[1] / ratios[0])]
        table.add_row(name, *cells)
    return table


def _same(a: Mapping[str, object], b: Mapping[str, object]) -> bool:
    return all(a.get(key) == b.get(key) for key in {*a, *b} - {"fma_peak"})


def _change(speedup: float) -> str:
    if abs(speedup - 1) < 0.05:
        return "[dim]same[/]"
    colour = "green" if speedup > 1 else "red"
    return f"[{colour}]{speedup:.2f}x[/]"
