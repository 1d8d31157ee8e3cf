"""Charts as inline SVG, drawn here: the page needs no script for them. Colours are the style sheet's, through classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from markupsafe import Markup

WIDTH: Final = 640
HEIGHT: Final = 120


def area(values: Sequence[float | None], label: str, unit: str = "", width: int = WIDTH, height: int = HEIGHT) -> Markup:
    """A line over time, the newest at the right; None is a hole. ``label`` is what a screen reader says, with the last value and
    the highest one."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return Markup("")
    top = max(*known, 1e-9)
    step = width / (len(values) - 1)
    runs: list[list[str]] = [[]]
    for at, value in enumerate(values):
        if value is None:
            runs.append([])
        else:
            runs[-1].append(f"{at * step:.1f},{height - 4 - value / top * (height - 12):.1f}")
    drawn = Markup("")
    for run in runs:
        if len(run) > 1:
            first, last = run[0].partition(",")[0], run[-1].partition(",")[0]
            drawn += Markup('<polygon class="fill" points="{}"/>').format(f"{first},{height} {' '.join(run)} {last},{height}")
            drawn += Markup('<polyline class="line" points="{}"/>').format(" ".join(run))
    said = f"{label}: now {short(known[-1])}{unit}, at most {short(max(known))}{unit}"
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">').format(
        width, height, said
    )
    base = Markup('<line class="axis" x1="0" x2="{0}" y1="{1}" y2="{1}"/>').format(width, height - 0.5)
    return head + base + drawn + Markup("</svg>")


def said(values: Sequence[float | None], unit: str = "") -> str:
    """The chart's scale in words: ``now 0.1 s, at most 2.7 s``."""
    known = [value for value in values if value is not None]
    return f"now {short(known[-1])}{unit}, at most {short(max(known))}{unit}" if known else ""


def share(part: float, whole: float, label: str, alarming: bool = True) -> Markup:
    """How full something is; from nine tenths on that is ``alarming``, or not."""
    filled = min(part / whole, 1.0) * 100 if whole else 0.0
    return Markup(
        '<svg class="share" viewBox="0 0 100 6" preserveAspectRatio="none" role="img" aria-label="{}">'
        '<rect class="track" width="100" height="6" rx="3"/><rect class="bar{}" width="{:.1f}" height="6" rx="3"/></svg>'
    ).format(label, " full" if alarming and filled >= 90 else "", filled)


def short(number: float) -> str:
    """1234567 as ``1.2 M``; small ones with a digit behind the point."""
    for limit, sign in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(number) >= limit:
            return f"{number / (limit if limit != 1e4 else 1e3):.1f}{sign}"
    return f"{number:.0f}" if number == int(number) or abs(number) >= 100 else f"{number:.1f}"
