"""Commands on model files: pack and verify; `inspect` has a file of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chronos.cli import errors, output
from chronos.cli.app import command
from chronos.cli.options import DeviceOptions, JsonOptions, RunOptions, folder_named
from chronos.common.errors import UsageError

if TYPE_CHECKING:
    from chronos.common.layout import PackReport
    from chronos.common.layout.source import ModelSource
    from chronos.common.traces.clusters import OrderChoice

PANEL = "Model files"
_CALIBRATION_TOKENS = 20_000
_STREAMED_TOKENS = 4_096  # each 512 of them read most of the experts from the disk once


class Bits(StrEnum):
    """What --quantize takes."""

    INT8 = "int8"
    INT4 = "int4"

    @property
    def bits(self) -> int:
        return int(self[-1])


PathArg = Annotated[
    str, typer.Argument(metavar="PATH", help="A model folder, a .ctsr file, or `demo`.")
]


@command("pack", panel=PANEL)
def pack(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A model folder, packed or not, an id of the hub, or a GGUF file."
        ),
    ],
    out_folder: Annotated[
        str, typer.Option("--out", "-o", metavar="DST", help="The folder to write.")
    ],
    device: DeviceOptions,
    out: JsonOptions,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="For a GGUF file: the folder of the checkpoint it was made from.",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="T.npz", help="Order experts by what this trace saw together."),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="As --trace, but record the trace first, on this text."),
    ] = None,
    link: Annotated[
        bool,
        typer.Option(
            "--link", help="Leave what is not a routed expert in SRC, which DST then needs."
        ),
    ] = False,
    quantize: Annotated[
        Bits | None,
        typer.Option(
            "--quantize", "-q", help="Quantise the experts: round to nearest, in groups of columns."
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            "-g",
            metavar="32|64|128",
            show_default="32 for int4, 64 for int8",
            help="Columns of a matrix that share a scale, with --quantize.",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Pack a model that no library here can run, too."),
    ] = False,
) -> None:
    """Split a model folder into its dense part and expert records that can be streamed.

    SRC is a model of Chronos or any Mixture-of-Experts checkpoint in safetensors that Transformers
    or MLX-LM can build, or such a one in GGUF; it is only read. Experts lie layer by layer. With
    --trace or --calibrate, experts used together lie side by side if that is measured to save read
    time; the reason is printed and kept in the manifest. An interrupted run continues where it
    stopped. --quantize leaves what is not a routed expert as it is; `eval DST --against SRC` says
    what it costs.
    """
    from chronos.common.disk.io import FileIO
    from chronos.common.layout import open_layout
    from chronos.common.layout.pack import check_destination, opened
    from chronos.measure.evaluate import documents_of

    to = folder_named(out_folder)
    if trace and calibrate:
        raise UsageError("--trace and --calibrate exclude each other")
    if calibrate:  # a misspelt name is told now, and not when all is packed
        documents_of(calibrate)
    folder, settings = _source(source, config, calibrate or trace)
    model = opened(folder, settings, FileIO())
    if not force:
        _check_runnable(model, folder)
    encoding = _encoding(model, quantize, group_size)
    if trace or calibrate:  # the same for a folder that cannot be written
        check_destination(folder, to)
    if calibrate and _streams_only(folder):
        report, choice = _calibrated(folder, to, calibrate, device, link, encoding)
    else:
        run = RunOptions(**dataclasses.asdict(device))
        choice = _order(folder, trace, calibrate, run, encoding)
        report = _pack(folder, to, choice, link, encoding, settings)
    if out.json:
        order = choice.to_json() if choice else open_layout(to).manifest.order
        output.print_json(report.to_json() | {"folder": str(to), "order": order})
        return
    print(f"{to}: {report.records} experts, {output.size(report.bytes)}")
    output.note(_pace(report))
    if report.left_out:
        output.note(
            f"left out, as no decoder runs them: {len(report.left_out)} tensors, for instance"
            f" {report.left_out[0]}"
        )
    if choice:
        output.note(choice.reason)


def _pace(report: PackReport) -> str:
    if report.reused_clusters == report.clusters:
        return "nothing to do: it was packed already"
    rate = output.size(report.bytes / max(report.seconds, 1e-9))
    went_on = f"{report.reused_clusters} of {report.clusters} cluster files were there already"
    again = f"; {went_on}" if report.reused_clusters else ""
    return f"{report.seconds:.1f} s, {rate}/s{again}"


def _source(source: str, config: str | None, ordered_by: object) -> tuple[Path, Path | None]:
    """What is packed, and the folder of the original where that is a GGUF file."""
    from chronos.common.disk.gguf import SUFFIX
    from chronos.run.models import resolve_model

    if not source.endswith(SUFFIX) or not Path(source).is_file():
        if config is not None:
            raise UsageError("only a GGUF file needs another folder's config.json", "--config")
        return resolve_model(source, fetch=True, bars=output.draws()), None
    if ordered_by is not None:
        raise UsageError(
            "experts of a GGUF file are packed layer by layer",
            source,
            "pack it, then pack what was packed with --trace or --calibrate",
        )
    return Path(source), None if config is None else Path(config).expanduser()


def _check_runnable(model: ModelSource, folder: Path) -> None:
    """Refuse what would be copied for nobody. Raises ConfigError."""
    from chronos.backends.libraries import who_runs
    from chronos.common.errors import ConfigError
    from chronos.common.model.guest import GuestConfig

    if not isinstance(model.config, GuestConfig):
        return
    verdicts = who_runs(model.config.model_type, model.dialect)
    if not any(verdict.may_run for verdict in verdicts):
        raise ConfigError(
            f"no library here runs {model.config.model_type}: "
            + "; ".join(verdict.text for verdict in verdicts),
            str(folder),
            "upgrade the library, or use a checkpoint of the text model; --force packs it anyway",
        )


def _encoding(model: ModelSource, quantize: Bits | None, group: int | None) -> str | None:
    """The encoding that is asked for; None to keep the experts' bytes."""
    from chronos.common.layout.affine import GROUPS
    from chronos.common.layout.source import own_encoding

    if group is not None and (quantize is None or group not in GROUPS):
        sizes = ", ".join(map(str, GROUPS))
        raise UsageError(f"{group} is no group of --quantize", "--group-size", f"one of {sizes}")
    return None if quantize is None else own_encoding(model, quantize.bits, group)


def _pack(
    folder: Path,
    to: Path,
    choice: OrderChoice | None,
    link: bool,
    encoding: str | None,
    settings: Path | None = None,
) -> PackReport:
    from chronos.common.layout import is_packed, open_layout
    from chronos.common.layout import pack as pack_folder

    order: Any = choice.order if choice else "layer"
    if choice is None and is_packed(to):
        order = open_layout(to).clusters()  # whatever it was: the same model is done already
    with _going_on(to), output.progress("packing", rate=True) as update:
        return pack_folder(
            folder,
            to,
            config=settings,
            order=order,
            how=choice.to_json() if choice else None,
            encoding=encoding,
            link=link,
            progress=update,
        )


@command("unpack", panel=PANEL)
def unpack(
    packed: Annotated[str, typer.Argument(metavar="PACKED", help="A packed model folder.")],
    out_folder: Annotated[
        str, typer.Option("--out", "-o", metavar="DST", help="The folder to write; new or empty.")
    ],
    out: JsonOptions,
    dequantize: Annotated[
        bool,
        typer.Option("--dequantize", help="Make quantised matrices plain ones (PyTorch)."),
    ] = False,
) -> None:
    """Write the checkpoint that a packed folder was made of: every tensor with its name and bytes.

    PACKED is compared with its digests first, and only read. What packing left out, heads that no
    decoder runs, does not come back. With --dequantize, matrices that another library quantised
    become plain ones, in the dtype of config.json.
    """
    from chronos.backends import dequantiser
    from chronos.common.layout import unpack as unpack_folder

    to, convert = folder_named(out_folder), dequantiser() if dequantize else None
    with output.progress("unpacking", rate=True) as update:
        report = unpack_folder(path_of(packed), to, dequantise=convert, progress=update)
    if out.json:
        output.print_json(report.to_json() | {"folder": str(to)})
        return
    print(f"{to}: {report.tensors} tensors, {output.size(report.bytes)}")


@contextmanager
def _going_on(to: Path) -> Iterator[None]:
    """What an interrupted run is worth."""
    try:
        yield
    except KeyboardInterrupt:
        output.note(f"interrupted; the same command goes on in {to}")
        raise


def _streams_only(folder: Path) -> bool:
    """Whether a model is to be run packed: another library would need memory for all of it."""
    from chronos.common.layout import is_packed
    from chronos.common.model.guest import GuestConfig, read_config

    return isinstance(read_config(folder), GuestConfig) and not is_packed(folder)


def _calibrated(
    folder: Path, to: Path, text: str, device: DeviceOptions, link: bool, encoding: str | None
) -> tuple[PackReport, OrderChoice | None]:
    """Pack by layers, run that within a quarter of the experts' memory, reorder if it pays."""
    from chronos.common.layout import open_layout, reorder
    from chronos.common.layout.folder import minimum_bytes
    from chronos.common.model.guest import read_config

    report = _pack(folder, to, None, link, encoding)
    layout, top_k = open_layout(to), read_config(to).num_experts_per_tok
    budget = max(layout.total_bytes // 4, minimum_bytes(layout, top_k))
    run = RunOptions(**dataclasses.asdict(device), budget=str(budget))
    choice = _order(to, None, text, run, None)
    if choice is not None and choice.order != layout.clusters():
        with output.progress("reordering", rate=True) as update:
            report = reorder(to, choice.order, choice.to_json(), progress=update)
    return report, choice


def _order(
    folder: Path,
    trace: Path | None,
    calibrate: str | None,
    run: RunOptions,
    encoding: str | None,
) -> OrderChoice | None:
    """Clusters or layer order, as a trace decides; None where there is none to ask."""
    from chronos.cli.routing import record
    from chronos.common.disk.io import FileIO
    from chronos.common.layout.source import encoded, open_source
    from chronos.common.traces.clusters import choose_order
    from chronos.common.traces.trace import RoutingTrace
    from chronos.measure.evaluate import documents_of

    if trace is not None:
        recorded = RoutingTrace.load(trace)
    elif calibrate is not None:
        tokens = _CALIBRATION_TOKENS if run.budget == "all" else _STREAMED_TOKENS
        with run.open(str(folder)) as engine:
            recorded = record(engine, str(folder), documents_of(calibrate), tokens, 512, 0)
    else:
        return None
    model = open_source(folder, FileIO())
    if encoding is not None and encoding not in model.encodings.values():
        model = encoded(model, encoding)
    experts = model.config.num_experts
    if (recorded.layers, recorded.num_experts) != (tuple(model.templates), experts):
        found = f"{recorded.num_layers} layers of {recorded.num_experts} experts"
        raise UsageError(
            f"the trace is of {found}, the model has {len(model.templates)} of {experts}"
            " (or in other layers)",
            str(trace or folder),
        )
    return choose_order(recorded, record_bytes=max(t.nbytes for t in model.templates.values()))


@command("verify", panel=PANEL)
def verify(path: PathArg, out: JsonOptions) -> None:
    """Read every byte of a model: headers, shapes, checksums, NaN and infinity.

    All problems are listed; the exit code is 3 if there is one.
    """
    from chronos.common.layout import verify as read_all

    with output.progress("verifying", rate=True) as update:
        report = read_all(path_of(path), collect=True, progress=update)
    if out.json:
        output.print_json(report.to_json())
    else:
        for problem in report.problems:
            errors.report(problem["what"], problem["where"], problem["fix"])
        coded = f" ({', '.join(report.encodings)})" if report.encodings else ""
        found = output.count(len(report.problems), "problem") if report.problems else "no problems"
        print(
            f"{path}: {output.size(report.bytes)} in {output.count(report.files, 'file')}, "
            f"{output.count(report.records, 'expert')}{coded}, "
            f"{output.count(report.tensors, 'tensor')}: {found}"
        )
        for what in report.unchecked:
            output.note(f"not checked: {what}")
    if report.problems:
        raise typer.Exit(3)


def path_of(text: str) -> Path:
    """A path, the shipped model by its name, or the cached files of an id of the hub."""
    from chronos.common.layout.folder import is_unfinished
    from chronos.run.hub import is_model_id
    from chronos.run.models import DEMO, resolve_model

    path = Path(text)
    if text == DEMO or (is_model_id(text) and not path.exists()):
        return resolve_model(text)
    if not path.exists():
        raise UsageError("there is no such file or folder", text, "check the spelling")
    return resolve_model(text) if path.is_dir() and not is_unfinished(path) else path
