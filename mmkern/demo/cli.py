"""``python -m mmkern demo``: train, compare, classify, walk to the root, draw."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmkern.backends import BACKENDS
from mmkern.extras import MissingExtraError, require

from . import data, picture
from .evaluation import Journey, most_typical, traverse, zero_shot_accuracy
from .training import Run, build, train

TITLE = "Handwritten digits and prompts in hyperbolic space"
TRAVELLERS = (3, 6, 1)


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo; the embedding has the paper's width."""

    steps: int = 160
    batch: int = 256
    embed_dim: int = 512
    held_out: float = 0.25
    seed: int = 0
    threads: int = 1  # these matrices are too small for more to help much


@dataclass(frozen=True)
class Outcome:
    """What came of the two trainings."""

    reference: Run
    mmkern: Run
    reference_accuracy: float
    accuracy: float
    journeys: Sequence[Journey]

    @property
    def curve_gap(self) -> float:
        """The largest difference of the two loss curves."""
        return max(abs(a - b) for a, b in zip(self.reference.losses, self.mmkern.losses, strict=True))

    @property
    def speedup(self) -> float:
        return self.reference.step_seconds / self.mmkern.step_seconds


def run(settings: Settings, output: Path, report: Callable[[Run, Run], None]) -> Outcome:
    """Train both models, look at what they learned, and draw mmkern's to ``output``."""
    training, held_out = data.load(settings.held_out, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    batches = data.batches(training, settings.steps, settings.batch, generator)
    reference, ours = (
        Run(backend, build(settings.embed_dim, settings.seed), settings.steps) for backend in ("reference", None)
    )
    with _threads(settings.threads):
        train((reference, ours), batches, lambda: report(reference, ours))
    journeys = _journeys(ours, held_out)
    picture.draw(ours.model, held_out, journeys, TITLE, output)
    reference_accuracy, accuracy = (zero_shot_accuracy(each.model, held_out) for each in (reference, ours))
    return Outcome(reference, ours, reference_accuracy, accuracy, journeys)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _journeys(trained: Run, digits: data.Digits) -> list[Journey]:
    chosen = []
    for digit in TRAVELLERS:
        of_class = digits.images[digits.labels == digit]
        chosen.append(of_class[most_typical(trained.model.embed_image(of_class))])
    images = torch.stack(chosen)
    ways = traverse(trained.model, images)
    return [Journey(*each) for each in zip(images, TRAVELLERS, ways, strict=True)]


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    settings = Settings(steps=options.steps, seed=options.seed, threads=options.threads)
    try:
        console = require("rich.console", "rich", "demo").Console()
        _introduce(console, settings)
        outcome = _run_with_progress(console, settings, options.output)
    except MissingExtraError as error:
        print(f"python -m mmkern demo: {error}", file=sys.stderr)
        return 2
    _conclude(console, outcome, options.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mmkern demo",
        description="Train a small MERU on handwritten digits, once with the reference ops and once with mmkern's.",
    )
    parser.add_argument("--steps", type=int, default=Settings.steps, help=f"of training (default: {Settings.steps})")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="of the split, the weights and the batches")
    parser.add_argument("--threads", type=int, default=Settings.threads, help=f"default: {Settings.threads}")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="the picture (default: demo.png)")
    return parser


def _introduce(console: Any, settings: Settings) -> None:
    console.print(
        f"A small MERU learns 1,797 handwritten digits with {len(data.PROMPTS)} prompts: {settings.steps} steps of "
        f"{settings.batch} pairs in {settings.embed_dim} dimensions, threads: {settings.threads}.\n"
        "Two models with the same weights take the same batches in turn: one with the reference ops (plain PyTorch, "
        "written for exactness rather than speed), one with mmkern's.",
        highlight=False,
    )
    missing = BACKENDS[0].missing()
    if missing:
        console.print(f"[bold]Both run the reference here: {missing}.[/] See python -m mmkern info.")


def _run_with_progress(console: Any, settings: Settings, output: Path) -> Outcome:
    progress = require("rich.progress", "rich", "demo")
    columns = (
        progress.TextColumn("training"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.description}"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=settings.steps)

        def report(reference: Run, ours: Run) -> None:
            bar.update(task, advance=1, description=f"loss {reference.losses[-1]:.4f} | {ours.losses[-1]:.4f}")

        return run(settings, output, report)


def _conclude(console: Any, outcome: Outcome, output: Path) -> None:
    table = require("rich.table", "rich", "demo").Table()
    for name in ("", "reference", "mmkern"):
        table.add_column(name, justify="right" if name else "left")
    runs = (outcome.reference, outcome.mmkern)
    table.add_row("loss, first step", *(f"{run.losses[0]:.4f}" for run in runs))
    table.add_row("loss, last step", *(f"{run.losses[-1]:.4f}" for run in runs))
    table.add_row("zero-shot accuracy, held out", f"{outcome.reference_accuracy:.1%}", f"{outcome.accuracy:.1%}")
    table.add_row("step, median", *(f"{1e3 * run.step_seconds:.1f} ms" for run in runs))
    console.print(table)
    console.print(f"Largest difference of the loss curves: {outcome.curve_gap:.1e}")
    console.print(f"A step with mmkern's ops is [bold]{outcome.speedup:.1f} times[/] as fast.")
    console.print("\nFrom an image to the root, the texts whose cones hold the way:")
    for journey in outcome.journeys:
        way = " → ".join(stop.text for stop in journey.stops)
        console.print(f"  {journey.label}: {way}", markup=False, highlight=False)
    console.print(f"\nPicture: {output}")
