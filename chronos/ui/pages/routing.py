"""Routing: a trace as a picture, its clusters, and how evenly experts are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from chronos.common.errors import ChronosError
from chronos.ui import pictures, svg
from chronos.ui.face import Face, Live, offered, relisted, table

KIND = "trace"
_TOKENS = 240  # columns of the picture


def build(face: Face) -> None:
    site = face.site
    kept: dict[tuple[str, float], Any] = {}  # what `inspect` said of a file
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
        trace = face.make(gr.Dropdown, label="@routing.trace", scale=3, elem_id="trace")
        layer = face.make(
            gr.Slider, label="@routing.layer", minimum=0, maximum=1, step=1, value=0, scale=3,
            elem_id="trace-layer",
        )  # fmt: skip
    picture = gr.HTML(elem_id="routing")
    with gr.Row():
        uses, numbers = gr.HTML(min_width=300), gr.HTML()

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

    def traces(language: str, called: Any) -> Any:
        return relisted(site.root.traces(), called)

    def live(language: str, called: Any, row: Any) -> Live:
        # Files are listed when a job has begun or ended, and when the list is opened: not at each
        # look, since all folders below the root are walked.
        jobs = site.jobs.of(KIND)
        states = [(job.name, job.state) for job in jobs]
        row = row if isinstance(row, int | float) else 0

        def draw() -> list[Any]:
            files = site.root.traces()
            name = called if called in files else (files[-1] if files else None)
            told = face.told(language, jobs[0] if jobs else None)
            shown = [gr.update(), "", "", ""]
            try:
                found = _found(face, kept, name) if name else None
                shown = _drawn(face, language, found, int(row)) if found else shown
            except ChronosError as error:  # a file that is no trace
                told += table((), [[str(error)]])
            return [offered(files, called, name), told, *shown]

        return (language, states, called, row), draw

    face.opened(listed, [model, data], [model, data])
    face.on([model.focus, data.focus], listed, [model, data], [model, data])
    face.on(trace.focus, traces, [trace], [trace])
    face.on(record.click, begun, [model, data, tokens], [])
    face.live("routing", live, [trace, layer], [trace, told, layer, picture, uses, numbers])


def _found(face: Face, kept: dict[tuple[str, float], Any], name: str) -> Any:
    """What `chronos inspect T.npz --json` prints; asked once for each version of the file."""
    path: Path = face.site.root.existing(name)
    key = (name, path.stat().st_mtime)
    if key not in kept:
        kept[key] = face.site.ask("inspect", str(path), "--tokens", str(_TOKENS))
    return kept[key]


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
