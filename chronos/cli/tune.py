"""`chronos tune ...`: a search for better recipes, and for this machine's settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chronos.cli import footer, output
from chronos.cli.app import app, command
from chronos.cli.bench import PROMPT, PromptOption
from chronos.cli.options import JsonOptions, ModelArg, check_budget, folder_named

if TYPE_CHECKING:
    from chronos.tune.apply import Applied

tune = typer.Typer(
    name="tune", no_args_is_help=True, help="Find a better recipe, or this machine's best settings."
)
app.add_typer(tune, name="tune", rich_help_panel="Train")

_RunArg = Annotated[str, typer.Argument(metavar="RUN", help="The study's folder.")]


@dataclass(frozen=True)
class StudyOptions:
    """Where the study is kept."""

    study: Annotated[
        str | None,
        typer.Option(
            "--study",
            metavar="URL",
            help="A database that holds the study, as sqlite:///study.db or "
            "postgresql+pg8000://HOST/NAME (docs/tune.md), so that workers of several machines "
            "share it.",
            show_default="RUN/study.journal",
        ),
    ] = None


@command("start", on=tune)
def start(
    config: Annotated[
        Path,
        typer.Option(
            "--config",
            "-c",
            metavar="RECIPE.toml",
            help="A recipe of pretrain or sft, with a section [tune] if its defaults are not "
            "wanted.",
        ),
    ],
    to: Annotated[str, typer.Option("--out", "-o", metavar="RUN", help="The study's folder.")],
    place: StudyOptions,
    out: JsonOptions,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Trials of the study, in place of the recipe's.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for routed experts at which reads are counted.",
            show_default="the recipe's, 25%",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Text to train on, not the recipe's.")
    ] = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="auto, torch or mlx.")] = "auto",
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="As `train` takes it.", show_default="the best one"),
    ] = None,
) -> None:
    """Search for a recipe whose model is better and reads less, each trial with the same compute.

    The recipe itself is the first trial. The same command goes on with a study, and a second
    process is a second worker. Ctrl-C, or `tune stop`, saves what is in progress.
    """
    from chronos.tune.settings import load_tuning
    from chronos.tune.worker import start as work

    tuning = load_tuning(config, trials=trials, budget=budget, data=data)
    done = work(
        tuning,
        folder_named(to),
        study=place.study,
        backend=backend,
        device=device,
        on_event=lambda event: output.note(text) if (text := _line(event)) else None,
    )
    if out.json:
        output.print_json({"run": to, **vars(done)})
    elif done.signal or done.stopped:
        output.note("stopped; the same command goes on")
    else:
        output.note(f"chronos tune status {to} shows what was found")
    if done.signal:
        raise typer.Exit(128 + done.signal)


def _line(event: dict[str, Any]) -> str:
    """An event for the person watching; nothing for one that only a program wants."""
    if text := event.get("message") or event.get("warning"):
        return str(text)
    name = f"trial {event.get('trial')}"
    if event.get("event") == "rung":
        becomes = {True: ", goes on", False: ", ends", None: ""}[event["goes_on"]]
        return f"{name}: step {event['step']}/{event['steps']}, {_values(event)}{becomes}"
    if event.get("event") != "trial":
        return ""
    why = f": {event['why']}" if event.get("why") else ""
    found = f" ({_values(event)})" if event.get("values") else ""
    return f"{name} {event['state']}{found}{why}"


def _values(event: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in event["values"].items())


@command("status", on=tune)
def status(run: _RunArg, place: StudyOptions, out: JsonOptions) -> None:
    """Show a study: the best trials, what they trade, and which parameters mattered.

    An importance counts if it is beyond what the same trials show with their losses shuffled, and
    beyond that of `control`, which nothing uses.
    """
    from chronos.tune.report import status as read
    from chronos.tune.study import Study

    found = read(Study.of(Path(run), place.study))
    if out.json:
        output.print_json(found)
        return
    counts = ", ".join(f"{number} {state}" for state, number in found["counts"].items())
    if found["waiting"]:
        output.note(f"{output.count(found['waiting'], 'trial')} to go on with or to repeat")
    output.table(
        ["trial", *found["objectives"], "params", "seeds"],
        [_best_row(row) for row in found["best"]],
        title=f"best of {counts or 'no trials yet'}",
        align="r" + "r" * len(found["objectives"]) + "ll",
    )
    if found["importances"]:
        rows = [
            [name, f"{i['importance']:.3f}", f"{i['shuffled_high']:.3f}", str(i["used_in"]),
             "yes" if i["beyond_chance"] else "no"]
            for name, i in found["importances"].items()
        ]  # fmt: skip
        output.table(["parameter", "importance", "shuffled", "used in", "counts"], rows)
    if found["apply"] is not None:
        output.note(f"chronos tune apply {run} -o recipe.toml writes trial {found['apply']}")


def _best_row(row: dict[str, Any]) -> list[str]:
    values = [f"{value:.4g}" for value in row["values"].values()]
    params = "\n".join(
        f"{name} {_short(value)}" for name, value in row["params"].items() if name != "control"
    )
    first = next(iter(row.get("seeds", {}).values()), None)
    again = f"{first['mean']:.4g} ± {first['stdev']:.2g}, {first['runs']} runs" if first else ""
    return [f"{row['trial']}{' (yours)' if row['own'] else ''}", *values, params, again]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@command("stop", on=tune)
def stop(run: _RunArg, place: StudyOptions, out: JsonOptions) -> None:
    """Ask all workers of a study to save what they do and leave, and wait until they have."""
    from chronos.tune.study import Study
    from chronos.tune.worker import stop as ask

    left = ask(Study.of(Path(run), place.study))
    if out.json:
        output.print_json({"run": run, "stopped": left})
    else:
        output.note(f"stopped; {output.count(left, 'trial')} will go on with `tune start`")


@command("apply", on=tune)
def apply(
    run: _RunArg,
    to: Annotated[str, typer.Option("--out", "-o", metavar="RECIPE.toml", help="File to write.")],
    place: StudyOptions,
    out: JsonOptions,
    trial: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Whose recipe.",
            show_default="the best loss that reads no more than the recipe",
        ),
    ] = None,
) -> None:
    """Write a trial's recipe, and say what it changes."""
    from chronos.tune.apply import apply as write

    done = write(run, to, study=place.study, trial=trial)
    if out.json:
        output.print_json(_applied(done))
        return
    print(done.path)
    lines = [f"{name}: {_short(old)} -> {_short(new)}" for name, (old, new) in done.changes.items()]
    for line in lines or ["nothing: the recipe itself is the best trial"]:
        output.note(line)


@command("machine", on=tune)
def machine(
    model: ModelArg,
    out: JsonOptions,
    budget: Annotated[
        str,
        typer.Option(help="As `generate` takes it.", metavar="SIZE", callback=check_budget),
    ] = "25%",
    backend: Annotated[str, typer.Option(metavar="NAME", help="auto, torch or mlx.")] = "auto",
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="As `generate` takes it.", show_default="the best one"),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=12, help="Of the continuation.")
    ] = 96,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of runs that a value has to win.")] = 3,
    prompt: PromptOption = PROMPT,
) -> None:
    """Find this machine's fastest settings for a model at a budget, none of which changes a token.

    Threads, readers, the page cache, a warm tier, prefetch and the predictor are tried on one
    recorded continuation. What is at least 3 % faster, with no fewer hits and no longer slowest
    tokens, and is so again in reverse order, is kept in a profile that `generate`, `chat` and
    `serve` follow at that budget, and `doctor` shows.
    """
    from chronos.tune.machine import tune_machine

    found = tune_machine(
        model, budget=budget, backend=backend, device=device, prompt=prompt, tokens=tokens,
        rounds=rounds, on_candidate=lambda candidate: output.note(_tried(vars(candidate))),
    )  # fmt: skip
    if out.json:
        output.print_json({"model": model} | found.to_json())
        return
    rows = [
        [t.knob, str(t.value), "-" if t.ratio != t.ratio else f"{t.ratio:.2f}", t.verdict]
        for t in found.tried
    ]
    output.table(["knob", "value", "speed", ""], rows, title=found.verdict, align="llrl")
    if found.saved is not None:
        print(found.saved)
    else:
        output.note("no profile is kept: the defaults are as good")
    for line in footer.busy():
        output.note(line)


def _tried(candidate: dict[str, Any]) -> str:
    return f"{candidate['knob']} {candidate['value']}: {candidate['verdict']}"


def _applied(done: Applied) -> dict[str, Any]:
    changes = {name: {"was": old, "is": new} for name, (old, new) in done.changes.items()}
    return {
        "path": str(done.path), "trial": done.trial, "changes": changes, "values": done.values,
    }  # fmt: skip
