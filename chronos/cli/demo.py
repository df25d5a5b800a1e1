"""`chronos demo`: the main job in one minute. One model answers twice, then one table."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chronos.cli import footer, output
from chronos.cli.app import command
from chronos.cli.generate import show, tokenizer_of
from chronos.cli.options import DeviceOptions, JsonOptions, RunOptions, check_budget

if TYPE_CHECKING:
    from chronos.run.engine import Engine, GenerationResult

_PROMPT = '"""Reading and writing files."""\n\nimport os\n'


@command("demo", panel="Start here")
def demo(
    device: DeviceOptions,
    out: JsonOptions,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A packed model folder.")] = "demo",
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="What both runs continue.",
            show_default="the start of a Python module",
        ),
    ] = _PROMPT,
    budget: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help="Expert memory of the second run.", callback=check_budget
        ),
    ] = "25%",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=2, help="Tokens of each run.")
    ] = 160,
    temp: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Of both runs; another one, another text.")] = 3,
) -> None:
    """Answer a prompt with all experts in memory, then with a quarter of them, and compare."""
    from chronos.common.text.sampling import SamplingParams

    _check(model, budget)
    runs = RunOptions(**dataclasses.asdict(device))
    # Sampled: greedy text of a small model goes in circles, which would flatter the cache.
    sampling = SamplingParams(temperature=temp, top_p=0.95, seed=seed)
    results: list[GenerationResult] = []
    facts: list[dict[str, Any]] = []
    if not out.json and not out.quiet:
        output.paragraph(_BEGINNING)
    for number, size in enumerate(("resident", budget), start=1):
        with runs.open(model, budget=size) as engine:
            if not out.json and not out.quiet:
                _announce(number, engine, model)
                print(prompt, end="", flush=True)
            ids = tokenizer_of(engine, model).encode(prompt)
            steps = engine.generate(ids, sampling, max_tokens=max_tokens, record=True)
            if not out.json and not out.quiet:
                show(steps)
            resident_s = 1 / results[0].stats["decode_tps"] if results else None
            result, peak = footer.with_limit(engine, steps.result, resident_s)
            results.append(result)
            facts.append(footer.to_json(engine, result, peak))
    same = results[0].tokens == results[1].tokens
    if out.json:
        output.print_json({"model": model, "tokens_identical": same, "runs": facts})
    else:
        _table(facts, same, budget, quiet=out.quiet)
        for line in footer.busy():
            output.note(line)


def _check(model: str, budget: str) -> None:
    """Whether both runs can be made, before the first one."""
    from chronos.common.budget import parse_budget
    from chronos.common.layout import open_layout
    from chronos.common.layout.folder import slots_within
    from chronos.common.model.guest import read_config
    from chronos.run.engine import RESIDENT
    from chronos.run.models import resolve_model

    folder = resolve_model(model)
    config = read_config(folder)
    layout = open_layout(folder, config=config)
    if budget.strip().lower() != RESIDENT:
        capacity = parse_budget(budget, layout.total_bytes)
        slots_within(layout, capacity, config.least_slots)


def _announce(number: int, engine: Engine, model: str) -> None:
    total, held = output.size(engine.expert_bytes_total), output.size(engine.budget_bytes)
    if engine.feed is None:
        text = f"{number}/2  {model} with all its experts in memory ({total})"
    else:
        text = f"{number}/2  {model} with room for {held} of its {total} of experts"
    output.heading(text)


def _table(facts: list[dict[str, Any]], same: bool, budget: str, *, quiet: bool) -> None:
    """One column per run, one row per question a newcomer would ask."""
    whole, part = facts[0]["stats"], facts[1]["stats"]
    read = footer.per_token(part, "bytes_read") / 1e6
    stall = 1e3 * footer.per_token(part, "stall_s")
    memory = output.size(facts[0]["expert_bytes_total"]), output.size(part["peak_expert_bytes"])
    rows = [
        ("The very same tokens?", "-", "yes" if same else "NO"),
        ("Tokens per second", f"{whole['decode_tps']:.1f}", f"{part['decode_tps']:.1f}"),
        ("Hit rate: needs met from memory", "100.0 %", output.percent(footer.hit_rate(part))),
        ("Read from disk per token", "0 MB", f"{read:.3f} MB"),
        ("Waiting for the disk per token", "0 ms", f"{stall:.2f} ms"),
        ("Most memory the experts took", *memory),
        ("Share of the limit", "-", footer.limit_cell(footer.limit_share(part))),
    ]
    if announced := part["announced"]:
        in_time = f"{announced - part['announced_late']} of {announced}"
        rows.insert(3, ("Known a token ahead, and there in time", "-", in_time))
    if not quiet:
        output.heading("What this shows")
        output.paragraph(_EXPLANATION.format(budget) + (_KNOWN if announced else ""))
    output.table(("", "all experts", f"room for {budget}"), rows)
    if not quiet:
        output.paragraph(_NUMBERS)


_BEGINNING = (
    "The same model goes on with the same text twice, with plenty of memory and then with little. "
    "It is small: what it writes looks right and means little. A table then compares the two runs."
)
_EXPLANATION = (
    "This language model is built from many small networks, its experts, and uses only a few of "
    "them for each token (a token is a piece of a word). The first run held all of them in "
    "memory. The second had room for {} of them, and read an expert from disk whenever it needed "
    "one it did not hold. Nothing is approximated: both runs must write the same text."
)
_KNOWN = (
    " This model says, while it computes one token, which of the experts that are not always in "
    "memory the next token will need. That is no guess, so they are read meanwhile: they are there "
    "when they are needed, which counts as a hit, and the second run hardly waits."
)
_NUMBERS = f"All of the tokens after the prompt. The limit: {footer.LIMIT}"
