"""`chronos serve`: answer over HTTP."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from chronos.cli.app import command
from chronos.cli.options import OutputOptions, RunOptions, checked, size_of
from chronos.common.budget import parse_size
from chronos.common.errors import MissingBackendError, UsageError

PANEL = "Run a model"
_KV, _DISK = "the cache of prompts", "the cache of prompts on disk"
_RUNNING = "the caches of those answered"


@command("serve", panel=PANEL)
def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Model folders, or `demo`; of several one is loaded at a time."
        ),
    ],
    run: RunOptions,
    out: OutputOptions,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Where to listen; other than loopback needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="What clients call each MODEL, in order.",
                     show_default="its folder's"),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name of the first; `*`: any name."),
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Clients must send it.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Keys, one a line.")
    ] = None,
    queue: Annotated[
        int, typer.Option(min=0, help="Requests that may wait; more are told when to come back.")
    ] = 8,
    max_sequences: Annotated[
        int | None,
        typer.Option(min=1, help="Answered at a time.", show_default="slots / top-k, up to 4"),
    ] = None,
    kv_cache: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="For beginnings of prompts that come again; 0: none.",
            callback=checked(lambda text: text == "0" or size_of(_KV)(text)),
        ),
    ] = "256MiB",
    prefix_cache_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep them there as well, for the next start.")
    ] = None,
    prefix_cache_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Of that folder.", callback=checked(size_of(_DISK)))
    ] = "4GiB",
    kv_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="For caches of those answered at a time; more wait.",
                     callback=checked(size_of(_RUNNING)), show_default="no limit"),
    ] = None,
    idle_unload: Annotated[
        float | None,
        typer.Option(metavar="MINUTES", min=0, help="Unload a model that nobody asked for so long.",
                     show_default="never"),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="A web page's origin that may ask, https://...")
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append what experts did, a JSON line twice a second.")
    ] = None,
) -> None:  # fmt: skip
    """Answer over HTTP, as OpenAI's and Anthropic's clients ask.

    Several requests share each read of an expert, and each is answered as if it were alone.
    """
    try:
        from chronos.serve import app, ask, guard, metrics, prefix_files, served, server, worker
    except ImportError as error:
        raise MissingBackendError(
            f"chronos serve needs the package {error.name}", "", "pip install 'chronos-moe[serve]'"
        ) from None
    keys = [*(api_key or ()), *_keys(api_key_file)]
    if not all(keys):
        raise UsageError("an API key is empty", "--api-key")
    local = host in guard.LOOPBACK
    if not local and not keys:
        raise UsageError(
            f"listening on {host} lets others in, and no key is asked for",
            "--host",
            "give --api-key KEY, or listen on 127.0.0.1",
        )
    names = [*(name or ()), *[""] * len(models)][: max(len(models), len(name or ()))]
    if len(names) > len(models):
        raise UsageError(f"{len(names)} names for {len(models)} models", "--name")
    cards = [
        served.Served.open(model, called, run.context)
        for model, called in zip(models, names, strict=True)
    ]
    catalogue = served.Catalogue(cards, alias or ())
    files = None
    if prefix_cache_dir is not None:
        size = parse_size(prefix_cache_size, _DISK)
        files = prefix_files.PrefixFiles(prefix_cache_dir, size)
    with server.bind(host, port) as sock:
        engine = worker.Worker(
            {card.name: functools.partial(run.open, str(card.folder)) for card in cards},
            queue=queue,
            sequences=max_sequences,
            prefix_bytes=0 if kv_cache == "0" else parse_size(kv_cache, _KV),
            prefix_files=files,
            kv_bytes=None if kv_memory is None else parse_size(kv_memory, _RUNNING),
            unload_s=None if idle_unload is None else 60 * idle_unload,
        )
        service = ask.Service(catalogue, engine, metrics.Metrics(engine))
        rules = guard.Rules(keys, guard.LOOPBACK if local else None, frozenset(cors or ()))
        server.run(
            app.application(service, rules),
            engine,
            sock,
            functools.partial(print, flush=True),
            stats,
        )


def _keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        keys = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UsageError(f"the keys cannot be read: {what}", str(path)) from None
    if not keys:
        raise UsageError("the file holds no key", str(path))
    return keys
