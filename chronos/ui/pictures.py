"""Numbers of logs as what charts draw, and a trace as an image. Nothing here measures anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chronos.ui.svg import COLOURS

_POINTS = 400  # of a line; more do not fit on a screen
_LATELY_S = 10.0
_CELL = 1_000  # pixels of an image's longer side, about


Points = dict[str, list[tuple[float, float]]]


def lines(rows: Sequence[Mapping[str, Any]], x: str, names: Mapping[str, str]) -> Points:
    """(x, value) of rows that have the keys of `names`, which says what each is called; long series
    are thinned, first and last points kept, and those without a point left out."""
    found: Points = {}
    for key, name in names.items():
        points = [(row[x], row[key]) for row in rows if row.get(key) is not None and x in row]
        if points:
            found[name] = [(float(a), float(b)) for a, b in _thinned(points)]
    return found


def _thinned(points: Sequence[Any]) -> Iterable[Any]:
    if len(points) <= _POINTS:
        return points
    at = np.linspace(0, len(points) - 1, _POINTS).round().astype(int)
    return [points[number] for number in at]


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of (cost, gain) pairs, which no other beats: none costs as little and gains as much, and is
    better in one of the two."""
    return [
        not any((a <= cost and b >= gain) and (a < cost or b > gain) for a, b in points)
        for cost, gain in points
    ]


def routing(
    ids_TK: Sequence[Sequence[int]], clusters: Sequence[Sequence[int]], experts: int
) -> npt.NDArray[np.uint8]:
    """An RGB image of one layer: a column a token, a row an expert, in the order of the clusters;
    a used expert has its cluster's colour. Thin lines part the clusters."""
    order = [expert for group in clusters for expert in group]
    place = {expert: row for row, expert in enumerate(order)}
    shades = [tuple(bytes.fromhex(colour[1:])) for colour in COLOURS]
    shade_of = {
        expert: shades[number % len(shades)]
        for number, group in enumerate(clusters)
        for expert in group
    }
    tokens = len(ids_TK)
    image = np.full((experts, max(1, tokens), 3), 245, np.uint8)
    for token, ids in enumerate(ids_TK):
        for expert in ids:
            image[place[expert], token] = shade_of[expert]
    cell = max(2, min(_CELL // max(1, tokens), 400 // experts))
    image = image.repeat(cell, 0).repeat(cell, 1)
    edge = 0
    for group in clusters[:-1]:
        edge += len(group) * cell
        image[edge - 1] = 120
    return image


def between(rows: Sequence[Mapping[str, Any]], window: str) -> list[dict[str, Any]]:
    """By layer, what was counted since the start or in the last seconds."""
    last = rows[-1]
    if window == "start":
        return list(last["layers"])
    first = next(row for row in rows if row["time"] >= last["time"] - _LATELY_S)
    before = {each["layer"]: each for each in first["layers"]}
    return [
        {
            name: value if name == "layer" else value - before[each["layer"]][name]
            for name, value in each.items()
        }
        for each in last["layers"]
    ]


def flow(rows: Sequence[Mapping[str, Any]]) -> Points:
    """Megabytes and tokens a second between two lines of the log."""
    start = rows[0]["time"] if rows else 0.0
    found = []
    for before, after in zip(rows, rows[1:], strict=False):
        seconds = after["time"] - before["time"]
        if seconds > 0:
            found.append(
                {
                    "seconds": after["time"] - start,
                    "read": (after["bytes_read"] - before["bytes_read"]) / 1e6 / seconds,
                    "tokens": (after["generated"] - before["generated"]) / seconds,
                }
            )
    return lines(found, "seconds", {"read": "MB/s", "tokens": "tokens/s"})


def budgets(name: str, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each budget of a benchmark: what `chronos bench --json` printed of it."""
    return [
        {
            "series": name,
            "budget": run["budget"],
            "bytes": run["budget_bytes"],
            "tokens_per_s": run["decode_tps_median"],
            "hit_rate": run["hit_rate"],
            "identical": run["tokens_identical"],
        }
        for run in result.get("budgets", ())
    ]


def trials(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The trials in a study's events, by their numbers: what was last said of each, with the
    newest of its rungs while it runs. One that goes on in another's folder stands for it."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        number = row.get("trial")
        if not isinstance(number, int):
            continue
        if row["event"] == "trial":
            found[number] = found.get(number, {}) | dict(row)
            if row["state"] == "running" and row.get("origin", number) != number:
                found.pop(row["origin"], None)
        elif row["event"] == "rung" and number in found:
            found[number] |= {"values": row["values"], "step": row["step"], "steps": row["steps"]}
        elif row["event"] == "progress" and number in found and "steps" in row:
            found[number] |= {"step": row["step"], "steps": row["steps"]}
    return [found[number] for number in sorted(found)]
