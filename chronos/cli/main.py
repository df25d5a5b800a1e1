"""The `chronos` command: its list of families, signals, and the way out.

Commands register on `app` when their family is imported; that is cheap, since no family imports a
framework at module level.
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import chronos
from chronos.cli import errors

app = typer.Typer(
    name="chronos",
    help="Train, pack and stream Mixture-of-Experts language models in a fraction of their experts' "
    "memory, with the very same tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# In the order of the help page.
FAMILIES = ("demo", "generate", "train", "files", "routing", "bench", "evaluate", "doctor")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"chronos {chronos.__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


for _family in FAMILIES:
    importlib.import_module(f"chronos.cli.{_family}").register(app)


def run(args: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code. Usage errors are one line each, as all errors are."""
    try:
        code: Any = app(args, prog_name="chronos", standalone_mode=False)
    except typer.Exit as error:
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT
    except Exception as error:
        # Typer's usage errors; their class is private to it, their shape is not.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        if message():
            context = getattr(error, "ctx", None)
            path = context.command_path if context else "chronos"
            errors.report(message().rstrip("."), "", f"{path} --help lists what it takes")
        elif getattr(error, "ctx", None):
            print(error.ctx.get_help())  # type: ignore[attr-defined]
        return getattr(error, "exit_code", 2)
    return code if isinstance(code, int) else 0


def main() -> None:
    """Console entry point."""
    signal.signal(signal.SIGTERM, errors.on_sigterm)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a token may be text the terminal cannot show
    sys.exit(run())
