"""What each governor of reading ahead gains, alone and with the others: rehearsed runs.

    python -m bench.runs.governors T.npz --forecast FILE [--case CASES] [-o R.jsonl]

Two things decide whether what is forecast is read ahead, beside a quarter of the slots at most:
`floor` (the chance of use that is asked for, by the link's load) and `prior` (a bandit: forecasts
run first, and are left for what the clock shows clearly faster). Each runs alone, both and neither
(`none`), on the test sequences at 12.5, 25 and 50 % of the experts, three disks, a host for which
reads and forecasts are free and one for which they are not. Forecasters: the trained one; one that
is too sure (chance ** 0.4); one that names the wrong experts. `off` keeps by decayed use and reads
nothing ahead, `keep` keeps by the forecaster and reads nothing ahead.
Ceiling: time by max(resident, bytes / disk), not printed; what counts is time by that of the first
way.
Clock and disk are numbers, so any machine gives the same. Prints a line a case, then a table, then
one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from chronos.common.experts.foresight.forecast import ForecastModel
from chronos.common.experts.foresight.policy import PredictorPolicy, SwitchablePolicy
from chronos.common.experts.foresight.predictor import ByRouting, DecayedUse, Scores, TokenTable
from chronos.common.experts.plan import PAYS, LinkUse
from chronos.common.experts.prefetch import Prefetcher
from chronos.common.traces.fit import split
from chronos.common.traces.rehearse import Pace, rehearse
from chronos.common.traces.simulate import slots_for
from chronos.common.traces.trace import RoutingTrace

_RECORD, _TOKEN_S, _WARMUP = 2_949_120, 0.045, 130  # the bandit first compares after 80 tokens
_FREE, _BUSY = (0.0, 0.0), (1e-10, 4e-3)  # host seconds a byte read, a token's forecasts
WAYS = ("floor prior", "floor", "prior", "none")


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


class Repeated(ByRouting):
    """A `Predictor` that answers as a recorded one did. change: of its chances of use."""

    name = "repeated"

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


class _Fixed:
    """In place of `LinkUse`."""

    floor = PAYS

    def end_token(self, carried: float, needed: float) -> None: ...


def _without_floor(prefetcher: Prefetcher) -> None:
    prefetcher._use = cast(LinkUse, _Fixed())


def measure(
    case: Case, trace: RoutingTrace, make: Callable[[], Any] | None, ways: list[str]
) -> dict[str, float]:
    """Milliseconds a token of `off`, `keep` and the ways named."""
    slots = slots_for(trace, case.budget)
    pace = Pace(
        _RECORD, 1e9 * case.disk, _TOKEN_S, read_s_per_byte=case.host[0], predict_s=case.host[1]
    )
    shape = trace.num_layers, trace.num_experts
    plain = replace(pace, predict_s=0.0)
    predictor = (lambda: TokenTable(*shape)) if make is None else make

    def run(policy: Any, its_pace: Pace, **options: Any) -> float:
        done = rehearse(trace, slots, policy, its_pace, warmup=_WARMUP, **options)
        return 1e3 * float(done.token_s.mean())

    found = {"off": run(PredictorPolicy(DecayedUse(*shape)), plain, prefetch=False)}
    its = plain if make is None else pace
    found["keep"] = run(PredictorPolicy(predictor()), its, prefetch=False)
    for way in ways:
        alter = {} if "floor" in way else {"alter": _without_floor}
        kind = SwitchablePolicy if "prior" in way else PredictorPolicy
        found[way] = run(kind(predictor()), its, **alter)
    return found


def table(found: dict[Case, dict[str, float]], base: str = WAYS[0]) -> list[str]:
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
    parser.add_argument("--ways", default=",".join(WAYS), help="the first is the measure")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    test = split(RoutingTrace.load(args.trace)).test
    trace = test.part(0, min(test.num_tokens, args.tokens + _WARMUP))
    recorded = Recorded(ForecastModel.load(args.forecast), trace) if args.forecast else None
    names, ways = args.case.split(",") if recorded else ["tokens"], args.ways.split(",")
    if recorded is None:  # a token table has nothing that could be switched off
        ways = [way for way in ways if "prior" not in way]
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
