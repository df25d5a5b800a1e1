"""`chronos bench replay T.npz`: decode on recorded routing, by budget and by what predicts it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from chronos.cli import charts, footer, output
from chronos.cli.app import command
from chronos.cli.bench import BudgetsOption, RoundsOption, bench
from chronos.cli.options import JsonOptions, ReplayOptions, checked, size_of, split
from chronos.common.budget import parse_size
from chronos.common.disk.io import drop_page_cache

if TYPE_CHECKING:
    from chronos.common.model.config import ModelConfig
    from chronos.common.traces.trace import RoutingTrace
    from chronos.measure.recorded import Progress, Replayed, Results
    from chronos.measure.timebox import Count, Timebox

_COLUMNS = (
    *("budget", "run", "ms/token", "p50", "p95", "p99"),
    *("MB/token", "stall", "hits", "x off"),
)
_EPOCHS = 10
_TRAINING = 0.25  # of the minutes: no epoch of the forecaster begins that would end later
# Counted tokens and those before them: at least, whatever the time, and at most.
_TOKENS, _WARMUP = (20, 200), (10, 100)
_LIMITS = (
    *("budget", "run", "limit", "ideal", "res.", "bytes", "policy", "overlap"),
    *("x bound", "ahead", "right"),
)
_LEGEND = (
    "All of the counted tokens. stall: ms a token spent waiting for reads. hits: needs of an "
    "expert that found it in memory. x off: speed by that without prefetch, the median of turns of "
    "the same tokens: a few slow turns move ms/token more. "
    f"limit: {footer.LIMIT} ideal: the same, computing as fast as the resident model. "
    "x bound: time by the larger of resident time and bytes read / disk rate, which complete "
    "overlap would take. Time is lost to: res. (resident time by this), bytes (a perfect cache's "
    "reads by these), policy (share of the gap from the better of lru and lfu to it that is "
    "closed), overlap (reads nobody waited for; below 0 they took longer than the disk by itself). "
    "ahead: needs not resident that were prefetched; right: prefetched bytes that were used."
)


@dataclass(frozen=True)
class ReplaySettings:
    """What is generated, what of it is measured, and where it is kept."""

    command: ClassVar = "bench replay"

    budgets: BudgetsOption = "25%"
    rounds: RoundsOption = 1
    expert_size: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Bytes of one expert of the generated model.",
            callback=checked(size_of("an expert size")),
        ),
    ] = "3MB"
    minutes: Annotated[
        float,
        typer.Option(
            min=0.1, metavar="M", help="Measure what fits in; options that are given win."
        ),
    ] = 3.0
    tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "-n",
            min=1,
            help="Counted tokens.",
            show_default=f"{_TOKENS[1]}, fewer where time is short",
        ),
    ] = None
    warmup: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens before them that fill caches.",
            show_default=f"{_WARMUP[1]}, fewer where time is short",
        ),
    ] = None
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the generated model here; used again next time."),
    ] = None
    forecast: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A forecaster that `chronos fit` wrote.",
            show_default="one trained on the trace's training sequences",
        ),
    ] = None
    epochs: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of that training, at most; 0: no forecaster.",
            show_default=f"{_EPOCHS}, fewer where time is short",
        ),
    ] = None
    cold: Annotated[
        bool,
        typer.Option("--cold", help="Start with empty caches: nothing is warmed up uncounted."),
    ] = False
    disk: Annotated[
        str | None,
        typer.Option(
            metavar="RATE",
            help="Read experts as from a disk of so many bytes a second, such as 1GB.",
            callback=checked(size_of("a disk's rate")),
            show_default="as fast as the disk gives them",
        ),
    ] = None
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw a chart too.")] = None

    @property
    def disk_rate(self) -> int | None:
        """Bytes per second, where a slower disk than this one is asked for."""
        return None if self.disk is None else parse_size(self.disk, "a disk's rate")


@command("replay", on=bench)
def replay(
    trace_file: Annotated[Path, typer.Argument(metavar="T.npz", help="A routing trace.")],
    run: ReplayOptions,
    out: JsonOptions,
    settings: ReplaySettings,
) -> None:
    """Replay a real model's recorded routing on a generated model of its geometry.

    The trace (its test sequences, where a forecaster runs) is decoded resident, and at each budget
    without prefetch, with decayed frequency of use (lfu), with a forecaster and by default (auto),
    in turns of ten tokens. That needs memory for the whole generated model (experts x layers x
    --expert-size) and four times the budget beside it. --disk shows what a slower disk would do.

    Within --minutes as many tokens are counted as the machine's pace allows; what was measured
    stands in the title and in --json. Making and training the model are part of that time.
    """
    from chronos.common.traces.trace import RoutingTrace
    from chronos.measure import recorded as room
    from chronos.measure.timebox import Timebox

    limit = Timebox(60 * settings.minutes)
    if settings.png is not None:
        charts.check(settings.png)
    trace = RoutingTrace.load(trace_file)
    config = room.config_for(trace, parse_size(settings.expert_size, "an expert size"))
    with _work_folder(settings.work) as folder:
        runs = _made(folder, trace, config, settings)
        # A tenth is for closing and for the limits; whatever the parts before took, some is left.
        box = limit.part(0.9, least_s=60 * settings.minutes / 4)
        results = _compared(folder, trace, runs, run, settings, box)
    if settings.png is not None:
        _draw(settings.png, results, f"{trace_file.name} on {_geometry(config)}")
    if out.json:
        _print_json(trace_file, config, results, settings)
        return
    title = f"{trace_file.name} on {_geometry(config)}\n{_measured(results, limit)}"
    output.table(_COLUMNS, [_row(results, *key) for key in results], title=title)
    for line in _spread(results):
        output.note(line)
    limited = [(key, found) for key, found in results.items() if found[0].limit is not None]
    output.table(_LIMITS, [_limit_row(*key, found) for key, found in limited])
    output.legend(_LEGEND)


def _made(
    folder: Path, trace: RoutingTrace, config: ModelConfig, settings: ReplaySettings
) -> dict[str, dict[str, str]]:
    """Generate the model with its forecaster; the runs to compare, by name."""
    from chronos.measure import recorded as room

    with output.progress("making the model") as update:
        room.make_model(folder, config, update)
    runs, epochs = dict(room.RUNS), settings.epochs
    if settings.forecast is not None:
        room.use_forecaster(folder, settings.forecast)
    elif epochs != 0:
        seconds = 60 * settings.minutes * _TRAINING if epochs is None else float("inf")
        with output.progress("training the forecaster") as update:
            room.train_forecaster(folder, trace, epochs or _EPOCHS, update, seconds)
    else:
        del runs[room.FORECAST], runs[room.AUTO]
    return runs


def _compared(
    folder: Path,
    trace: RoutingTrace,
    runs: dict[str, dict[str, str]],
    run: ReplayOptions,
    settings: ReplaySettings,
    box: Timebox,
) -> Results:
    from chronos.common.disk.io import FileIO, PacedIO
    from chronos.common.traces.fit import split as parts
    from chronos.measure import recorded as room
    from chronos.measure.timebox import Count

    cold, rate = settings.cold, settings.disk_rate
    io = FileIO() if rate is None else PacedIO(rate)
    with output.progress("replaying") as update:
        return room.compare(
            lambda budget, options: run.open(str(folder), budget=budget, io=io, **options),
            parts(trace).test if room.FORECAST in runs else trace,
            split(settings.budgets),
            rounds=settings.rounds,
            warmup=Count(0, 0) if cold else _count(settings.warmup, _WARMUP),
            tokens=_count(settings.tokens, _TOKENS),
            limit=box,
            runs=runs,
            before_each=_drop_page_cache if cold else lambda: None,
            io=io,
            progress=_told(update, box),
        )


def _print_json(
    trace_file: Path, config: ModelConfig, results: Results, settings: ReplaySettings
) -> None:
    from chronos.measure.recorded import ratio_to_off

    runs = []
    for (budget, run), rounds in results.items():
        ratio, *half = ratio_to_off(results, budget, run) or (None,)
        runs.append(
            {
                "budget": budget,
                "run": run or None,
                "ratio_to_off": ratio,
                "ratio_to_off_middle_half": half or None,
                "rounds": [found.to_json() for found in rounds],
            }
        )
    measured = {"trace": str(trace_file), "cold": settings.cold, "disk": settings.disk_rate}
    data = measured | {"config": config.to_json()}
    output.print_json(data | {"runs": runs})


def _count(given: int | None, otherwise: tuple[int, int]) -> Count:
    from chronos.measure.timebox import Count

    return Count(*otherwise) if given is None else Count(given, given)


def _told(update: Progress, box: Timebox) -> Progress:
    """Says once, as soon as the pace is known, how much will be measured and how long it takes."""
    said: list[bool] = []

    def tell(done: int, expected: int) -> None:
        update(done, expected)
        if not said:
            said.append(True)
            left_s = box.elapsed_s * (expected - done) / done
            each = 1e3 * box.elapsed_s / done
            output.note(
                f"{each:.0f} ms a token: {expected} tokens of all runs, {left_s:.0f} s left"
            )

    return tell


def _measured(results: Results, limit: Timebox) -> str:
    counts = sorted({(len(r.seconds_T), r.warmup) for found in results.values() for r in found})
    told = " or ".join(f"{tokens} tokens after {warmup}" for tokens, warmup in counts)
    rounds = max(len(found) for found in list(results.values())[1:])
    times = f", {rounds} rounds" if rounds > 1 else ""
    return f"each run: {told} of warm-up{times}; {limit.elapsed_s:.0f} s in all"


def _drop_page_cache() -> None:
    """Direct reads pass it by; what a file system reads beside them does not."""
    if not drop_page_cache():
        output.note("the page cache was not dropped: that needs Linux and root")


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _percentile_s(found: list[Replayed], percent: float) -> float:
    return statistics.median(result.percentile_s(percent) for result in found)


def _row(results: Results, budget: str, run: str) -> tuple[str, ...]:
    """Medians over the rounds."""
    from chronos.measure.recorded import ratio_to_off

    found = results[budget, run]
    mean = 1e3 * (_median(r.token_s for r in found) or 0.0)
    times = [f"{mean:.1f}", *(f"{1e3 * _percentile_s(found, p):.0f}" for p in (50, 95, 99))]
    if found[0].limit is None:
        return (budget, "", *times, *("-",) * 4)
    ratio = ratio_to_off(results, budget, run)
    return (
        budget,
        run,
        *times,
        f"{(_median(r.bytes_read for r in found) or 0) / 1e6:.1f}",
        f"{1e3 * (_median(r.stall_s for r in found) or 0):.1f}",
        output.percent(_median(footer.hit_rate(r.stats) for r in found)),
        f"{ratio[0]:.2f}" if ratio is not None else "-",
    )


def _spread(results: Results) -> Iterator[str]:
    """Between what the middle half of the turns lay, whose median is `x off`."""
    from chronos.measure.recorded import OFF, ratio_to_off

    for budget, run in results:
        if run not in ("", OFF) and (ratio := ratio_to_off(results, budget, run)) is not None:
            yield f"{budget} {run}: half of the turns {ratio[1]:.2f} to {ratio[2]:.2f} x off"


def _limit_row(budget: str, run: str, found: list[Replayed]) -> tuple[str, ...]:
    def share(name: str) -> str:
        return _whole(_median((r.limit or {}).get(f"eta_{name}") for r in found))

    bound = _median(r.share_of_bound for r in found) or 0.0
    return (
        budget,
        run,
        *(share(name) for name in ("limit", "ideal", "res", "bytes", "policy", "overlap")),
        f"{bound:.2f}",
        _whole(_median(r.stats["prefetch_recall"] for r in found)),
        _whole(_median(r.stats["prefetch_precision"] for r in found)),
    )


def _whole(share: float | None) -> str:
    """Percent without decimals: eleven columns have to fit."""
    return "-" if share is None else f"{100 * share:.0f} %"


def _draw(path: Path, results: Results, title: str) -> None:
    groups: dict[str, dict[str, float]] = {}
    for (budget, run), found in results.items():
        milliseconds = 1e3 * (_median(r.token_s for r in found) or 0.0)
        groups.setdefault(budget, {})[run or "resident"] = milliseconds
    charts.bars(path, groups, title=title, y="ms per token, median of the rounds")


def _geometry(config: ModelConfig) -> str:
    size = output.size(config.expert_parameters * config.dtype_bytes)
    return f"{config.num_hidden_layers} x {config.num_experts} random experts of {size}"


@contextmanager
def _work_folder(work: Path | None) -> Iterator[Path]:
    """Where the generated model lies: the folder named, or one that goes away afterwards."""
    import tempfile

    if work is not None:
        work.parent.mkdir(parents=True, exist_ok=True)
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="chronos-replay-") as folder:
        yield Path(folder) / "model"
