"""`chronos export`: models for other libraries."""

from __future__ import annotations

from typing import Annotated

import typer

from chronos.cli import output
from chronos.cli.app import command
from chronos.cli.files import PANEL, path_of
from chronos.cli.options import JsonOptions, folder_named
from chronos.common.errors import UsageError

_FLOATS = ("f32", "f16", "bf16")
_TYPES = {"hf": _FLOATS, "mlx": _FLOATS, "gguf": (*_FLOATS, "q8_0", "mxfp4")}


@command("export", panel=PANEL)
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model folder, packed or not, or `demo`.")
    ],
    out_folder: Annotated[
        str, typer.Option("--out", "-o", metavar="DST", help="The folder to write; new or empty.")
    ],
    to: Annotated[str, typer.Option(metavar="hf", help="For whom: Transformers (hf).")],
    out: JsonOptions,
    type: Annotated[
        str | None,
        typer.Option(
            metavar="f32|f16|bf16|q8_0|mxfp4",
            show_default="as stored",
            help="What weights are written as; the last two for llama.cpp.",
        ),
    ] = None,
    with_code: Annotated[
        bool,
        typer.Option(
            "--with-code",
            help="Lay a modelling file beside the weights, for a model of Chronos' own that has no"
            " architecture in the library.",
        ),
    ] = False,
    dequantize: Annotated[
        bool,
        typer.Option("--dequantize", help="Make a guest's quantised matrices plain (PyTorch)."),
    ] = False,
) -> None:
    """Write a model for another library. What foresees experts stays behind.

    A model of Chronos' own becomes an architecture that the library has, where the arithmetic is
    the same; else it is refused, or written with a modelling file (--with-code). A packed guest
    becomes the checkpoint it was packed from. DST is there whole or not at all.
    """
    if to not in _TYPES:
        raise UsageError(f"models are not exported to {to!r}", "--to", f"use {' or '.join(_TYPES)}")
    if type is not None and type not in _TYPES[to]:
        known = " or ".join(_TYPES[to])
        raise UsageError(f"{type!r} is no type of --to {to}", "--type", f"use {known}")
    folder, source = folder_named(out_folder), path_of(model)
    if with_code and to != "hf":
        raise UsageError("--with-code is for --to hf", "--with-code", "leave it out")
    if dequantize and to == "gguf":
        fix = "export it --to hf --dequantize first, and that --to gguf"
        raise UsageError("--dequantize is for --to hf and --to mlx", "--dequantize", fix)
    with output.progress("exporting", rate=True) as update:
        if to == "gguf":
            from chronos.interop.gguf import export_gguf

            done = export_gguf(source, folder, kind=type or "", progress=update)
        else:
            from chronos.backends import dequantiser
            from chronos.interop.export import DTYPES
            from chronos.interop.export import export as export_folder

            done = export_folder(
                source,
                folder,
                to=to,
                dtype=DTYPES[type] if type else "",
                with_code=with_code,
                dequantise=dequantiser() if dequantize else None,
                progress=update,
            )
    if out.json:
        output.print_json(done.to_json() | {"folder": str(folder)})
        return
    print(f"{folder}: {done.architecture}, {done.tensors} tensors, {output.size(done.bytes)}")
    for note in done.notes:
        output.note(note)
