"""What predictors are worth on a trace: reads a cache needs with each, and how often each is right.

Every predictor meets the same tokens through the bookkeeping of a feed; recall is judged at the
end of a token, for the next one of the same sequence. R_ref stays the better of LRU and plain
decayed LFU, whatever stronger variants are listed beside them.
Not covered: time, prefetch.

Shape legend: L layers, E experts, K top-k.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chronos.common.experts.foresight.forecast import ForecastModel
from chronos.common.experts.foresight.policy import PredictorPolicy
from chronos.common.experts.foresight.predictor import (
    DecayedUse,
    Predictor,
    PreviousToken,
    TokenTable,
)
from chronos.common.traces.simulate import (
    POLICIES,
    CacheRun,
    Caches,
    Comparison,
    compare,
    simulate_sizes,
)
from chronos.common.traces.trace import RoutingTrace
from chronos.common.training.recall import guesses

Progress = Callable[[int, int], None]
_TIMED = 200  # tokens a predictor is timed on


@dataclass(frozen=True)
class Recall:
    """At the end of a token, for the next one. Shares; None where nothing was there to judge.

    absent: only needs that the cache did not hold, and guesses (k per layer) that it did not hold.
    """

    at_k: float | None
    at_k3: float | None
    precision_absent: float | None
    recall_absent: float | None


@dataclass(frozen=True)
class Measured:
    """One predictor on one trace and number of slots."""

    run: CacheRun
    recall: Recall
    eta_policy: float | None
    token_s: float  # what predicting costs, with scores asked for once a layer

    def to_json(self) -> dict[str, Any]:
        return {
            "hits": self.run.hits,
            "misses": self.run.misses,
            "hit_rate": self.run.hit_rate,
            "reads_per_token": self.run.reads_per_token,
            "eta_policy": self.eta_policy,
            "recall_at_k": self.recall.at_k,
            "recall_at_k3": self.recall.at_k3,
            "precision_absent": self.recall.precision_absent,
            "recall_absent": self.recall.recall_absent,
            "predict_s_per_token": self.token_s,
        }


def predictors(trace: RoutingTrace, forecast: ForecastModel | None = None) -> dict[str, Predictor]:
    """Every predictor that the trace can feed, fresh, by name."""
    shape = trace.num_layers, trace.num_experts
    found: dict[str, Predictor] = {
        "previous-token": PreviousToken(*shape),
        "decayed-use": DecayedUse(*shape),
    }
    if forecast is not None:
        forecast.check_fits(*shape, trace.top_k)
        found["forecast"] = forecast.predictor()
    if trace.tokens_T is not None:
        found["token-table"] = TokenTable(*shape)
    return found


Result = tuple[Comparison, dict[str, Measured]]


def measure(
    trace: RoutingTrace,
    sizes: Sequence[int],
    forecast: ForecastModel | None = None,
    *,
    pooled: bool = True,
    warmup: float = 0.0,
    policies: Sequence[str] = POLICIES,
    progress: Progress = lambda done, total: None,
) -> list[Result]:
    """For each number of slots, caches without a predictor and every predictor available, on the
    same tokens."""
    candidates = predictors(trace, forecast)
    total, results = (len(sizes) + len(candidates)), []
    for done, slots in enumerate(sizes, 1):
        caches = compare(trace, slots, policies, pooled=pooled, warmup=warmup)
        results.append((caches, dict[str, Measured]()))
        progress(done, total)
    for done, (name, predictor) in enumerate(candidates.items(), len(sizes) + 1):
        judge = _Judge(trace, predictor, int(warmup * trace.num_tokens), len(sizes))
        runs = simulate_sizes(
            trace, sizes, PredictorPolicy(predictor),
            pooled=pooled, warmup=warmup, name=name, watch=judge,
        )  # fmt: skip
        token_s = _token_s(predictors(trace, forecast)[name], trace)
        for size, ((caches, found), run) in enumerate(zip(results, runs, strict=True)):
            eta = caches.eta_policy(run.reads_per_token)
            found[name] = Measured(run, judge.recall(size), eta, token_s)
        progress(done, total)
    return results


def best(measured: Mapping[str, Measured]) -> str:
    """The predictor that needs the fewest reads."""
    return min(measured, key=lambda name: measured[name].run.misses)


class _Judge:
    """Counts right guesses, called before each token, whose id it tells to who needs it."""

    def __init__(self, trace: RoutingTrace, predictor: Predictor, first: int, sizes: int) -> None:
        self._trace, self._predictor, self._first = trace, predictor, first
        self._needs = self._found_k = self._found_k3 = 0
        self._absent, self._guessed, self._right = ([0] * sizes for _ in range(3))

    def __call__(self, token: int, caches: Caches) -> None:
        seq_T, K = self._trace.seq_T, self._trace.top_k
        if self._predictor.by_token and self._trace.tokens_T is not None:
            self._predictor.begin_token(int(self._trace.tokens_T[token]))
        if token < max(1, self._first) or seq_T[token] != seq_T[token - 1]:
            return
        likely_LE = self._predictor.next_uses()
        needed_LE = _marked(likely_LE.shape, self._trace.ids_TLK[token])
        at_k_LE = _marked(likely_LE.shape, guesses(likely_LE, K))
        at_k3_LE = _marked(likely_LE.shape, guesses(likely_LE, K + 3))
        self._needs += int(needed_LE.sum())
        self._found_k += int((needed_LE & at_k_LE).sum())
        self._found_k3 += int((needed_LE & at_k3_LE).sum())
        for size, group in enumerate(caches):
            absent_LE = np.ones(likely_LE.shape, np.bool_)
            for cache in group:
                absent_LE[tuple(np.array([*cache.ready], np.intp).reshape(-1, 2).T)] = False
            self._absent[size] += int((needed_LE & absent_LE).sum())
            self._guessed[size] += int((at_k_LE & absent_LE).sum())
            self._right[size] += int((needed_LE & at_k_LE & absent_LE).sum())

    def recall(self, size: int) -> Recall:
        return Recall(
            _share(self._found_k, self._needs),
            _share(self._found_k3, self._needs),
            _share(self._right[size], self._guessed[size]),
            _share(self._right[size], self._absent[size]),
        )


def _marked(shape: tuple[int, ...], experts_LK: NDArray[Any]) -> NDArray[np.bool_]:
    marks_LE = np.zeros(shape, np.bool_)
    np.put_along_axis(marks_LE, experts_LK.astype(np.intp), True, 1)
    return marks_LE


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _token_s(predictor: Predictor, trace: RoutingTrace) -> float:
    """CPU time, the median over tokens after the first quarter, when a memory has something to
    search."""
    tokens = trace.ids_TLK[:_TIMED].tolist()
    seconds = []
    for ids_LK in tokens:
        begin = time.thread_time()
        for layer, experts in enumerate(ids_LK):
            predictor.observe(layer, experts)
            predictor.reconsider()
            predictor.scores()
        predictor.end_token()
        seconds.append(time.thread_time() - begin)
    return float(np.median(seconds[len(seconds) // 4 :]))
