"""Benchmark: decode speed by budget as bars, and against memory; of one or several runs."""

from __future__ import annotations

from typing import Any

import gradio as gr

from chronos.common.budget import parse_budget, shown_size
from chronos.ui import pictures, svg
from chronos.ui.face import Face, Live, offered, relisted, table
from chronos.ui.jobs import Job

KIND = "bench"


def build(face: Face) -> None:
    site = face.site
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            model = face.make(gr.Dropdown, label="@bench.model", elem_id="bench-model")
            budgets = face.make(
                gr.Textbox, label="@bench.budgets", value="all,50%,25%,12.5%", max_lines=1
            )
            with gr.Row():
                tokens = face.make(gr.Number, label="@bench.tokens", value=64, precision=0)
                rounds = face.make(gr.Number, label="@bench.rounds", value=3, precision=0)
            with gr.Row():
                start = face.make(gr.Button, value="@bench.start", variant="primary")
                stop = face.make(gr.Button, value="@job.stop", variant="stop")
            told = gr.HTML(elem_id="bench-state")
        with gr.Column(scale=3, min_width=320):
            runs = face.make(gr.Dropdown, label="@bench.runs", multiselect=True)
            bars, front, numbers = gr.HTML(elem_id="bench-bars"), gr.HTML(), gr.HTML()

    def listed(language: str, mine: Any) -> Any:
        return relisted(["demo", *site.root.models()], mine)

    def begun(language: str, mine: str, sizes: str, many: float, times: float) -> Any:
        where = mine if mine == "demo" else str(site.root.existing(mine or ""))
        for size in sizes.split(","):
            parse_budget(size.strip(), 1 << 50)
        args = ["bench", "decode", where, f"--budgets={sizes}", "-n", str(int(many or 64))]
        args += ["--rounds", str(int(times or 1)), "--json"]
        site.jobs.start(site.jobs.free_name("bench"), KIND, args)

    def stopped(language: str) -> None:
        for job in site.jobs.of(KIND):
            if job.alive:
                site.jobs.stop(job.name)

    def live(language: str, called: Any) -> Live:
        jobs = site.jobs.of(KIND)
        done = [job for job in jobs if job.state == "done" and job.result()]
        names = [job.name for job in done]
        called = called if isinstance(called, list) else []
        wanted = [name for name in called if name in names] or names[:1]
        mark = (language, [(job.name, job.state) for job in jobs], wanted)
        return mark, lambda: [
            offered(names, called, wanted),
            face.told(language, jobs[0] if jobs else None),
            *_drawn(face, language, [job for job in done if job.name in wanted]),
        ]

    face.opened(listed, [model], [model])
    face.on(model.focus, listed, [model], [model])
    face.on(start.click, begun, [model, budgets, tokens, rounds], [])
    face.on(stop.click, stopped, [], [])
    face.live("bench", live, [runs], [runs, told, bars, front, numbers])


def _drawn(face: Face, language: str, jobs: list[Job]) -> list[str]:
    rows = [row for job in jobs for row in pictures.budgets(job.name, job.result() or {})]
    if not rows:
        return ["", "", ""]
    best = pictures.pareto([(row["bytes"], row["tokens_per_s"]) for row in rows])
    speeds: dict[str, dict[str, float]] = {}
    trade: dict[str, list[tuple[float, float]]] = {}
    for row, good in zip(rows, best, strict=True):
        speeds.setdefault(row["budget"], {})[row["series"]] = row["tokens_per_s"]
        point = row["bytes"] / 1e6, row["tokens_per_s"]
        trade.setdefault("Pareto" if good else row["series"], []).append(point)
    cells = [
        (
            row["series"],
            row["budget"],
            shown_size(row["bytes"]),
            f"{row['tokens_per_s']:.1f}",
            "-" if row["hit_rate"] is None else f"{100 * row['hit_rate']:.1f} %",
            "*" if good else "",
        )
        for row, good in zip(rows, best, strict=True)
    ]
    return [
        svg.bars(face.say(language, "bench.speed"), speeds),
        svg.points(face.say(language, "bench.front"), trade),
        table(("", "budget", "memory", "tokens/s", "hits", "Pareto"), cells),
    ]
