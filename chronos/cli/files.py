"""Commands on model files: pack, inspect, verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chronos.cli import errors, output
from chronos.cli.app import command
from chronos.cli.options import DeviceOptions, JsonOptions, RunOptions
from chronos.common.errors import UsageError

if TYPE_CHECKING:
    from chronos.common.layout.clusters import OrderChoice

_PANEL = "Model files"
_CALIBRATION_TOKENS = 20_000
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
        typer.Option(metavar="T.npz", help="Order experts by what this trace saw together."),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="As --trace, but record the trace first, on this text."),
    ] = None,
) -> None:
    """Split a model folder into its dense part and expert records that can be streamed.

    Experts lie layer by layer. With --trace or --calibrate, experts used together lie side by side
    if that is measured to save read time; the reason is printed and kept in the manifest. An
    interrupted run continues where it stopped.
    """
    from chronos.common.layout import pack as pack_folder
    from chronos.models import resolve_model

    if trace and calibrate:
        raise UsageError("--trace and --calibrate exclude each other")
    folder = resolve_model(source)
    choice = _order(folder, trace, calibrate, device)
    with output.progress("packing") as update:
        report = pack_folder(
            folder,
            to,
            order=choice.order if choice else "layer",
            how=choice.to_json() if choice else None,
            progress=update,
        )
    if out.json:
        order = choice.to_json() if choice else {"method": "layer"}
        output.print_json(report.to_json() | {"folder": str(to), "order": order})
        return
    rate = output.size(report.bytes / max(report.seconds, 1e-9))
    print(f"{to}: {report.records} experts, {output.size(report.bytes)}")
    output.note(f"{report.seconds:.1f} s, {rate}/s")
    if choice:
        output.note(choice.reason)


def _order(
    folder: Path, trace: Path | None, calibrate: str | None, device: DeviceOptions
) -> OrderChoice | None:
    """Clusters or layer order, as a trace decides; None where there is none to ask."""
    from chronos.cli.routing import record
    from chronos.common.config import ModelConfig
    from chronos.common.layout.clusters import choose_order
    from chronos.common.layout.ctsr import record_template
    from chronos.common.routing.trace import RoutingTrace
    from chronos.common.weights import expert_tensors

    if trace is not None:
        recorded = RoutingTrace.load(trace)
    elif calibrate is not None:
        run = RunOptions(backend=device.backend, device=device.device)
        with run.open(str(folder)) as engine:
            recorded = record(engine, str(folder), calibrate, _CALIBRATION_TOKENS, 512, 0)
    else:
        return None
    config = ModelConfig.from_json(folder)
    wanted = (config.num_hidden_layers, config.num_experts)
    if (recorded.num_layers, recorded.num_experts) != wanted:
        found = f"{recorded.num_layers} layers of {recorded.num_experts} experts"
        raise UsageError(
            f"the trace is of {found}, the model has {wanted[0]} of {wanted[1]}", str(trace)
        )
    return choose_order(recorded, record_bytes=record_template(expert_tensors(config))[1])


@command("inspect", panel=_PANEL)
def inspect(path: PathArg, out: JsonOptions) -> None:
    """Show what a model folder or file holds, and what budgets would hold of it."""
    from chronos.common.layout import inspect as look

    data = look(_path(path))
    if out.json:
        output.print_json(data)
        return
    rows = [(key.replace("_", " "), _value(key, value)) for key, value in data.items()]
    output.table((path, ""), rows, align="ll")


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
    from chronos.models import DEMO, resolve_model

    if text == DEMO:
        return resolve_model(text)
    if not Path(text).exists():
        raise UsageError("there is no such file or folder", text)
    return Path(text)
