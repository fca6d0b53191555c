"""One picture of a run: the roofline, and how many times faster mmkern is than each rival."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmkern.extras import require

from . import metrics, table
from .floors import Bound, Floors
from .history import Run
from .measure import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MODE_COLOURS = {"forward": "#1b6ca8", "forward+backward": "#c8553d"}
_RIVAL_COLOURS = {"eager": "#8a9ba8", "compile": "#e0a030"}
_PEER_COLOURS = ("#5b8c5a", "#7a5c99", "#a05050")
_INK, _MUTED, _FAINT = "#222222", "#5a6670", "#b8bec4"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
}


def draw(run: Run, floors: Floors, target: Path) -> None:
    """Write a PNG: cases carry the same number in both panels."""
    matplotlib = require("matplotlib", "matplotlib", "bench")
    figure_module = require("matplotlib.figure", "matplotlib", "bench")
    cases = list(run.cases.values())
    rivals = list(dict.fromkeys(name for m in cases for name in metrics.rivals(m.metrics)))
    heights = 5.2, 0.9 + sum(_room(m) for m in cases)
    with matplotlib.rc_context(_STYLE):
        figure = figure_module.Figure(figsize=(11, sum(heights) + 1.2), dpi=120, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12)
        figure.suptitle(_title(run), x=0.012, ha="left", fontsize=9, color=_MUTED)
        top, bottom = (part.subplots() for part in figure.subfigures(2, 1, height_ratios=heights))
        _roofline(top, cases, run.machine.get("fma_peak"))
        _ratios(bottom, cases, rivals, floors)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target)


def _title(run: Run) -> str:
    machine = run.machine
    return f"{run.time[:10]}   revision {run.revision}   {machine['cpu']}   {machine['isa']}   torch {machine['torch']}"


# ---- Roofline --------------------------------------------------------------------------------------------------------


def _roofline(axes: Axes, cases: Sequence[Measurement], fma_peak: float | None) -> None:
    drawn = [(i, m) for i, m in enumerate(cases, 1) if m.mode in _MODE_COLOURS and m.threads == 1]
    axes.set_title("Roofline: achieved rate against arithmetic intensity, one thread", loc="left", fontweight="bold")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("additions and multiplications for each byte that must move")
    axes.set_ylabel("GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    if not drawn:
        return
    intensities = [m.flops / m.bytes for _, m in drawn]
    left, right = min(intensities) / 3, max(max(intensities) * 3, 64)
    _roofs(axes, [m for _, m in drawn], fma_peak, left, right)
    for _, m in drawn:
        x, ours = m.flops / m.bytes, m.flops / m.medians["mmkern"] / 1e9
        if "eager" in m.medians:
            eager = m.flops / m.medians["eager"] / 1e9
            axes.plot([x, x], [eager, ours], color=_MODE_COLOURS[m.mode], lw=1, alpha=0.35, zorder=2)
            axes.plot(x, eager, "o", ms=5, mfc="white", mec=_MODE_COLOURS[m.mode], zorder=3)
        axes.plot(x, ours, "o", ms=7, color=_MODE_COLOURS[m.mode], mec="white", zorder=4)
    axes.set_xlim(left, right)
    _number(axes, [(i, m.flops / m.bytes, m.flops / m.medians["mmkern"] / 1e9) for i, m in drawn])
    for mode, colour in _MODE_COLOURS.items():
        axes.plot([], [], "o", ms=7, color=colour, label=f"mmkern, {mode}")
    axes.plot([], [], "o", ms=5, mfc="white", mec=_INK, label="torch eager, the same case")
    axes.legend(frameon=False, loc="lower right")
    axes.grid(which="major", color="#eef0f2", zorder=0)


def _roofs(axes: Axes, cases: Sequence[Measurement], fma_peak: float | None, left: float, right: float) -> None:
    """The multiply-add peak and the best matrix product; the slowest copy (memory) and the fastest (a cache)."""
    products = [m.flops / m.medians["mmkern"] / m.metrics["sgemm"] / 1e9 for m in cases if "sgemm" in m.metrics]
    ceilings = {"multiply-add peak": fma_peak / 1e9 if fma_peak else None, "sgemm": max(products, default=None)}
    lowest = min((ceiling for ceiling in ceilings.values() if ceiling), default=None)
    for name, ceiling in ceilings.items():
        if ceiling:
            axes.axhline(ceiling, color=_INK, lw=1.2, ls="--" if name == "sgemm" else "-", zorder=1)
            side = "top" if ceiling == lowest else "bottom"  # the two may be one line but for a hair
            axes.text(right, ceiling, f"{name} {ceiling:.0f} GFLOP/s ", ha="right", va=side, fontsize=8)
    copies = sorted(m.bytes / m.medians["mmkern"] / m.metrics["copy"] / 1e9 for m in cases if "copy" in m.metrics)
    if not copies:
        return
    slopes = {"copy in memory": copies[0]}
    if copies[-1] > 1.5 * copies[0]:
        slopes["copy in cache"] = copies[-1]
    highest = max((c for c in ceilings.values() if c), default=math.inf)
    for style, (name, slope) in zip(("-", "--"), slopes.items(), strict=False):
        end = min(highest / slope, right)
        axes.plot([left, end], [slope * left, slope * end], color=_INK, lw=1.2, ls=style, zorder=1)
        label = axes.text(
            end * 0.8, slope * end * 0.86, f"{name} {slope:.1f} GB/s", fontsize=8, ha="right", va="bottom"
        )
        label.set_rotation(math.degrees(math.atan(slope)))  # of the line, in the units of the axes
        label.set_rotation_mode("anchor")
        label.set_transform_rotates_text(True)


def _number(axes: Axes, points: Iterable[tuple[int, float, float]]) -> None:
    """Write each case's number beside its dot; dots that nearly coincide share a label."""
    groups: list[tuple[float, float, list[int]]] = []
    for number, x, y in points:
        near = next((g for g in groups if abs(math.log(g[0] / x)) < 0.1 and abs(math.log(g[1] / y)) < 0.12), None)
        if near:
            near[2].append(number)
        else:
            groups.append((x, y, [number]))
    for x, y, numbers in groups:
        _beside(axes, ", ".join(map(str, numbers)), x, y, 7)


def _beside(axes: Axes, text: str, x: float, y: float, points: int) -> None:
    axes.annotate(text, (x, y), xytext=(points, 0), textcoords="offset points", va="center", fontsize=8, zorder=5)


# ---- Ratios ----------------------------------------------------------------------------------------------------------

_BAR, _GAP = 0.17, 0.16  # inches


def _room(m: Measurement) -> float:
    return _GAP + _BAR * max(1, len(metrics.rivals(m.metrics)))


def _ratios(axes: Axes, cases: Sequence[Measurement], rivals: Sequence[str], floors: Floors) -> None:
    colours = _rival_colours(rivals)
    axes.set_title("Times faster than each rival", loc="left", fontweight="bold", pad=26)
    axes.set_xscale("log")
    ticks, y = [], 0.0
    for m in cases:
        ticks.append(y + (_room(m) - _GAP) / 2)
        bounds = floors.get(m.case, {})
        for name, ratio in metrics.rivals(m.metrics).items():
            _bar(axes, y + _BAR / 2, ratio, colours[name], bounds.get(name))
            y += _BAR
        y = ticks[-1] + (_room(m) - _GAP) / 2 + _GAP
    axes.set_ylim(y, -_GAP)
    axes.set_yticks(ticks, [f"{m.case}  {i:>2}" for i, m in enumerate(cases, 1)])
    axes.tick_params(axis="y", length=0)
    axes.axvline(1, color=_INK, lw=1)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.8), high * 3)
    axes.set_xticks([at for at in (1, 2, 3, 5, 10, 20, 50, 100) if at <= axes.get_xlim()[1]])
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    for at, m in zip(ticks, cases, strict=True):
        words = axes.text(1, at, table.machine(m), ha="right", va="center", fontsize=8, color=_MUTED)
        words.set_transform(axes.get_yaxis_transform())
    for name in rivals:
        axes.plot([], [], "s", ms=8, color=colours[name], label=name)
    axes.plot([], [], "|", ms=9, mew=2, color=_INK, label="goal")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(rivals) + 1, borderaxespad=0.2)


def _bar(axes: Axes, y: float, ratio: float, colour: str, bound: Bound | None) -> None:
    axes.barh(y, ratio - 1, left=1, height=_BAR * 0.9, color=colour, zorder=2)
    text_at = ratio
    if bound and bound.goal:
        axes.plot([bound.goal] * 2, [y - _BAR * 0.45, y + _BAR * 0.45], color=_INK, lw=2, zorder=3)
        text_at = max(ratio, bound.goal)
    _beside(axes, metrics.text("", ratio), max(text_at, 1), y, 4)


def _rival_colours(rivals: Iterable[str]) -> Mapping[str, str]:
    peers = iter(_PEER_COLOURS * 4)
    return {name: _RIVAL_COLOURS.get(name) or next(peers) for name in rivals}
