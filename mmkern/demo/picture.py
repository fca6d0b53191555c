"""The picture: images and prompts on the Poincaré disk, and the way of three images to the root."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkern import ops
from mmkern.extras import require
from mmkern.models import Meru

from .data import DIGITS, PROMPTS, Digits, Prompt
from .evaluation import Stop
from .layout import Array, DiskLayout, spread_labels

IMAGE_RADIUS = 0.9
LABEL_RING = (0.44, 0.8)
COLOURS = ("#3b6fb6", "#e07b1f", "#3a9a4b", "#c8392f", "#8460b5", "#8c5a4a", "#d667a8", "#5f6b76", "#a89a1c", "#1899a8")
INK = "#22262b"
FAINT = "#9aa3ad"
PAPER = "#fbfaf7"


@dataclass(frozen=True)
class Journey:
    """One of the images whose way to the root is drawn."""

    image: Tensor
    label: int
    stops: Sequence[Stop]


def _matplotlib(module: str) -> Any:
    return require(f"matplotlib.{module}", "matplotlib", "demo")


@torch.no_grad()
def draw(model: Meru, digits: Digits, journeys: Sequence[Journey], title: str, path: Path) -> None:
    """Write the picture of held-out ``digits``, all prompts and the ``journeys`` to ``path``."""
    curvature = model.curvature
    points = model.embed_image(digits.images)
    layout = DiskLayout.fit(points, digits.labels, curvature, IMAGE_RADIUS)
    figure = _matplotlib("figure").Figure(figsize=(11, 13.2), facecolor=PAPER)
    figure.text(0.5, 0.975, title, ha="center", va="top", fontsize=17, color=INK, weight="bold")
    disk = figure.add_axes((0.02, 0.155, 0.96, 0.8))
    disk.set(xlim=(-1.16, 1.16), ylim=(-1.16, 1.16), aspect="equal")
    disk.axis("off")
    _draw_rings(disk, layout)
    places = layout.place(points)
    colours = [COLOURS[label] for label in digits.labels.tolist()]
    disk.scatter(*places.T, s=13, c=colours, alpha=0.65, linewidths=0, zorder=3)
    _draw_legend(disk, digits, points, places)
    prompts = layout.place(model.embed_text(torch.arange(len(PROMPTS))))
    _draw_prompts(disk, prompts)
    for journey in journeys:
        _draw_way(disk, layout, journey)
    disk.plot(0, 0, marker="*", markersize=22, color=INK, markeredgecolor=PAPER, zorder=9)
    disk.annotate("root", (0, 0), (0, -0.045), ha="center", va="top", fontsize=11, weight="bold", color=INK, zorder=9)
    _draw_labels(disk, prompts)
    _write_ways(figure.add_axes((0.02, 0.035, 0.96, 0.13)), journeys)
    note = f"Distance to the root is true (drawn {layout.stretch:.1f} times as long); the angle turns each digit its own way."
    figure.text(0.5, 0.012, note, ha="center", fontsize=10, color="#6b747d")
    figure.savefig(path, dpi=130)


def _draw_rings(disk: Any, layout: DiskLayout) -> None:
    """The rim, and circles of equal distance to the root."""
    patches = _matplotlib("patches")
    disk.add_patch(patches.Circle((0, 0), 1, facecolor="white", edgecolor=INK, linewidth=1.6, zorder=0))
    for distance in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0):
        radius = float(np.tanh(layout.stretch * distance / 2))
        if radius < 0.97:
            disk.add_patch(patches.Circle((0, 0), radius, fill=False, edgecolor="#e3e5e8", linewidth=0.9, zorder=1))


def _draw_legend(disk: Any, digits: Digits, points: Tensor, places: Array) -> None:
    """Outside the rim, the most typical image of each class."""
    for digit in sorted(DIGITS):
        of_class = (digits.labels == digit).nonzero()[:, 0]
        middle = places[of_class.numpy()].mean(0)
        where = middle / np.linalg.norm(middle) * 1.085
        _draw_digit(disk, digits.images[of_class[most_typical(points[of_class])]], COLOURS[digit], where, 0.062)


def most_typical(points: Tensor) -> int:
    """The row of ``[N, D]`` whose direction is nearest to the mean direction."""
    directions = torch.nn.functional.normalize(points, dim=1)
    return int((directions @ directions.mean(0)).argmax())


def _draw_digit(axes: Any, image: Tensor, colour: str, centre: Array, half: float, zorder: int = 5) -> None:
    rgba = np.zeros((8, 8, 4))
    rgba[..., :3] = _matplotlib("colors").to_rgb(colour)
    rgba[..., 3] = image[0].numpy()
    x, y = centre
    extent = (x - half, x + half, y - half, y + half)
    axes.imshow(rgba, extent=extent, interpolation="bicubic", zorder=zorder, aspect="equal", clip_on=False)


def _is_single(prompt: Prompt) -> bool:
    return len(prompt.digits) == 1


def _colour(prompt: Prompt) -> str:
    return COLOURS[min(prompt.digits)] if _is_single(prompt) else INK


def _draw_prompts(disk: Any, places: Array) -> None:
    for prompt, place in zip(PROMPTS, places, strict=True):
        size = 60 if _is_single(prompt) else 75
        marker = "o" if _is_single(prompt) else "D"
        disk.scatter(*place, s=size, c=_colour(prompt), marker=marker, edgecolors="white", linewidths=1.1, zorder=7)


def _draw_labels(disk: Any, places: Array) -> None:
    """Every prompt for several digits, and one for each single digit, which stands for its synonyms too."""
    shown = [i for i, prompt in enumerate(PROMPTS) if not _is_single(prompt) or prompt.text.startswith("the digit")]
    texts = []
    for i in shown:
        words = PROMPTS[i].text.replace(" smaller", "\nsmaller").replace(" larger", "\nlarger")
        weight = "bold" if _is_single(PROMPTS[i]) else "normal"
        style = {"fontsize": 10, "color": _colour(PROMPTS[i]), "weight": weight, "linespacing": 1.05}
        texts.append(disk.text(0, 0, words, ha="center", va="center", zorder=8, **style))
    figure = disk.figure
    _matplotlib("backends.backend_agg").FigureCanvasAgg(figure)
    to_data = disk.transData.inverted()
    boxes = [to_data.transform_bbox(text.get_window_extent()) for text in texts]
    sizes = np.array([(box.width + 0.025, box.height + 0.018) for box in boxes])
    anchors = places[shown]
    for i, text, anchor, centre in zip(shown, texts, anchors, spread_labels(anchors, sizes, *LABEL_RING), strict=True):
        text.set_position(centre)
        text.set_bbox({"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.0})
        disk.plot(*zip(anchor, centre, strict=True), color=_colour(PROMPTS[i]), linewidth=0.7, alpha=0.55, zorder=4)


def _draw_way(disk: Any, layout: DiskLayout, journey: Journey) -> None:
    stops = layout.place(torch.stack([stop.point for stop in journey.stops]))
    colour = COLOURS[journey.label]
    disk.plot(*np.vstack([stops, [[0, 0]]]).T, color=colour, linewidth=3.2, alpha=0.85, zorder=5, solid_capstyle="round")
    disk.scatter(*stops[:-1].T, s=42, c="white", edgecolors=colour, linewidths=2, zorder=6)


def _write_ways(axes: Any, journeys: Sequence[Journey]) -> None:
    axes.set(xlim=(0, 96), ylim=(len(journeys) * 4.2, 0), aspect="auto")
    axes.axis("off")
    for row, journey in enumerate(journeys):
        y = row * 4.2 + 2.1
        colour = COLOURS[journey.label]
        words = "   →   ".join(stop.text for stop in journey.stops)
        axes.text(10, y, words, va="center", fontsize=12, color=INK)
        axes.plot([5.6, 8.6], [y, y], color=colour, linewidth=3.2, solid_capstyle="round")
