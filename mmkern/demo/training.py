"""Two models with the same weights, trained in turn on the same batches: one with the reference ops, one with mmkern's.

Every image goes into a batch with one prompt, and many images of a batch share theirs: equal prompts are positives of
one another (``text_ids`` of :meth:`mmkern.models.Meru.loss`), so that no image is pushed off a text that it was given.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmkern import use_backend
from mmkern.models import Meru

from .data import Batch, tokens
from .towers import WIDTH, ImageTower, TextTower

LEARNING_RATE = 8e-3
WARMUP = 0.1


def build(embed_dim: int, seed: int) -> Meru:
    """A model whose weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Meru(ImageTower(), TextTower(*tokens()), WIDTH, WIDTH, embed_dim)


class Run:
    """One training: a model, the backend of its ops (None: the default choice), and what each step gave."""

    def __init__(self, backend: str | None, model: Meru, steps: int) -> None:
        self.backend = backend
        self.model = model
        self.losses: list[float] = []
        self.seconds: list[float] = []
        scalars = {id(p) for p in model.scalars}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if id(p) not in scalars]},
            {"params": model.scalars, "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.2)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, _warmup_then_cosine(steps))

    def step(self, batch: Batch) -> None:
        start = time.perf_counter()
        with use_backend(self.backend):
            loss = self.model(batch.images, batch.prompt_ids, batch.prompt_ids).total
            loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)
        self._schedule.step()

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds)


def _warmup_then_cosine(steps: int) -> Callable[[int], float]:
    warmup = max(1, round(WARMUP * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return math.cos(math.pi / 2 * (step - warmup) / max(1, steps - warmup)) ** 2

    return factor


def train(runs: Sequence[Run], batches: Sequence[Batch], report: Callable[[], None]) -> None:
    """Step all runs through the batches in turn, so that the machine treats them alike."""
    for batch in batches:
        for run in runs:
            run.step(batch)
        report()
