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

_COLOURS = tuple(f"C{number}" for number in range(10))
_CROWDED = 5  # groups, beyond which their names are slanted
_MARKERS, _DASHES = "os^vDP*X", ("-", "--", "-.", ":")
_WIDTH, _HEIGHT, _DPI = 7.8, 4.2, 110  # inches, dots per inch


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
    looks: Mapping[str, int] = {},
) -> None:
    """A chart of one line per name through its (x, y) points; `percent`: both axes are shares.
    looks: the number of each name's `look`, where it is not its place."""
    figure, axes = _figure(title, x, y)
    for number, (name, points) in enumerate(series.items()):
        xs, ys = zip(*points, strict=True)
        width = 2.4 if name in bold else 1.2
        axes.plot(xs, ys, label=name, linewidth=width, **look(looks.get(name, number)))
    if percent:
        _percents(axes.xaxis)
        _percents(axes.yaxis)
        axes.set_xticks(sorted({px for points in series.values() for px, _ in points}))
    _save(figure, axes, path)


def look(number: int) -> dict[str, Any]:
    """Colour, marker and line of the n-th series; 40 differ, in black and white too."""
    turn = number // len(_COLOURS)
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[(number + turn) % len(_MARKERS)],
        "linestyle": _DASHES[(number + turn) % len(_DASHES)],
        "markersize": 4.5,
    }


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
    crowded = len(groups) > _CROWDED
    axes.set_xticks(
        range(len(groups)),
        list(groups),
        rotation=30 if crowded else 0,
        ha="right" if crowded else "center",
        fontsize=7 if crowded else None,
    )
    if percent:
        _percents(axes.yaxis)
    _save(figure, axes, path, legend=len(names) > 1)


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
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))


def _save(figure: Any, axes: Any, path: Path, *, legend: bool = True) -> None:
    if legend:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    atomic_write(path, [drawn.getbuffer()], nbytes=drawn.getbuffer().nbytes)
