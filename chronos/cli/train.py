"""`chronos train ...`: one command per training stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chronos.cli import output
from chronos.cli.app import app, command
from chronos.cli.options import DeviceOptions, JsonOptions, folder_named
from chronos.common.errors import UsageError

if TYPE_CHECKING:
    from chronos.common.model.config import LossWeights
    from chronos.common.training.recipe import Recipe, S
    from chronos.train import Plan, Report

train = typer.Typer(name="train", no_args_is_help=True, help="Train a model from a recipe.")
app.add_typer(train, name="train", rich_help_panel="Train")

_SHOWN = (
    "loss", "ce", "lookahead", "rewards/margins", "rewards/accuracies", "reward", "kl", "kd",
    "valid_ce", "valid_loss", "valid_rewards/accuracies", "router/effective_experts",
    "router/largest_share", "router/shift",
)  # fmt: skip


_Config = Annotated[
    Path, typer.Option("--config", "-c", metavar="RECIPE.toml", help="What to train, and on what.")
]


@dataclass(frozen=True)
class StageOptions:
    """What every stage takes beside its recipe."""

    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Open everything, say what memory and time it takes, write nothing."
        ),
    ] = False
    report_to: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="tensorboard, trackio or wandb, which get the log's numbers too."
        ),
    ] = None


@dataclass(frozen=True)
class FolderOptions:
    """Where a run lies, and how it goes on."""

    by_command = True
    to: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", metavar="RUN", help="Run folder.", show_default="runs/<recipe>"
        ),
    ] = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run folder's newest checkpoint.")
    ] = False
    force: Annotated[
        bool, typer.Option("--force", help="Resume although the recipe has changed.")
    ] = False
    skip_bad: Annotated[
        int | None, typer.Option(min=0, help="Pass over this many bad rows of the data.")
    ] = None


@dataclass(frozen=True)
class StartOptions:
    """What a stage goes on with, how much of it is trained, and on what."""

    by_command = True
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="What to go on with, instead of the recipe's: or `demo`.",
        ),
    ] = None
    lora: Annotated[
        int | None,
        typer.Option(
            "--lora",
            min=1,
            metavar="RANK",
            help="Train adapters of this rank beside the model, which stays as it is; the rest of"
            " them is in the recipe's [lora].",
        ),
    ] = None
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="SIZE",
            help="Memory for routed experts, as 25%, 8GiB or all, of a packed model with adapters;"
            " without it they are all in memory.",
        ),
    ] = None
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Rows to train on, instead of the recipe's.")
    ] = None


@command("pretrain", on=train)
def pretrain(
    config: Annotated[
        Path,
        typer.Option(
            "--config",
            "-c",
            metavar="RECIPE.toml",
            help="What to train, and on what; `demo`: as the model that ships was trained.",
        ),
    ],
    options: StageOptions,
    device: DeviceOptions,
    out: JsonOptions,
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Text to train on, instead of the recipe's."),
    ] = None,
    *,
    folder: FolderOptions,
) -> None:
    """Train a model on text, from scratch, or go on with one whose context may grow.

    `-c longer` is the recipe that ships for that. Ctrl-C finishes the step, saves and leaves;
    --resume goes on, on a CPU bit for bit.
    """
    _run("pretrain", config, options, device, out, StartOptions(data=data), folder)


@command("sft", on=train)
def sft(
    config: _Config,
    options: StageOptions,
    device: DeviceOptions,
    out: JsonOptions,
    start: StartOptions,
    folder: FolderOptions,
) -> None:
    """Fine-tune a model on chats and completions: the answers are trained, and how they end.

    Rows: messages, prompt + completion, or text. `-c sft` is the recipe that ships, for the demo
    model on documented functions of the standard library.
    """
    _run("sft", config, options, device, out, start, folder)


@command("dpo", on=train)
def dpo(
    config: _Config,
    options: StageOptions,
    device: DeviceOptions,
    out: JsonOptions,
    start: StartOptions,
    folder: FolderOptions,
) -> None:
    """Make a model prefer one answer to another, held to a reference (DPO).

    Rows: prompt, chosen, rejected. `-c dpo` is the recipe that ships.
    """
    _run("dpo", config, options, device, out, start, folder)


@command("orpo", on=train)
def orpo(
    config: _Config,
    options: StageOptions,
    device: DeviceOptions,
    out: JsonOptions,
    start: StartOptions,
    folder: FolderOptions,
) -> None:
    """Fine-tune and prefer in one go, without a reference (ORPO).

    Rows: prompt, chosen, rejected. `-c orpo` is the recipe that ships.
    """
    _run("orpo", config, options, device, out, start, folder)


@command("grpo", on=train)
def grpo(
    config: _Config,
    options: StageOptions,
    device: DeviceOptions,
    out: JsonOptions,
    start: StartOptions,
    folder: FolderOptions,
) -> None:
    """Let a model answer, judge the answers, and make the better ones likelier (GRPO).

    Rows: prompt, and columns that a reward may want. Rewards run in a process of their own; the
    answers are in RUN/completions.jsonl. `-c grpo` is the recipe that ships.
    """
    _run("grpo", config, options, device, out, start, folder)


@command("distill", on=train)
def distill(
    config: _Config,
    options: StageOptions,
    device: DeviceOptions,
    out: JsonOptions,
    start: StartOptions,
    folder: FolderOptions,
) -> None:
    """Bring a model near a teacher's predictions, on given rows or on its own answers.

    The teacher shares the vocabulary; packed, its experts may stay on disk (teacher_budget).
    `-c distill` is the recipe that ships.
    """
    _run("distill", config, options, device, out, start, folder)


def _run(
    stage: str,
    config: Path,
    options: StageOptions,
    device: DeviceOptions,
    out: JsonOptions,
    start: StartOptions,
    place: FolderOptions,
) -> None:
    from chronos import train as room
    from chronos.common.training.recipe import load_recipe

    section, run, prepare = room.STAGES[stage]
    recipe = _changed(load_recipe(config, section), start, place.skip_bad, device.threads)
    folder = Path("runs") / config.stem if place.to is None else folder_named(place.to)
    if options.dry_run and place.resume:
        raise UsageError("--dry-run looks at no run folder", "--resume", "leave one of them out")
    if place.force and not place.resume:
        raise UsageError("--force is for --resume", "--force", "give both, or neither")
    if stage == "pretrain":
        output.note(_loss(recipe.model.loss_weights))
    with _events(recipe.cadence.steps) as on_event:
        if options.dry_run:
            plan = room.plan(
                prepare, recipe, backend=device.backend, device=device.device, on_event=on_event
            )
            _print_plan(plan, recipe.cadence.steps, out)
            return
        report = run(
            recipe,
            folder,
            backend=device.backend,
            device=device.device,
            resume=place.resume,
            force=place.force,
            report_to=options.report_to,
            on_event=on_event,
        )
    if report.rank:  # the first process says it
        pass
    elif out.json:
        output.print_json(report_json(report, folder))
    elif report.adapter:
        print(report.adapter)
        output.note(f"chronos merge {recipe.start} {report.adapter} -o DST makes a model of both")
    elif report.model:
        print(report.model)
        output.note(f"chronos pack {report.model} -o DST makes it streamable")
    else:
        output.note(f"stopped and saved at step {report.step}; --resume goes on")
    if report.signal:
        raise typer.Exit(128 + report.signal)


def _print_plan(plan: Plan, steps: int, out: JsonOptions) -> None:
    if out.json:
        output.print_json(plan.to_json())
        return
    update, took = plan.update, plan.time
    rows = update["rows"] * update["together"]
    why = {
        "dense": "what is not trained, as stored; large matrices of 16 bits stay so on a CPU too",
        "experts": "routed ones that are in memory at once",
        "parameters": f"{plan.parameters:,} are trained; float32",
        "gradients": "as many",
        "optimizer": "what it keeps of them",
        "activations": f"{'at most, ' if 'dense' in plan.memory else ''}of {rows} rows of"
        f" {update['seq_len']} tokens, by ACTIVATIONS in chronos/common/training/memory.py",
        "logits": f"of {update['labels']} labels, a tile at a time",
        "total": ("" if "activations" in plan.memory else "activations not counted; ")
        + f"{output.size(plan.free_bytes)} of the machine's memory are free",
    }
    known = plan.memory
    sizes = [[name, output.size(known[name]), text] for name, text in why.items() if name in known]
    peak = "peak of this process so far: with frameworks, a reference, a teacher"
    sizes.append(["measured", output.size(plan.peak_bytes), peak])
    where = f"{plan.stage} on {plan.backend}, {plan.device}"
    output.table(["memory", "", "of"], sizes, title=where, align="lrl")
    computed, all_of_it = int(took["measured_micro_batches"]), update["micro_batches"]
    times = [
        ["an update's batches", f"{took['batches_s']:.3g} s", "measured, once"],
        ["an update", f"{took['update_s']:.3g} s", f"measured on {computed} of {all_of_it}"
         " micro-batches"],
        ["tokens a second", f"{took['tokens_per_s']:.4g}", f"{update['tokens']} an update"],
        ["evaluations", _duration(took["evaluate_s"]), "one batch measured, times all of them"],
        ["the run", _duration(took["run_s"]), f"{steps} updates"],
    ]  # fmt: skip
    output.table(["time", "", "by"], times, align="lrl")


def _loss(weights: LossWeights) -> str:
    """What the log's `loss` is the sum of."""
    terms = [f"{value:g} {name}" for name, value in vars(weights).items() if value]
    return "loss = " + " + ".join(["ce (cross-entropy, nats per token)", *terms])


def report_json(report: Report, folder: Path) -> dict[str, Any]:
    return {
        "run": str(folder),
        "model": str(report.model) if report.model else None,
        "adapter": str(report.adapter) if report.adapter else None,
        "step": report.step,
        "skipped": report.skipped,
        "signal": report.signal,
        "last": report.last,
    }


def _changed(
    recipe: Recipe[S], start: StartOptions, skip_bad: int | None, threads: int | None
) -> Recipe[S]:
    """The recipe with what flags say in place of its own."""
    from chronos.common.training.lora import LoraRecipe

    data: dict[str, Any] = {} if start.data is None else {"path": start.data}
    if skip_bad is not None:
        data["skip_bad"] = skip_bad
    changes: dict[str, Any] = {"data": dataclasses.replace(recipe.data, **data)}
    if threads is not None:
        changes["optimizer"] = dataclasses.replace(recipe.optimizer, threads=threads)
    if start.model is not None:
        changes["start"] = start.model
    if start.lora is not None:
        changes["lora"] = dataclasses.replace(recipe.lora or LoraRecipe(), rank=start.lora)
    if start.budget is not None:
        changes["budget"] = start.budget
    return dataclasses.replace(recipe, **changes)


@contextmanager
def _events(steps: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Where the trainer's events go: a line each on stderr, above a bar on a terminal."""
    with output.progress("training", lines=False) as update:

        def on_event(event: dict[str, Any]) -> None:
            if "step" in event:
                update(event["step"], steps)
            if text := _line(event, steps):
                output.note(text)

        yield on_event


def _line(event: dict[str, Any], steps: int) -> str:
    if "step" not in event:
        return str(event.get("message") or event.get("warning") or "")
    parts = [f"step {event['step']}/{steps}"]
    parts += [f"{name} {event[name]:.4g}" for name in _SHOWN if event.get(name) is not None]
    if "tokens_per_s" in event:
        parts.append(f"{event['tokens_per_s']:.0f} tok/s, {_duration(event['eta_s'])} left")
    if event.get("skipped"):
        parts.append("update skipped: not finite")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@command("merge", panel="Train")
def merge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, packed or not.")],
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="An adapter in peft's format: RUN/adapter.")
    ],
    to: Annotated[str, typer.Option("--out", "-o", metavar="DST", help="The folder to write.")],
    out: JsonOptions,
) -> None:
    """Make one model of a model and an adapter that was trained beside it.

    A packed model keeps its experts, which DST shares with it; its dense part is written anew.
    """
    from chronos.run.models import resolve_model
    from chronos.train.merge import merge as merge_folders

    folder = folder_named(to)
    done = merge_folders(resolve_model(model), Path(adapter), folder)
    if out.json:
        output.print_json({"folder": str(done.folder), "matrices": done.matrices})
    else:
        print(done.folder)
        output.note(f"{done.matrices} matrices are others than the model's")
