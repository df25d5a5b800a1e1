"""Export: a model packed, unpacked, merged with an adapter, verified; each as a job."""

from __future__ import annotations

from typing import Any

import gradio as gr

from chronos.ui.face import Face, Live, chosen, newest, offered, relisted
from chronos.ui.pages.common import finished_numbers

ACTIONS = ("pack", "unpack", "merge", "export", "verify")
_FORMATS = ("hf",)  # of `chronos export --to`


def build(face: Face) -> None:
    site = face.site
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            action = face.make(
                gr.Radio, label="@export.action", choices=list(ACTIONS), value="pack",
                elem_id="export-action",
            )  # fmt: skip
            model = face.make(
                gr.Dropdown, label="@export.model", allow_custom_value=True, elem_id="export-model"
            )
            adapter = face.make(
                gr.Dropdown, label="@export.adapter", allow_custom_value=True, visible=False
            )
            calibrate = face.make(
                gr.Dropdown, label="@export.calibrate", allow_custom_value=True, value=""
            )
            plain = face.make(gr.Checkbox, label="@export.dequantize", value=False, visible=False)
            form = face.make(
                gr.Dropdown, label="@export.form", choices=list(_FORMATS), value="hf", visible=False
            )
            code = face.make(gr.Checkbox, label="@export.code", value=False, visible=False)
            to = face.make(
                gr.Textbox,
                label="@export.to",
                value="models/mine",
                max_lines=1,
                elem_id="export-to",
            )
            with gr.Row():
                start = face.make(gr.Button, value="@export.start", variant="primary")
                stop = face.make(gr.Button, value="@job.stop", variant="stop")
        with gr.Column(scale=3, min_width=320):
            run = face.make(gr.Dropdown, label="@job.which")
            told = gr.HTML(elem_id="export-state")
            numbers = gr.HTML()
            log = face.make(gr.Textbox, label="@job.log", lines=8, max_lines=16)

    def listed(language: str, does: str, mine: Any, beside: Any, text: Any) -> list[Any]:
        return [
            relisted(site.root.models(), mine, free=True),
            gr.update(choices=site.root.adapters(), visible=does == "merge"),
            gr.update(choices=["", "stdlib", *site.root.data()], visible=does == "pack"),
            gr.update(visible=does in ("unpack", "export")),
            gr.update(visible=does == "export"),
            gr.update(visible=does == "export"),
            gr.update(visible=does != "verify"),
        ]

    def begun(
        language: str,
        does: str,
        mine: str,
        beside: str,
        text: str,
        dequantize: bool,
        whose: str,
        with_code: bool,
        out: str,
    ) -> Any:
        args = [does, str(site.root.existing(mine or ""))]
        if does == "merge":
            args.append(str(site.root.existing(beside or "")))
        if does != "verify":
            args += ["-o", str(site.root.path(out))]
        if does == "pack" and text:
            args += ["--calibrate", text if text == "stdlib" else str(site.root.existing(text))]
        if does == "export":
            args += ["--to", whose, *(["--with-code"] if with_code else [])]
        if does in ("unpack", "export") and dequantize:
            args.append("--dequantize")
        job = site.jobs.start(site.jobs.free_name(does), does, [*args, "--json"])
        return chosen(_runs(face), job.name)

    def stopped(language: str, called: str | None) -> None:
        if called:
            site.jobs.stop(called)

    def live(language: str, called: Any) -> Live:
        runs = _runs(face)
        names = [name for _, name in runs]
        asked, called = called, called if called in names else (names[0] if names else None)
        job = newest(site.jobs, called, *ACTIONS)
        mark = (language, runs, job and (job.name, job.state, len(job.rows)))
        return mark, lambda: [
            offered(runs, asked, called),
            face.told(language, job),
            finished_numbers(job),
            "\n".join(job.lines(60)) if job else "",
        ]

    inputs, places = (
        [action, model, adapter, calibrate],
        [model, adapter, calibrate, plain, form, code, to],
    )
    face.opened(listed, inputs, places)
    face.on(action.input, listed, inputs, places)
    face.on([model.focus, adapter.focus, calibrate.focus], listed, inputs, places)
    face.on(start.click, begun, [*inputs, plain, form, code, to], [run])
    face.on(stop.click, stopped, [run], [])
    face.live("export", live, [run], [run, told, numbers, log])


def _runs(face: Face) -> list[tuple[str, str]]:
    return [(f"{job.name} ({job.state})", job.name) for job in face.site.jobs.of(*ACTIONS)]
