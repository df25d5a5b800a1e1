"""Environment twins of flags: names, how lists are written, which one was wrong, misspelt ones.

A flag has the twin CHRONOS_<FLAG>. Where commands mean different things by a flag of one name, each
command that declares it for itself has its own: CHRONOS_<COMMAND>_<FLAG>. Knows Typer's contexts,
and nothing of what a flag is for.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from typing import Any

from chronos.common.errors import UsageError
from chronos.common.tuning import KERNEL, PLAIN

_PREFIX = "CHRONOS_"
# No flag has these.
_OURS = (PLAIN, KERNEL, "CHRONOS_TEST_", "CHRONOS_TRACES", "CHRONOS_SMOLLM")
# `--budget` of generate is memory, of simulate shares of a trace; `--out` is a file or a folder ...
_OWN = frozenset("budget data epochs force max-tokens out seed to type warmup".split())
_OWN_OF = frozenset({("pack", "config")})  # a folder there, a recipe everywhere else


def twin(flag: str, command: str) -> str:
    """The variable of `--<flag>`, declared by `command` for itself, or shared where that is ""."""
    own = bool(command) and (flag in _OWN or (command, flag) in _OWN_OF)
    name = f"{command} {flag}" if own else flag
    return _PREFIX + name.upper().replace("-", "_").replace(" ", "_")


def is_set(ctx: Any, name: str) -> bool:
    """Whether a parameter's value comes from the environment."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "ENVIRONMENT"


def as_given(ctx: Any, where: str) -> str:
    """`--flag` as the user gave it: the variable where it came from the environment."""
    for parameter in ctx.command.params:
        if where in parameter.opts and is_set(ctx, parameter.name):
            return str(parameter.envvar)
    return where


def texts(ctx: Any, param: Any, value: list[str] | None) -> list[str] | None:
    """Callback of a flag that may be repeated: its variable is one text, blanks and all, or a JSON
    list of texts. Raises UsageError."""
    if not is_set(ctx, param.name):
        return value
    raw = os.environ[param.envvar]
    if not raw.lstrip().startswith("["):
        return [raw]
    try:
        found = json.loads(raw)
    except ValueError:
        return [raw]
    if not all(isinstance(text, str) for text in found):
        raise UsageError(
            "a list of texts holds something else", param.envvar, """use for example ["a", "b c"]"""
        )
    return list(found)


def unknown(ctx: Any) -> Iterator[str]:
    """A line for each CHRONOS_ variable that no command reads, with what may have been meant; and
    for one that other commands read for a flag of this name, where this one's has its own."""
    named = sorted(n for n in os.environ if n.startswith(_PREFIX) and not n.startswith(_OURS))
    if not named:
        return
    known = set(_twins(ctx.find_root().command))
    own = {p.envvar: p.opts[0] for p in ctx.command.params if p.envvar}
    for variable, flag in own.items():
        shared = twin(flag.lstrip("-"), "")
        if shared in named and shared in known and shared not in own:
            yield f"{shared} is not read here: {flag} of this command has {variable}"
    for name in named:
        if name not in known:
            meant = sorted(n for n in known if n.endswith(name.removeprefix("CHRONOS")))
            meant = meant or difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
            yield f"no command reads {name}{hint}"


def _twins(group: Any) -> Iterator[str]:
    for command in group.commands.values():
        if hasattr(command, "commands"):
            yield from _twins(command)
        yield from (p.envvar for p in command.params if p.envvar)
