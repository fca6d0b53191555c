"""The picture: images and prompts on the Poincaré disk, and the way of three images to the root."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmkern.extras import require
from mmkern.models import Meru

from .data import DIGITS, PROMPTS, Digits, Prompt
from .evaluation import Journey, most_typical
from .layout import Array, DiskLayout, spread_labels

IMAGE_RADIUS = 0.9
LABEL_RING = (0.43, 0.82)
RINGS = (0.25, 0.5)
THUMBNAIL = 0.028
COLOURS = ("#3b6fb6", "#e07b1f", "#3a9a4b", "#c8392f", "#8460b5", "#8c5a4a", "#d667a8", "#5f6b76", "#a1930f", "#1899a8")
INK = "#22262b"
GREY = "#6b747d"
PAPER = "#fbfaf7"


def _matplotlib(module: str) -> Any:
    return require(f"matplotlib.{module}", "matplotlib", "demo")


@torch.no_grad()
def draw(model: Meru, digits: Digits, journeys: Sequence[Journey], title: str, path: Path) -> None:
    """Write the picture of held-out ``digits``, all prompts and the ``journeys`` to ``path``."""
    points = model.embed_image(digits.images)
    layout = DiskLayout.fit(points, digits.labels, model.curvature, IMAGE_RADIUS)
    prompts = layout.place(model.embed_text(torch.arange(len(PROMPTS))))
    figure = _matplotlib("figure").Figure(figsize=(11, 13.4), facecolor=PAPER)
    disk = figure.add_axes((0.02, 0.155, 0.96, 0.79))
    _draw_rings(disk, layout)
    _draw_images(disk, digits, points, layout.place(points))
    _draw_prompts(disk, prompts)
    for journey in journeys:
        _draw_way(disk, layout, prompts, journey)
    disk.plot(0, 0, marker="*", markersize=24, color=INK, markeredgecolor="white", zorder=9)
    disk.set(xlim=(-1.17, 1.17), ylim=(-1.17, 1.17), aspect="equal")
    disk.axis("off")
    labels = _draw_labels(disk, prompts)
    ways = [np.linspace(0, 1, 20)[:, None] * layout.place(journey.stops[0].point[None]) for journey in journeys]
    _label_rings(disk, layout, np.concatenate([labels, prompts, *ways]))
    _write_ways(figure.add_axes((0.07, 0.04, 0.91, 0.12)), journeys)
    figure.text(0.5, 0.978, title, ha="center", va="top", fontsize=18, color=INK, weight="bold")
    key = "small digits and dots: images   ●  prompts for one digit   ◆  prompts for several   ★  the root"
    figure.text(0.5, 0.951, key, ha="center", va="top", fontsize=11, color=GREY)
    note = (
        f"Distances to the root are true, drawn {layout.stretch:.1f} times as long; grey circles lie at "
        f"{' and '.join(map(str, RINGS))}. Angles are chosen to part the digits."
    )
    figure.text(0.5, 0.014, note, ha="center", fontsize=10, color=GREY)
    figure.savefig(path, dpi=130)


def _draw_rings(disk: Any, layout: DiskLayout) -> None:
    """The rim, and circles of equal distance to the root."""
    circle = _matplotlib("patches").Circle
    disk.add_patch(circle((0, 0), 1, facecolor="white", edgecolor=INK, linewidth=1.6, zorder=0))
    for distance in RINGS:
        disk.add_patch(circle((0, 0), layout.radius(distance), fill=False, edgecolor="#dfe2e6", linewidth=1, zorder=1))


def _label_rings(disk: Any, layout: DiskLayout, taken: Array) -> None:
    """Each circle's distance, written where it is farthest from the ``taken`` places."""
    angle = np.linspace(0, 2 * np.pi, 120)
    for distance in RINGS:
        places = layout.radius(distance) * np.stack([np.cos(angle), np.sin(angle)], 1)
        free = np.linalg.norm(places[:, None] - taken, axis=2).min(1).argmax()
        style = {"fontsize": 9, "color": "#8a939c", "ha": "center", "va": "center", "zorder": 2}
        disk.text(*places[free], f"{distance:g}", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1}, **style)


def _draw_images(disk: Any, digits: Digits, points: Tensor, places: Array) -> None:
    """Each image where it lies, as itself or, for want of room, as a dot; outside, each class's most typical."""
    colours = np.array(COLOURS)[digits.labels.numpy()]
    drawn: list[int] = []
    for i, place in enumerate(places):
        if (np.abs(places[drawn] - place).max(1) > 2 * THUMBNAIL).all():
            drawn.append(i)
            _draw_digit(disk, digits.images[i], colours[i], place, THUMBNAIL)
    dots = np.delete(np.arange(len(places)), drawn)
    disk.scatter(*places[dots].T, s=7, c=colours[dots], alpha=0.5, linewidths=0, zorder=3)
    for digit in sorted(DIGITS):
        of_class = (digits.labels == digit).nonzero()[:, 0]
        middle = places[of_class.numpy()].mean(0)
        typical = digits.images[of_class[most_typical(points[of_class])]]
        _draw_digit(disk, typical, COLOURS[digit], middle / np.linalg.norm(middle) * 1.09, 0.06)


def _draw_digit(axes: Any, image: Tensor, colour: str, centre: Array, half: float) -> None:
    """The strokes of an image ``[1, 8, 8]``, enlarged smoothly, on a clear ground."""
    large = functional.interpolate(image[None], size=(64, 64), mode="bicubic")[0, 0]
    rgba = np.zeros((64, 64, 4))
    rgba[..., :3] = _matplotlib("colors").to_rgb(colour)
    rgba[..., 3] = ((large - 0.35) / 0.3).clamp(0, 1).numpy()
    x, y = centre
    axes.imshow(rgba, extent=(x - half, x + half, y - half, y + half), zorder=4)


def _is_single(prompt: Prompt) -> bool:
    return len(prompt.digits) == 1


def _colour(prompt: Prompt) -> str:
    return COLOURS[min(prompt.digits)] if _is_single(prompt) else INK


def _draw_prompts(disk: Any, places: Array) -> None:
    single = np.array([_is_single(prompt) for prompt in PROMPTS])
    colours = np.array([_colour(prompt) for prompt in PROMPTS])
    for of_kind, size, marker in ((single, 60, "o"), (~single, 72, "D")):
        style = {"s": size, "c": colours[of_kind], "marker": marker, "edgecolors": "white", "linewidths": 1.1}
        disk.scatter(*places[of_kind].T, zorder=7, **style)


def _draw_labels(disk: Any, places: Array) -> Array:
    """Every prompt for several digits, and one for each single digit, which stands for its synonyms too.

    Returns: the centres of the labels.
    """
    shown = [i for i, prompt in enumerate(PROMPTS) if not _is_single(prompt) or prompt.text.startswith("the digit")]
    texts = []
    for i in shown:
        words = PROMPTS[i].text.replace(" smaller", "\nsmaller").replace(" larger", "\nlarger")
        weight = "bold" if _is_single(PROMPTS[i]) else "normal"
        style = {"fontsize": 10.5, "color": _colour(PROMPTS[i]), "weight": weight, "linespacing": 1.05}
        texts.append(disk.text(0, 0, words, ha="center", va="center", zorder=8, **style))
    _matplotlib("backends.backend_agg").FigureCanvasAgg(disk.figure)  # measures the texts
    to_data = disk.transData.inverted()
    boxes = [to_data.transform_bbox(text.get_window_extent()) for text in texts]
    sizes = np.array([(box.width + 0.03, box.height + 0.022) for box in boxes])
    anchors = places[shown]
    centres = spread_labels(anchors, sizes, *LABEL_RING)
    for i, text, anchor, centre in zip(shown, texts, anchors, centres, strict=True):
        text.set_position(centre)
        text.set_bbox({"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.0})
        disk.plot(*zip(anchor, centre, strict=True), color=_colour(PROMPTS[i]), linewidth=0.7, alpha=0.55, zorder=6)
    return centres


def _draw_way(disk: Any, layout: DiskLayout, prompts: Array, journey: Journey) -> None:
    """The way itself, a ring where it meets another text, and from there a dotted line to that text."""
    colour = COLOURS[journey.label]
    stops = layout.place(torch.stack([stop.point for stop in journey.stops]))
    disk.plot(*np.vstack([stops, [[0, 0]]]).T, color=colour, linewidth=3.4, alpha=0.9, zorder=5, solid_capstyle="round")
    for stop, place in zip(journey.stops, stops, strict=True):
        if stop.prompt is not None:
            link = zip(place, prompts[stop.prompt], strict=True)
            disk.plot(*link, ":", color=colour, linewidth=1.5, alpha=0.7, zorder=6)
            disk.scatter(*place, s=46, c="white", edgecolors=colour, linewidths=2, zorder=6)


def _write_ways(axes: Any, journeys: Sequence[Journey]) -> None:
    axes.set(xlim=(0, 25), ylim=(0, len(journeys)))
    axes.axis("off")
    for row, journey in enumerate(reversed(journeys)):
        y = row + 0.5
        _draw_digit(axes, journey.image, COLOURS[journey.label], np.array([0.45, y]), 0.4)
        axes.plot([1.15, 1.75], [y, y], color=COLOURS[journey.label], linewidth=3.4, solid_capstyle="round")
        # Lines break after an arrow only.
        words = "\N{NO-BREAK SPACE}→ ".join(stop.text.replace(" ", "\N{NO-BREAK SPACE}") for stop in journey.stops)
        axes.text(2.1, y, textwrap.fill(words, 112), va="center", fontsize=11.5, color=INK, linespacing=1.3)
    axes.set(xlim=(0, 25), ylim=(0, len(journeys)), aspect="auto")
