"""Measure a case: check it, then time all sides in turns."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmkern.explain import explain

from . import metrics
from .case import Case, traffic
from .sides import Thunk, build_sides, check, product_flops, yardstick

WARMUPS = 12  # fewer measure page faults
FEWEST_ROUNDS, MOST_ROUNDS = 11, 400
SHORTEST_SAMPLE = 2e-3  # seconds; shorter calls are timed many at a time: the first finds cold caches
RIVALS = ("eager", "compile", "peer")

Stage = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How to measure: which rivals, for how long, and whether to check first."""

    rivals: tuple[str, ...] = RIVALS
    seconds: float = 2.0
    check: bool = True


@dataclass(frozen=True)
class Measurement:
    """A case's medians in seconds a call, and what follows from them (see :mod:`mmkern.bench.metrics`)."""

    case: str
    op: str
    shape: str
    mode: str
    source: str
    backend: str
    threads: int
    flops: float
    bytes: int
    medians: dict[str, float]
    spreads: dict[str, float]  # interquartile range over median
    metrics: dict[str, float]
    as_found: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict, repr=False, compare=False)

    def as_json(self) -> dict[str, Any]:
        """Everything but the samples."""
        fields = asdict(replace(self, samples={}))
        del fields["samples"]
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Measurement:
        return cls(**fields)


def measure(case: Case, plan: Plan, stage: Stage = lambda text: None) -> Measurement:
    """Check a case and time its sides. ``stage`` hears what goes on. Raises where a result is wrong."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        sides = build_sides(case, plan.rivals)
        args = sides["mmkern"].args
        if plan.check:
            stage("compiling and checking" if "compile" in sides else "checking")
            check(case, sides)
        stage("timing")
        timed = {name: side.timed(case) for name, side in sides.items()}
        samples = interleave(timed | {case.yardstick: yardstick(case, args)}, plan.seconds)
        outs = [out.detach() for out in sides["mmkern"].forward()]
    finally:
        torch.set_num_threads(before)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    moved = traffic(args, outs, case.mode)
    copied = 2 * max(a.nbytes for a in args if isinstance(a, Tensor))
    kernels_of = case.family.made_of.get(case.op, case.op)
    return Measurement(
        case=str(case),
        op=case.op,
        shape=str(case.shape),
        mode=case.mode,
        source=case.shape.source,
        backend=next(c.backend for c in explain(kernels_of, *args) if c.chosen) if kernels_of else "PyTorch",
        threads=case.threads,
        flops=case.flops(),
        bytes=moved,
        medians=medians,
        spreads={name: _spread(times) for name, times in samples.items()},
        metrics=metrics.derive(medians, copies=moved / copied, products=case.flops() / product_flops(case, args)),
        samples=samples,
    )


def interleave(sides: Mapping[str, Thunk], seconds: float) -> dict[str, list[float]]:
    """Seconds a call of each side, in turns, after warm-ups; about ``seconds`` long in all.

    Each round has an order of its own: what a side finds in the caches is what the one before it left there.
    """
    calls = {name: _warm_up(run) for name, run in sides.items()}
    samples: dict[str, list[float]] = {name: [] for name in sides}
    shuffle, order = random.Random(0).shuffle, list(sides)
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start, rounds = time.perf_counter(), 0
        while rounds < FEWEST_ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() - start < seconds):
            shuffle(order)
            for name in order:
                samples[name].append(_time(sides[name], calls[name]))
            rounds += 1
    finally:
        if enabled:
            gc.enable()
    return samples


def _warm_up(run: Thunk) -> int:
    """Warm up; returns how many calls make a sample that the clock resolves."""
    times = [_time(run, 1) for _ in range(WARMUPS)]
    return max(1, round(SHORTEST_SAMPLE / statistics.median(times)))


def _time(run: Thunk, calls: int) -> float:
    turns = range(calls)
    start = time.perf_counter()
    for _ in turns:
        run()
    return (time.perf_counter() - start) / calls


def _spread(times: Sequence[float]) -> float:
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle
