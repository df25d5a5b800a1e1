"""Decode speed at several budgets beside the resident model's own, in interleaved rounds.

Every run opens the model anew and answers uncounted `warmup` times, so a streamed run is measured
with the experts its last answer left; the operating system's file cache is avoided where the disk
can be read directly. Medians over the rounds count, and ratios are those of the medians; how far
rounds lie apart says what they are worth. All counters are of the decoded tokens. Knows no
framework and prints nothing.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chronos.common.text.sampling import SamplingParams
from chronos.run.engine import RESIDENT, Engine

if TYPE_CHECKING:
    from chronos.run.engine import GenerationResult

Open = Callable[[str], AbstractContextManager[Engine]]


@dataclass
class Runs:
    """All rounds at one budget."""

    budget: str
    budget_bytes: int = 0
    results: list[GenerationResult] = field(default_factory=list)

    def tps(self) -> list[float]:
        return [float(r.stats["decode_tps"]) for r in self.results]

    def median(self, name: str) -> float:
        return statistics.median(float(r.stats[name]) for r in self.results)

    def per_token(self, name: str) -> float:
        """Median over the rounds of a decode counter per decoded token."""
        return statistics.median(
            float(r.stats[f"decode_{name}"]) / max(1, int(r.stats["decode_tokens"]))
            for r in self.results
        )

    def hit_rate(self) -> float | None:
        """Share of all rounds' routed needs that were in memory; None where none was streamed."""
        routed = sum(r.stats["decode_routed"] for r in self.results)
        hits = sum(r.stats["decode_hits"] for r in self.results)
        return float(hits / routed) if routed else None

    def spread(self) -> float | None:
        """How far the fastest round lies above the slowest, by the median; None for one round."""
        tps, middle = self.tps(), self.median("decode_tps")
        return (max(tps) - min(tps)) / middle if len(tps) > 1 and middle else None

    def median_limit(self, name: str) -> float | None:
        found = [(r.stats.get("limit") or {}).get(name) for r in self.results]
        numbers = [float(value) for value in found if value is not None]
        return statistics.median(numbers) if numbers else None


@dataclass
class Bench:
    """The runs of every budget; `runs[0]` are the resident ones."""

    expert_bytes_total: int = 0
    runs: list[Runs] = field(default_factory=list)

    def ratio(self, runs: Runs) -> float:
        """Median speed by the resident model's median speed."""
        return runs.median("decode_tps") / max(self.runs[0].median("decode_tps"), 1e-9)

    def identical(self, runs: Runs) -> bool:
        """Whether every round made exactly the resident model's tokens."""
        pairs = zip(runs.results, self.runs[0].results, strict=True)
        return all(own.tokens == resident.tokens for own, resident in pairs)

    def to_json(self) -> dict[str, Any]:
        return {
            "expert_bytes_total": self.expert_bytes_total,
            "rounds": len(self.runs[0].results),
            "budgets": [self._row(runs) for runs in self.runs],
        }

    def _row(self, runs: Runs) -> dict[str, Any]:
        return {
            "budget": runs.budget,
            "budget_bytes": runs.budget_bytes,
            "decode_tps": runs.tps(),
            "decode_tps_median": runs.median("decode_tps"),
            "spread": runs.spread(),
            "ratio_to_resident": self.ratio(runs),
            "hit_rate": runs.hit_rate(),
            "tokens_identical": self.identical(runs),
            "stats": [r.stats for r in runs.results],
        }


def run(
    open_engine: Open,
    budgets: Sequence[str],
    prompt: Sequence[int],
    sampling: SamplingParams,
    *,
    max_tokens: int,
    rounds: int,
    warmup: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bench:
    """Measure; the order of the budgets turns from round to round."""
    bench = Bench(runs=[Runs(name) for name in (RESIDENT, *budgets)])
    done, total = 0, rounds * len(bench.runs)
    resident_s: float | None = None  # seconds per token, for the limit
    for number in range(rounds):
        turn = number % len(bench.runs) if resident_s else 0
        for runs in bench.runs[turn:] + bench.runs[:turn]:
            with open_engine(runs.budget) as engine:
                for answer in range(warmup + 1):
                    last = answer == warmup
                    steps = engine.generate(prompt, sampling, max_tokens=max_tokens, record=last)
                    result = steps.result
                stats = result.stats | {"limit": engine.limit(result, resident_s)}
                result = dataclasses.replace(result, stats=stats, meter=None)
                runs.results.append(result)
                runs.budget_bytes = engine.budget_bytes
                bench.expert_bytes_total = engine.expert_bytes_total
            if runs is bench.runs[0] and result.stats["decode_tps"]:
                resident_s = 1 / result.stats["decode_tps"]
            done += 1
            progress(done, total)
    return bench
