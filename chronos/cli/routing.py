"""`chronos trace`: which experts each token asks for; and words on traces for other commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chronos.cli import output
from chronos.cli.app import command
from chronos.cli.generate import tokenizer_of
from chronos.cli.options import (
    DataOption,
    HeldOutOption,
    JsonOptions,
    ModelArg,
    RunOptions,
    SkipBadOption,
)
from chronos.common.errors import UsageError

if TYPE_CHECKING:
    from chronos.common.data import Document
    from chronos.common.traces.trace import RoutingTrace
    from chronos.run.engine import Engine

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
    held_out: HeldOutOption = None,
    skip_bad: SkipBadOption = 0,
) -> None:
    """Record which experts each token of a text is routed to. A file that is there is not written
    over."""
    from chronos.measure.evaluate import documents_of

    output.check_target(to, "--out", new=True)  # now, and not when all is recorded
    documents = documents_of(data, held_out, skip_bad)
    with run.open(model) as engine:
        recorded = record(engine, model, documents, max_tokens, seq_len, new_tokens)
    recorded.save(to)
    if out.json:
        output.print_json(trace_json(recorded) | {"file": str(to)})
        return
    print(f"{to}: {describe(recorded)}")


def record(
    engine: Engine,
    model: str,
    documents: Sequence[Document],
    max_tokens: int,
    seq_len: int,
    new_tokens: int,
) -> RoutingTrace:
    """The routing of a text, with a progress bar."""
    from chronos.measure import evaluate

    room = engine.context - new_tokens
    if room < 1:
        raise UsageError(f"--new-tokens {new_tokens} leaves no room in {engine.context} tokens")
    if seq_len > room:
        output.note(f"pieces of {room} tokens, not {seq_len}: that is what the context holds")
    sequences = evaluate.cut(tokenizer_of(engine, model), documents, min(seq_len, room))
    with output.progress("recording") as update:
        return evaluate.record(
            engine.session,
            engine.config,
            sequences,
            max_tokens=max_tokens,
            new_tokens=new_tokens,
            model=model,
            layers=engine.moe_layers,
            expert_bytes=_record_bytes(engine),
            progress=update,
        )


def _record_bytes(engine: Engine) -> int:
    """Bytes of the largest expert as it is stored."""
    if engine.layout is not None:
        return engine.layout.record_nbytes
    config = engine.config
    layers = len(engine.moe_layers or range(config.num_hidden_layers))
    return engine.expert_bytes_total // (layers * config.num_experts)


def share_of(text: str) -> float:
    """A percentage as a share; a trace knows no bytes, so only percentages make sense."""
    try:
        share = float(text.strip().removesuffix("%")) / 100 if text.strip().endswith("%") else 0.0
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(f"a budget for a trace cannot be {text.strip()!r}", "", "use 25%")
    return share


def shares_of(text: str) -> list[tuple[str, float]]:
    """The shares of a list with commas, beside how each is written."""
    return [(part.strip(), share_of(part)) for part in text.split(",")]


def trace_json(recorded: RoutingTrace) -> dict[str, object]:
    return {
        "tokens": recorded.num_tokens,
        "layers": recorded.num_layers,
        "experts": recorded.num_experts,
        "top_k": recorded.top_k,
        "sequences": len(set(recorded.seq_T.tolist())),
        "model": recorded.meta["model"],
        "phase": recorded.meta["phase"],
        "expert_bytes": recorded.expert_bytes,
    }


def describe(recorded: RoutingTrace) -> str:
    d = trace_json(recorded)
    return (
        f"{output.count(recorded.num_tokens, 'token')} in "
        f"{output.count(len(set(recorded.seq_T.tolist())), 'sequence')} ({d['phase']}), "
        f"{d['layers']} layers x {d['experts']} experts, top-{d['top_k']}"
    )
