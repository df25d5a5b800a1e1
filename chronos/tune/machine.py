"""Settings with which this machine runs a model fastest, of those that change no token.

One continuation is recorded, and every candidate decodes it: a bit of its logits that is another
one rules the candidate out. Knobs are tried one after the other, each value beside the best so far
in turns; one is taken if it is faster by 3 % with no worse hits and no longer slowest tokens, and
all together are kept only if they are so again in reverse order, where warming up helps the other
side. A file that the system still has in memory would favour whoever comes later, so its pages are
dropped before each run; where they cannot be, only reads past the page cache are compared.
"""

from __future__ import annotations

import hashlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from chronos.common.disk.io import drop_file_pages, drop_page_cache
from chronos.common.disk.reader import READERS
from chronos.common.errors import ChronosError, UsageError
from chronos.common.experts.foresight.forecast import find_forecast
from chronos.common.text.sampling import SamplingParams
from chronos.common.text.tokenizer import Tokenizer
from chronos.run import profile
from chronos.run.engine import RESIDENT, Engine, load
from chronos.run.models import resolve_model
from chronos.run.profile import Entry
from chronos.run.sequence import OneSequence

FASTER = 1.03  # of the tokens a second, from which on a setting is taken
_HITS = 0.005  # of all needs, that a setting may hit less: forecasts follow the clock
_SLOWEST = 1.05  # of the 99th percentile of a token's time
_GREEDY = SamplingParams()
Options = Mapping[str, Any]
Knobs = Sequence[tuple[str, Sequence[Any]]]  # option of `load` -> values to try beside its default


@dataclass(frozen=True)
class Sample:
    """One run of the continuation. token_s: seconds of each timed token. bits: a digest of what it
    computed. hit_rate: of its needs, None where nothing is streamed."""

    token_s: tuple[float, ...]
    bits: str
    hit_rate: float | None = None


class Measure(Protocol):
    """Runs the continuation with options in place of defaults. Tests give another one."""

    def __call__(self, options: Options) -> Sample: ...


@dataclass(frozen=True)
class Runs:
    """Some runs with the same options."""

    samples: tuple[Sample, ...]

    @property
    def tps(self) -> float:
        """Tokens a second, of the median run."""
        return statistics.median(len(s.token_s) / sum(s.token_s) for s in self.samples)

    @property
    def slowest_s(self) -> float:
        """The 99th percentile of a token's time, over all runs."""
        return float(np.quantile([t for s in self.samples for t in s.token_s], 0.99))

    @property
    def hit_rate(self) -> float | None:
        rates = [s.hit_rate for s in self.samples if s.hit_rate is not None]
        return statistics.fmean(rates) if rates else None

    def to_json(self) -> dict[str, float]:
        found = {"tokens_per_s": self.tps, "p99_s": self.slowest_s}
        return found if self.hit_rate is None else found | {"hit_rate": self.hit_rate}


@dataclass(frozen=True)
class Candidate:
    """A value of a knob that was tried. verdict: `taken`, or why it was not."""

    knob: str
    value: Any
    verdict: str
    ratio: float = math.nan  # of its speed to that of the best before it


@dataclass(frozen=True)
class Found:
    """options: what is kept, nothing where nothing helps. before, after: in reverse order, where it
    came to that. verdict: in words."""

    options: dict[str, Any]
    tried: list[Candidate]
    verdict: str
    before: Runs | None = None
    after: Runs | None = None
    saved: Path | None = None
    entry: Entry | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "options": self.options,
            "verdict": self.verdict,
            "before": None if self.before is None else self.before.to_json(),
            "after": None if self.after is None else self.after.to_json(),
            "tried": [vars(candidate) for candidate in self.tried],
            "profile": None if self.saved is None else str(self.saved),
        }


def search(
    measure: Measure,
    knobs: Knobs,
    *,
    rounds: int = 3,
    on_candidate: Callable[[Candidate], None] = lambda candidate: None,
) -> Found:
    """Coordinate descent over the knobs, and the confirmation."""
    best: dict[str, Any] = {}
    bits, tried = measure(best).bits, list[Candidate]()
    for knob, values in knobs:
        for value in values:
            wanted = best | {knob: value}
            candidate = _try(measure, best, wanted, rounds, bits, knob)
            tried.append(candidate)
            on_candidate(candidate)
            if candidate.verdict == "taken":
                best = wanted
    if not best:
        return Found({}, tried, "nothing is at least 3 % faster")
    after, before = _in_turns(measure, best, {}, rounds)
    verdict = _verdict(before, after, bits)
    if verdict != "taken":
        return Found({}, tried, f"not confirmed in reverse order: {verdict}", before, after)
    return Found(best, tried, f"{_ratio(before, after):.2f} times as fast", before, after)


def _try(
    measure: Measure, best: Options, wanted: Options, rounds: int, bits: str, knob: str
) -> Candidate:
    value = wanted[knob]
    try:
        # Most do not help: one round tells, and only what may be taken has the others.
        old, new = _in_turns(measure, best, wanted, 1)
        verdict = _verdict(old, new, bits)
        if verdict == "taken" and rounds > 1:
            others = _in_turns(measure, best, wanted, rounds - 1)
            old, new = (
                Runs(a.samples + b.samples) for a, b in zip((old, new), others, strict=True)
            )
            verdict = _verdict(old, new, bits)
    except ChronosError as error:
        return Candidate(knob, value, f"refused: {error.what}")
    return Candidate(knob, value, verdict, _ratio(old, new))


def _in_turns(measure: Measure, first: Options, second: Options, rounds: int) -> tuple[Runs, Runs]:
    pairs = [(measure(first), measure(second)) for _ in range(rounds)]
    one, other = zip(*pairs, strict=True)
    return Runs(one), Runs(other)


def _ratio(old: Runs, new: Runs) -> float:
    return new.tps / old.tps


def _verdict(old: Runs, new: Runs, bits: str) -> str:
    if any(sample.bits != bits for sample in new.samples):
        return "other bits"
    if _ratio(old, new) < FASTER:
        return "not 3 % faster"
    if old.hit_rate is not None and (new.hit_rate or 0.0) < old.hit_rate - _HITS:
        return "fewer hits"
    return "longer slowest tokens" if new.slowest_s > _SLOWEST * old.slowest_s else "taken"


def tune_machine(
    model: str,
    *,
    budget: str = "25%",
    backend: str | None = None,
    device: str | None = None,
    prompt: str,
    tokens: int = 96,
    rounds: int = 3,
    on_candidate: Callable[[Candidate], None] = lambda candidate: None,
) -> Found:
    """Find, confirm and keep settings for a model at a budget, as `chronos tune machine` does.

    tokens: of the continuation; the first third warms up. Raises UsageError where neither the page
    cache can be dropped nor files be read past it, and what `engine.load` raises.
    """
    runs = _Continuation(model, budget, backend, device, prompt, tokens)
    found = search(runs, runs.knobs(), rounds=rounds, on_candidate=on_candidate)
    measured = {}
    if found.before is not None and found.after is not None:
        measured = {"before_tps": found.before.tps, "after_tps": found.after.tps}
    entry = Entry(runs.backend, device or "", runs.budget, found.options, measured)
    saved = profile.save(model, runs.expert_bytes, entry)
    return Found(**(vars(found) | {"saved": saved if found.options else None, "entry": entry}))


class _Continuation:
    """The `Measure` of a real model."""

    def __init__(
        self, model: str, budget: str, backend: str | None, device: str | None, prompt: str,
        tokens: int,
    ) -> None:  # fmt: skip
        self._folder = resolve_model(model)
        self._ids = Tokenizer.load(self._folder).encode_prompt(prompt)
        self._where = {"budget": budget, "backend": backend, "device": device}
        self._model, self._warmup, self._tokens = model, tokens // 3, tokens
        self._drops = drop_file_pages(self._folder) or drop_page_cache()
        if not self._drops and not _reads_past_the_cache(self._folder):
            raise UsageError(
                "the page cache can neither be dropped nor read past here: what it still has would"
                " favour whoever is measured later",
                str(self._folder),
                "put the model on another file system, or run this as root on Linux",
            )
        with self._load({}) as engine:
            self.threads, self.backend = engine.threads, engine.backend
            resident = str(budget).strip().lower() == RESIDENT
            self.budget: int | str = RESIDENT if resident else engine.budget_bytes
            self.expert_bytes = engine.expert_bytes_total
            self._feed = engine.feed is not None
            self._all = engine.budget_bytes >= engine.expert_bytes_total
            self._copies = engine.feed is not None and engine.feed.copy_rate() is not None
            self._known = engine.feed is not None and engine.feed.known is not None
            sequence = OneSequence(engine.session)
            token, self._recorded = sequence.prefill(self._ids, _GREEDY), list[int]()
            for _ in range(tokens):
                self._recorded.append(token)
                token = sequence.decode(token, _GREEDY)

    def knobs(self) -> Knobs:
        """What can make a difference to this model here, and no difference to its tokens."""
        found: list[tuple[str, Sequence[Any]]] = []
        if self.threads is not None and self._on_cpu():
            cores = os.cpu_count() or 1
            others = {1, max(1, cores // 2), cores} - {self.threads}
            found.append(("threads", sorted(others)))
        if not self._feed:
            return found
        found.append(("readers", [n for n in (1, 2, 8, 16) if n != READERS]))
        if self._drops:
            found.append(("direct", [False]))
        if self._all:
            return found
        if self._copies:
            found.append(("warm", ["25%", "50%"]))
        found.append(("prefetch", ["off"]))
        if not self._known:
            forecast = ["forecast"] if find_forecast(self._folder) is not None else []
            found.append(("predictor", [*forecast, "token-table", "lfu", "lru"]))
        return found

    def _on_cpu(self) -> bool:
        return not str(self._where["device"] or "cpu").startswith(("cuda", "mps", "gpu"))

    def _load(self, options: Options) -> Engine:
        if self._drops:
            drop_file_pages(self._folder) or drop_page_cache()
        return load(self._model, **(self._where | dict(options)), profile="off")

    def __call__(self, options: Options) -> Sample:
        if self.threads is not None:
            options = {"threads": self.threads, **options}  # of the whole process: said each time
        with self._load(options) as engine:
            sequence, bits = OneSequence(engine.session), hashlib.blake2b(digest_size=16)
            written = [sequence.prefill(self._ids, _GREEDY)]
            bits.update(sequence.logits().tobytes())
            warmup = self._recorded[: self._warmup]
            written += [sequence.decode(token, _GREEDY) for token in warmup]
            before = None if engine.feed is None else engine.feed.stats()
            seconds = []
            for token in self._recorded[self._warmup :]:
                began = time.perf_counter()
                written.append(sequence.decode(token, _GREEDY))
                seconds.append(time.perf_counter() - began)
            bits.update(sequence.logits().tobytes() + repr(written).encode())
            rate = None
            if engine.feed is not None and before is not None:
                needs = engine.feed.stats().minus(before)
                rate = needs.hits / needs.routed if needs.routed else None
        return Sample(tuple(seconds), bits.hexdigest(), rate)


def _reads_past_the_cache(folder: Path) -> bool:
    """Whether the file system of a folder can open a file for direct reads."""
    flag = getattr(os, "O_DIRECT", 0)
    path = next((p for p in folder.rglob("*") if p.is_file()), None)
    if not flag or path is None:
        return sys.platform == "darwin"  # it has F_NOCACHE
    try:
        os.close(os.open(path, os.O_RDONLY | flag))
    except OSError:
        return False
    return True
