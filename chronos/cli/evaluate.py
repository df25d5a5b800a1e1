"""`chronos eval`: loss, lookahead recall, and routing locality beside its entropy."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

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
    from chronos.common.data import Batch, Document
    from chronos.run.engine import Engine


@command("eval", panel="Measure")
def evaluate(
    model: ModelArg,
    data: DataOption,
    run: RunOptions,
    out: JsonOptions,
    held_out: HeldOutOption = None,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", "-n", min=1, help="Tokens to measure on, in whole rows, at least one."
        ),
    ] = 50_000,
    seq_len: Annotated[
        int | None,
        typer.Option(min=2, show_default="256, or the model's", help="Context of each row."),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1, help="Rows at a time; a guest, or a budget, takes a document at a time."
        ),
    ] = 8,
    skip_bad: SkipBadOption = 0,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="OTHER", help="Measure this model on the same tokens, and compare the losses."
        ),
    ] = None,
) -> None:
    """Measure a model on text; lookahead recall where all its experts are in memory.

    The same tokens in the same contexts are measured at every budget and batch size. With
    --against, the loss factor is the perplexity of MODEL divided by that of OTHER: what its
    quantisation costs, where OTHER is not quantised.
    """
    from chronos.measure import evaluate as room
    from chronos.run.engine import RESIDENT

    documents = room.documents_of(data, held_out, skip_bad)
    budget = RESIDENT if run.budget == "all" else run.budget
    # own_process leaves out parts of a framework that losses of a resident model need.
    with run.open(model, budget=budget, own_process=False) as engine:
        seq_len = _row_length(engine, seq_len)
        dataset = room.packed(tokenizer_of(engine, model), documents, seq_len)
        rows = room.rows_of(dataset, max_tokens)
        with output.progress("routing") as update:
            trace = room.record(
                engine.session,
                engine.config,
                (ids_T.tolist() for ids_T, _ in room.pieces_of(rows)),
                max_tokens=len(rows) * seq_len,
                model=model,
                progress=update,
            )
        terms = _terms(engine, rows, batch_size)
    compared = {}
    if against is not None:
        with run.open(against, budget=budget, own_process=False) as engine:
            _check_same(rows, engine, against, documents, seq_len, max_tokens)
            loss = _terms(engine, rows, batch_size)["ce"]
        factor = math.exp(min(terms["ce"] - loss, 700.0))
        compared = {"against": {"model": against, "loss": loss, "loss_factor": factor}}
    result = {
        "documents": len(documents),
        "tokens": sum(row.tokens for row in rows),
        "rows": len(rows),
        "seq_len": seq_len,
        **room.summary(terms, dataset, documents),
        "locality": room.locality(trace),
        **compared,
    }
    if out.json:
        output.print_json({"model": model, "data": data} | result)
        return
    output.table(
        ("measure", "value", ""), _rows(result), title=_title(model, data, documents), align="lrl"
    )


def _row_length(engine: Engine, asked: int | None) -> int:
    if asked is None:
        return min(256, engine.context)
    if asked > engine.context:
        raise UsageError(
            f"a row of {asked} tokens is longer than the context of {engine.context}",
            "--seq-len",
            f"use at most {engine.context}",
        )
    return asked


def _check_same(
    rows: list[Batch],
    engine: Engine,
    against: str,
    documents: list[Document],
    seq_len: int,
    max_tokens: int,
) -> None:
    """Losses per token compare where the tokens are the same."""
    from chronos.measure import evaluate as room

    dataset = room.packed(tokenizer_of(engine, against), documents, _row_length(engine, seq_len))
    others = room.rows_of(dataset, max_tokens)
    if [row.ids_BT.tolist() for row in rows] != [row.ids_BT.tolist() for row in others]:
        raise UsageError(
            "it makes other tokens of the text, so the losses do not compare",
            "--against",
            "name a model with the same tokenizer",
        )


def _terms(engine: Engine, rows: list[Batch], batch_size: int) -> dict[str, float]:
    """The terms of the loss: of a native model in memory as training has them, else its loss."""
    from chronos import backends
    from chronos.common.model.config import ModelConfig
    from chronos.common.training.objectives import NextToken
    from chronos.common.training.recipe import OptimizerRecipe
    from chronos.measure import evaluate as room

    backend, loaded = backends.load(engine.backend), engine.session.model
    if engine.feed is None and isinstance(engine.config, ModelConfig):
        step = backend.train_step(loaded, OptimizerRecipe())
        batches = list(room.together(rows, batch_size))
        return step.evaluate(batches, NextToken(engine.config.loss_weights))
    with engine.feed.step() if engine.feed else nullcontext() as source:
        forward = partial(backend.forward, loaded, source=source)
        return room.sequence_loss(forward, room.pieces_of(rows))


def _title(model: str, data: str, documents: list[Document]) -> str:
    return f"{model} on {data}: {output.count(len(documents), 'document')}"


def _rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    place = result["locality"]
    rows = [
        (
            "tokens",
            str(result["tokens"]),
            f"predicted, in {output.count(result['rows'], 'row')} of {result['seq_len']}",
        ),
        ("loss", f"{result['loss']:.4f}", "nats per token"),
        ("perplexity", f"{result['perplexity']:.2f}", ""),
    ]
    if other := result.get("against"):
        rows[2:2] = [
            ("loss of the other", f"{other['loss']:.4f}", other["model"]),
            ("loss factor", f"{other['loss_factor']:.4f}", "perplexity by that of the other"),
        ]
    if result["bits_per_byte"] is not None:  # rows of conversations have no text of their own
        rows.append(("bits per byte", f"{result['bits_per_byte']:.4f}", ""))
    for ahead, recall in enumerate(result["lookahead_recall"]):
        when = "this token" if ahead == 0 else f"{ahead} token{'s' * (ahead > 1)} ahead"
        rows.append(("lookahead recall", output.percent(recall), f"of the experts of {when}"))
    chance = output.percent(place["repeat_by_chance"])
    return [
        *rows,
        ("locality", output.percent(place["repeat"]), f"picked again; {chance} by chance"),
        ("router entropy", f"{place['entropy']:.3f}", f"nats of {place['entropy_max']:.3f}"),
        ("effective experts", f"{place['effective_experts']:.1f}", "per layer, exp(entropy)"),
        ("largest share", output.percent(place["largest_share"]), "of a layer's picks, one expert"),
    ]
