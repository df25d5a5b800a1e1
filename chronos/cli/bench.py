"""`chronos bench MODEL`: decode speed by budget, beside the resident model's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from chronos.cli import footer, output
from chronos.cli.app import app, command
from chronos.cli.options import (
    BenchOptions,
    JsonOptions,
    ModelArg,
    SamplingOptions,
    check_budgets,
    split,
)

if TYPE_CHECKING:
    from chronos.measure.benchmark import Bench, Runs

BudgetsOption = Annotated[
    str,
    typer.Option(
        "--budgets",
        metavar="SIZES",
        help="Budgets to measure, with commas.",
        callback=check_budgets,
    ),
]
RoundsOption = Annotated[
    int, typer.Option("--rounds", min=1, help="Interleaved rounds; medians count.")
]

_COLUMNS = (
    *("budget", "tok/s", "spread", "of resident", "same"),
    *("hits", "MB/tok", "stall ms", "of limit"),
)
_LEGEND = (
    "tok/s: median of the rounds. spread: from the slowest to the fastest of them, by the median. "
    "of resident: ratio of the medians. same: the resident model's very tokens. " + footer.LEGEND
)
_NOISY = 0.2  # rounds further apart say little about a budget
PROMPT = "import os\n\n\ndef "
PromptOption = Annotated[
    str,
    typer.Option(
        "--prompt",
        "-p",
        metavar="TEXT",
        help="What is continued.",
        show_default="the start of a Python module",
    ),
]


class _DefaultGroup(TyperGroup):
    """`bench MODEL` means `bench decode MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["decode", *args]
        return super().parse_args(ctx, args)


bench = typer.Typer(
    name="bench",
    cls=_DefaultGroup,
    no_args_is_help=True,
    help="Measure decode speed: `bench MODEL` by budget, `bench replay T.npz` on recorded routing. "
    "`chronos bench decode --help` lists the flags of `bench MODEL`.",
)
app.add_typer(bench, name="bench", rich_help_panel="Measure")


@command("decode", on=bench)
def decode(
    model: ModelArg,
    run: BenchOptions,
    sampling: SamplingOptions,
    out: JsonOptions,
    budgets: BudgetsOption = "all,50%,25%",
    rounds: RoundsOption = 3,
    warmup: Annotated[
        int, typer.Option(min=0, help="Uncounted answers before each counted one.")
    ] = 1,
    prompt: PromptOption = PROMPT,
) -> None:
    """Decode at several budgets beside the fully resident model. `bench MODEL` is short for it."""
    from chronos.common.text.tokenizer import Tokenizer
    from chronos.measure import benchmark
    from chronos.run.models import resolve_model

    ids = Tokenizer.load(resolve_model(model)).encode_prompt(prompt)
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
    output.legend(_LEGEND)
    if max(runs.spread() or 0.0 for runs in result.runs) > _NOISY:
        output.note("Rounds lie far apart: something else used this machine. More --rounds help.")
    for line in footer.busy():
        output.note(line)


def _row(result: Bench, runs: Runs) -> tuple[str, ...]:
    speed = f"{runs.median('decode_tps'):.1f}", output.percent(runs.spread())
    if runs is result.runs[0]:
        return ("resident", *speed, "100.0 %", *("-",) * 5)
    return (
        runs.budget,
        *speed,
        output.percent(result.ratio(runs)),
        "yes" if result.identical(runs) else "no",
        output.percent(runs.hit_rate()),
        f"{runs.per_token('bytes_read') / 1e6:.3f}",
        f"{1e3 * runs.per_token('stall_s'):.2f}",
        footer.limit_cell(runs.median_limit("eta_limit")),
    )
