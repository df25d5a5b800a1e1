"""What each governor of reading ahead gains, alone and with the others: rehearsed runs.

    python -m bench.runs.governors T.npz --forecast FILE [--case CASES] [-o R.jsonl]

Three things limit what is read ahead: `share` (the part of the idle link that a source may use, by
its used bytes), `floor` (the chance of use that is asked for, by the link's load) and `contest`
(ways of running a token compared by the clock). Every subset of them runs on the test sequences at
12.5, 25 and 50 % of the experts, three disks, a host for which reads and forecasts are free and
one for which they are not. `prior` is a contest of two ways, with forecasts and without them,
which begins with forecasts and leaves them only for what is clearly faster. Forecasters: the
trained one; one that is too sure (chance ** 0.4); one that names the wrong experts. Without `share`
a quarter of the slots may be asked for; `idle` is all of the idle link, never judged. `off` keeps
by decayed use and reads nothing ahead, `keep` keeps by the forecaster and reads nothing ahead.
Ceiling: time by max(resident, bytes / disk), not printed; what counts is time by that of all three.
Clock and disk are numbers, so any machine gives the same. Prints a line a case, then a table, then
one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chronos.common.experts.contest import _CARRIED, BLOCK, Token, _compared
from chronos.common.experts.foresight.forecast import ForecastModel
from chronos.common.experts.foresight.predictor import (
    DecayedUse,
    PredictorPolicy,
    RestingPolicy,
    Scores,
    TokenTable,
)
from chronos.common.experts.plan import PAYS
from chronos.common.experts.prefetch import Prefetcher
from chronos.common.traces.fit import split
from chronos.common.traces.rehearse import Pace, rehearse
from chronos.common.traces.simulate import slots_for
from chronos.common.traces.trace import RoutingTrace

_RECORD, _TOKEN_S, _WARMUP = 2_949_120, 0.045, 130  # a contest of three ways takes 96 tokens
_FREE, _BUSY = (0.0, 0.0), (1e-10, 4e-3)  # host seconds a byte read, a token's forecasts
GOVERNORS = ("share", "floor", "contest")
_SUBSETS = [
    *("share floor contest", "floor contest", "share contest", "share floor"),
    *(
        "share",
        "floor",
        "contest",
        "none",
        "idle floor",
        "idle",
        "floor prior",
        "share floor prior",
    ),
]
_ALL = _SUBSETS[0]


class Case(NamedTuple):
    """One line of the result."""

    forecaster: str
    budget: float  # of the experts
    disk: float  # GB/s
    host: tuple[float, float]


def cases(names: list[str]) -> Iterator[Case]:
    for name, budget, disk, host in product(
        names, (0.125, 0.25, 0.5), (0.5, 1.5, 4.5), (_FREE, _BUSY)
    ):
        if name in ("trained", "tokens") or budget == 0.25:
            yield Case(name, budget, disk, host)


class Recorded:
    """A forecaster's answers at every moment of a stream, so that it has to be asked only once."""

    def __init__(self, model: ForecastModel, trace: RoutingTrace) -> None:
        forecaster = model.predictor()
        shape = (trace.num_tokens, trace.num_layers + 1, 2, trace.num_layers, trace.num_experts)
        self.scores = np.empty(shape, np.float32)  # [T, layers served, reconsidered, L, E]
        self.chance = np.empty(shape, np.float32)
        for token, ids_LK in enumerate(trace.ids_TLK.tolist()):
            self._note(forecaster, (token, 0))
            for layer, experts in enumerate(ids_LK):
                forecaster.observe(layer, experts)
                self._note(forecaster, (token, layer + 1, 0))
                forecaster.reconsider()
                self._note(forecaster, (token, layer + 1, 1))
            forecaster.end_token()

    def _note(self, forecaster: Any, at: tuple[int, ...]) -> None:
        self.scores[at], self.chance[at] = forecaster.scores(), forecaster.next_uses()


class Repeated:
    """A `Predictor` that answers as a recorded one did. change: of its chances of use."""

    def __init__(self, recorded: Recorded, change: Callable[[Scores], Scores]) -> None:
        self._recorded, self._change = recorded, change
        self._at = [0, 0, 0]

    def observe(self, layer: int, experts: object) -> None:
        self._at[1:] = layer + 1, 0

    def reconsider(self) -> None:
        self._at[2] = 1

    def end_token(self) -> None:
        self._at = [min(self._at[0] + 1, len(self._recorded.scores) - 1), 0, 0]

    def prime(self, ids_TLK: np.ndarray[Any, Any]) -> None:
        self._at = [min(self._at[0] + len(ids_TLK), len(self._recorded.scores) - 1), 0, 0]

    def scores(self) -> Scores:
        return self._recorded.scores[tuple(self._at)].astype(np.float64)

    def next_uses(self) -> Scores:
        return self._change(self._recorded.chance[tuple(self._at)].astype(np.float64))


CHANGES: dict[str, Callable[[Scores], Scores]] = {
    "trained": lambda chance: chance,
    "sure": lambda chance: np.asarray(chance**0.4),
    "wrong": lambda chance: np.roll(chance, 1, axis=1),
}


class _Granted:
    """In place of a `PrefetchController`: so many bytes at any time."""

    share = 1.0

    def __init__(self, granted: int) -> None:
        self._granted = granted

    def allowance(self, in_flight_bytes: int = 0) -> int:
        return max(0, self._granted - in_flight_bytes)

    def end_token(self, **known: float) -> None: ...


class _Fixed:
    """In place of `LinkUse`."""

    floor = PAYS

    def end_token(self, carried: float, needed: float) -> None: ...


class _Prior:
    """In place of a `Contest`: way 0 (forecasts) runs unless way 2 (neither they nor reads ahead)
    is faster by one standard error. The other way gets a block after 4 of the first, then after 8
    of the better one, after twice as many each time the same one stays better, at most 64."""

    def __init__(self) -> None:
        self.way = self._best = self._token = 0
        self._length, self._lasting = 4 * BLOCK, 8
        self._tokens: dict[int, deque[Token]] = {0: deque(maxlen=64), 2: deque(maxlen=64)}

    def end_token(self, seconds: float, news: float) -> None:
        self._token += 1
        if self._token > _CARRIED:
            self._tokens[self.way].append((seconds, news))
        if self._token >= self._length:
            self._next_block()

    def _next_block(self) -> None:
        self._token, self._length = 0, BLOCK
        if not self._tokens[2] or self.way == self._best:
            self.way = 2 - self.way
            return
        (ahead, plain), error = _compared([self._tokens[0], self._tokens[2]])
        best = 0 if ahead <= plain + error else 2
        self._lasting = min(2 * self._lasting, 64) if best == self._best else 8
        self.way = self._best = best
        self._length = self._lasting * BLOCK


def without(governors: str, slots: int) -> Callable[[Prefetcher], None]:
    """Takes the governors that are not named from a prefetcher; the contest is an argument."""
    named = governors.split()

    def alter(prefetcher: Any) -> None:
        for source in prefetcher.sources.values():
            if "idle" in named:
                source.controller.share, source.controller._judge = 1.0, lambda: None
            elif "share" not in named:
                source.controller = _Granted(slots // 4 * _RECORD)
        if "floor" not in named:
            prefetcher._use = _Fixed()
        if "prior" in named:
            prefetcher._contest = _Prior()

    return alter


def measure(
    case: Case, trace: RoutingTrace, make: Callable[[], Any] | None, ways: list[str]
) -> dict[str, float]:
    """Milliseconds a token of `off`, `keep` and the ways named."""
    slots = slots_for(trace, case.budget)
    pace = Pace(
        _RECORD, 1e9 * case.disk, _TOKEN_S, read_s_per_byte=case.host[0], predict_s=case.host[1]
    )
    shape = trace.num_layers, trace.num_experts
    plain, table = replace(pace, predict_s=0.0), make is None
    predictor = (lambda: TokenTable(*shape)) if make is None else make

    def run(policy: Any, its_pace: Pace, **options: Any) -> float:
        done = rehearse(trace, slots, policy, its_pace, warmup=_WARMUP, **options)
        return 1e3 * float(done.token_s.mean())

    found = {"off": run(PredictorPolicy(DecayedUse(*shape)), plain, prefetch=False)}
    its = plain if table else pace
    found["keep"] = run(PredictorPolicy(predictor()), its, prefetch=False)
    for governors in ways:
        contest = "contest" in governors or "prior" in governors
        kind = RestingPolicy if contest and not table else PredictorPolicy
        alter = without(governors, slots)
        found[governors] = run(kind(predictor()), its, contest=contest, alter=alter)
    return found


def table(found: dict[Case, dict[str, float]], base: str = _ALL) -> list[str]:
    """Of each way, over all cases of a forecaster: its time by that of `base` and by `off`."""
    lines = []
    for name in dict.fromkeys(case.forecaster for case in found):
        rows = [row for case, row in found.items() if case.forecaster == name]
        for way in rows[0]:
            ratios, offs = ([row[way] / row[b] for row in rows] for b in (base, "off"))
            lines.append(
                f"{name:8} {way:20} by the first: mean {np.exp(np.mean(np.log(ratios))):.3f} "
                f"least {min(ratios):.3f} most {max(ratios):.3f}   by off: "
                f"mean {np.exp(np.mean(np.log(offs))):.3f} most {max(offs):.3f}"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--forecast", type=Path, help="without one: the token table")
    parser.add_argument("--case", default="trained,sure,wrong")
    parser.add_argument("--ways", default=",".join(_SUBSETS), help="the first is the measure")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    test = split(RoutingTrace.load(args.trace)).test
    trace = test.part(0, min(test.num_tokens, args.tokens + _WARMUP))
    recorded = Recorded(ForecastModel.load(args.forecast), trace) if args.forecast else None
    names, ways = args.case.split(",") if recorded else ["tokens"], args.ways.split(",")
    found: dict[Case, dict[str, float]] = {}
    for case in cases(names):
        make = None
        if recorded is not None:
            known, change = recorded, CHANGES[case.forecaster]
            make = lambda k=known, c=change: Repeated(k, c)  # noqa: E731
        found[case] = measure(case, trace, make, ways)
        line = {"trace": args.trace.stem, **case._asdict(), "ms": found[case]}
        print(json.dumps(line), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
    print("\n".join(table(found, ways[0])))
    print(json.dumps({"trace": args.trace.stem, "cases": len(found)}))


if __name__ == "__main__":
    main()
