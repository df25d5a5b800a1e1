"""Commands on model files: pack, inspect, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from chronos.cli import errors, output
from chronos.cli.app import command
from chronos.cli.options import DeviceOptions, JsonOptions, RunOptions

_PANEL = "Model files"
PathArg = Annotated[
    str, typer.Argument(metavar="PATH", help="A model folder, a .ctsr file, or `demo`.")
]


@command("pack", panel=_PANEL)
def pack(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model folder, packed or not.")],
    to: Annotated[Path, typer.Option("--out", "-o", metavar="DST", help="The folder to write.")],
    device: DeviceOptions,
    out: JsonOptions,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="T.npz", help="Lay experts used together side by side, from this trace."
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="As --trace, but record the trace first, on this text."),
    ] = None,
) -> None:
    """Split a model folder into its dense part and expert records that can be streamed.

    Without --trace or --calibrate the experts lie layer by layer, which is as fast for records of
    several megabytes. An interrupted run continues where it stopped.
    """
    from chronos.common.errors import UsageError
    from chronos.common.layout import pack as pack_folder
    from chronos.models import resolve_model

    if trace and calibrate:
        raise UsageError("--trace and --calibrate exclude each other")
    folder = resolve_model(source)
    order = _clusters(folder, trace, calibrate, device) if trace or calibrate else "layer"
    with output.progress("packing") as update:
        report = pack_folder(folder, to, order=order, progress=update)
    if out.json:
        output.print_json(report.to_json() | {"folder": str(to)})
        return
    rate = output.size(report.bytes / max(report.seconds, 1e-9))
    print(f"{to}: {report.records} experts, {output.size(report.bytes)}")
    output.note(f"{report.seconds:.1f} s, {rate}/s")


def _clusters(
    folder: Path, trace: Path | None, calibrate: str | None, device: DeviceOptions
) -> list[list[tuple[int, int]]]:
    """Which experts lie together, from a recorded trace or one recorded now."""
    from chronos.cli.routing import record
    from chronos.common.layout.clusters import clusters
    from chronos.common.routing.trace import RoutingTrace

    if trace is not None:
        return clusters(RoutingTrace.load(trace))
    run = RunOptions(backend=device.backend, device=device.device, budget="all")
    with run.open(str(folder)) as engine:
        return clusters(record(engine, str(folder), str(calibrate), 20_000, 512, 0))


@command("inspect", panel=_PANEL)
def inspect(path: PathArg, out: JsonOptions) -> None:
    """Show what a model folder or file holds, and what budgets would hold of it."""
    from chronos.common.layout import inspect as look

    data = look(_path(path))
    if out.json:
        output.print_json(data)
        return
    rows = [(key.replace("_", " "), _value(key, value)) for key, value in data.items()]
    output.table((path, ""), rows, left=True)


def _value(key: str, value: Any) -> str:
    if isinstance(value, int) and "bytes" in key:
        return f"{output.size(value)} ({value})"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@command("verify", panel=_PANEL)
def verify(path: PathArg, out: JsonOptions) -> None:
    """Read every byte of a model: headers, shapes, checksums, NaN and infinity.

    All problems are listed; the exit code is 3 if there is one.
    """
    from chronos.common.layout import verify as read_all

    with output.progress("verifying") as update:
        report = read_all(_path(path), collect=True, progress=update)
    if out.json:
        output.print_json(report.to_json())
    else:
        for problem in report.problems:
            what, *where = problem.splitlines()
            errors.report(what, " ".join(where))
        print(
            f"{path}: {output.size(report.bytes)} in {report.files} files, {report.records} "
            f"experts, {report.tensors} tensors: {len(report.problems) or 'no'} problems"
        )
    if report.problems:
        raise typer.Exit(3)


def _path(text: str) -> Path:
    """A path, or the shipped model by its name."""
    from chronos.common.errors import UsageError
    from chronos.models import DEMO, resolve_model

    if text == DEMO:
        return resolve_model(text)
    if not Path(text).exists():
        raise UsageError("there is no such file or folder", text)
    return Path(text)
