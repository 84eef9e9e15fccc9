"""Line charts as inline SVG whose colours are the page's CSS variables, so that they follow light and dark."""

import hashlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

SERIES = 6  # colours that the page defines: --series-0 ...
# Matplotlib wants real colours; these stand for the page's and are replaced in the SVG.
INK, RULE = "#010203", "#010204"
COLOURS = [f"#01030{i}" for i in range(SERIES)]
STYLES = ["-", "--", "-.", ":"]
POINTS = 500  # drawn of a series
SMOOTH_FROM = 60  # points from which a running mean is drawn over the raw line


@dataclass(frozen=True)
class Series:
    label: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart(
    series: Sequence[Series],
    *,
    width: float = 3.5,
    height: float = 2.2,
    x_label: str = "",
    y_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
    smooth: bool = False,
) -> tuple[str, str]:
    """(SVG, remark). Sizes in inches. `smooth` thins noisy series and draws their running mean on top.

    What cannot be drawn (NaN, infinities, values <= 0 on a log axis) is left out, and the remark says how much.
    """
    # The salt names clips and markers: they must not collide on one page, nor change from one build to the next.
    salt = hashlib.blake2b(repr((list(series), width, height, log_x, log_y)).encode(), digest_size=8).hexdigest()
    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
    }  # fmt: skip
    left_out, whole = 0, True
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        for i, one in enumerate(series):
            x, y = np.asarray(one.x, dtype=float), np.asarray(one.y, dtype=float)
            whole = whole and bool((x == np.round(x)).all())
            drawable = np.isfinite(x) & np.isfinite(y) & ((x > 0) | (not log_x)) & ((y > 0) | (not log_y))
            left_out += int((~drawable).sum())
            x, y = np.where(drawable, x, np.nan), np.where(drawable, y, np.nan)
            look: Any = {
                "color": COLOURS[i % SERIES],
                "linestyle": STYLES[i // SERIES % len(STYLES)],
                "solid_capstyle": "round",
            }
            if smooth and drawable.sum() >= SMOOTH_FROM:
                axes.plot(*_thinned(x, y), **{**look, "linestyle": "-", "linewidth": 0.8, "alpha": 0.3})
                axes.plot(*_thinned(x[drawable], _running_mean(y[drawable])), **look, linewidth=1.7)
            else:
                few = drawable.sum() <= 25
                axes.plot(*_thinned(x, y), **look, linewidth=1.7, marker="o" if few else None, markersize=3.2)
        _dress(axes, log_x, log_y, whole)
        axes.set_xlabel(x_label, color=INK, parse_math=False)
        axes.set_ylabel(y_label, color=INK, parse_math=False)
        axes.margins(x=0.02)
        reason = "not finite, or not above 0" if log_x or log_y else "not finite"
        remark = f"{left_out} value{'s' * (left_out > 1)} not drawn ({reason})." if left_out else ""
        return _svg(figure), remark


def wide_range(values: Sequence[float]) -> bool:
    """Whether a log axis reads better: all positive, over two decades."""
    finite = [v for v in values if math.isfinite(v)]
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) > 100


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points, each the mean of its neighbours (NaN where all are)."""
    if len(x) <= POINTS:
        return x, y
    cuts = np.linspace(0, len(x), POINTS + 1).astype(int)
    means = []
    for values in (x, y):
        kept = np.isfinite(values)
        totals, counts = (
            np.add.reduceat(np.where(kept, values, 0.0), cuts[:-1]),
            np.add.reduceat(kept.astype(int), cuts[:-1]),
        )
        means.append(np.where(counts > 0, totals / np.maximum(counts, 1), np.nan))
    return means[0], means[1]


def _running_mean(y: np.ndarray) -> np.ndarray:
    """Mean of a 25th of the points around each; of those on one side at the ends."""
    total, at, reach = np.concatenate([[0.0], np.cumsum(y)]), np.arange(len(y)), max(1, len(y) // 50)
    start, stop = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(y))
    return (total[stop] - total[start]) / (stop - start)


def _dress(axes: Any, log_x: bool, log_y: bool, whole: bool) -> None:
    for axis, log in ((axes.xaxis, log_x), (axes.yaxis, log_y)):
        if log:
            (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
            low, high = sorted(axis.get_view_interval())
            short = high / max(low, 1e-300) < 30  # less than two decades: label 1, 2 and 5 too
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if short else (1.0,), numticks=6))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
            axis.set_minor_formatter(NullFormatter())
        else:
            axis.set_major_locator(
                MaxNLocator(6, integer=whole, steps=[1, 2, 5, 10])
                if axis is axes.xaxis
                else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
            )
            plain = ScalarFormatter(useOffset=False)
            plain.set_powerlimits((-4, 6))
            axis.set_major_formatter(plain)
        axis.get_offset_text().set_color(INK)
    axes.tick_params(colors=INK, length=0, pad=5)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(RULE)


def _svg(figure: Figure) -> str:
    """The figure as an SVG element that scales with its column and takes the page's font and colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = svg.replace("'DejaVu Sans'", "var(--sans)").replace(INK, "var(--soft)").replace(RULE, "var(--rule)")
    for i, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--series-{i})")
    return svg.strip()
