"""The floor file: what each figure must not fall below, what it should reach, and why."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import metrics
from .measure import Measurement

ROOM = 0.9  # a floor is this share of what was measured: room for noise


@dataclass(frozen=True)
class Bound:
    """The floor and the goal of one metric of one case; None where there is none yet.

    ``floor_on``: by ISA level, where another floor holds: wider registers make a share of sgemm's rate harder to reach.
    """

    floor: float | None = None
    goal: float | None = None
    why: str = ""
    floor_on: Mapping[str, float] = field(default_factory=dict)

    def on(self, isa: str) -> Bound:
        return replace(self, floor=self.floor_on.get(isa, self.floor), floor_on={})

    def with_floor(self, floor: float, isa: str) -> Bound:
        if isa in self.floor_on:
            return replace(self, floor_on={**self.floor_on, isa: floor})
        return replace(self, floor=floor)


Floors = Mapping[str, Mapping[str, Bound]]


@dataclass(frozen=True)
class Verdict:
    """One figure against its bound."""

    case: str
    metric: str
    bound: Bound
    measured: float | None

    @property
    def holds(self) -> bool:
        """Not below its floor. A figure that could not be measured does not hold."""
        if self.measured is None:
            return False
        return self.bound.floor is None or metrics.reaches(self.metric, self.measured, self.bound.floor)

    @property
    def status(self) -> str:
        if self.measured is None:
            return "not measured"
        if not self.holds:
            return "below floor"
        if self.bound.goal is not None and not metrics.reaches(self.metric, self.measured, self.bound.goal):
            return "below goal"
        return "ok" if self.bound.floor is not None else "no floor yet"


def load(path: Path) -> dict[str, dict[str, Bound]]:
    """Bounds by case and metric."""
    table = json.loads(path.read_text())
    return {case: {metric: Bound(**fields) for metric, fields in bounds.items()} for case, bounds in table.items()}


def save(path: Path, floors: Floors) -> None:
    """One bound a line."""
    cases = []
    for case, bounds in floors.items():
        lines = (f"    {json.dumps(metric)}: {_text(bound)}" for metric, bound in bounds.items())
        cases.append(f"  {json.dumps(case)}: {{\n" + ",\n".join(lines) + "\n  }")
    part = path.with_name(path.name + ".part")
    part.write_text("{\n" + ",\n".join(cases) + "\n}\n")
    os.replace(part, path)


def _text(bound: Bound) -> str:
    return json.dumps({k: v for k, v in vars(bound).items() if k == "floor" or v}, ensure_ascii=False)


def judge(floors: Floors, measured: Mapping[str, Measurement], cases: Iterable[str], isa: str = "") -> list[Verdict]:
    """A verdict for every bound of the cases, as measured at this ISA level."""
    return [
        Verdict(case, metric, bound.on(isa), measured[case].metrics.get(metric) if case in measured else None)
        for case in cases
        for metric, bound in floors[case].items()
    ]


def raised(floors: Floors, measured: Mapping[str, Measurement], isa: str = "") -> dict[str, dict[str, Bound]]:
    """The same table with each measured figure's floor at nine tenths of it, never beyond the goal."""
    return {
        case: {
            metric: _raised(metric, bound, measured[case].metrics.get(metric) if case in measured else None, isa)
            for metric, bound in bounds.items()
        }
        for case, bounds in floors.items()
    }


def _raised(metric: str, bound: Bound, measured: float | None, isa: str) -> Bound:
    if measured is None:
        return bound
    floor = metrics.loosened(metric, measured, ROOM)
    if bound.goal is not None and metrics.reaches(metric, floor, bound.goal):
        floor = bound.goal
    return bound.with_floor(float(f"{floor:.3g}"), isa)
