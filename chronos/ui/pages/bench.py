"""Benchmark: decode speed by budget as bars, and against memory; of one or several runs."""

from __future__ import annotations

from typing import Any

import gradio as gr
import pandas as pd

from chronos.common.budget import parse_budget, shown_size
from chronos.ui import pictures
from chronos.ui.face import Face, chosen, offered, table
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
            bars = face.make(
                gr.BarPlot, label="@bench.speed", x="budget", y="value", color="series",
                height=300, sort=None,
            )  # fmt: skip
            front = face.make(
                gr.ScatterPlot, label="@bench.front", x="megabytes", y="tokens_per_s",
                color="series", height=300,
            )  # fmt: skip
            numbers = gr.HTML()

    def listed(language: str, mine: Any) -> Any:
        return chosen(["demo", *site.root.models()], mine)

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

    def live(language: str, seen: Any, called: list[str] | None) -> Any:
        jobs = site.jobs.of(KIND)
        done = [job for job in jobs if job.state == "done" and job.result()]
        names = [job.name for job in done]
        wanted = [name for name in called or () if name in names] or names[:1]
        mark = (language, [(job.name, job.state) for job in jobs], wanted)
        if mark == seen:
            return None
        picked = [job for job in done if job.name in wanted]
        shown = offered(names, called or [], wanted)
        return mark, [shown, face.told(language, jobs[0] if jobs else None), *_drawn(picked)]

    face.opened(listed, [model], [model])
    face.on(model.focus, listed, [model], [model])
    face.on(start.click, begun, [model, budgets, tokens, rounds], [])
    face.on(stop.click, stopped, [], [])
    face.live("bench", live, [runs], [runs, told, bars, front, numbers])


def _drawn(jobs: list[Job]) -> list[Any]:
    rows = [row for job in jobs for row in pictures.budgets(job.name, job.result() or {})]
    if not rows:
        return [None, None, ""]
    best = pictures.pareto([(row["bytes"], row["tokens_per_s"]) for row in rows])
    bars = pd.DataFrame(
        [(row["budget"], row["tokens_per_s"], row["series"]) for row in rows],
        columns=["budget", "value", "series"],
    )
    front = pd.DataFrame(
        [
            (row["bytes"] / 1e6, row["tokens_per_s"], "Pareto" if good else row["series"])
            for row, good in zip(rows, best, strict=True)
        ],
        columns=["megabytes", "tokens_per_s", "series"],
    )
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
    return [bars, front, table(("", "budget", "memory", "tokens/s", "hits", "Pareto"), cells)]
