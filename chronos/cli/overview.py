"""`chronos inspect`: what a model is, who runs it, what a budget would hold, what to type next."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from chronos.cli import output
from chronos.cli.app import command
from chronos.cli.files import PANEL, PathArg, path_of
from chronos.cli.options import JsonOptions, check_budget, checked, size_of
from chronos.common.errors import UsageError


@command("inspect", panel=PANEL)
def inspect(
    path: PathArg,
    out: JsonOptions,
    file: Annotated[
        str, typer.Argument(metavar="[FILE]", help="After the word `data`: rows to train on.")
    ] = "",
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="Whose tokens the rows of FILE are counted in.")
    ] = "",
    budget: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="What this much would hold, as generate takes it.",
            callback=check_budget,
        ),
    ] = "",
    disk: Annotated[
        str,
        typer.Option(
            metavar="RATE",
            help="With a recipe: bytes a second of a disk such as 1GB, for the speed it allows.",
            callback=checked(size_of("a rate")),
        ),
    ] = "",
    tokens: Annotated[
        int, typer.Option("--tokens", min=0, help="With a trace: first tokens, in --json.")
    ] = 0,
) -> None:
    """Explain a model folder or file: its experts, what budgets would hold, whether it fits.

    Reads headers only, of a folder of any kind, before packing or after.

    Of a recipe (.toml) of pretraining it explains the model that would be made: parameters, bytes,
    memory of an update, and with --disk how fast its experts could be read. Of a routing trace
    (.npz) it explains the routing: use of experts and clusters by layer.

    `chronos inspect data FILE --model M` explains rows instead: their kind, how long they are, what
    is wrong with which, and the first one with what would be trained of it.
    """
    if path.endswith((".toml", ".npz")):
        if file or model:
            raise UsageError("inspect explains one thing", file or model)
        if path.endswith(".toml"):
            _explain_recipe(path, budget, disk, out)
        else:
            _explain_trace(path, tokens, out)
        return
    if file or model:
        if path != "data" or not file or budget:
            raise UsageError(
                "inspect explains one thing", "", "chronos inspect data FILE [--model MODEL]"
            )
        _explain_rows(file, model, out)
        return
    from chronos.backends.libraries import who_runs
    from chronos.common.layout import inspect as look

    place = path_of(path)
    data = look(place, budgets=[budget]) if budget else look(place)
    if place.is_dir():
        data |= _fit(place, data)
        libraries = who_runs(data["model_type"], data["dialect"])
        data["runs_with"] = [library.text for library in libraries]
        if any(library.may_run for library in libraries):
            held = [each["budget"] for each in data["budgets"] if each["enough"]]
            data["next"] = _next(path, data["kind"], held[0] if budget and held else "25%")
    if out.json:
        output.print_json(data)
        return
    following = data.pop("next", None)
    rows = [
        (_LABELS.get(key, key.replace("_", " ")), _value(key, value))
        for key, value in data.items()
        if key != "budgets"
    ]
    rows += [(f"budget {held['budget']}", _held(held)) for held in data.get("budgets", ())]
    output.table((path, ""), rows, align="ll")
    if following:
        output.command_line("next:", following)


def _explain_recipe(path: str, budget: str, disk: str, out: JsonOptions) -> None:
    from chronos.common.budget import parse_size
    from chronos.common.training.design import SHARES, design
    from chronos.common.training.recipe import load_recipe
    from chronos.train.pretrain import PretrainRecipe

    recipe = load_recipe(path, PretrainRecipe)
    data = design(
        recipe.model,
        optimizer=recipe.optimizer,
        rows=recipe.stage.batch_size,
        seq_len=recipe.stage.seq_len,
        budgets=[budget] if budget else SHARES,
        disk_rate=parse_size(disk, "a rate") if disk else None,
    )
    if out.json:
        output.print_json(data)
        return
    update = data.pop("update", {})
    budgets = [(f"budget {each['budget']}", _designed(each)) for each in data.pop("budgets")]
    rows = [(key.replace("_", " "), _sized(key, value)) for key, value in data.items() if value]
    parts = [
        (f"an update's {key}", output.size(value))
        for key, value in update.items()
        if key not in ("rows", "seq_len")
    ]
    output.table((path, ""), rows + parts + budgets, align="ll")


def _designed(room: dict[str, Any]) -> str:
    speed = room["tokens_per_s_at_most"]
    read = f"{output.size(room['read_bytes_per_token'])} read a token if all are as likely"
    return f"{_held(room)}; {read}" + (f", at most {speed:.1f} tokens/s" if speed else "")


def _sized(key: str, value: int | float) -> str:
    return output.size(value) if "bytes" in key else f"{value:,}"


def _explain_trace(path: str, tokens: int, out: JsonOptions) -> None:
    from chronos.cli.routing import describe, trace_json
    from chronos.common.traces.overview import by_layer, first_ids
    from chronos.common.traces.trace import RoutingTrace
    from chronos.measure.evaluate import locality

    trace = RoutingTrace.load(path)
    layers = by_layer(trace)
    if out.json:
        data = trace_json(trace) | {"locality": locality(trace), "by_layer": layers}
        output.print_json(data | {"first_ids": first_ids(trace, tokens)})
        return
    rows = [
        (
            str(each["layer"]),
            f"{each['effective_experts']:.1f}",
            output.percent(each["largest_share"]),
            output.percent(each["repeat"]),
            str(len(each["clusters"])),
        )
        for each in layers
    ]
    columns = ("layer", "effective experts", "largest share", "picked again", "clusters")
    output.table(columns, rows, title=describe(trace))


def _explain_rows(rows: str, model: str, out: JsonOptions) -> None:
    from chronos.common.data.overview import overview
    from chronos.common.text.tokenizer import Tokenizer
    from chronos.common.training.recipe import BUILT_IN, STDLIB
    from chronos.run.models import resolve_model

    tokenizer = Tokenizer.load(resolve_model(model)) if model else None
    built_in = rows in BUILT_IN and rows != STDLIB
    found = overview(rows.removeprefix("stdlib-") if built_in else rows, tokenizer, built_in)
    if out.json:
        output.print_json(found)
        return
    first, bad = found.pop("first", {}), found.pop("bad_rows")
    table = [
        (key.replace("_", " "), _plain(value))
        for key, value in found.items()
        if value not in ([], {})
    ]
    output.table((rows, ""), table, align="ll")
    for name, parts in first.items():
        print(f"\nfirst {name}:" if name != "row" else "\nfirst row:")
        for text, trained in parts:
            mark = "trained | " if trained else "        | "
            print("\n".join(mark + line for line in text.split("\n")))
    if bad:
        print("\nbad rows:")
        print("\n".join(f"  {line}" for line in bad))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


_LABELS = {
    "kind": "what it is",
    "bytes": "dense part and experts",
    "folder_bytes": "size of its files, all of them",
    "expert_bytes": "size of one expert",
    "expert_bytes_total": "size of all experts",
    "expert_bytes_per_token": "experts of one token",
    "dense_bytes": "size of the rest (dense part)",
    "dense_memory_bytes": "its dense part dequantised",
    "least_memory_bytes": "least memory to run it",
    "memory_free_bytes": "memory free here",
    "fits_memory": "all of it fits into memory",
    "disk_free_bytes": "disk free here",
    "fits_disk": "its packed form fits beside it",
    "runs_with": "runs with",
    "clusters": "cluster files",
    "left_out_tensors": "tensors left out when packing",
}


def _held(held: dict[str, Any]) -> str:
    if not held["enough"]:
        return f"too small: at least {output.size(held['least_bytes'])}"
    size, each = output.size(held["bytes"]), held["experts_per_layer"]
    return f"{held['experts']} experts in {size}, {each:.1f} a layer"


def _fit(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Whether all of it fits into memory, and its packed form beside it on the disk."""
    from chronos.backends.probe import memory_limits

    total, free = data["dense_bytes"] + data["expert_bytes_total"], memory_limits().free
    held = data.get("dense_memory_bytes", data["dense_bytes"])
    fit = {
        "bytes": total,
        "least_memory_bytes": held + data["budgets"][0]["least_bytes"],
        "memory_free_bytes": free,
        "fits_memory": held + data["expert_bytes_total"] <= free,
    }
    if data["kind"] == "packed":
        files = (path for path in folder.rglob("*") if path.is_file())
        return fit | {"folder_bytes": sum(path.stat().st_size for path in files)}
    room = shutil.disk_usage(folder.resolve().parent).free
    return fit | {"disk_free_bytes": room, "fits_disk": total <= room}


def _next(path: str, kind: str, budget: str) -> str:
    """The command that comes next."""
    if kind == "packed":
        return f"chronos generate {shlex.quote(path)} --budget {budget} -p 'Once upon a time'"
    target = path.rstrip("/") if Path(path).exists() else path.rpartition("/")[2]
    return f"chronos pack {shlex.quote(path)} -o {shlex.quote(target + '-packed')}"


def _value(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and "bytes" in key:
        return output.size(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
