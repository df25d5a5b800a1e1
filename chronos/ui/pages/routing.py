"""Routing: a trace as a picture, its clusters, and how evenly experts are used."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import gradio as gr

from chronos.common.errors import UsageError
from chronos.ui import pictures, svg
from chronos.ui.face import Face, Live, offered, relisted, table

KIND = "trace"
_TOKENS = 240  # columns of the picture
_LISTS_S = 3.0


def build(face: Face) -> None:
    site = face.site
    listing = _Listing(site.root.traces)
    with gr.Row():
        model = face.make(gr.Dropdown, label="@routing.model", scale=2, min_width=160)
        data = face.make(
            gr.Dropdown, label="@routing.data", allow_custom_value=True, scale=2, min_width=160
        )
        tokens = face.make(
            gr.Number, label="@routing.tokens", value=2000, precision=0, minimum=1, min_width=120
        )
        record = face.make(gr.Button, value="@routing.record", min_width=120)
    told = gr.HTML(elem_id="trace-state")
    with gr.Row():
        trace = face.make(
            gr.Dropdown, label="@routing.trace", scale=3, min_width=260, elem_id="trace"
        )
        layer = face.make(
            gr.Slider, label="@routing.layer", minimum=0, maximum=1, step=1, value=0, scale=3,
            elem_id="trace-layer",
        )  # fmt: skip
    picture = gr.HTML(elem_id="routing")
    uses, numbers = face.beside()

    def listed(language: str, mine: Any, text: Any) -> list[Any]:
        files = ["stdlib", *site.root.data()]
        return [relisted(["demo", *site.root.models()], mine), relisted(files, text, free=True)]

    def begun(language: str, mine: str, text: str, most: float) -> None:
        where = mine if mine == "demo" else str(site.root.existing(mine or ""))
        rows = text if text == "stdlib" else str(site.root.existing(text or ""))
        name = site.jobs.free_name("trace")
        args = ["trace", where, "--data", rows, "-n", str(int(most or 2000))]
        out = site.root.run(name) / "routing.npz"
        site.jobs.start(name, KIND, [*args, "-o", str(out), "--json"])

    def live(language: str, called: Any, row: Any) -> Live:
        jobs = site.jobs.of(KIND)
        files = listing()
        name = called if called in files else (files[-1] if files else None)
        found = _found(face, name) if name else None
        row = row if isinstance(row, int | float) else 0
        states = [(job.name, job.state) for job in jobs]

        def draw() -> list[Any]:
            told = face.told(language, jobs[0] if jobs else None)
            if isinstance(found, UsageError):  # a file that is no trace
                told += table((), [[str(found)]])
            elif name and found is None:
                told += f"<p>{face.say(language, 'routing.reading')}</p>"
            known = isinstance(found, dict)
            shown = _drawn(face, language, found, int(row)) if known else [gr.update(), "", "", ""]
            return [offered(files, called, name), told, *shown]

        return (language, files, states, name, row, type(found)), draw

    face.opened(listed, [model, data], [model, data])
    face.on([model.focus, data.focus], listed, [model, data], [model, data])
    face.on(record.click, begun, [model, data, tokens], [])
    face.live("routing", live, [trace, layer], [trace, told, layer, picture, uses, numbers])


class _Listing:
    """Files, looked for again when some seconds have passed: all folders are walked for them."""

    def __init__(self, read: Callable[[], list[str]]) -> None:
        self._read, self._files, self._read_at = read, list[str](), -math.inf

    def __call__(self) -> list[str]:
        if time.monotonic() - self._read_at > _LISTS_S:
            self._files, self._read_at = self._read(), time.monotonic()
        return self._files


def _found(face: Face, name: str) -> Any:
    """What `chronos inspect T.npz --json` prints, for each version of the file; None while it has
    not said it yet."""
    try:
        path = face.site.root.existing(name)
        key = (name, path.stat().st_mtime)
    except (UsageError, OSError):  # it was removed just now
        return None
    return face.site.later(key, "inspect", str(path), "--tokens", str(_TOKENS))


def _drawn(face: Face, language: str, found: Any, row: int) -> list[Any]:
    layers = found["by_layer"]
    row = max(0, min(row, len(layers) - 1))
    one = layers[row]
    ids_TK = [ids_LK[row] for ids_LK in found["first_ids"]]
    image = pictures.routing(ids_TK, one["clusters"], found["experts"])
    group_of = {e: number for number, group in enumerate(one["clusters"]) for e in group}
    shades = {f"{n + 1}": svg.COLOURS[n % len(svg.COLOURS)] for n in range(len(one["clusters"]))}
    uses = {str(e): {f"{group_of[e] + 1}": n} for e, n in enumerate(one["uses"])}
    cells = [
        (
            each["layer"],
            f"{each['effective_experts']:.1f}",
            f"{100 * each['largest_share']:.1f} %",
            "-" if each["repeat"] is None else f"{100 * each['repeat']:.1f} %",
            len(each["clusters"]),
        )
        for each in layers
    ]
    head = [
        face.say(language, f"routing.{k}")
        for k in ("of_layer", "effective", "largest", "again", "clusters")
    ]
    slider = gr.update(maximum=max(1, len(layers) - 1), value=row)
    return [
        slider,
        svg.image(face.say(language, "routing.picture"), image),
        svg.bars(face.say(language, "routing.uses"), uses, stacked=True, colours=shades),
        table(head, cells),
    ]
