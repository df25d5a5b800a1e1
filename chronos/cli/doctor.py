"""`chronos doctor`: what this machine offers, and why something is not used."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import chronos
from chronos.cli import output
from chronos.cli.app import command
from chronos.cli.options import JsonOptions
from chronos.common.tuning import PLAIN, machine_load, plain

if TYPE_CHECKING:
    from chronos.backends.probe import Finding, MemoryLimits

_READ_BLOCK, _READ_THREADS, _READ_BYTES = 1 << 20, 4, 512 << 20
_SMALL_SAMPLE = 64 << 20  # below it caches of the disk and the time to begin decide


@command("doctor", panel="This machine")
def doctor(
    out: JsonOptions,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The model whose disk is measured.")
    ] = "demo",
) -> None:
    """Show backends, devices, memory limits and the read rate of a model's disk."""
    from chronos.backends import NAMES, probe, select
    from chronos.common.errors import MissingBackendError
    from chronos.run.models import resolve_model

    resolve_model(model)  # a misspelt name is no finding
    found = [probe.inspect(name) for name in NAMES]
    try:
        chosen = select()
    except MissingBackendError:
        chosen = ""
    memory, disk, packages = probe.memory_limits(), _disk(model), _packages()
    if out.json:
        output.print_json(
            _system()
            | {"backends": [f.to_json() for f in found], "chosen": chosen}
            | {"memory": memory.to_json(), "disk": disk, "packages": packages}
            | {"profile": _profile(model)}
        )
        return
    rows = _system_rows() + [_backend_row(f, chosen) for f in found]
    rows += [_package_row(package) for package in packages]
    rows += [
        _threads_row(found, _system()["waiting"]),
        *_load_rows(),
        _memory_row(memory),
        _disk_row(disk),
        *_profile_rows(model),
    ]
    output.table(("what", "found"), rows, align="ll")
    fixes = [f.fix for f in found if not f.usable] + [p["fix"] for p in packages if p["fix"]]
    for fix in dict.fromkeys(fixes):
        output.command_line("missing:", fix)


def _system() -> dict[str, Any]:
    from chronos import kernels
    from chronos.backends.startup import waiting

    return {
        "chronos": chronos.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "plain": plain(),
        "kernels": kernels.available(),
        "waiting": waiting(),
        "load": load.average if (load := machine_load()) else None,
        "import_name_shared_with": _namesakes(),
    }


def _namesakes() -> list[str]:
    """Other distributions here that bring a package called `chronos`: one overwrites the other."""
    from importlib import metadata

    names = metadata.packages_distributions().get("chronos", [])
    return sorted({name for name in names if name.lower().replace("_", "-") != "chronos-moe"})


def _system_rows() -> list[tuple[str, str]]:
    system = _system()
    fast = f"off: {PLAIN} is set" if system["plain"] else f"on; {PLAIN}=1 turns them off"
    compiled = (
        "for packed experts" if system["kernels"] else "none: off, not compiled, or another CPU"
    )
    return [
        ("chronos", system["chronos"]),
        ("python", system["python"]),
        ("platform", f"{system['platform']}, {system['cores']} cores"),
        ("fast steps", fast),
        ("kernels", compiled),
        *(("import name", _CLASH.format(name)) for name in system["import_name_shared_with"]),
    ]


_CLASH = (
    "{0} is imported as `chronos` too, and here the two overwrite each other:\n"
    "give each an environment of its own, and install this one again"
)


def _threads_row(found: list[Finding], waiting: str) -> tuple[str, str]:
    lines = [
        f"{f.name}: {f.threads} for a product on a CPU, waiting {waiting}; --threads sets them"
        if f.threads
        else f"{f.name}: as many as it takes; --threads has no effect"
        for f in found
        if f.usable
    ]
    return "threads", "\n".join(lines) or "-"


def _load_rows() -> list[tuple[str, str]]:
    """None where the system does not say."""
    if (load := machine_load()) is None:
        return []
    words = "busy: speeds are lower than they could be" if load.busy else "quiet enough"
    return [("load", f"{load.average:.1f} threads wanted one of {load.cores} cores: {words}")]


def _backend_row(found: Finding, chosen: str) -> tuple[str, str]:
    label = f"backend {found.name}"
    if not found.usable:
        return label, f"no: {found.reason}"
    used = " (used by default)" if found.name == chosen else ""
    return label, f"{found.version}{used}\n" + "\n".join(found.devices)


_PACKAGES = (
    ("transformers", "guests on torch", "guests"),
    ("mlx_lm", "guests on mlx", "guests"),
    ("huggingface_hub", "models of the hub", "guests"),
    ("matplotlib", "charts", "plot"),
    ("optuna", "the tuner", "tune"),
    ("starlette", "the server", "serve"),
    ("tensorboardX", "reports of training", "report"),
)


def _packages() -> list[dict[str, Any]]:
    """Optional packages: what each is for, its version if it is here, else how to get it."""
    from importlib import metadata

    found = []
    for name, purpose, extra in _PACKAGES:
        here = importlib.util.find_spec(name) is not None
        version = metadata.version(name.replace("_", "-")) if here else None
        fix = "" if here else f"pip install 'chronos-moe[{extra}]'"
        found.append({"name": name, "for": purpose, "version": version, "fix": fix})
    return found


def _package_row(package: dict[str, Any]) -> tuple[str, str]:
    name = package["name"].replace("_", "-")
    version = package["version"]
    return package["for"], f"{name} {version}" if version else f"no: {name} is not installed"


def _memory_row(memory: MemoryLimits) -> tuple[str, str]:
    free = output.size(memory.free)
    lines = [f"{output.size(memory.machine)} in the machine, {free} free to use"]
    if memory.cgroup is None:
        lines.append("no cgroup limit")
    else:
        lines.append(f"cgroup limit {output.size(memory.cgroup)} ({memory.source})")
    return "memory", "\n".join(lines)


def _disk(model: str) -> dict[str, Any]:
    """Read rate of the largest file of the model, or why it was not measured."""
    from chronos.common.disk.io import measure_read_rate
    from chronos.common.errors import ChronosError
    from chronos.run.models import resolve_model

    try:
        folder = resolve_model(model)
        path = max((p for p in folder.rglob("*") if p.is_file()), key=_size)
        rate = measure_read_rate(path, _READ_BLOCK, _READ_THREADS, max_bytes=_READ_BYTES)
    except (ChronosError, OSError) as error:
        return {"model": model, "reason": str(error).partition("\n")[0]}
    nbytes = min(_size(path), _READ_BYTES)
    return {"model": model, "file": str(path), "bytes": nbytes, "bytes_per_s": rate}


def _size(path: Path) -> int:
    return path.stat().st_size


def _disk_row(disk: dict[str, Any]) -> tuple[str, str]:
    if "reason" in disk:
        return "disk", f"not measured: {disk['reason']}"
    text = f"{output.size(disk['bytes_per_s'])}/s in reads of {output.size(_READ_BLOCK)}"
    text += f", {_READ_THREADS} threads\n{output.size(disk['bytes'])} of {disk['file']}"
    if disk["bytes"] < _SMALL_SAMPLE:
        text += "\na small sample: expect another rate each time, name a larger MODEL"
    return "disk", text


def _profile(model: str) -> dict[str, Any] | None:
    """What `chronos tune machine` found of the model, and whether it is of this machine."""
    from chronos.run.profile import find

    found = find(model)
    if found is None:
        return None
    entries = [dataclasses.asdict(entry) for entry in found.entries]
    return {
        "path": str(found.path), "here": found.here, "machine": found.machine, "entries": entries,
    }  # fmt: skip


def _profile_rows(model: str) -> list[tuple[str, str]]:
    profile = _profile(model)
    if profile is None:
        return [("profile", "none: chronos tune machine MODEL makes one")]
    machine = profile["machine"]
    made = f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB"
    lines = [profile["path"], f"made on {made}" + ("" if profile["here"] else ": not this machine")]
    for entry in profile["entries"] if profile["here"] else []:
        budget = entry["budget"]
        size = budget if isinstance(budget, str) else output.size(budget)
        settings = ", ".join(f"{name} {value}" for name, value in entry["options"].items())
        lines.append(
            f"{entry['backend']} {entry['device']} at {size}: {settings}".replace("  ", " ")
        )
    return [("profile", "\n".join(lines))]
