"""`chronos simulate`: caches and predictors on a trace; `chronos fit`: training a forecaster."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chronos.cli import charts, output
from chronos.cli.app import command
from chronos.cli.options import JsonOptions, RunOptions, SkipBadOption, checked, size_of
from chronos.cli.routing import describe, record, share_of, shares_of, trace_json
from chronos.common.errors import DataError, UsageError

if TYPE_CHECKING:
    from chronos.common.experts.foresight.forecast import ForecastModel
    from chronos.common.traces.fit import FitOptions, Fitted, Parts
    from chronos.common.traces.measure import Measured
    from chronos.common.traces.simulate import CacheRun, Comparison
    from chronos.common.traces.trace import RoutingTrace

_PANEL = "Routing"
_TOP = ("forecast", "min")  # drawn bold
EpochsOption = Annotated[
    int, typer.Option(min=1, help="Passes over the training sequences, at most.")
]
ExpertSizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Size of one expert, for bytes read.",
        callback=checked(size_of("an expert size")),
        show_default="as the trace says; without, reads are counted",
    ),
]
ForecasterOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FILE",
        show_default="forecast.safetensors in the model folder",
        help="The file to write.",
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Makes training repeatable.")]


@command("simulate", panel=_PANEL)
def simulate(
    trace_file: Annotated[Path, typer.Argument(metavar="T.npz", help="A routing trace.")],
    out: JsonOptions,
    budget: Annotated[
        str,
        typer.Option(
            metavar="PERCENT",
            help="Share of all experts; several with commas.",
            callback=checked(shares_of),
        ),
    ] = "12.5%,25%,37.5%,50%",
    warmup: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of the tokens that only fills caches.")
    ] = 0.1,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Equal slots in every layer, not one pool.")
    ] = False,
    expert_size: ExpertSizeOption = None,
    forecast: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A forecaster that `chronos fit` wrote."),
    ] = None,
    fit: Annotated[
        bool, typer.Option(help="Without --forecast: train one first, which takes minutes.")
    ] = True,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw a chart too.")] = None,
) -> None:
    """Run a trace through caches and predictors, up to the best any cache could do (MIN).

    With a forecaster, only test sequences are run, which training never sees.
    """
    from chronos.common.budget import parse_size
    from chronos.common.traces.measure import measure
    from chronos.common.traces.simulate import check_slots, slots_for
    from chronos.common.traces.trace import RoutingTrace

    if png is not None:
        charts.check(png)
    shares = shares_of(budget)
    recorded = RoutingTrace.load(trace_file)
    record_bytes = recorded.expert_bytes
    if expert_size is not None:
        record_bytes = parse_size(expert_size, "an expert size")
    for _, share in shares:
        check_slots(recorded, slots_for(recorded, share, pooled=not per_layer))
    model, tested = _forecaster(recorded, forecast, fit)
    sizes = [slots_for(tested, share, pooled=not per_layer) for _, share in shares]
    with output.progress("replaying") as update:
        measured = measure(
            tested, sizes, model, pooled=not per_layer, warmup=warmup, progress=update
        )
    results = {text: result for (text, _), result in zip(shares, measured, strict=True)}
    if png is not None:
        draw(png, dict(zip([share for _, share in shares], measured, strict=True)), tested)
    if out.json:
        traces = {"trace": trace_json(recorded), "replayed": trace_json(tested)}
        about = {"warmup": warmup, "expert_bytes": record_bytes}
        budgets = {text: result_json(*result, record_bytes) for text, result in results.items()}
        output.print_json(traces | about | {"budgets": budgets})
        return
    print(describe(recorded))
    if tested is not recorded:
        print(f"Replayed are its test sequences: {describe(tested)}")
    for text, result in results.items():
        _table(text, *result, record_bytes)
    output.legend(_LEGEND)


def _forecaster(
    recorded: RoutingTrace, file: Path | None, fit: bool
) -> tuple[ForecastModel | None, RoutingTrace]:
    """The forecaster of a file or, with `fit`, one trained now, if there is one; and what of the
    trace it has never seen."""
    from chronos.common.experts.foresight.forecast import ForecastModel

    if file is not None:
        model = ForecastModel.load(file)
        model.check_fits(*_geometry(recorded), where=str(file))
        return model, _parts(recorded).test
    if fit:
        try:
            parts = _parts(recorded)
            return _trained(parts).model, parts.test
        except DataError as error:
            output.legend(f"No forecaster was trained: {error.what}.")
    return None, recorded


_LEGEND = (
    "lru, lfu: keep the last used, the most used (fading). min: the best any cache can do, knowing "
    "all routing to come; min-wN knows the next N tokens. Gap closed: from the better of lru and "
    "lfu to min. Right: of the experts that the next token needs, the share among the k likeliest "
    "of each layer, and among k + 3."
)


def _table(
    text: str, caches: Comparison, measured: dict[str, Measured], record_bytes: int | None
) -> None:
    slots, pooled = caches.runs[0].slots, caches.runs[0].pooled
    right = {
        name: f"{output.percent(m.recall.at_k)} / {output.percent(m.recall.at_k3)}"
        for name, m in measured.items()
    }
    rows = [
        (
            run.policy,
            output.percent(run.hit_rate),
            f"{run.reads_per_token:.1f}"
            if record_bytes is None
            else output.size(run.reads_per_token * record_bytes),
            output.percent(caches.eta_policy(run.reads_per_token)),
            right.get(run.policy, ""),
        )
        for run in sorted(_runs(caches, measured), key=lambda run: -run.misses)
    ]
    title = f"{text} of the experts: {slots} slots{'' if pooled else ' per layer'}"
    title += f", {output.size(record_bytes)} an expert" if record_bytes else ""
    read = "read a token" if record_bytes else "experts read a token"
    output.table(("policy", "hits", read, "gap closed", "right"), rows, title=title)


def _runs(caches: Comparison, measured: dict[str, Measured]) -> list[CacheRun]:
    return [*caches.runs, *(m.run for m in measured.values())]


def result_json(
    caches: Comparison, measured: dict[str, Measured], record_bytes: int | None
) -> dict[str, Any]:
    """One budget: caches, predictors and their recall; what the best predictor closes. Bytes are
    null where the size of an expert is not known."""
    from chronos.common.traces.measure import best

    top = best(measured)
    data = caches.to_json()
    data["policies"] |= {name: m.to_json() for name, m in measured.items()}
    for policy in data["policies"].values():
        reads = policy["reads_per_token"]
        policy["bytes_per_token"] = None if record_bytes is None else reads * record_bytes
    requests = caches.runs[0].requests
    return data | {
        "requests": requests,
        "best_predictor": top,
        "eta_policy": measured[top].eta_policy,
    }


def draw(
    path: Path,
    results: Mapping[float, tuple[Comparison, dict[str, Measured]]],
    trace: RoutingTrace,
) -> None:
    """Hit rate by share of the experts, a line per policy and predictor; of one share, bars.

    A name has the same look in every chart, whichever others are drawn.
    """
    rates = {
        share: {run.policy: run.hit_rate for run in _runs(*result)}
        for share, result in results.items()
    }
    title = f"{trace.meta['model'] or 'trace'}: expert cache hits, {trace.num_tokens} tokens"
    y = "requests served from memory"
    names = sorted({name for policies in rates.values() for name in policies}, key=_place)
    if len(rates) == 1:
        [(share, policies)] = rates.items()
        title += f", {100 * share:g}% of the experts in memory"
        groups = {_spelled(name): {"hits": policies[name]} for name in names if name in policies}
        charts.bars(path, groups, title=title, y=y, percent=True)
        return
    hits = {
        _spelled(name): [(share, rates[share][name]) for share in sorted(rates)] for name in names
    }
    looks = {_spelled(name): _place(name) for name in names}
    x, bold = "share of the experts in memory", [_spelled(name) for name in _TOP]
    charts.lines(path, hits, title=title, x=x, y=y, bold=bold, looks=looks)


_PLACES = (
    *("lru", "lfu", "min", "min-w1", "min-w2", "min-w4", "min-w8"),
    *("forecast", "token-table", "previous-token", "decayed-use"),
)


def _place(name: str) -> int:
    return _PLACES.index(name) if name in _PLACES else len(_PLACES)


def _spelled(name: str) -> str:
    """As a reader of the picture alone can understand it."""
    if name == "min":
        return "min (knows all to come)"
    ahead = name.removeprefix("min-w")
    return f"{name} (knows {ahead} ahead)" if ahead != name else name


@command("fit", panel=_PANEL)
def fit(
    source: Annotated[
        str, typer.Argument(metavar="T.npz|MODEL", help="A routing trace, or a model to record.")
    ],
    run: RunOptions,
    out: JsonOptions,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            envvar="CHRONOS_DATA",
            help="With MODEL: text to record routing of, as for trace.",
        ),
    ] = None,
    to: ForecasterOption = None,
    epochs: EpochsOption = 10,
    seed: SeedOption = 0,
    budget_tested: Annotated[
        str,
        typer.Option(
            "--test-budget",
            metavar="PERCENT",
            help="Cache to report on.",
            callback=checked(share_of),
        ),
    ] = "25%",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, help="With MODEL: tokens to record.")
    ] = 50_000,
    new_tokens: Annotated[
        int,
        typer.Option(min=0, help="With MODEL: half of them are what it writes, so many at once."),
    ] = 128,
    skip_bad: SkipBadOption = 0,
) -> None:
    """Train a forecaster of expert use, and say what it is worth on sequences it never saw."""
    from chronos.common.layout import is_packed
    from chronos.common.layout.digests import renew
    from chronos.common.traces.fit import FitOptions
    from chronos.common.traces.measure import measure
    from chronos.common.traces.simulate import slots_for
    from chronos.common.traces.trace import RoutingTrace

    share, fingerprint = share_of(budget_tested), ""
    if data is not None and source.endswith(".npz"):
        raise UsageError("a trace is recorded already", "--data", "leave it out, or name a MODEL")
    file = _target(to, source)
    if source.endswith(".npz"):
        recorded = RoutingTrace.load(source)
    else:
        recorded, fingerprint = _recorded(source, run, data, max_tokens, new_tokens, skip_bad)
    parts = _parts(recorded)
    fitted = _trained(parts, FitOptions(epochs=epochs, seed=seed), fingerprint)
    fitted.model.save(file)
    if is_packed(file.parent):
        renew(file.parent, [file.name])
    test, slots = parts.test, slots_for(recorded, share)
    with output.progress("replaying") as update:
        tested = measure(test, [slots], fitted.model, warmup=0.1, progress=update)
    result = result_json(*tested[0], recorded.expert_bytes)
    if out.json:
        about = {"file": str(file), "trace": trace_json(recorded), "tested": trace_json(test)}
        output.print_json(about | _fitted_json(fitted) | {"budget": budget_tested, "test": result})
        return
    print(f"{file}: trained in {fitted.seconds:.0f} s on {describe(recorded)}")
    print(f"Tested on sequences it never saw: {describe(test)}")
    _table(budget_tested, *tested[0], recorded.expert_bytes)
    output.legend(_LEGEND)


def _fitted_json(fitted: Fitted) -> dict[str, Any]:
    return {
        "seconds": fitted.seconds,
        "validation_losses": fitted.losses,
        "geometry": dataclasses.asdict(fitted.model.geometry),
    }


def _recorded(
    model: str, run: RunOptions, data: str | None, max_tokens: int, new_tokens: int, skip_bad: int
) -> tuple[RoutingTrace, str]:
    """Routing of a text, and of what the model writes after its beginnings, other ones where there
    are enough documents. All of them: the forecaster's own split decides what is held out."""
    from chronos.common.traces.trace import join
    from chronos.measure.evaluate import documents_of

    if data is None:
        raise UsageError("a model needs text to be recorded on", "", "give --data PATH, or a T.npz")
    with run.open(model) as engine:
        fingerprint = engine.layout.fingerprint if engine.layout is not None else ""
        text = max_tokens - max_tokens // 2 if new_tokens else max_tokens
        documents = documents_of(data, 0.0, skip_bad)
        traces = [record(engine, model, documents, text, 512, 0)]
        if new_tokens:
            written = max_tokens // 2
            last_first = documents[::-1]
            traces.append(record(engine, model, last_first, written, 64, new_tokens))
    return join(traces), fingerprint


def _target(to: Path | None, source: str) -> Path:
    """The file to write, checked before anything is recorded."""
    from chronos.common.experts.foresight.forecast import FORECAST
    from chronos.run.models import resolve_model

    if to is None and source.endswith(".npz"):
        raise UsageError("a trace has no folder to keep a forecaster in", "", "give -o FILE")
    file = resolve_model(source) / FORECAST if to is None else to
    output.check_target(file, "--out")
    return file


def _trained(parts: Parts, options: FitOptions | None = None, fingerprint: str = "") -> Fitted:
    from chronos.common.traces.fit import FitOptions, fit

    with output.progress("training") as update:
        return fit(
            parts.train,
            parts.validation,
            options or FitOptions(),
            fingerprint=fingerprint,
            progress=update,
        )


def _parts(recorded: RoutingTrace) -> Parts:
    from chronos.common.traces.fit import split

    return split(recorded)


def _geometry(trace: RoutingTrace) -> tuple[int, int, int]:
    return trace.num_layers, trace.num_experts, trace.top_k
