"""What is measured: a family's ops, on shapes from the papers, in a mode."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmkern.extras import require
from mmkern.ops._outputs import Result

# The two "call" modes time what a call costs beside its arithmetic, on a tensor that is too small to matter.
Mode = Literal["forward", "forward+backward", "call", "call+grad"]
Level = Literal["default", "full"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem: ``rows`` vectors of length ``width``; ``others`` to pair each with, or to reduce for each.

    Of attention, ``rows`` are queries and ``others`` keys, in each of ``batch`` times ``heads``.
    """

    rows: int
    width: int
    source: str
    others: int | None = None
    batch: int | None = None
    heads: int | None = None

    @property
    def sizes(self) -> list[int]:
        return [n for n in (self.batch, self.heads, self.rows, self.others, self.width) if n is not None]

    def __str__(self) -> str:
        return "x".join(map(str, self.sizes))


def load_shapes(path: Path) -> dict[str, Shape]:
    """Shapes by name, from a YAML file."""
    table = require("yaml", "pyyaml", "bench").safe_load(path.read_text())
    return {name: Shape(**fields) for name, fields in table.items()}


@dataclass(frozen=True)
class Peer:
    """Another library's op, on inputs in that library's own form (made outside the timing)."""

    function: Callable[..., Tensor]
    args: Sequence[Any]
    leaves: Sequence[Tensor]
    comparable: Callable[[Tensor], Tensor]


def few_rows(x: Tensor) -> Tensor:
    """At most 256 rows, evenly spread: the oracle of all pairs takes minutes where mmkern takes a second."""
    return x[:: -(-x.shape[0] // 256)] if x.dim() else x


@dataclass(frozen=True)
class Family:
    """What the cases of a family share. Its functions are told the task: an op, or an op and a variant of its call.

    ``arguments(task, shape, generator)`` makes the inputs, in float32. ``rivals`` are the field's formulas by task, in
    plain PyTorch, with the same arguments; ``torch.compile`` compiles the same functions. ``ours`` are the calls of
    mmkern where that is not the op with these arguments. ``peer(task, args)`` is another library's op, for cases
    ``with_peer``. ``flops(op, backward)`` are the additions and multiplications for each of the product of the sizes.
    ``yardstick(op)`` is what the machine is asked for at that size: a copy, or the product x yᵀ of ``product(args)``.
    ``few`` takes of an argument what the oracle can compute in a second. ``made_of`` names the op whose kernels another
    one runs, where that has none of its own; "" where it runs PyTorch's.
    """

    name: str
    arguments: Callable[[str, Shape, torch.Generator], list[Any]]
    rivals: Mapping[str, Callable[..., Result]]
    flops: Callable[[str, bool], float]
    peer_name: str = ""
    peer: Callable[[str, Sequence[Any]], Peer] | None = None
    ours: Mapping[str, Callable[..., Result]] = field(default_factory=dict)
    yardstick: Callable[[str], Literal["copy", "sgemm"]] = lambda op: "copy"
    product: Callable[[Sequence[Any]], tuple[Tensor, Tensor]] = lambda args: (args[0], args[1])
    few: Callable[[Tensor], Tensor] = few_rows
    made_of: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One op on one shape in one mode.

    Its scalars are 0-d tensors, and learned where a gradient is taken; in the call modes floats, as the 2 of ``x * 2``.
    """

    family: Family
    op: str
    shape: Shape
    mode: Mode = "forward"
    level: Level = "default"
    dtype: torch.dtype = torch.float32
    threads: int = 1
    with_peer: bool = False
    variant: str = ""

    def __str__(self) -> str:
        dtype = "" if self.dtype == torch.float32 else f"/{str(self.dtype).removeprefix('torch.')}"
        threads = "" if self.threads == 1 else f"/{self.threads} threads"
        variant = f"/{self.variant}" if self.variant else ""
        return f"{self.op}/{self.shape}/{self.mode}{variant}{dtype}{threads}"

    @property
    def task(self) -> str:
        return f"{self.op}, {self.variant}" if self.variant else self.op

    @property
    def needs_grad(self) -> bool:
        return self.mode in ("forward+backward", "call+grad")

    @property
    def yardstick(self) -> str:
        """What the machine itself does at that size (see mmkern.bench.metrics)."""
        if self.mode == "call":
            return "bare kernel"
        if self.mode == "call+grad":
            return "x * 2"
        return self.family.yardstick(self.op)

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of all sides, in the order of their turns."""
        peers = (self.family.peer_name,) if self.with_peer else ()
        return ("mmkern", "eager", "compile", *peers, self.yardstick)

    def arguments(self) -> list[Any]:
        """Inputs, the same in every process; ready to be differentiated where the mode needs it."""
        generator = torch.Generator().manual_seed(sum(map(ord, str(self))))
        made = self.family.arguments(self.task, self.shape, generator)
        return [self._ready(value) if isinstance(value, Tensor) else value for value in made]

    def _ready(self, value: Tensor) -> Tensor | float:
        if not value.is_floating_point():
            return value
        if value.dim() == 0:
            return float(value) if self.mode.startswith("call") else value.requires_grad_(self.needs_grad)
        return value.to(self.dtype).requires_grad_(self.needs_grad)

    def flops(self) -> float:
        """Additions and multiplications that the problem takes; per-row transcendentals are not counted."""
        passes = [False, True] if self.mode == "forward+backward" else [False]
        return math.prod(self.shape.sizes) * sum(self.family.flops(self.op, backward) for backward in passes)


def traffic(args: Sequence[Any], outs: Sequence[Tensor], mode: Mode) -> int:
    """The fewest bytes that must move: inputs and outputs once; backward reads them again and writes the gradients."""
    inputs = sum(a.nbytes for a in args if isinstance(a, Tensor))
    outputs = sum(out.nbytes for out in outs)
    forward = inputs + outputs
    return forward if mode != "forward+backward" else forward + 2 * inputs + outputs


def load_suite(folder: Path) -> dict[str, Case]:
    """Every case of the ``bench_*.py`` files in ``folder``, by name. Raises ValueError where there is none."""
    if str(folder.resolve().parent) not in sys.path:
        sys.path.append(str(folder.resolve().parent))  # a family's file imports its rivals from benchmarks.rivals
    cases: list[Case] = []
    for path in sorted(folder.glob("bench_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"{path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        cases += module.CASES
    if not cases:
        raise ValueError(f"no bench_*.py in {folder.resolve()}: run in a checkout of mmkern, or use --suite")
    return by_name(cases)


def by_name(cases: Iterable[Case]) -> dict[str, Case]:
    found: dict[str, Case] = {}
    for case in cases:
        if str(case) in found:
            raise ValueError(f"two benchmark cases are called {case}")
        found[str(case)] = case
    return found


def select(cases: Mapping[str, Case], level: Level, pattern: str = "") -> list[str]:
    """Names of the cases of a level ("full" has them all) that contain ``pattern``."""
    return [name for name, case in cases.items() if pattern in name and (level == "full" or case.level == "default")]
