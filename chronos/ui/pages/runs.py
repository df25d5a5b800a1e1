"""Runs: every job there was, what it was asked to do and what it said."""

from __future__ import annotations

import datetime
import shlex
from typing import Any

import gradio as gr

from chronos.ui.face import Face, Live, offered, table


def build(face: Face) -> None:
    site = face.site
    with gr.Row():
        run = face.make(gr.Dropdown, label="@job.which", scale=4, elem_id="any-run")
        stop = face.make(gr.Button, value="@job.stop", variant="stop", scale=1)
    told = gr.HTML()
    command = face.make(gr.Textbox, label="@runs.command", lines=1, max_lines=4)
    log = face.make(gr.Textbox, label="@job.log", lines=10, max_lines=20)
    listing = gr.HTML(elem_id="runs")

    def stopped(language: str, called: str | None) -> None:
        if called:
            site.jobs.stop(called)

    def live(language: str, called: Any) -> Live:
        jobs = site.jobs.jobs()
        names = [job.name for job in jobs]
        asked, called = called, called if called in names else (names[0] if names else None)
        mark = (language, called, [(job.name, job.state, len(job.rows)) for job in jobs])
        job = next((job for job in jobs if job.name == called), None)

        def draw() -> list[Any]:
            head = [face.say(language, f"runs.{k}") for k in ("name", "kind", "began", "state")]
            rows = [
                (
                    each.name,
                    each.kind,
                    datetime.datetime.fromtimestamp(each.began).strftime("%Y-%m-%d %H:%M"),
                    face.say(language, f"job.{each.state}"),
                )
                for each in jobs
            ]
            return [
                offered(names, asked, called),
                face.told(language, job),
                shlex.join(["chronos", *job.args]) if job else "",
                "\n".join(job.lines()) if job else "",
                table(head, rows),
            ]

        return mark, draw

    face.on(stop.click, stopped, [run], [])
    face.live("runs", live, [run], [run, told, command, log, listing])
