"""Pipeline: the six stages, what their data holds, a run as it goes on."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from chronos.common.errors import ChronosError
from chronos.common.training.recipe import BUILT_IN
from chronos.train import STAGES
from chronos.ui import pictures, recipes, svg
from chronos.ui.face import Face, Live, chosen, newest, offered, relisted, table
from chronos.ui.jobs import Job
from chronos.ui.rows import Rows

_OWN = ""  # the recipe's own
_LOSSES = {"loss": "loss", "ce": "ce", "valid_ce": "valid_ce", "valid_loss": "valid_loss"}
_HEALTH = {"router/effective_experts": "effective_experts"}
_SHARES = {"router/largest_share": "largest_share", "router/shift": "shift"}
KINDS = ("train", "plan")


def build(face: Face) -> None:
    site = face.site
    logs: dict[str, Rows] = {}
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            stage = face.make(
                gr.Radio, label="@pipeline.stage", choices=list(STAGES), value="pretrain",
                elem_id="stage",
            )  # fmt: skip
            recipe = face.make(gr.Dropdown, label="@pipeline.recipe", elem_id="train-recipe")
            model = face.make(gr.Dropdown, label="@pipeline.model", allow_custom_value=True)
            data = face.make(
                gr.Dropdown, label="@pipeline.data", allow_custom_value=True, elem_id="train-data"
            )
            name = face.make(gr.Textbox, label="@pipeline.name", value="one", max_lines=1)
            with gr.Row():
                start = face.make(gr.Button, value="@pipeline.start", variant="primary")
                resume = face.make(gr.Button, value="@pipeline.resume")
                plan = face.make(gr.Button, value="@pipeline.plan")
            with face.make(gr.Accordion, label="@pipeline.preview", open=False):
                look = face.make(gr.Button, value="@pipeline.look")
                rows_told = gr.HTML()
                preview = face.make(
                    gr.HighlightedText, label="@pipeline.first",
                    color_map={"trained": "green"}, show_legend=True, show_inline_category=False,
                )  # fmt: skip
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                run = face.make(gr.Dropdown, label="@pipeline.run", elem_id="run", scale=3)
                stop = face.make(gr.Button, value="@pipeline.stop", variant="stop", scale=1)
            told = gr.HTML(elem_id="run-state")
            losses = gr.HTML(elem_id="losses")
            health, shares = face.beside()
            log = face.make(
                gr.Textbox, label="@job.log", lines=6, max_lines=12, autoscroll=True,
                elem_id="run-log",
            )  # fmt: skip

    def listed(language: str, at: str, mine: Any, begun: Any, rows: Any) -> list[Any]:
        own = (face.say(language, "pipeline.own"), _OWN)
        models = [own, "demo", *site.root.models()]
        files = [own, *BUILT_IN, *site.root.data()]
        fitting = [n for n in site.recipes.names() if _fits(face, n, at)]
        return [
            relisted(fitting, mine),
            relisted(models, begun, free=True, visible=at != "pretrain"),
            relisted(files, rows, free=True),
        ]

    def begin(
        language: str, at: str, mine: str, begun: str, rows: str, called: str, *extra: str
    ) -> Any:
        args = ["train", at, "-c", site.recipes.path(mine or ""), *extra]
        if "--dry-run" not in extra:
            args += ["-o", str(site.root.run(called))]
        if at != "pretrain" and begun:
            args += ["--model", begun if begun == "demo" else str(site.root.existing(begun))]
        if rows:
            args += ["--data", rows if rows in BUILT_IN else str(site.root.existing(rows))]
        if "--dry-run" in extra:
            called = site.jobs.free_name(f"plan-{called}")
        job = site.jobs.start(called, "plan" if "--dry-run" in extra else "train", args)
        return chosen(_runs(face), job.name)

    def resumed(language: str, *values: str) -> Any:
        return begin(language, *values, "--resume")

    def planned(language: str, *values: str) -> Any:
        return begin(language, *values, "--dry-run", "--json")

    def stopped(language: str, called: str | None) -> None:
        if called:
            site.jobs.stop(called)

    def explained(language: str, mine: str, begun: str, rows: str) -> list[Any]:
        found = _explained(face, mine, begun, rows)
        first: tuple[str, list[Any]] = next(iter(found.get("first", {}).items()), ("", []))
        parts = [(text, "trained" if trained else None) for text, trained in first[1]]
        numbers = [(key, _plain(v)) for key, v in found.items() if key not in ("first", "bad_rows")]
        bad = table((), [[line] for line in found["bad_rows"]]) if found["bad_rows"] else ""
        return [table((), numbers) + bad, gr.update(value=parts)]

    def live(language: str, called: Any) -> Live:
        runs = _runs(face)
        names = [value for _, value in runs]
        asked, called = called, called if called in names else (names[0] if names else None)
        job = newest(site.jobs, called, *KINDS)
        rows = _metrics(logs, job)
        mark = (language, runs, job and (job.name, job.began, job.state, len(job.rows)), len(rows))
        return mark, lambda: [
            offered(runs, asked, called),
            _state(face, language, job, rows),
            _drawn(face.say(language, "pipeline.losses"), rows, _LOSSES),
            _drawn(face.say(language, "pipeline.health"), rows, _HEALTH),
            _drawn(face.say(language, "pipeline.shares"), rows, _SHARES),
            "\n".join(job.lines(60)) if job else "",
        ]

    inputs = [stage, recipe, model, data]
    face.opened(listed, inputs, inputs[1:])
    face.on(stage.input, listed, inputs, inputs[1:])
    face.on([recipe.focus, model.focus, data.focus], listed, inputs, inputs[1:])
    face.on(start.click, begin, [*inputs, name], [run])
    face.on(resume.click, resumed, [*inputs, name], [run])
    face.on(plan.click, planned, [*inputs, name], [run])
    face.on(stop.click, stopped, [run], [])
    face.on(look.click, explained, [recipe, model, data], [rows_told, preview])
    face.live("pipeline", live, [run], [run, told, losses, health, shares, log])


def _fits(face: Face, name: str, stage: str) -> bool:
    """Whether a recipe is one of the stage. One that cannot be read fits all, and is refused when
    it is used."""
    try:
        return recipes.stage_of(face.site.recipes.text(name)) == stage
    except ChronosError:
        return True


def _drawn(title: str, rows: list[dict[str, Any]], names: dict[str, str]) -> str:
    series = pictures.lines(rows, "step", names)
    return svg.lines(title, series) if series else ""


def _runs(face: Face) -> list[tuple[str, str]]:
    jobs = face.site.jobs.of(*KINDS)
    return [(f"{job.name} ({job.args[1]})", job.name) for job in jobs]


def _metrics(logs: dict[str, Rows], job: Job | None) -> list[dict[str, Any]]:
    if job is None or job.kind != "train":
        return []
    rows = logs.setdefault(job.name, Rows(job.folder / "metrics.jsonl"))
    return rows.read()


def _state(face: Face, language: str, job: Job | None, rows: list[dict[str, Any]]) -> str:
    told = face.told(language, job)
    steps = [row for row in rows if "steps" in row]
    if job is None:
        return told
    if job.kind == "plan" and (found := job.result()):
        return told + table((), [(k, _plain(v)) for k, v in found.items()])
    if not steps:
        return told
    last = steps[-1]
    share = 100 * last["step"] / last["steps"]
    bar = f'<progress max="100" value="{share:.1f}">{share:.0f} %</progress>'
    left = f", {last['eta_s']:.0f} s {face.say(language, 'pipeline.left')}" if job.alive else ""
    line = f"{last['step']}/{last['steps']}, {last['tokens_per_s']:,.0f} tokens/s{left}"
    return f"{told}{bar}<p>{html.escape(line)}</p>"


def _explained(face: Face, mine: str, begun: str, rows: str) -> Any:
    """What `chronos inspect data FILE --model M` says."""
    recipe = recipes.check(face.site.recipes.text(mine or ""))
    root = face.site.root
    path = rows or recipe.data.path
    where = path if path in BUILT_IN else str(root.existing(path))
    model = begun or recipe.start or "demo"
    whose = model if model == "demo" else str(root.existing(model))
    return face.site.ask("inspect", "data", where, "--model", whose)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(each)}" for key, each in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
