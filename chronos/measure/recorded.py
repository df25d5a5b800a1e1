"""Recorded routing of a real model on a generated one of the same geometry.

Random weights say nothing about routing, so the trace decides it: which experts are read, kept and
computed is what the recorded model would have asked for. The arithmetic is real, its values are
not. At each budget the same tokens are decoded resident, with prefetch off, and with prefetch by
several predictors, in turns of a few tokens; a forecaster comes from other sequences of the trace.
Not covered: forecasts that a model makes of itself, which random weights cannot.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chronos.common.disk.atomic import atomic_write
from chronos.common.disk.io import FileIO, measure_read_rate
from chronos.common.disk.tensors import write_tensors
from chronos.common.errors import UsageError
from chronos.common.experts.foresight.forecast import FORECAST as SIDE_FILE
from chronos.common.experts.foresight.forecast import ForecastModel
from chronos.common.layout import is_packed, write_experts
from chronos.common.layout.folder import FINGERPRINT
from chronos.common.model.config import ModelConfig
from chronos.common.model.weights import (
    SAFETENSORS_DTYPE,
    TensorSpec,
    dense_tensors,
    expert_tensors,
)
from chronos.common.text.sampling import SamplingParams, Work
from chronos.common.traces.fit import FitOptions, fit, split
from chronos.common.traces.trace import RoutingTrace
from chronos.measure.timebox import Count, Pace, Timebox
from chronos.run.engine import RESIDENT, Engine
from chronos.run.meter import Machine, Meter, measure_machine

Progress = Callable[[int, int], None]
_HIDDEN, _VOCABULARY = 1024, 2048
_SHIFTS = 1 << 16
_TURN = 10  # tokens of one run before the next has its turn
_SAMPLE_BYTES = 32 << 20
_UNTRAINED = "0" * 32
_GREEDY = SamplingParams()
Open = Callable[[str, Mapping[str, str]], AbstractContextManager[Engine]]
# What is compared at each budget, by name: options of `engine.load`.
OFF, FORECAST, AUTO = "off", "forecast", "auto"
RUNS: dict[str, dict[str, str]] = {
    OFF: {"prefetch": "off", "predictor": "lfu"},
    "lfu": {"predictor": "lfu"},
    FORECAST: {"predictor": "forecast"},
    AUTO: {"predictor": "auto"},  # the default: the forecaster while it pays
}


class RecordedRouting:
    """A `route_override` for one sequence: the trace's next token each time layer 0 is asked."""

    def __init__(self, trace: RoutingTrace, start: int = 0) -> None:
        """start: the trace's token that comes first."""
        self._ids_TLK = trace.ids_TLK.astype(np.int64)
        if trace.weights_TLK is not None:
            self._weights_TLK = trace.weights_TLK.astype(np.float32)
        else:
            shape = self._ids_TLK.shape
            self._weights_TLK = np.full(shape, 1 / trace.top_k, np.float32)
        self._token = start - 1

    def __call__(self, layer: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """(ids, weights) [1, K] of this token's layer."""
        self._token += layer == 0
        at = self._token
        return self._ids_TLK[at : at + 1, layer], self._weights_TLK[at : at + 1, layer]


def config_for(trace: RoutingTrace, record_bytes: int) -> ModelConfig:
    """A model of the trace's geometry with experts of about `record_bytes` in bfloat16."""
    width = record_bytes // (6 * _HIDDEN) // 32 * 32
    if width < 32:
        raise UsageError(f"experts of {record_bytes} bytes are too small", "", "give 200kB or more")
    return ModelConfig(
        hidden_size=_HIDDEN,
        num_hidden_layers=trace.num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=_VOCABULARY,
        num_experts=trace.num_experts,
        num_experts_per_tok=trace.top_k,
        moe_intermediate_size=width,
        sliding_window=256,
        lookahead_steps=0,
        dtype="bfloat16",
    )


def make_model(
    folder: Path, config: ModelConfig, progress: Progress = lambda done, total: None
) -> Path:
    """Write a packed folder of random weights, with the memory of a few tensors; one that is there
    already with this config is used again, one that is half there is completed."""
    if is_packed(folder):
        if ModelConfig.from_json(folder) != config:
            raise UsageError("the folder holds another model", str(folder), "name another --work")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "config.json", [config.dumps().encode()])
    dense, random = dense_tensors(config), _Random(config)
    # Stands for a digest of the weights, which config and generator decide.
    metadata = {"format": "pt", FINGERPRINT: _UNTRAINED}
    write_tensors(folder / "model.safetensors", map(random.named, dense), metadata)
    specs, total = expert_tensors(config), config.num_routed_experts * random.record_nbytes
    layers = [
        [(layer, expert) for expert in range(config.num_experts)]
        for layer in range(config.num_hidden_layers)
    ]
    write_experts(
        folder,
        layers,
        specs,
        random.experts,
        fingerprint=_UNTRAINED,
        order={"method": "layer"},
        progress=lambda done: progress(done, total),
        finite=False,
    )
    return folder


class _Random:
    """bfloat16 values near 0, cut at another place of one pool for each tensor: drawing them all
    anew would take longer than writing them. Norms are one."""

    def __init__(self, config: ModelConfig) -> None:
        self.specs = expert_tensors(config)
        largest = max(spec.nbytes for spec in [*dense_tensors(config), *self.specs]) // 2
        values = np.random.default_rng(0).standard_normal(largest + _SHIFTS, np.float32)
        self._pool = _bfloat16(values * np.float32(0.02))
        self._used = 0

    @property
    def record_nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)

    def named(self, spec: TensorSpec) -> tuple[str, str, tuple[int, ...], memoryview]:
        return spec.name, SAFETENSORS_DTYPE[spec.dtype], spec.shape, self._bytes(spec)

    def experts(
        self, keys: Sequence[tuple[int, int]]
    ) -> Generator[tuple[tuple[int, int], dict[str, memoryview]], None, None]:
        for key in keys:
            yield key, {spec.name: self._bytes(spec) for spec in self.specs}

    def _bytes(self, spec: TensorSpec) -> memoryview:
        count = spec.nbytes // 2
        if "norm" in spec.name:
            return _bfloat16(np.ones(count, np.float32)).view(np.uint8).data
        start = self._used % _SHIFTS
        self._used += 131
        return self._pool[start : start + count].view(np.uint8).data


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper halves of float32 values: bfloat16, rounded towards 0."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def train_forecaster(
    folder: Path,
    trace: RoutingTrace,
    epochs: int,
    progress: Progress = lambda done, total: None,
    seconds: float = float("inf"),
) -> float:
    """Fit a forecaster on the trace's training sequences and leave it in the folder; seconds taken.

    seconds: no epoch begins that would end later. One that was trained there on the same sequences
    in the same way is used again: 0 seconds.
    """
    parts, path, options = split(trace), folder / SIDE_FILE, FitOptions(epochs=epochs)
    way = repr((options, seconds)).encode()
    digest = hashlib.sha256(parts.train.ids_TLK.tobytes() + way).hexdigest()
    note = folder / "forecast.trained"
    if path.exists() and note.exists() and note.read_text() == digest:
        return 0.0
    fitted = fit(parts.train, parts.validation, options, progress=progress, seconds=seconds)
    fitted.model.save(path)
    atomic_write(note, [digest.encode()])
    return fitted.seconds


def use_forecaster(folder: Path, file: Path) -> None:
    """Put a trained forecaster into the folder."""
    ForecastModel.load(file).save(folder / SIDE_FILE)
    (folder / "forecast.trained").unlink(missing_ok=True)


@dataclass(frozen=True)
class Replayed:
    """One run over the counted tokens. Seconds and bytes are per token."""

    token_s: float
    bytes_read: float
    stall_s: float
    seconds_T: tuple[float, ...]
    stats: dict[str, Any]
    limit: dict[str, Any] | None
    disk_rate: float | None
    bytes_copied: float = 0.0  # from host memory to an accelerator's slots
    copy_rate: float | None = None
    warmup: int = 0  # tokens before the counted ones

    @property
    def serial_s(self) -> float | None:
        """What the token would take if no read or copy overlapped anything; None if not
        streamed."""
        if self.limit is None or self.disk_rate is None:
            return None
        return float(self.limit["t_res_s"]) + self.bytes_read / self.disk_rate + self._copy_s

    @property
    def share_of_serial(self) -> float | None:
        serial = self.serial_s
        return self.token_s / serial if serial else None

    @property
    def share_of_bound(self) -> float | None:
        """Time per token by what these reads and copies would take if all overlapped completely."""
        if self.limit is None or self.disk_rate is None:
            return None
        bound_s = max(float(self.limit["t_res_s"]), self.bytes_read / self.disk_rate, self._copy_s)
        return self.token_s / bound_s

    @property
    def _copy_s(self) -> float:
        return self.bytes_copied / self.copy_rate if self.copy_rate else 0.0

    @property
    def turns_s(self) -> npt.NDArray[np.float64]:
        """Seconds of each turn."""
        return np.add.reduceat(self.seconds_T, range(0, len(self.seconds_T), _TURN))

    def percentile_s(self, percent: float) -> float:
        """Seconds that so many percent of the tokens stayed within."""
        return float(np.percentile(self.seconds_T, percent))

    def to_json(self) -> dict[str, Any]:
        return {
            "token_s": self.token_s,
            "tokens": len(self.seconds_T),
            "warmup": self.warmup,
            "p50_s": self.percentile_s(50),
            "p95_s": self.percentile_s(95),
            "p99_s": self.percentile_s(99),
            "bytes_read_per_token": self.bytes_read,
            "stall_s_per_token": self.stall_s,
            "disk_bytes_per_s": self.disk_rate,
            "bytes_copied_per_token": self.bytes_copied,
            "copy_bytes_per_s": self.copy_rate,
            "serial_s": self.serial_s,
            "share_of_serial": self.share_of_serial,
            "share_of_bound": self.share_of_bound,
            "limit": self.limit,
            "stats": self.stats,
        }


Results = dict[tuple[str, str], list[Replayed]]  # (budget, run), a list of rounds


def compare(
    open_engine: Open,
    trace: RoutingTrace,
    budgets: Sequence[str],
    *,
    rounds: int,
    warmup: Count,
    tokens: Count,
    limit: Timebox | None = None,
    runs: Mapping[str, Mapping[str, str]] = RUNS,
    before_each: Callable[[], None] = lambda: None,
    io: FileIO | None = None,
    progress: Progress = lambda done, total: None,
) -> Results:
    """Rounds of every budget: a resident run, whose time enters the limits, and every run, all open
    at once and taking turns of a few tokens, so that a machine that changes its pace within seconds
    changes it for all of them. limit: the groups share what is left of it; within its part a group
    warms up for a third of the time and then counts, at most as many tokens as `warmup` and
    `tokens` say and at least as many, whatever the time. before_each: called before a model is
    opened. io: what the engines read their experts through, for the disk's rate. progress: tokens
    done, and that will be done at this pace.
    """
    if trace.num_tokens < warmup.least + tokens.least + 2:
        raise UsageError(f"the trace has {trace.num_tokens} tokens, fewer than were asked for")
    warmup = warmup.up_to(trace.num_tokens - tokens.least - 2)
    tokens = tokens.up_to(trace.num_tokens - warmup.most - 2)
    limit = limit or Timebox()
    results: Results = {(RESIDENT, ""): []}
    results |= {(budget, run): [] for budget in budgets for run in runs}
    groups, finished = rounds * len(budgets), 0
    with _opened(open_engine, before_each, RESIDENT, {}) as resident:  # loaded once: it is large
        for number, budget in enumerate(list(budgets) * rounds):
            box = limit.part(1 / (groups - number))
            group = {(RESIDENT, ""): _Run(resident, trace)}
            with ExitStack() as stack:
                for run, options in runs.items():
                    group[budget, run] = _Run(
                        stack.enter_context(_opened(open_engine, before_each, budget, options)),
                        trace,
                    )
                told = functools.partial(_shifted, progress, finished, groups - number)
                rate = _in_turns(list(group.values()), warmup, tokens, box, io, told)
                machine = _machine(group, rate)
                for key in group:  # no name of a run outlives its group
                    results[key].append(group[key].result(machine))
            finished += sum(run.warmup + len(run.seconds) for run in group.values())
            group.clear()
            gc.collect()  # engines are in cycles, and the next ones need their memory
    return results


def _opened(
    open_engine: Open, before: Callable[[], None], budget: str, options: Mapping[str, str]
) -> AbstractContextManager[Engine]:
    before()
    return open_engine(budget, options)


class _Run:
    """One engine on the trace, and the seconds of its counted tokens."""

    def __init__(self, engine: Engine, trace: RoutingTrace) -> None:
        routing = RecordedRouting(trace)
        self.engine, self._override = engine, lambda seq, layer: routing(layer)
        self.seconds: list[float] = []
        self.begin()

    def begin(self) -> None:
        """A prompt of one token; the key/value cache starts empty. Counts from here."""
        self.engine.session.drop(0)
        self._meter = Meter(self.engine.session, self.engine.feed, record=True)
        self.warmup, self.seconds = len(self.seconds), []
        self._meter.run(Work(0, [0], _GREEDY, prompt=1), route_override=self._override)

    def decode(self, tokens: int) -> None:
        for _ in range(tokens):
            begin = time.perf_counter()
            self._meter.run(Work(0, [0], _GREEDY), route_override=self._override)
            self.seconds.append(time.perf_counter() - begin)

    @property
    def token_s(self) -> float:
        return float(np.mean(self.seconds))

    def result(self, machine: Machine | None) -> Replayed:
        """machine: of the streamed runs."""
        engine, tokens = self.engine, len(self.seconds)
        self._meter.end()
        stats, limit = self._meter.stats() | engine.prefetch_stats(), None
        if machine is not None and engine.layout is not None:
            limit = self._meter.limit(engine.config, machine)
        return Replayed(
            self.token_s,
            stats["decode_bytes_read"] / tokens,
            stats["decode_stall_s"] / tokens,
            tuple(self.seconds),
            stats,
            limit,
            machine.disk_rate if machine is not None and limit else None,
            stats["decode_bytes_copied"] / tokens,
            machine.copy_rate if machine is not None else None,
            self.warmup,
        )


def _machine(group: Mapping[tuple[str, str], _Run], disk_rate: float | None) -> Machine | None:
    """What bounds the streamed runs of one budget, which have one layout and as many slots."""
    engine = next((run.engine for run in group.values() if run.engine.layout is not None), None)
    if engine is None or engine.layout is None or engine.feed is None or disk_rate is None:
        return None
    return dataclasses.replace(
        measure_machine(engine.layout, engine.config, engine.feed, engine.device),
        resident_token_s=group[RESIDENT, ""].token_s,
        disk_rate=disk_rate,
    )


def _in_turns(
    group: list[_Run],
    warmup: Count,
    tokens: Count,
    box: Timebox,
    io: FileIO | None,
    progress: Progress,
) -> float | None:
    """Warm-up, then the counted tokens, a turn of each run after the other. The disk's rate for
    records in bytes per second: the median of one sample after every counted round of turns."""
    pace, rates = Pace(warmup, tokens, box), []
    for counted in (False, True):
        while length := pace.next(counted, _TURN):
            group = [*group[1:], group[0]]
            for run in group:
                run.decode(length)
            pace.done(length)
            progress(pace.tokens * len(group), pace.expected * len(group))
            if counted and (rate := _disk_rate(group, io)) is not None:
                rates.append(rate)
        if not counted:
            for run in group:
                run.begin()
    return float(np.median(rates)) if rates else None


def _disk_rate(group: list[_Run], io: FileIO | None) -> float | None:
    layout = next((r.engine.layout for r in group if r.engine.layout is not None), None)
    if layout is None:
        return None
    return measure_read_rate(layout.files[0], layout.record_nbytes, max_bytes=_SAMPLE_BYTES, io=io)


def ratio_to_off(results: Results, budget: str, run: str) -> tuple[float, float, float] | None:
    """Speed by that of the run without prefetch, over turns of the same tokens: the median, and the
    ends of the middle half."""
    off = results.get((budget, OFF))
    if not off:
        return None
    pairs = zip(off, results[budget, run], strict=True)
    ratios = np.concatenate([without.turns_s / own.turns_s for without, own in pairs])
    median, low, high = np.percentile(ratios, (50, 25, 75))
    return float(median), float(low), float(high)


def _shifted(progress: Progress, before: int, groups: int, done: int, expected: int) -> None:
    """groups: this one and those to come, taken to be as long."""
    progress(before + done, before + groups * expected)
