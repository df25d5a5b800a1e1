"""Flags declared once, shared by every command that takes them.

A command names a bundle, `def generate(model: ModelArg, run: RunOptions, ...)`; `unfold` turns it
into single flags for Typer, gives each flag its environment twin CHRONOS_<NAME>, and runs the
function inside the error handling of `chronos.cli.errors`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from chronos.cli import errors, output

if TYPE_CHECKING:
    from chronos.common.text.sampling import SamplingParams
    from chronos.run.engine import Engine

own_process = False  # set by main(): then start-up may leave out what only compilers need
_RUN, _SAMPLE, _OUT = "Where and how it runs", "Sampling", "Output"

ModelArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model folder, or `demo` for the one that ships.")
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="PATH",
        help="A .txt, .jsonl or .jsonl.gz file or a folder; `stdlib` is Python's own sources.",
    ),
]
HeldOutOption = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        show_default="0.02 for stdlib, else all documents",
        help="Only the documents that a recipe with this validation_share keeps from training; "
        "0: all.",
    ),
]


@dataclass(frozen=True)
class DeviceOptions:
    """Which framework, on which device."""

    backend: Annotated[
        str,
        typer.Option(help="auto, torch or mlx.", metavar="NAME", rich_help_panel=_RUN),
    ] = "auto"
    device: Annotated[
        str | None,
        typer.Option(help="torch: cpu, cuda, cuda:1, mps; mlx: gpu, cpu.", metavar="NAME",
                     rich_help_panel=_RUN, show_default="the best one"),
    ] = None  # fmt: skip


@dataclass(frozen=True)
class RunOptions(DeviceOptions):
    """How a model's experts are kept."""

    budget: Annotated[
        str,
        typer.Option(
            help="Memory for routed experts: 25% of them, 2GiB, or all.",
            metavar="SIZE",
            rich_help_panel=_RUN,
        ),
    ] = "all"
    warm: Annotated[
        str,
        typer.Option(
            help="Second tier in host memory behind the device's: 4GiB, 50%.",
            metavar="SIZE",
            rich_help_panel=_RUN,
        ),
    ] = "0"
    miss: Annotated[
        str,
        typer.Option(
            help="exact waits for a missing expert (same tokens as with all of them); "
            "fallback lets the shared expert stand in.",
            metavar="exact|fallback",
            rich_help_panel=_RUN,
        ),
    ] = "exact"
    prefetch: Annotated[
        str,
        typer.Option(
            help="Read experts ahead of their use.", metavar="auto|off", rich_help_panel=_RUN
        ),
    ] = "auto"
    predictor: Annotated[
        str,
        typer.Option(
            help="What decides which experts are kept and read ahead: the forecaster that "
            "`chronos fit` trained, what each token needed before (token-table), decayed frequency "
            "(lfu) or recency (lru) of use, or the path of a forecaster. auto: the model's "
            "forecaster, if it has one, while that pays; else token-table.",
            metavar="auto|forecast|token-table|lfu|lru",
            rich_help_panel=_RUN,
        ),
    ] = "auto"
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing",
            help="With --miss fallback: load although some experts' files are gone.",
            rich_help_panel=_RUN,
        ),
    ] = False

    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of prompt and reply, in place of what the model's config allows.",
            metavar="N",
            rich_help_panel=_RUN,
            show_default="the model's",
        ),
    ] = None

    def open(self, model: str, **changes: Any) -> Engine:
        """The model, loaded as these flags say; raises what `chronos.load` raises."""
        from chronos.run.engine import load

        options = {"own_process": own_process} | dataclasses.asdict(self)
        return load(model, **(options | changes))


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen."""

    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", "-n", min=1, help="Stop after this many.", rich_help_panel=_SAMPLE
        ),
    ] = 256
    temp: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token.", rich_help_panel=_SAMPLE)
    ] = 0.0
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.", rich_help_panel=_SAMPLE)
    ] = 1.0
    top_k: Annotated[
        int, typer.Option(min=0, help="Likeliest k only; 0 is off.", rich_help_panel=_SAMPLE)
    ] = 0
    min_p: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Share of the likeliest one's.", rich_help_panel=_SAMPLE
        ),
    ] = 0.0
    seed: Annotated[
        int | None,
        typer.Option(help="Makes sampling repeatable.", rich_help_panel=_SAMPLE),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            min=0.0, show_default="the model's own",
            help="Above 1 holds back tokens of the prompt and the answer.",
            rich_help_panel=_SAMPLE,
        ),
    ] = None  # fmt: skip
    presence_penalty: Annotated[
        float,
        typer.Option(
            min=-2.0, max=2.0, help="Off each token the answer has.", rich_help_panel=_SAMPLE
        ),
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        typer.Option(
            min=-2.0, max=2.0, help="The same, for every time it came.", rich_help_panel=_SAMPLE
        ),
    ] = 0.0
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="Stop where this text appears; may be repeated.",
            metavar="TEXT",
            rich_help_panel=_SAMPLE,
        ),
    ] = None

    def params(self) -> SamplingParams:
        """As `chronos.common.text.sampling.SamplingParams`; raises UsageError on a bad value."""
        from chronos.common.text.sampling import SamplingParams

        return SamplingParams(
            temperature=self.temp,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )


@dataclass(frozen=True)
class OutputOptions:
    """How much is said."""

    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="No progress, no footer.", rich_help_panel=_OUT),
    ] = False
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="A traceback with errors.", rich_help_panel=_OUT),
    ] = False


@dataclass(frozen=True)
class JsonOptions(OutputOptions):
    """For commands whose result is also one JSON object."""

    json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object on stdout.", rich_help_panel=_OUT),
    ] = False


def unfold(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of single flags that builds the bundles `function` asks for."""
    hints = get_type_hints(function, include_extras=True)
    bundles: dict[str, type[Any]] = {}
    flat: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            bundles[parameter.name] = hint
            flat += _fields(hint)
        else:
            flat.append(parameter.replace(annotation=hint))
    flat = [
        p.replace(annotation=_with_twin(p.name, p.annotation), kind=p.KEYWORD_ONLY) for p in flat
    ]

    @functools.wraps(function)
    def run(**values: Any) -> None:
        def call() -> None:
            made = {
                name: bundle(**{f.name: values.pop(f.name) for f in dataclasses.fields(bundle)})
                for name, bundle in bundles.items()
            }
            flags = next((b for b in made.values() if isinstance(b, OutputOptions)), None)
            output.configure(
                quiet=flags is not None and flags.quiet,
                json=isinstance(flags, JsonOptions) and flags.json,
            )
            function(**values, **made)

        errors.guard(call, verbose=bool(values.get("verbose")))

    run.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in flat}
    return run


def _fields(bundle: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(bundle, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(bundle)
    ]  # fmt: skip


def _with_twin(name: str, hint: Any) -> Any:
    """The annotation with `envvar` set on its Option; arguments have no twin."""
    if get_origin(hint) is not Annotated:
        raise TypeError(f"parameter {name!r} needs an Annotated typer.Option or typer.Argument")
    base, info = get_args(hint)
    if isinstance(info, ArgumentInfo):
        return hint
    assert isinstance(info, OptionInfo)
    info = copy(info)
    # In Annotated, the first flag name given sits where a default would.
    names = [str(text) for text in (info.default, *(info.param_decls or ()))]
    flag = next((text[2:] for text in names if text.startswith("--")), name)
    info.envvar = f"CHRONOS_{flag.upper().replace('-', '_')}"
    info.show_envvar = False
    return Annotated[base, info]
