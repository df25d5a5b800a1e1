"""Writes the generated documents: `python -m chronos.cli.docs [--check | --links] [DOCS]`.

docs/cli.md is made from the commands, docs/modules.md from the modules' docstrings,
docs/recipes.md from what checks recipes, docs/api.md from the public names' docstrings.
With `--check` nothing is written, and a file that is not up to date is a failure. With `--links`
nothing is made, and a link between pages that leads nowhere is one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer.main

from chronos.cli import api_page, recipe_page
from chronos.cli.app import paragraphs
from chronos.cli.main import app

_LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
_PACKAGE = Path(__file__).resolve().parents[1]
_MODULES_HEAD = """# Modules

Generated from the modules' docstrings by `make docs`; do not edit.
[structure.md](structure.md) says which to open for what.
"""
_HEAD = """# Commands

Generated from the commands by `make docs`; do not edit.

Data goes to stdout, progress and numbers to stderr. `--json` prints one JSON object on stdout.
Every flag has an environment twin, named beside it; a flag on the command line wins. Where commands
mean different things by a flag of one name, the variable names the command too. An error is
one line each for what happened, where, and how to fix it; `-v` adds the traceback.

`chronos --install-completion` teaches the shell it is typed in (bash, zsh, fish, PowerShell) to
complete commands and flags; `chronos --show-completion` prints what it would install.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | it failed |
| 2 | usage: a flag, a name or a number makes no sense |
| 3 | bad or corrupt input |
| 4 | not enough memory, disk, files or threads |
| 5 | a backend or an optional package is missing |
| 130, 143 | ended by SIGINT, SIGTERM |

## Environment

`CHRONOS_<FLAG>` stands for a flag, `CHRONOS_<COMMAND>_<FLAG>` where commands mean different things
by it; the table of each command names them. `CHRONOS_STOP` holds one text, or several as a JSON
list. A `CHRONOS_` name that no command reads is told, with the one that was meant. Two variables
have no flag:

`CHRONOS_PLAIN=1` helps to find what causes a wrong token. Steps then run as their model is written,
more slowly: no CUDA graphs, no recorded steps, no packed weights, no products by oneDNN or by
compiled kernels. Graphs, recorded steps, packed weights and kernels for packed experts keep every
bit, so the tokens stay the same. The float32 products of native models (kernels, oneDNN) round in
another order than torch's, so there logits may differ in their last bits. `chronos doctor` shows
whether it is set.

`CHRONOS_KERNEL=off` leaves out the compiled products alone (`CHRONOS_PLAIN=1` does too): slower,
the same tokens of guests, and of native models logits that may differ in their last bits.
"""


def render() -> str:
    """The whole document."""
    root = typer.main.get_command(app)
    parts = [_HEAD]
    for path, command in commands(root, "chronos"):
        parts.append(_section(path, command))
    return "\n".join(parts)


def commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, command) of every leaf, in the order of the help page."""
    for name in group.list_commands(None):
        command = group.commands[name]
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _section(path: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join([path, *(_argument(p) for p in arguments), "[OPTIONS]"])
    text = f"## {path}\n\n    {usage}\n\n{paragraphs(command.help or '')}\n"
    if arguments:
        text += "\n" + "".join(f"- `{_argument(p)}`: {p.help}\n" for p in arguments)
    text += "\n| flag | environment | default | |\n|---|---|---|---|\n"
    return text + "".join(_row(p) for p in options if p.name != "help")


def _argument(parameter: Any) -> str:
    metavar = parameter.metavar or parameter.name.upper()
    return metavar if parameter.required else f"[{metavar}]"


def _row(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in sorted(option.opts, key=len, reverse=True))
    if option.metavar and not option.is_flag:
        names += f" {option.metavar.replace('|', chr(92) + '|')}"
    shown = "required" if option.required else _default(option)
    return f"| {names} | `{option.envvar}` | {shown} | {option.help or ''} |\n"


def _default(option: Any) -> str:
    """The default as a reader would type it, or the words that stand for it."""
    if isinstance(option.show_default, str):
        return option.show_default
    if option.default is None or option.default is False or option.default == "":
        return ""
    return f"`{option.default}`"


def module_table(package: Path = _PACKAGE) -> str:
    """docs/modules.md: every module with the first line of its docstring."""
    rows = [f"| `{name}` | {line} |" for name, line in sorted(modules(package))]
    return "\n".join([_MODULES_HEAD, "| module | |", "|---|---|", *rows, ""])


def modules(package: Path) -> Iterator[tuple[str, str]]:
    """(path in the package, first line of the docstring) of every module that says something."""
    for path in package.rglob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
        if docstring:
            yield path.relative_to(package).as_posix(), docstring.partition("\n")[0]


PAGES: dict[str, Callable[[], str]] = {
    "cli.md": render,
    "modules.md": module_table,
    "recipes.md": recipe_page.render,
    "api.md": api_page.render,
}


def broken_links(folder: Path) -> list[str]:
    """Links between pages below a folder that lead to no file, or to no heading of one."""
    broken = []
    for page in sorted(folder.rglob("*.md")):
        for target, anchor in _LINK.findall(page.read_text("utf-8")):
            there = (page.parent / target) if target else page
            if not there.exists():
                broken.append(f"{page}: {target} is not there")
            elif anchor and there.suffix == ".md" and anchor not in _anchors(there):
                broken.append(f"{page}: {target}#{anchor} is no heading")
    return broken


def _anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    plain = (re.sub(r"[^\w\s-]", "", head).strip().lower() for head in heads)
    return {re.sub(r"[-\s]+", "-", head) for head in plain}


def main(args: Sequence[str]) -> int:
    check = "--check" in args
    folders = [Path(arg) for arg in args if not arg.startswith("--")]
    folder = folders[0] if folders else Path("docs")
    if "--links" in args:
        broken = broken_links(folder)
        print("".join(f"{line}\n" for line in broken), end="", file=sys.stderr)
        return int(bool(broken))
    wanted = {folder / name: make() for name, make in PAGES.items()}
    stale = [path for path, text in wanted.items() if _read(path) != text]
    for path in stale:
        if check:
            print(f"{path} is not up to date; run `make docs`", file=sys.stderr)
        else:
            path.write_text(wanted[path], "utf-8")
    return int(check and bool(stale))


def _read(path: Path) -> str:
    return path.read_text("utf-8") if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
