"""I/O monitor: what a server's experts do, layer by layer, while it answers."""

from __future__ import annotations

from typing import Any

import gradio as gr

from chronos.common.budget import shown_size
from chronos.ui import pictures, svg
from chronos.ui.face import Face, Live, newest, offered, table
from chronos.ui.pages import chat
from chronos.ui.rows import Row

_NEEDS = {"hits": "#009E73", "late": "#E69F00", "misses": "#D55E00"}


def build(face: Face) -> None:
    site = face.site
    with gr.Row():
        server = face.make(
            gr.Dropdown, label="@experts.server", scale=3, min_width=260, elem_id="io-server"
        )
        since = face.make(
            gr.Radio, label="@experts.since", choices=[("10 s", "lately"), ("all", "start")],
            value="start", scale=2,
        )  # fmt: skip
    told = gr.HTML(elem_id="io-state")
    needs, stalls = face.beside()
    read, flow = face.beside()

    def live(language: str, called: Any, window: Any) -> Live:
        running = chat.servers_of(face)
        names = [name for _, name in running]
        asked, called = called, called if called in names else (names[0] if names else None)
        job = newest(site.jobs, called, chat.KIND)
        rows = site.talks.of(job).experts.read() if job else []
        rows = [row for row in rows if "hits" in row and row["model"] == rows[-1]["model"]]
        mark = (language, running, called, window, len(rows), rows[-1:])
        return mark, lambda: [
            offered(running, asked, called),
            face.told(language, job) + _totals(face, language, rows),
            *(_drawn(face, language, rows, window) if rows else [""] * 4),
        ]

    face.live("experts", live, [server, since], [server, told, needs, stalls, read, flow])


def _totals(face: Face, language: str, rows: list[Row]) -> str:
    if not rows:
        return f"<p>{face.say(language, 'experts.none')}</p>"
    last = rows[-1]
    needs = max(1, last["routed"])
    cells = [
        ("hits", f"{last['hits']:,} ({100 * last['hits'] / needs:.1f} %)"),
        ("late", f"{last['late']:,}"),
        ("misses", f"{last['misses']:,}"),
        (face.say(language, "chat.read"), shown_size(last["bytes_read"] / max(1, last["tokens"]))),
        (face.say(language, "experts.stalled"), f"{1e3 * last['stall_s']:,.0f} ms"),
        (
            face.say(language, "experts.memory"),
            f"{shown_size(last['live_bytes'])} / {shown_size(last['capacity_bytes'])}",
        ),
    ]
    return table([name for name, _ in cells], [[value for _, value in cells]])


def _drawn(face: Face, language: str, rows: list[Row], window: Any) -> list[str]:
    layers = {str(each["layer"]): each for each in pictures.between(rows, window)}
    needs = {layer: {name: each[name] for name in _NEEDS} for layer, each in layers.items()}
    stalls = {layer: {"": 1e3 * each["stall_s"]} for layer, each in layers.items()}
    read = {layer: {"": each["bytes_read"] / 1e6} for layer, each in layers.items()}
    return [
        svg.bars(face.say(language, "experts.needs"), needs, stacked=True, colours=_NEEDS),
        svg.bars(face.say(language, "experts.stalls"), stalls),
        svg.bars(face.say(language, "experts.read"), read),
        svg.lines(face.say(language, "experts.flow"), pictures.flow(rows)),
    ]
