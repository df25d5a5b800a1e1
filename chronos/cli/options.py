"""Flags declared once, shared by every command that takes them.

A command names a bundle, `def generate(model: ModelArg, run: RunOptions, ...)`; `unfold` turns it
into single flags for Typer, gives each flag its environment twin (`chronos.cli.environment`), and
runs the function inside the error handling of `chronos.cli.errors`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from chronos.cli import environment, errors, output
from chronos.common.budget import parse_budget, parse_size
from chronos.common.errors import UsageError

if TYPE_CHECKING:
    from chronos.common.text.sampling import SamplingParams
    from chronos.run.engine import Engine

own_process = False  # set by main(): then start-up may leave out what only compilers need
_NUMBERS = (int, float, int | None, float | None)
_RUN, _SAMPLE, _OUT = "Where and how it runs", "Sampling", "Output"


def checked(parse: Callable[[str], object]) -> Callable[..., Any]:
    """A callback for a flag: what `parse` refuses is refused before any work, and it named."""

    def check(ctx: typer.Context, param: typer.CallbackParam, value: str | None) -> str | None:
        try:
            if value is not None and (value or param.default):  # "" only where that is the default
                parse(value)
        except UsageError as error:
            flag = environment.as_given(ctx, max(param.opts, key=len))
            raise UsageError(error.what, flag, error.fix) from None
        return value

    return check


def _budget(text: str) -> None:
    if text.strip().lower() != "resident":
        parse_budget(text, 1 << 50)


def _warm(text: str) -> None:
    if text != "0":
        parse_budget(text, 1 << 50, "a warm tier")


def _budgets(text: str) -> None:
    for budget in split(text):
        _budget(budget)


def split(budgets: str) -> list[str]:
    """The budgets of a list with commas."""
    found = [text.strip() for text in budgets.split(",") if text.strip()]
    if not found:
        raise UsageError("no budget was given", "--budgets", "use for example 50%,25%")
    return found


def folder_named(text: str) -> Path:
    """A folder to write. An empty name, which an unset variable gives, is not the current one."""
    if not text.strip():
        raise UsageError("the folder to write has no name", "--out", "name one; `.` is this one")
    return Path(text)


def size_of(what: str) -> Callable[[str], int]:
    """Reads `2GiB` or a byte count; `what` names it in errors."""
    return functools.partial(parse_size, what=what)


check_budget = checked(_budget)
check_budgets = checked(_budgets)

ModelArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model folder, or `demo` for the one that ships.")
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="PATH",
        envvar="CHRONOS_DATA",
        help="A text (.txt, .md, .rst, .py), .jsonl or .jsonl.gz file, or a folder of them; "
        "`stdlib` is Python's own sources.",
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
SkipBadOption = Annotated[
    int, typer.Option("--skip-bad", min=0, help="Pass over this many bad rows or files.")
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
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Threads of a product on a CPU (torch); 1 is steadiest beside busy programs.",
            rich_help_panel=_RUN,
            show_default="as many as torch takes",
        ),
    ] = None


@dataclass(frozen=True)
class RunOptions(DeviceOptions):
    """How a model's experts are kept."""

    budget: Annotated[
        str,
        typer.Option(
            help="Memory for routed experts: 25% of them, 2GiB, or all (resident: all, in the "
            "model itself). kB, MB, GB count by 1000; KiB or K, MiB or M, GiB or G by 1024.",
            metavar="SIZE",
            callback=check_budget,
            rich_help_panel=_RUN,
        ),
    ] = "all"
    warm: Annotated[
        str,
        typer.Option(
            help="Second tier in host memory behind the device's: 4GiB, 50%.",
            metavar="SIZE",
            callback=checked(_warm),
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

    profile: Annotated[
        str,
        typer.Option(
            help="auto takes what `chronos tune machine` found on this machine, for what no flag "
            "says; off does not.",
            metavar="auto|off",
            rich_help_panel=_RUN,
        ),
    ] = "auto"

    def open(self, model: str, **changes: Any) -> Engine:
        """The model, loaded as these flags say; raises what `chronos.load` raises."""
        from chronos.run.engine import load

        options = {"own_process": own_process} | dataclasses.asdict(self)
        engine = load(model, **(options | changes))
        chosen = engine.feed.predictor if engine.feed else None
        if self.predictor != "auto" and "budget" not in changes and chosen is None:
            output.note(f"--predictor {self.predictor}: no effect where every expert is in memory")
        return engine


@dataclass(frozen=True)
class BenchOptions(RunOptions):
    """For commands that measure several budgets, which --budgets names."""

    left_out: ClassVar = ("budget",)


@dataclass(frozen=True)
class ReplayOptions(RunOptions):
    """For `bench replay`, whose runs differ in what reads ahead."""

    left_out: ClassVar = ("budget", "prefetch", "predictor")


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
            help="Stop where this text appears; may be repeated. The variable holds one text, or "
            "several as a JSON list.",
            metavar="TEXT",
            callback=environment.texts,
            rich_help_panel=_SAMPLE,
        ),
    ] = None

    def params(self) -> SamplingParams:
        """As `chronos.common.text.sampling.SamplingParams`; raises UsageError on a bad value."""
        from chronos.common.text.sampling import SamplingParams

        shaping = {"--top-p": self.top_p < 1, "--top-k": self.top_k, "--min-p": self.min_p}
        idle = [flag for flag, given in shaping.items() if given]
        idle += ["--seed"] if self.seed is not None else []
        if self.temp == 0 and idle:
            output.note(
                f"{', '.join(idle)}: no effect at --temp 0, which takes the likeliest token"
            )
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


def unfold(function: Callable[..., Any], command: str = "") -> Callable[..., Any]:
    """A function of single flags that builds the bundles `function` asks for. command: its path,
    for the environment twins of flags that it alone means so."""
    hints = get_type_hints(function, include_extras=True)
    bundles: dict[str, type[Any]] = {}
    flat: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            bundles[parameter.name] = hint
            flat += _parameters(hint, command)
        else:
            own = _with_twin(parameter.name, hint, command)
            flat.append(parameter.replace(annotation=own, kind=parameter.KEYWORD_ONLY))

    @functools.wraps(function)
    def run(ctx: typer.Context, **values: Any) -> None:
        def call() -> None:
            made = {
                name: bundle(**{field.name: values.pop(field.name) for field in _fields(bundle)})
                for name, bundle in bundles.items()
            }
            flags = next((b for b in made.values() if isinstance(b, OutputOptions)), None)
            output.configure(
                quiet=flags is not None and flags.quiet,
                json=isinstance(flags, JsonOptions) and flags.json,
            )
            for line in environment.unknown(ctx):
                output.note(line)
            function(**values, **made)

        errors.guard(
            call,
            verbose=bool(values.get("verbose")),
            spell=functools.partial(environment.as_given, ctx),
        )

    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    flat.append(context)
    run.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in flat}
    return run


def _fields(bundle: type[Any]) -> list[dataclasses.Field[Any]]:
    left_out = getattr(bundle, "left_out", ())
    return [field for field in dataclasses.fields(bundle) if field.name not in left_out]


def _parameters(bundle: type[Any], command: str) -> list[inspect.Parameter]:
    hints = get_type_hints(bundle, include_extras=True)
    if not getattr(bundle, "by_command", False):  # its flags mean the same everywhere
        command = getattr(bundle, "command", "")  # of a bundle that one command alone has
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default,
            annotation=_with_twin(field.name, hints[field.name], command),
        )
        for field in _fields(bundle)
    ]  # fmt: skip


def _with_twin(name: str, hint: Any, command: str) -> Any:
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
    info.metavar = info.metavar or ("N" if base in _NUMBERS else None)
    info.envvar = info.envvar or environment.twin(flag.replace("_", "-"), command)
    return Annotated[base, info]
