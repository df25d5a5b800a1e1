"""`chronos inspect`: what a model is, who runs it, what a budget would hold, what to type next."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from chronos.cli import output
from chronos.cli.app import command
from chronos.cli.files import PANEL, PathArg, path_of
from chronos.cli.options import JsonOptions

# Package, where it keeps an architecture, and what is shown; by whose records they are.
_TRANSFORMERS = ("transformers", "models/{}/__init__.py", "Transformers on torch")
_MLX_LM = ("mlx_lm", "models/{}.py", "MLX-LM on mlx")
_LIBRARIES = {"transformers": (_TRANSFORMERS, _MLX_LM), "mlx": (_MLX_LM,)}


@command("inspect", panel=PANEL)
def inspect(
    path: PathArg,
    out: JsonOptions,
    budget: Annotated[
        str,
        typer.Option(metavar="SIZE", help="What this much would hold, as generate takes it."),
    ] = "",
) -> None:
    """Explain a model folder or file: its experts, what budgets would hold, whether it fits.

    Reads headers only, of a folder of any kind, before packing or after.
    """
    from chronos.common.layout import inspect as look

    place = path_of(path)
    data = look(place, budgets=[budget]) if budget else look(place)
    if place.is_dir():
        data |= _fit(place, data)
        data["runs_with"] = _libraries(data["model_type"], data["dialect"])
        data["next"] = _next(path, data)
    if out.json:
        output.print_json(data)
        return
    rows = [(key.replace("_", " "), _value(key, value)) for key, value in data.items()]
    output.table((path, ""), rows, align="ll")


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


def _libraries(model_type: str, dialect: str) -> list[str]:
    """Who builds this model; one whose installed version has no such architecture says so."""
    if dialect == "chronos":
        return ["Chronos"]
    return [_library(model_type, *known) for known in _LIBRARIES[dialect]]


def _library(model_type: str, package: str, place: str, label: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return f"{label} (not installed: pip install 'chronos-moe[guests]')"
    home = Path(spec.submodule_search_locations[0])
    names = (model_type, model_type.removesuffix("_text"))
    if any((home / place.format(name)).is_file() for name in names):
        return label
    return f"{label}, if it knows {model_type} under another name"


def _next(path: str, data: dict[str, Any]) -> str:
    """The command that comes next."""
    if data["kind"] == "packed":
        return f"chronos generate {shlex.quote(path)} --budget 25% -p 'Once upon a time'"
    name = Path(path).resolve().name if Path(path).exists() else path.rpartition("/")[2]
    return f"chronos pack {shlex.quote(path)} -o {shlex.quote(name + '-packed')}"


def _value(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and "bytes" in key:
        return f"{output.size(value)} ({value})"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
