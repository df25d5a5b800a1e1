"""`chronos ui`: pages in a browser over the other commands."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Annotated

import typer

from chronos.cli import output
from chronos.cli.app import command
from chronos.cli.options import OutputOptions
from chronos.common.errors import MissingBackendError, UsageError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@command("ui", panel="Run a model")
def ui(
    out: OutputOptions,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Where to listen; other than loopback needs --auth.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7860,
    root: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Models, data, recipes and runs are looked for below it."),
    ] = Path("."),
    auth: Annotated[
        list[str] | None,
        typer.Option(metavar="USER:PASSWORD", help="Who may use it; may be repeated."),
    ] = None,
) -> None:
    """Design, train, tune, chat and watch in a browser.

    Every button is a command of Chronos, run as a job in a folder of DIR/runs: it goes on when the
    page is closed and when this command ends, and is found again.
    """
    began = time.perf_counter()
    users = [_user(text) for text in auth or ()]
    if not root.is_dir():
        raise UsageError("there is no such folder", str(root), "make it, or name another")
    if host not in LOOPBACK and not users:
        raise UsageError(
            f"listening on {host} lets others in, and nobody is asked who they are",
            "--host",
            "give --auth USER:PASSWORD, or listen on 127.0.0.1",
        )
    try:
        from chronos.serve import server
        from chronos.ui import app
    except ImportError as error:
        raise MissingBackendError(
            f"chronos ui needs the package {error.name}", "", "pip install 'chronos-moe[ui]'"
        ) from None
    with server.bind(host, port) as sock:
        say = functools.partial(print, flush=True)

        def ready(text: str) -> None:
            say(text)
            output.note(
                f"started in {time.perf_counter() - began:.1f} s; Ctrl-C ends it, jobs go on"
            )

        app.run(root, sock, ready, local=host in LOOPBACK, auth=users)


def _user(text: str) -> tuple[str, str]:
    name, colon, password = text.partition(":")
    if not (name and colon and password):
        raise UsageError("a user is NAME:PASSWORD", "--auth")
    return name, password
