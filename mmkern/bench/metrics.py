"""Numbers that a floor can hold: ratios of medians from one run.

``eager``, ``compile``, a peer's name: how many times faster mmkern is. ``copy``, ``sgemm``: the share of the machine's
own rate that it reaches. ``overhead_us``, ``of_mul``: what a call costs above the bare kernel, and as a multiple of
``x * 2`` with a gradient; of these less is better.
"""

from __future__ import annotations

from collections.abc import Mapping

YARDSTICKS = ("copy", "sgemm", "bare kernel", "x * 2")
LESS_IS_BETTER = ("overhead_us", "of_mul")


def derive(medians: Mapping[str, float], *, copies: float, products: float) -> dict[str, float]:
    """Metrics of a case that moves at least as much as ``copies`` copies, and computes ``products`` matrix products."""
    ours = medians["mmkern"]
    found = {name: t / ours for name, t in medians.items() if name != "mmkern" and name not in YARDSTICKS}
    for name, amount in (("copy", copies), ("sgemm", products)):
        if name in medians:
            found[name] = amount * medians[name] / ours
    if "bare kernel" in medians:
        found["overhead_us"] = 1e6 * (ours - medians["bare kernel"])
    if "x * 2" in medians:
        found["of_mul"] = ours / medians["x * 2"]
    return found


def rivals(metrics: Mapping[str, float]) -> dict[str, float]:
    """Only the ratios against other implementations."""
    return {n: v for n, v in metrics.items() if n not in YARDSTICKS and n not in LESS_IS_BETTER}


def reaches(metric: str, value: float, bound: float) -> bool:
    return value <= bound if metric in LESS_IS_BETTER else value >= bound


def loosened(metric: str, value: float, share: float) -> float:
    """``value`` with room for noise: ``share`` of it, or that much more where less is better."""
    return value / share if metric in LESS_IS_BETTER else value * share


def text(metric: str, value: float) -> str:
    """``2.4x``, ``81 %`` or ``2.5 µs``."""
    if metric in ("copy", "sgemm"):
        return f"{100 * value:.0f} %"
    if metric == "overhead_us":
        return f"{value:.1f} µs"
    return f"{value:.0f}x" if value >= 20 else f"{value:.2f}x"
