"""The Typer application and the decorator that puts a command on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

import chronos
from chronos.cli.options import unfold

_F = TypeVar("_F", bound=Callable[..., None])

# As the help page shows them: what a newcomer needs first. Others follow as they were registered.
_ORDER = (
    "demo generate chat serve train tune ui merge pack unpack export inspect verify trace fit"
    " simulate bench eval doctor"
).split()


class _Ordered(TyperGroup):
    """Commands in the order above, whatever the order of imports; `help [COMMAND]` is `--help`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] == "help":
            args = [*args[1:], "--help"]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=lambda n: _ORDER.index(n) if n in _ORDER else len(_ORDER))


app = typer.Typer(
    name="chronos",
    cls=_Ordered,
    help="Train, pack and stream Mixture-of-Experts language models in a fraction of their "
    "experts' memory, with the very same tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(
    name: str, *, panel: str | None = None, on: typer.Typer = app, **kwargs: Any
) -> Callable[[_F], _F]:
    """Register a function as a command: flags unfolded, environment twins set, errors handled."""

    def register(function: _F) -> _F:
        path = name if on is app else f"{on.info.name} {name}"
        kwargs.setdefault("help", paragraphs(function.__doc__ or ""))
        on.command(name, rich_help_panel=panel, **kwargs)(unfold(function, path))
        return function

    return register


def paragraphs(text: str) -> str:
    """Each paragraph on one line, for whoever shows it to fold."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"chronos {chronos.__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass
