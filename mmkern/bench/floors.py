"""The floor file: what each figure must not fall below, what it should reach, and why."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from . import metrics
from .measure import Measurement

ROOM = 0.9  # a floor is this share of what was measured: room for noise


@dataclass(frozen=True)
class Bound:
    """The floor and the goal of one metric of one case; None where there is none yet."""

    floor: float | None = None
    goal: float | None = None
    why: str = ""


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
    table = {
        case: {metric: {k: v for k, v in vars(bound).items() if k == "floor" or v} for metric, bound in bounds.items()}
        for case, bounds in floors.items()
    }
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n")
    os.replace(part, path)


def judge(floors: Floors, measured: Mapping[str, Measurement], cases: Iterable[str]) -> list[Verdict]:
    """A verdict for every bound of the cases."""
    return [
        Verdict(case, metric, bound, measured[case].metrics.get(metric) if case in measured else None)
        for case in cases
        for metric, bound in floors[case].items()
    ]


def raised(floors: Floors, measured: Mapping[str, Measurement]) -> dict[str, dict[str, Bound]]:
    """The same table with each measured figure's floor at nine tenths of it, never beyond the goal."""
    return {
        case: {
            metric: _raised(metric, bound, measured[case].metrics.get(metric) if case in measured else None)
            for metric, bound in bounds.items()
        }
        for case, bounds in floors.items()
    }


def _raised(metric: str, bound: Bound, measured: float | None) -> Bound:
    if measured is None:
        return bound
    floor = metrics.loosened(metric, measured, ROOM)
    if bound.goal is not None and metrics.reaches(metric, floor, bound.goal):
        floor = bound.goal
    return replace(bound, floor=float(f"{floor:.3g}"))
