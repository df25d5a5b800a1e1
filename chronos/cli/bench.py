"""`chronos bench MODEL`: decode speed by budget, and `bench replay T.npz`: on recorded routing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from chronos.cli import footer, output
from chronos.cli.app import app, command
from chronos.cli.options import JsonOptions, ModelArg, RunOptions, SamplingOptions
from chronos.common.errors import UsageError

if TYPE_CHECKING:
    from chronos.benchmark import Bench, Runs
    from chronos.common.config import ModelConfig
    from chronos.replay import Replayed

BudgetsOption = Annotated[
    str, typer.Option("--budgets", metavar="SIZES", help="Budgets to measure, with commas.")
]
RoundsOption = Annotated[
    int, typer.Option("--rounds", min=1, help="Interleaved rounds; medians count.")
]

_COLUMNS = (
    *("budget", "tok/s", "of resident", "same tokens"),
    *("hits", "MB/token", "stall ms", "of limit"),
)
_REPLAY_COLUMNS = (
    *("budget", "ms/token", "MB/token", "stall ms"),
    *("hits", "disk MB/s", "of serial", "of limit"),
)
_REPLAY_LEGEND = (
    "of serial: time per token by the time that computing and reading would take one after the "
    "other, resident time + bytes read / disk rate; below 100 % reads overlap with computing. "
    + footer.LEGEND
)
_PROMPT = "import os\n\n\ndef "


class _DefaultGroup(TyperGroup):
    """`bench MODEL` means `bench decode MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["decode", *args]
        return super().parse_args(ctx, args)


bench = typer.Typer(
    cls=_DefaultGroup,
    no_args_is_help=True,
    help="Measure decode speed: `bench MODEL` by budget, `bench replay T.npz` on recorded routing.",
)
app.add_typer(bench, name="bench", rich_help_panel="Measure")


@command("decode", on=bench)
def decode(
    model: ModelArg,
    run: RunOptions,
    sampling: SamplingOptions,
    out: JsonOptions,
    budgets: BudgetsOption = "all,50%,25%,12.5%",
    rounds: RoundsOption = 3,
    warmup: Annotated[
        int, typer.Option(min=0, help="Uncounted answers before each counted one.")
    ] = 1,
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="What is continued.",
            show_default="the start of a Python module",
        ),
    ] = _PROMPT,
) -> None:
    """Decode at several budgets beside the fully resident model. `bench MODEL` is short for it."""
    from chronos import benchmark
    from chronos.common.tokenizer import Tokenizer
    from chronos.models import resolve_model

    ids = Tokenizer.load(resolve_model(model)).encode(prompt)
    with output.progress("measuring") as update:
        result = benchmark.run(
            lambda budget: run.open(model, budget=budget),
            split(budgets),
            ids,
            sampling.params(),
            max_tokens=sampling.max_tokens,
            rounds=rounds,
            warmup=warmup,
            progress=update,
        )
    if out.json:
        output.print_json({"model": model} | result.to_json())
        return
    title = f"{model}: {output.size(result.expert_bytes_total)} of experts"
    output.table(_COLUMNS, [_row(result, runs) for runs in result.runs], title=title)
    output.legend(footer.LEGEND)


@command("replay", on=bench)
def replay(
    trace_file: Annotated[Path, typer.Argument(metavar="T.npz", help="A routing trace.")],
    run: RunOptions,
    out: JsonOptions,
    budgets: BudgetsOption = "25%",
    rounds: RoundsOption = 1,
    expert_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Bytes of one expert of the generated model.")
    ] = "3MB",
    tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Counted tokens.")] = 200,
    warmup: Annotated[int, typer.Option(min=0, help="Tokens before them that fill caches.")] = 100,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the generated model here; used again next time."),
    ] = None,
) -> None:
    """Replay a real model's recorded routing on a generated model of its geometry.

    The resident run comes first, so the whole generated model must fit in memory: experts x layers
    x --expert-size.
    """
    from chronos import replay as room
    from chronos.common.budget import parse_budget
    from chronos.common.routing.trace import RoutingTrace

    trace = RoutingTrace.load(trace_file)
    config = room.config_for(trace, parse_budget(expert_size, 1 << 62))
    with _work_folder(work) as folder:
        with output.progress("making the model") as update:
            room.make_model(folder, config, update)
        with output.progress("replaying") as update:
            runs = room.compare(
                lambda budget: run.open(str(folder), budget=budget),
                trace,
                split(budgets),
                rounds=rounds,
                warmup=warmup,
                tokens=tokens,
                progress=update,
            )
    if out.json:
        data = {name: [r.to_json() for r in results] for name, results in runs.items()}
        output.print_json({"trace": str(trace_file), "config": config.to_json(), "runs": data})
        return
    rows = [_replay_row(name, results) for name, results in runs.items()]
    output.table(_REPLAY_COLUMNS, rows, title=f"{trace_file.name} on {_geometry(config)}")
    output.legend(_REPLAY_LEGEND)


def _replay_row(name: str, results: list[Replayed]) -> tuple[str, ...]:
    """Medians over the rounds."""
    import statistics

    def median(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    token_ms = 1e3 * (median(r.token_s for r in results) or 0.0)
    if results[0].limit is None:
        return (name, f"{token_ms:.1f}", *("-",) * 6)
    rate = median(r.disk_rate for r in results) or 0.0
    return (
        name,
        f"{token_ms:.1f}",
        f"{(median(r.bytes_read for r in results) or 0.0) / 1e6:.1f}",
        f"{1e3 * (median(r.stall_s for r in results) or 0.0):.1f}",
        output.percent(median(footer.hit_rate(r.stats) for r in results)),
        f"{rate / 1e6:.0f}",
        output.percent(median(r.share_of_serial for r in results)),
        output.percent(median(footer.limit_share({"limit": r.limit}) for r in results)),
    )


def _geometry(config: ModelConfig) -> str:
    size = output.size(config.expert_parameters * config.dtype_bytes)
    return f"{config.num_hidden_layers} x {config.num_experts} random experts of {size}"


def split(budgets: str) -> list[str]:
    """The budgets of a list with commas."""
    found = [text.strip() for text in budgets.split(",") if text.strip()]
    if not found:
        raise UsageError("no budget was given", "--budgets", "use for example 50%,25%")
    return found


@contextmanager
def _work_folder(work: Path | None) -> Iterator[Path]:
    """Where the generated model lies: the folder named, or one that goes away afterwards."""
    import tempfile

    if work is not None:
        work.parent.mkdir(parents=True, exist_ok=True)
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="chronos-replay-") as folder:
        yield Path(folder) / "model"


def _row(result: Bench, runs: Runs) -> tuple[str, ...]:
    speed = f"{runs.median('decode_tps'):.1f}"
    if runs is result.runs[0]:
        return ("resident", speed, "100.0 %", *("-",) * 5)
    return (
        runs.budget,
        speed,
        output.percent(result.ratio(runs)),
        "yes" if result.identical(runs) else "no",
        output.percent(runs.hit_rate()),
        f"{runs.per_token('bytes_read') / 1e6:.3f}",
        f"{1e3 * runs.per_token('stall_s'):.2f}",
        output.percent(runs.median_limit("eta_limit")),
    )
