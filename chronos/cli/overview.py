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
from chronos.cli.options import JsonOptions, check_budget


@command("inspect", panel=PANEL)
def inspect(
    path: PathArg,
    out: JsonOptions,
    budget: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="What this much would hold, as generate takes it.",
            callback=check_budget,
        ),
    ] = "",
) -> None:
    """Explain a model folder or file: its experts, what budgets would hold, whether it fits.

    Reads headers only, of a folder of any kind, before packing or after.
    """
    from chronos.backends.libraries import who_runs
    from chronos.common.layout import inspect as look

    place = path_of(path)
    data = look(place, budgets=[budget]) if budget else look(place)
    if place.is_dir():
        data |= _fit(place, data)
        libraries = who_runs(data["model_type"], data["dialect"])
        data["runs_with"] = [library.text for library in libraries]
        if any(library.may_run for library in libraries):
            data["next"] = _next(path, data)
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


_LABELS = {
    "kind": "what it is",
    "bytes": "size in all",
    "expert_bytes": "size of one expert",
    "expert_bytes_total": "size of all experts",
    "expert_bytes_per_token": "experts of one token",
    "dense_bytes": "size of the rest (dense part)",
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
        return f"too small: {output.size(held['least_bytes'])} wanted, the experts of one layer"
    size, each = output.size(held["bytes"]), held["experts_per_layer"]
    return f"{held['experts']} experts in {size}, {each:.1f} a layer"


def _fit(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Whether all of it fits into memory, and its packed form beside it on the disk."""
    from chronos.backends.probe import memory_limits

    total, free = data["dense_bytes"] + data["expert_bytes_total"], memory_limits().free
    fit = {
        "bytes": total,
        "least_memory_bytes": data["dense_bytes"]
        + data["experts_per_token"] * data["expert_bytes"],
        "memory_free_bytes": free,
        "fits_memory": total <= free,
    }
    if data["kind"] == "packed":
        return fit
    room = shutil.disk_usage(folder.resolve().parent).free
    return fit | {"disk_free_bytes": room, "fits_disk": total <= room}


def _next(path: str, data: dict[str, Any]) -> str:
    """The command that comes next."""
    if data["kind"] == "packed":
        return f"chronos generate {shlex.quote(path)} --budget 25% -p 'Once upon a time'"
    target = path.rstrip("/") if Path(path).exists() else path.rpartition("/")[2]
    return f"chronos pack {shlex.quote(path)} -o {shlex.quote(target + '-packed')}"


def _value(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and "bytes" in key:
        return output.size(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
