"""The `chronos` command: its families of commands, signals, and the way out.

Importing the families registers their commands; that is cheap, since none of them imports a
framework at module level.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any

import typer

from chronos.cli import (
    bench,
    chat,
    demo,
    doctor,
    environment,
    errors,
    evaluate,
    export,
    files,
    generate,
    options,
    overview,
    replay,
    routing,
    serve,
    simulate,
    train,
    tune,
    ui,
)
from chronos.cli.app import app
from chronos.common.errors import ChronosError

__all__ = ["app", "main", "run"]

FAMILIES = (
    demo,
    generate,
    chat,
    serve,
    ui,
    train,
    tune,
    files,
    export,
    overview,
    routing,
    simulate,
    bench,
    replay,
    evaluate,
    doctor,
)


def run(args: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code. Usage errors are one line each, as all errors are."""
    try:
        code: Any = app(args, prog_name="chronos", standalone_mode=False)
    except typer.Exit as error:
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT
    except ChronosError as error:  # of a flag's value, before its command began
        errors.report(error.what, error.where, error.fix)
        return error.exit_code
    except Exception as error:
        return _usage_error(error)
    return code if isinstance(code, int) else 0


def _usage_error(error: Any) -> int:
    """Typer keeps the class of its usage errors private, not their shape; others are raised on."""
    if not hasattr(error, "format_message"):
        raise error
    message, context = error.format_message(), getattr(error, "ctx", None)
    if message:
        path = context.command_path if context else "chronos"
        param = getattr(error, "param", None)
        where = ""
        if param is not None and context and environment.is_set(context, param.name):
            where = str(param.envvar)
        message = re.sub(r" \(env var: '\w+'\)", "", message.rstrip("."))
        errors.report(message, where, f"`{path} --help` lists what it takes")
    elif context:
        print(context.get_help())
    return int(getattr(error, "exit_code", 2))


def main() -> None:
    """Console entry point."""
    options.own_process = True
    # Forecasts are products of a few microseconds. A second BLAS thread for them would fight the
    # framework's own, which wait for their next product by spinning.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, errors.on_sigterm)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a token may be text the terminal cannot show
    sys.exit(run())
