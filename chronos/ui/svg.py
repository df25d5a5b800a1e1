"""Charts as HTML: lines, points and bars in an SVG, their words beside it, so that these keep their
size in windows of every width.

A chart that is drawn anew twice a second has to cost little, here and in a browser: it is a text of
a few kilobytes that a browser puts in place, without a script. Knows no page and no framework.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Series = Mapping[str, Sequence[tuple[float, float]]]
Groups = Mapping[str, Mapping[str, float]]
# Of Okabe and Ito (jfly.uni-koeln.de/color), which colour-blind people tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_SIZE = 1000  # of the drawing, both ways; it is stretched to its place
_NAMES = 12  # below an axis, at most


def lines(title: str, series: Series) -> str:
    """A line a series through its (x, y) points."""
    return _plane(title, series, joined=True)


def points(title: str, series: Series) -> str:
    """A mark for each (x, y)."""
    return _plane(title, series, joined=False)


def bars(
    title: str, groups: Groups, *, stacked: bool = False, colours: Mapping[str, str] | None = None
) -> str:
    """Bars of each place on the axis, a value a series: one upon the other, or side by side."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    shades = {name: (colours or {}).get(name) or _shade(at) for at, name in enumerate(names)}
    tops = [
        sum(group.values()) if stacked else max(group.values(), default=0.0)
        for group in groups.values()
    ]
    ticks = _ticks(0.0, max(tops, default=0.0))
    high = ticks[-1]
    broad = _SIZE / max(1, len(groups))
    drawn = []
    for at, (place, group) in enumerate(groups.items()):
        base = 0.0
        width = 0.8 * broad if stacked else 0.8 * broad / max(1, len(names))
        for name, value in group.items():
            left = (at + 0.1) * broad + (0 if stacked else names.index(name) * width)
            tall = _SIZE * value / high
            told = html.escape(f"{place} {name}: {_number(value)}")
            drawn.append(
                f'<rect x="{left:.1f}" y="{_SIZE - base - tall:.1f}" width="{width:.1f}"'
                f' height="{tall:.1f}" fill="{shades[name]}"><title>{told}</title></rect>'
            )
            base += tall if stacked else 0
    every = math.ceil(len(groups) / _NAMES)
    below = [
        ((at + 0.5) / len(groups), place) for at, place in enumerate(groups) if at % every == 0
    ]
    return _figure(title, shades, drawn, _heights(ticks), below)


def image(title: str, pixels_HWC: npt.NDArray[np.uint8]) -> str:
    """An RGB image, as wide as its place."""
    from PIL import Image  # of Gradio's own needs

    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "png")
    source = base64.b64encode(file.getvalue()).decode()
    told = html.escape(title)
    return (
        f'<figure class="chart"><figcaption>{told}</figcaption>'
        f'<img alt="{told}" src="data:image/png;base64,{source}"></figure>'
    )


def _plane(title: str, series: Series, *, joined: bool) -> str:
    every = [point for found in series.values() for point in found]
    if not every:
        return _figure(title, {}, [], [], [])
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*every, strict=True))
    heights = _ticks(low, high)
    # A line ends where its axis does; marks at the edge would be cut in half.
    places = _ticks(left, right)
    if not joined:
        left, right = places[0], places[-1]
    wide, tall = (right - left) or 1.0, heights[-1] - heights[0]
    shades = {name: _shade(at) for at, name in enumerate(series)}
    drawn = []
    for name, found in series.items():
        at = [(_SIZE * (x - left) / wide, _SIZE * (1 - (y - heights[0]) / tall)) for x, y in found]
        look = f'stroke="{shades[name]}" fill="none" vector-effect="non-scaling-stroke"'
        if joined and len(at) > 1:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
            told = html.escape(name)
            drawn.append(f'<path d="{path}" {look} stroke-width="1.5"><title>{told}</title></path>')
            continue
        for (x, y), (right_of, up) in zip(at, found, strict=True):
            told = html.escape(f"{name}: {_number(right_of)}, {_number(up)}")
            # A line without length and with round ends is a dot, however the drawing is stretched.
            drawn.append(
                f'<path d="M{x:.1f} {y:.1f}h0.01" {look} stroke-width="8" stroke-linecap="round">'
                f"<title>{told}</title></path>"
            )
    below = [((x - left) / wide, _number(x)) for x in places if left <= x <= right]
    return _figure(title, shades, drawn, _heights(heights), below)


def _figure(
    title: str,
    shades: Mapping[str, str],
    drawn: Sequence[str],
    beside: Sequence[tuple[float, str]],
    below: Sequence[tuple[float, str]],
) -> str:
    """beside, below: (share of the axis, word)."""
    key = "".join(
        f'<span class="key"><i style="background:{shade}"></i>{html.escape(name)}</span>'
        for name, shade in shades.items()
        if name
    )
    grid = "".join(
        f'<path d="M0 {_SIZE * (1 - at):.1f}H{_SIZE}" class="grid"/>' for at, _ in beside
    )
    words = "".join(
        f'<span class="beside" style="bottom:{100 * at:.1f}%">{word}</span>' for at, word in beside
    ) + "".join(
        f'<span class="below" style="left:{100 * at:.1f}%">{html.escape(word)}</span>'
        for at, word in below
    )
    told = html.escape(f"{title}: {', '.join(filter(None, shades))}" if shades else title)
    return (
        f'<figure class="chart"><figcaption>{html.escape(title)}{key}</figcaption>'
        f'<div class="plane"><svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none"'
        f' role="img" aria-label="{told}">{grid}{"".join(drawn)}</svg>{words}</div></figure>'
    )


def _heights(ticks: Sequence[float]) -> list[tuple[float, str]]:
    low, high = ticks[0], ticks[-1]
    return [((tick - low) / (high - low), _number(tick)) for tick in ticks]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, three to six, that hold both."""
    if not high > low:
        low, high = (0.0, 1.0) if low == 0 else (min(low, 0.0), max(low, 0.0))
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * number for number in range(first, last + 1)]


def _number(value: float) -> str:
    if abs(value) >= 10_000:
        for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.3g}{sign}"
    return f"{value:.4g}"


def _shade(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
