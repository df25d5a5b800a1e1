"""Auto-Tune: a study's trials as they come, what they trade, and the best one into Config.

Trials are read from RUN/events.jsonl (docs/tune.md), the best and what may be applied from
`chronos tune status`, which is asked when a trial has ended.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from chronos.common.errors import UsageError
from chronos.ui import pictures, svg
from chronos.ui.face import Face, Live, chosen, newest, offered, relisted, table
from chronos.ui.jobs import Job
from chronos.ui.rows import Row, Rows

KIND = "tune"
EVENTS = "events.jsonl"  # of a study's folder
_RUNNING, _WHOLE = "running", "whole"
Best = dict[Path, tuple[int, Any]]  # of a study's folder


def build(face: Face) -> None:
    site = face.site
    logs: dict[Path, Rows] = {}
    newest_best: Best = {}
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            recipe = face.make(gr.Dropdown, label="@tune.recipe", elem_id="tune-recipe")
            data = face.make(gr.Dropdown, label="@pipeline.data", allow_custom_value=True)
            with gr.Row():
                trials = face.make(
                    gr.Number, label="@tune.trials", value=12, precision=0, minimum=1, min_width=120
                )
                name = face.make(
                    gr.Textbox, label="@tune.name", value="search", max_lines=1, min_width=120
                )
            with gr.Row():
                start = face.make(gr.Button, value="@tune.start", variant="primary", min_width=120)
                stop = face.make(gr.Button, value="@job.stop", variant="stop", min_width=120)
            told = gr.HTML(elem_id="tune-state")
            to = face.make(gr.Textbox, label="@tune.to", value="tuned", max_lines=1)
            use = face.make(gr.Button, value="@tune.apply", variant="primary")
            changes = gr.HTML(elem_id="tune-changes")
        with gr.Column(scale=3, min_width=320):
            run = face.make(gr.Dropdown, label="@tune.run")
            front = gr.HTML(elem_id="tune-front")
            numbers = gr.HTML(elem_id="tune-trials")

    def listed(language: str, mine: Any, rows: Any) -> list[Any]:
        own = (face.say(language, "pipeline.own"), "")
        files = [own, "stdlib", *site.root.data()]
        return [relisted(site.recipes.names(), mine), relisted(files, rows, free=True)]

    def begun(language: str, mine: str, rows: str, many: float, called: str) -> Any:
        args = ["tune", "start", "-c", site.recipes.path(mine or "")]
        args += ["-o", str(site.root.run(called)), "--trials", str(int(many or 1))]
        if rows:
            args += ["--data", rows if rows == "stdlib" else str(site.root.existing(rows))]
        site.jobs.start(called, KIND, args)
        return chosen(_runs(face), called)

    def stopped(language: str, called: str | None) -> None:
        if called:
            site.jobs.stop(called)

    def applied(language: str, called: str | None, name: str) -> str:
        if not called:
            raise UsageError(face.say(language, "tune.none"))
        folder = site.root.run(called)
        written = folder / "applied.toml"
        found = site.ask("tune", "apply", str(folder), "-o", str(written))
        text = written.read_text("utf-8")
        path = site.recipes.save(name, text)
        site.recipes.keep_draft(name, text)
        rows = [
            (key, _short(each["was"]), _short(each["is"])) for key, each in found["changes"].items()
        ]
        said = face.say(language, "tune.applied", trial=found["trial"], path=path)
        return table(
            ("", face.say(language, "tune.was"), face.say(language, "tune.is")), rows, said
        )

    def live(language: str, called: Any) -> Live:
        runs = _runs(face)
        names = [name for _, name in runs]
        said, called = called, called if called in names else (names[0] if names else None)
        job = newest(site.jobs, called, KIND)
        rows = logs.setdefault(job.folder, Rows(job.folder / EVENTS)).read() if job else []
        found = pictures.trials(rows)
        said_after, best = _best(face, job, found, newest_best)
        mark = (language, runs, job and (job.name, job.state), len(rows), said_after)

        def draw() -> list[Any]:
            return [
                offered(runs, said, called),
                _told(face, language, job, found),
                _front(face.say(language, "tune.front"), found, rows, best),
                _table(face, language, found, best),
            ]

        return mark, draw

    face.opened(listed, [recipe, data], [recipe, data])
    face.on([recipe.focus, data.focus], listed, [recipe, data], [recipe, data])
    face.on(start.click, begun, [recipe, data, trials, name], [run])
    face.on(stop.click, stopped, [run], [])
    face.on(use.click, applied, [run, to], [changes])
    face.live("tune", live, [run], [run, told, front, numbers])


def _best(
    face: Face, job: Job | None, found: list[dict[str, Any]], newest: Best
) -> tuple[int, Any]:
    """After how many ended trials `chronos tune status` spoke last, and what it said. It is asked
    when one has ended, and not waited for."""
    ended = sum(trial["state"] != _RUNNING for trial in found)
    if job is None or not ended:
        return 0, None
    said = face.site.later((job.folder, job.began, ended), "tune", "status", str(job.folder))
    if isinstance(said, dict):  # else a worker is writing: the next trial asks
        newest[job.folder] = ended, said
    return newest.get(job.folder, (0, None))


def _objectives(trials: list[dict[str, Any]], rows: list[Row]) -> list[str]:
    starts = [row["objectives"] for row in rows if row.get("event") == "start"]
    if starts:
        return list(starts[-1])
    return list(next((trial["values"] for trial in trials if trial.get("values")), {}))


def _front(title: str, trials: list[dict[str, Any]], rows: list[Row], best: Any) -> str:
    """Whole trials by their two objectives; of one objective, by the trial's number."""
    names = _objectives(trials, rows)
    whole = [t for t in trials if t["state"] == _WHOLE and t.get("values")]
    if not whole or not names:
        return ""
    leading = {row["trial"] for row in (best or {}).get("best", ())}
    found: dict[str, list[tuple[float, float]]] = {}
    for trial in whole:
        values = [trial["values"][name] for name in names]
        point = (values[1], values[0]) if values[1:] else (trial["trial"], values[0])
        found.setdefault("Pareto" if trial["trial"] in leading else "trials", []).append(point)
    return svg.points(title, found)


def _told(face: Face, language: str, job: Job | None, trials: list[dict[str, Any]]) -> str:
    told = face.told(language, job)
    if not trials:
        return told
    ended = sum(trial["state"] != _RUNNING for trial in trials)
    return told + f"<p>{face.say(language, 'tune.ended', ended=ended, trials=len(trials))}</p>"


def _table(face: Face, language: str, trials: list[dict[str, Any]], best: Any) -> str:
    leading = {row["trial"] for row in (best or {}).get("best", ())}
    rows = []
    for trial in trials:
        step = (
            f" {trial['step']}/{trial['steps']}"
            if trial["state"] == _RUNNING and "step" in trial
            else ""
        )
        values = trial.get("values") or {}
        rows.append(
            (
                f"{trial['trial']}{' *' if trial['trial'] in leading else ''}",
                trial["state"] + step,
                ", ".join(f"{key} {_short(value)}" for key, value in values.items()),
                ", ".join(
                    f"{k.rpartition('.')[2]} {_short(v)}"
                    for k, v in trial.get("params", {}).items()
                ),
            )
        )
    head = [
        face.say(language, f"tune.{column}") for column in ("trial", "state", "found", "params")
    ]
    return table(head, rows, face.say(language, "tune.star") if leading else "")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _runs(face: Face) -> list[tuple[str, str]]:
    return [(f"{job.name} ({job.state})", job.name) for job in face.site.jobs.of(KIND)]
