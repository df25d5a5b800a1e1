"""Commands on routing: trace records it, simulate replays it against caches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chronos.cli import output
from chronos.cli.app import command
from chronos.cli.generate import tokenizer_of
from chronos.cli.options import DataOption, JsonOptions, ModelArg, RunOptions
from chronos.common.errors import UsageError

if TYPE_CHECKING:
    from chronos.common.routing.trace import RoutingTrace
    from chronos.common.simulate import Comparison
    from chronos.engine import Engine

_PANEL = "Routing"


@command("trace", panel=_PANEL)
def trace(
    model: ModelArg,
    data: DataOption,
    to: Annotated[Path, typer.Option("--out", "-o", metavar="T.npz", help="The file to write.")],
    run: RunOptions,
    out: JsonOptions,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, help="Tokens to record in all.")
    ] = 20_000,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens taken of each document.")] = 512,
    new_tokens: Annotated[
        int,
        typer.Option(min=0, help="Record what the model writes after each prompt, not the text."),
    ] = 0,
) -> None:
    """Record which experts each token of a text is routed to."""
    with run.open(model) as engine:
        recorded = record(engine, model, data, max_tokens, seq_len, new_tokens)
    recorded.save(to)
    if out.json:
        output.print_json(trace_json(recorded) | {"file": str(to)})
        return
    print(f"{to}: {_describe(recorded)}")


def record(
    engine: Engine, model: str, data: str, max_tokens: int, seq_len: int, new_tokens: int
) -> RoutingTrace:
    """The routing of a text, with a progress bar."""
    from chronos import evaluate

    room = engine.context - new_tokens
    if room < 1:
        raise UsageError(f"--new-tokens {new_tokens} leaves no room in {engine.context} tokens")
    documents = evaluate.documents_of(data)
    sequences = evaluate.cut(tokenizer_of(engine, model), documents, min(seq_len, room))
    with output.progress("recording") as update:
        return evaluate.record(
            engine.runner,
            engine.config,
            sequences,
            max_tokens=max_tokens,
            new_tokens=new_tokens,
            model=model,
            layers=engine.moe_layers,
            progress=update,
        )


@command("simulate", panel=_PANEL)
def simulate(
    trace_file: Annotated[Path, typer.Argument(metavar="T.npz", help="A routing trace.")],
    out: JsonOptions,
    budget: Annotated[
        str, typer.Option(metavar="PERCENT", help="Share of all experts; several with commas.")
    ] = "12.5%,25%,50%",
    warmup: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of the tokens that only fills caches.")
    ] = 0.1,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Equal slots in every layer, not one pool.")
    ] = False,
) -> None:
    """Replay a trace against cache policies, up to the best any cache could do (MIN)."""
    from chronos.common.routing.trace import RoutingTrace
    from chronos.common.simulate import compare, slots_for

    recorded = RoutingTrace.load(trace_file)
    results: dict[str, Comparison] = {}
    shares = [(text.strip(), share_of(text)) for text in budget.split(",")]
    with output.progress("replaying") as update:
        for text, share in shares:
            slots = slots_for(recorded, share, pooled=not per_layer)
            results[text] = compare(recorded, slots, pooled=not per_layer, warmup=warmup)
            update(len(results), len(shares))
    if out.json:
        data = {text: result.to_json() for text, result in results.items()}
        output.print_json({"trace": trace_json(recorded), "warmup": warmup, "budgets": data})
        return
    print(_describe(recorded))
    for text, result in results.items():
        _table(text, result, per_layer)
    output.legend(_LEGEND)


_LEGEND = (
    "lru, lfu: keep the last used, the most used (fading). min: the best any cache can do, knowing "
    "all routing to come; min-wN knows the next N tokens. Gap closed: from the better of lru and "
    "lfu to min."
)


def _table(text: str, result: Comparison, per_layer: bool) -> None:
    where = "slots per layer" if per_layer else "slots"
    rows = []
    for replay in result.replays:
        gap = result.eta_policy(replay.reads_per_token)
        reads = f"{replay.reads_per_token:.2f}"
        rows.append((replay.policy, output.percent(replay.hit_rate), reads, output.percent(gap)))
    title = f"{text} of the experts: {result.replays[0].slots} {where}"
    output.table(("policy", "hits", "reads per token", "gap closed"), rows, title=title)


def share_of(text: str) -> float:
    """A percentage as a share; a trace knows no bytes, so only percentages make sense."""
    try:
        share = float(text.strip().removesuffix("%")) / 100 if text.strip().endswith("%") else 0.0
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(f"a budget for a trace cannot be {text.strip()!r}", "", "use 25%")
    return share


def trace_json(recorded: RoutingTrace) -> dict[str, object]:
    return {
        "tokens": recorded.num_tokens,
        "layers": recorded.num_layers,
        "experts": recorded.num_experts,
        "top_k": recorded.top_k,
        "sequences": len(set(recorded.seq_T.tolist())),
        "model": recorded.meta["model"],
        "phase": recorded.meta["phase"],
    }


def _describe(recorded: RoutingTrace) -> str:
    d = trace_json(recorded)
    return (
        f"{d['tokens']} tokens in {d['sequences']} sequences ({d['phase']}), "
        f"{d['layers']} layers x {d['experts']} experts, top-{d['top_k']}"
    )
