"""Routing: a trace as a picture, its clusters, and how evenly experts are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from chronos.ui import pictures
from chronos.ui.face import Face, chosen, offered, table

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
    picture = face.make(
        gr.Image, label="@routing.picture", type="numpy", interactive=False, elem_id="routing",
        buttons=["download", "fullscreen"], format="png",
    )  # fmt: skip
    with gr.Row():
        uses = face.make(
            gr.BarPlot, label="@routing.uses", x="expert", y="value", color="series", height=240,
            min_width=300,
        )  # fmt: skip
        numbers = gr.HTML()

    def listed(language: str, mine: Any, text: Any) -> list[Any]:
        files = ["stdlib", *site.root.data()]
        models = ["demo", *site.root.models()]
        return [chosen(models, mine), gr.update(choices=files, value=text or "stdlib")]

    def begun(language: str, mine: str, text: str, most: float) -> None:
        where = mine if mine == "demo" else str(site.root.existing(mine or ""))
        rows = text if text == "stdlib" else str(site.root.existing(text or ""))
        name = site.jobs.free_name("trace")
        args = ["trace", where, "--data", rows, "-n", str(int(most or 2000))]
        out = site.root.run(name) / "routing.npz"
        site.jobs.start(name, KIND, [*args, "-o", str(out), "--json"])

    def live(language: str, seen: Any, called: Any, row: float) -> Any:
        files = site.root.traces()
        jobs = site.jobs.of(KIND)
        asked, called = called, called if called in files else (files[-1] if files else None)
        states = [(job.name, job.state) for job in jobs]
        mark = (language, files, states, called, row)
        if mark == seen:
            return None
        found = _found(face, kept, called) if called else None
        state = face.told(language, jobs[0] if jobs else None)
        return mark, [
            offered(files, asked, called),
            state,
            *_drawn(face, language, found, int(row or 0)),
        ]

    face.opened(listed, [model, data], [model, data])
    face.on([model.focus, data.focus], listed, [model, data], [model, data])
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
    if found is None:
        return [gr.update(), None, None, ""]
    layers = found["by_layer"]
    row = min(row, len(layers) - 1)
    one = layers[row]
    ids_TK = [ids_LK[row] for ids_LK in found["first_ids"]]
    image = pictures.routing(ids_TK, one["clusters"], found["experts"])
    group_of = {e: number for number, group in enumerate(one["clusters"]) for e in group}
    uses = pd.DataFrame(
        [(str(e), n, f"{group_of[e] + 1}") for e, n in enumerate(one["uses"])],
        columns=["expert", "value", "series"],
    )
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
    return [slider, image, uses, table(head, cells)]
