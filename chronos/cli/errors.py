"""Errors as people see them: what, where and how to fix it, one line each, and an exit code.

0 ok, 1 failure, 2 usage, 3 bad or corrupt input, 4 resource, 5 missing backend or extra, 130
SIGINT, 143 SIGTERM. A traceback is shown with -v only.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from chronos.common.errors import ChronosError

_LABELS = ("error", "where", "fix")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised in the main thread so that files are closed and locks released."""


def on_sigterm(number: int, frame: Any) -> NoReturn:
    raise Terminated


def guard(
    call: Callable[[], None], *, verbose: bool = False, spell: Callable[[str], str] = str
) -> None:
    """Run a command's body; every failure leaves as `typer.Exit` with its code. spell: a flag that
    an error names, as the user gave it."""
    try:
        call()
    except typer.Exit:
        raise
    except Terminated:
        raise typer.Exit(128 + signal.SIGTERM) from None
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None
    except BrokenPipeError:
        _silence_stdout()
        raise typer.Exit(1) from None
    except Exception as error:
        if verbose:
            traceback.print_exc()
        what, where, fix = describe(error, verbose)
        report(what, spell(where), fix)
        raise typer.Exit(exit_code(error)) from None


def report(what: str, where: str = "", fix: str = "") -> None:
    """Print an error to stderr, one line per known part."""
    for label, text in zip(_LABELS, (what, where, fix), strict=True):
        if text:
            print(f"{label}: {' '.join(text.split())}", file=sys.stderr)


def exit_code(error: BaseException) -> int:
    if isinstance(error, ChronosError):
        return error.exit_code
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in _NO_ROOM:
        return 4
    return 1


def describe(error: Exception, verbose: bool) -> tuple[str, str, str]:
    """(what, where, fix) of any exception; ours carry all three."""
    if isinstance(error, ChronosError):
        return error.what, error.where, error.fix
    if isinstance(error, MemoryError):
        return "out of memory", "", "lower --budget"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower(), str(error.filename or ""), ""
    again = "" if verbose else "this is a bug in Chronos; -v shows the traceback to report"
    return f"{type(error).__name__}: {error}", "", again


def _silence_stdout() -> None:
    """The reader has gone (`| head`); keep the interpreter from complaining at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return
