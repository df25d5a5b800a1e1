"""Charts as PNG files, drawn without a display. matplotlib is an optional package (`plot`).

Takes plain numbers, so that whoever measures needs no word of matplotlib. One style for all: a
line or bar per name, a legend, percent where a share is meant.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chronos.cli import output
from chronos.common.disk.atomic import atomic_write
from chronos.common.errors import MissingBackendError, UsageError

_WIDTH, _HEIGHT, _DPI = 6.4, 4.0, 110  # inches, dots per inch


def check(path: Path) -> None:
    """Raises UsageError or MissingBackendError unless a chart can be drawn there: asked before long
    work."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"a chart is a PNG file, not {path.name!r}", "--png", "name it FILE.png")
    output.check_target(path, "--png")
    _require()


def _require() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingBackendError(
            "charts need matplotlib, which is not installed",
            "",
            "pip install 'chronos-moe[plot]'",
        )


def lines(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x: str,
    y: str,
    percent: bool = True,
    bold: Sequence[str] = (),
) -> None:
    """A chart of one line per name through its (x, y) points; `percent`: both axes are shares."""
    figure, axes = _figure(title, x, y)
    for name, points in series.items():
        xs, ys = zip(*points, strict=True)
        style = {"linewidth": 2.4} if name in bold else {"linewidth": 1.2, "linestyle": "--"}
        axes.plot(xs, ys, marker="o", markersize=3.5, label=name, **style)
    if percent:
        _percents(axes.xaxis)
        _percents(axes.yaxis)
        axes.set_xticks(sorted({px for points in series.values() for px, _ in points}))
    _save(figure, axes, path)


def bars(
    path: Path,
    groups: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    y: str,
    percent: bool = False,
) -> None:
    """A chart of one group of bars per outer name, one bar in it per inner name."""
    figure, axes = _figure(title, "", y)
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        shift = (place - (len(names) - 1) / 2) * width
        at = [i + shift for i, group in enumerate(groups.values()) if name in group]
        axes.bar(at, [group[name] for group in groups.values() if name in group], width, label=name)
    axes.set_xticks(range(len(groups)), list(groups))
    if percent:
        _percents(axes.yaxis)
    _save(figure, axes, path)


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    _require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _percents(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0))


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.legend(fontsize=7)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    atomic_write(path, [drawn.getbuffer()], nbytes=drawn.getbuffer().nbytes)
