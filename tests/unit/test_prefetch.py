"""The prefetcher asks for what pays, counts what became of it, and is quiet where all is there."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from chronos.common.experts.bandit import BLOCK
from chronos.common.experts.prefetch import LOOKAHEAD, NEXT_GATE, PREDICTOR, Prefetcher
from chronos.common.experts.residency import Counts
from chronos.common.experts.stats import TokenReport
from chronos.common.model.weights import Key

LAYERS, EXPERTS, TOP_K, RECORD = 3, 6, 2, 1000


class FakeStore:
    """Remembers what it was asked for; grants every prefetch."""

    def __init__(self) -> None:
        self.report = TokenReport()
        self.held: set[Key] = set()
        self.asked_by: dict[Key, str] = {}  # prefetched, not needed yet
        self.log: list[tuple[str, Any]] = []

    def acquire(self, layer: int, experts: Sequence[int]) -> None:
        self.log.append(("acquire", (layer, list(experts))))
        wanted = {(layer, expert) for expert in experts}
        self.report.hits += len(wanted & self.held)
        for key in wanted & self.held & self.asked_by.keys():
            self.report.of(self.asked_by.pop(key)).used += 1
        self.report.misses += len(wanted - self.held)
        self.held |= wanted

    def prefetch(self, keys: Sequence[Key], asked_by: str) -> list[Key]:
        self.log.append(("prefetch", list(keys)))
        new = [key for key in keys if key not in self.held]
        self.held.update(new)
        self.asked_by.update(dict.fromkeys(new, asked_by))
        self.report.of(asked_by).asked += len(new)
        return new

    def evict(self, key: Key) -> None:
        self.held.remove(key)
        self.report.of(self.asked_by.pop(key)).wasted += 1

    def resident(self) -> frozenset[Key]:
        return frozenset(self.held)

    def end_token(self) -> TokenReport:
        report, self.report = self.report, TokenReport()
        return report


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


class Forecast(Counts):
    """A policy's forecasts, as a test sets them."""

    forecasts = True

    def __init__(self) -> None:
        self.chance = np.zeros((LAYERS, EXPERTS))
        self.priority = self.chance
        self.disabled: list[bool] = []

    def begin_token(self, token: int) -> None:
        raise AssertionError("not asked for")

    def observe(self, layer: int, experts: object, by: object = None) -> None: ...
    def end_token(self) -> None: ...
    def disable(self, disabled: bool) -> None:
        self.disabled.append(disabled)

    def next_uses(self) -> np.ndarray:
        return self.chance


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def over_a_link(store: FakeStore, clock: Clock, slots: int = 8, **options: Any) -> Prefetcher:
    """Over a link that carries a hundred records a second, nothing in flight."""
    stats = SimpleNamespace(bytes_read=100 * RECORD, busy_s=1.0)
    reader: Any = SimpleNamespace(stats=stats, in_flight_prefetch_bytes=lambda: 0)
    return Prefetcher(
        store,
        shape=(LAYERS, EXPERTS),
        top_k=TOP_K,
        record_bytes=RECORD,
        capacity_bytes=slots * RECORD,
        reader=reader,
        clock=clock,
        **options,
    )


@pytest.fixture
def prefetcher(store: FakeStore, clock: Clock) -> Prefetcher:
    return over_a_link(store, clock)


def sure_of(*keys: Key) -> np.ndarray:
    """A forecast [1, L, E] that is certain of these."""
    probs = np.full((1, LAYERS, EXPERTS), 1e-3)
    for layer, expert in keys:
        probs[0, layer, expert] = 1 / TOP_K
    return probs


def acquire(prefetcher: Prefetcher, layer: int, experts: Sequence[int]) -> None:
    """What a step does for a layer."""
    store: Any = prefetcher.store
    store.acquire(layer, experts)
    prefetcher.acquired(layer, experts)


def end_token(prefetcher: Prefetcher) -> None:
    store: Any = prefetcher.store
    prefetcher.end_token(store.end_token())


def token(
    prefetcher: Prefetcher,
    routed: Sequence[Key],
    forecast: np.ndarray | None = None,
    seconds: float = 1.0,
) -> bool:
    """One decoded token; returns whether a forecast was wanted."""
    prefetcher.begin_token(0)
    wanted = prefetcher.wanted()
    for layer in range(LAYERS):
        acquire(prefetcher, layer, [e for at, e in routed if at == layer])
        if layer == 0 and wanted and forecast is not None:
            prefetcher.forecast(forecast)
    clock: Any = prefetcher._clock
    clock.now += seconds
    end_token(prefetcher)
    return wanted


def test_a_sure_forecast_of_absent_experts_is_prefetched_best_first(
    store: FakeStore, prefetcher: Prefetcher
) -> None:
    token(prefetcher, [(0, 0)])
    store.held.add((1, 4))
    token(prefetcher, [(0, 0)], sure_of((1, 4), (2, 5), (0, 3)))
    # (1, 4) is here, layer 0 has been served, the rest is too unlikely.
    assert [keys for what, keys in store.log if what == "prefetch"] == [[(2, 5)]]


def test_demand_reads_come_before_the_forecast_ones(
    store: FakeStore, prefetcher: Prefetcher
) -> None:
    token(prefetcher, [(0, 0)])
    store.log.clear()
    token(prefetcher, [(0, 1), (1, 2)], sure_of((2, 5)))
    assert [what for what, _ in store.log] == ["acquire", "prefetch", "acquire", "acquire"]


def test_nothing_is_forecast_while_nothing_misses(store: FakeStore, prefetcher: Prefetcher) -> None:
    routed = [(0, 0), (1, 1), (2, 2)]
    token(prefetcher, routed)
    assert token(prefetcher, routed, sure_of())  # the token before missed
    assert not token(prefetcher, routed, sure_of((1, 5)))
    assert token(prefetcher, [(0, 3)]) is False
    assert token(prefetcher, routed)  # it missed again


def test_a_prompt_asks_layer_by_layer(store: FakeStore, prefetcher: Prefetcher) -> None:
    use_LE = np.zeros((LAYERS, EXPERTS))
    use_LE[0, 0], use_LE[1, [2, 4]], use_LE[2, [1, 3]] = 9.0, (1.0, 2.0), (5.0, 5.0)
    acquire(prefetcher, 0, [0])
    prefetcher.forecast_prompt(use_LE)
    acquire(prefetcher, 1, [4])
    acquire(prefetcher, 2, [1])
    assert store.log == [
        ("acquire", (0, [0])),
        ("prefetch", [(1, 4), (1, 2)]),
        ("acquire", (1, [4])),
        ("prefetch", [(2, 1), (2, 3)]),
        ("acquire", (2, [1])),
    ]


def test_the_predictor_asks_between_layers_and_at_the_end_of_the_token(
    store: FakeStore, clock: Clock
) -> None:
    forecast = Forecast()
    prefetcher = over_a_link(store, clock, slots=12, policy=forecast)
    token(prefetcher, [(0, 0)])
    store.log.clear()
    forecast.chance = np.zeros((LAYERS, EXPERTS))
    forecast.chance[1, 3] = forecast.chance[2, 4] = 0.9
    forecast.chance[2, 5] = 0.3  # more likely a waste
    forecast.priority = forecast.chance * np.array([[1.0], [0.5], [1.0]])  # layer 2 comes sooner
    token(prefetcher, [(0, 0), (1, 1)])
    asked = [keys for what, keys in store.log if what == "prefetch"]
    assert asked == [[(2, 4), (1, 3)], [], []]  # once; later both are here
    assert prefetcher.to_json()[PREDICTOR]["records"] == 2


def test_in_a_prompt_the_predictor_is_not_asked(store: FakeStore, clock: Clock) -> None:
    forecast = Forecast()
    prefetcher = over_a_link(store, clock, policy=forecast)
    token(prefetcher, [(0, 0)])
    store.log.clear()
    forecast.chance = np.ones((LAYERS, EXPERTS))
    for layer in range(LAYERS):
        acquire(prefetcher, layer, [0])
    assert [what for what, _ in store.log] == ["acquire"] * LAYERS


def test_at_a_prompts_end_what_it_promises_is_preloaded_within_a_quarter(
    store: FakeStore, clock: Clock
) -> None:
    forecast = Forecast()
    prefetcher = over_a_link(store, clock, policy=forecast)
    forecast.chance[1, :] = 0.9, 0.8, 0.7, 0.6, 0.3, 0.2
    store.held.add((1, 0))
    prefetcher.end_prompt()
    assert store.log == [("prefetch", [(1, 1), (1, 2)])]


def test_reads_longer_than_a_token_look_further_ahead(store: FakeStore, clock: Clock) -> None:
    forecast = Forecast()
    forecast.chance[1, 3] = 0.3  # now unlikely, within two tokens likely
    prefetcher = over_a_link(store, clock, policy=forecast)
    prefetcher._room = lambda: 1000 * RECORD  # type: ignore[method-assign]
    token(prefetcher, [(0, 0)])
    assert ("prefetch", [(1, 3)]) not in store.log
    prefetcher._record_bytes = 150 * RECORD  # 1.5 s a record, a token takes 1 s
    token(prefetcher, [(0, 1)])
    assert ("prefetch", [(1, 3)]) in store.log


def test_the_next_gate_asks_for_what_is_absent_within_a_quarter(
    store: FakeStore, prefetcher: Prefetcher
) -> None:
    token(prefetcher, [(0, 0)])
    store.held.add((1, 2))
    assert prefetcher.wanted(NEXT_GATE)
    prefetcher.begin_token(0)
    acquire(prefetcher, 0, [1])
    prefetcher.forecast_next(1, [2, 4, 5])
    assert store.log[-1] == ("prefetch", [(1, 4), (1, 5)])
    acquire(prefetcher, 1, [4, 3])
    end_token(prefetcher)
    assert prefetcher.to_json() == {NEXT_GATE: {"records": 2, "used": 1}}


@pytest.mark.parametrize("slots", [7, 8, 15])
def test_in_a_token_at_most_a_quarter_of_the_slots_is_asked_for(
    store: FakeStore, clock: Clock, slots: int
) -> None:
    """By all sources together, and however often they are asked."""
    forecast = Forecast()
    prefetcher = over_a_link(store, clock, slots, policy=forecast)
    token(prefetcher, [(0, 0)])
    store.log.clear()
    forecast.chance[1], forecast.chance[2] = 0.9, 0.8
    prefetcher.begin_token(0)
    for layer in range(LAYERS):
        acquire(prefetcher, layer, [0])
        prefetcher.forecast(sure_of((1, 4), (1, 5), (2, 4)))
        prefetcher.forecast_next(2, range(EXPERTS))
    asked = [key for what, keys in store.log if what == "prefetch" for key in keys]
    assert len(asked) == slots // 4
    assert not any(prefetcher.wanted(source) for source in (LOOKAHEAD, NEXT_GATE))


def test_what_is_still_on_its_way_counts_as_asked_for(store: FakeStore, clock: Clock) -> None:
    prefetcher, in_flight = over_a_link(store, clock), 2 * RECORD
    reader: Any = prefetcher._reader
    reader.in_flight_prefetch_bytes = lambda: in_flight
    assert not token(prefetcher, [(0, 0)], sure_of((1, 4), (2, 5)))
    in_flight = RECORD
    assert token(prefetcher, [(0, 1)], sure_of((1, 4), (2, 5)))
    assert store.log.count(("prefetch", [(1, 4)])) == 1  # one of the two
    in_flight = 100 * RECORD
    assert not prefetcher.wanted()


def test_a_source_has_a_few_reads_before_some_were_used(store: FakeStore, clock: Clock) -> None:
    prefetcher = over_a_link(store, clock, slots=100)
    everything = [(layer, expert) for layer in (1, 2) for expert in range(EXPERTS)]
    token(prefetcher, [(0, 0)], sure_of(*everything))
    assert prefetcher._totals[LOOKAHEAD].asked == 4
    assert not prefetcher.wanted(LOOKAHEAD) and prefetcher.wanted(NEXT_GATE)  # each by itself
    token(prefetcher, [(0, 1), (1, 0), (1, 1), (1, 2)])
    assert prefetcher._totals[LOOKAHEAD].used == 3
    token(prefetcher, [(0, 2)], sure_of(*everything))
    assert prefetcher._totals[LOOKAHEAD].asked == 12  # all of them


def test_a_source_that_is_wrong_spoils_few_reads(store: FakeStore, prefetcher: Prefetcher) -> None:
    for _ in range(40):
        for key in [key for key in store.held if key not in store.asked_by]:
            store.held.remove(key)  # so that everything misses
        token(prefetcher, [(0, 0), (1, 1), (2, 2)], sure_of((1, 5), (2, 4), (2, 3), (1, 4), (1, 3)))
    assert 4 < prefetcher._totals[LOOKAHEAD].asked <= 7  # one more in a while, to be tried again


def test_what_was_evicted_or_met_a_prompt_makes_room(
    store: FakeStore, prefetcher: Prefetcher
) -> None:
    sure = sure_of((1, 5), (2, 4), (2, 3), (1, 4))
    for end in ("evicted", "prompt"):
        before = prefetcher._totals[LOOKAHEAD].asked
        for _ in range(3):
            token(prefetcher, [(0, 0), (0, before % 5 + 1)], sure)
            store.held.discard((0, 0))
        assert prefetcher._totals[LOOKAHEAD].asked == before + 4
        for key in list(store.asked_by):
            store.evict(key)
        if end == "prompt":
            store.end_token()  # its report is nobody's
            prefetcher.end_prompt()
        else:
            end_token(prefetcher)
        assert prefetcher._starts[LOOKAHEAD].room == 4


def test_after_a_prompt_nothing_is_left_to_ask_for_layer_by_layer(
    store: FakeStore, prefetcher: Prefetcher
) -> None:
    prefetcher.forecast_prompt(np.ones((LAYERS, EXPERTS)))
    prefetcher.end_prompt()
    before = len(store.log)
    acquire(prefetcher, 1, [0])
    assert [what for what, _ in store.log[before:]] == ["acquire"]


@pytest.mark.parametrize("can_disable", [True, False])
def test_forecasts_that_can_be_disabled_leave_a_block_to_tokens_without(
    store: FakeStore, clock: Clock, can_disable: bool
) -> None:
    forecast = Forecast()
    forecast.can_disable = can_disable
    prefetcher = over_a_link(store, clock, policy=forecast)
    wanted = []
    for _ in range(6 * BLOCK):
        store.held.clear()  # so that each token misses
        seconds = 1.1 if forecast.disabled and forecast.disabled[-1] else 1.0
        asked = token(prefetcher, [(0, 1)], seconds=seconds)
        wanted.append([asked, prefetcher.wanted(NEXT_GATE)])
    blocks = [np.array(wanted[at : at + BLOCK]) for at in range(0, 6 * BLOCK, BLOCK)]
    lookahead = [bool(block[:, 0].all()) for block in blocks]
    assert lookahead == [True] * 4 + [not can_disable, True]
    disabled = [at for at, off in enumerate(forecast.disabled) if off]
    assert disabled == (list(range(4 * BLOCK - 1, 5 * BLOCK - 1)) if can_disable else [])
    after = [at for at, (_, gate) in enumerate(wanted) if not gate]
    assert after == disabled  # no source is asked then


def test_without_forecasts_to_disable_times_change_nothing(store: FakeStore, clock: Clock) -> None:
    """A policy that only counts, and a LookaheadRouter."""
    prefetcher = over_a_link(store, clock)
    for number in range(200):
        store.held.clear()
        assert token(prefetcher, [(0, 1)], seconds=1.0 + number % 7) or number == 0


def test_reuse_distance_is_how_long_ago_a_tokens_experts_were_used(
    store: FakeStore, clock: Clock
) -> None:
    forecast, told = Forecast(), []
    forecast.can_disable = True
    prefetcher = over_a_link(store, clock, policy=forecast)
    bandit = prefetcher._bandit
    assert bandit is not None
    bandit.end_token = lambda s, distance: told.append(distance)  # type: ignore[method-assign,assignment]
    for routed in ([(0, 0), (2, 5)], [(0, 0)], [(2, 5)], [(0, 0), (0, 1)]):
        token(prefetcher, routed)
    assert told == [12.0, 0.0, 1.0, 7.0]  # never used: 64 tokens ago


@pytest.mark.parametrize(
    ("read", "wasted", "asked"), [(80, 0, False), (20, 0, True), (80, 60, True)]
)
def test_on_a_busy_link_only_the_likely_is_read_ahead(
    store: FakeStore, clock: Clock, read: int, wasted: int, asked: bool
) -> None:
    """Of the hundred records a token that the link carries, `read` are; what was no use is no
    need: it does not make the link busy."""
    forecast = Forecast()
    forecast.chance[1, 3] = 0.7
    prefetcher = over_a_link(store, clock, policy=forecast)
    stats: Any = prefetcher._reader.stats
    prefetcher._room = lambda: 10 * RECORD  # type: ignore[method-assign]
    stats.bytes_read += read * RECORD
    stats.busy_s += read / 100
    store.report.of(PREDICTOR).wasted += wasted
    token(prefetcher, [(0, 0)])
    store.held.discard((1, 3))
    store.log.clear()
    token(prefetcher, [(0, 0)])
    assert (("prefetch", [(1, 3)]) in store.log) == asked
    forecast.chance[1, 3] = 0.9
    token(prefetcher, [(0, 0)])
    assert ("prefetch", [(1, 3)]) in store.log


def test_the_link_is_the_slower_of_disk_and_copies(store: FakeStore, clock: Clock) -> None:
    """A disk of 100 records a second behind copies of 400."""
    prefetcher = over_a_link(store, clock, copy_s=1 / 400)
    reads = prefetcher._reader.stats
    assert prefetcher._link(reads, 0, 0) == pytest.approx(100 * RECORD)
    for _ in range(100):  # nothing comes from the disk any more
        rate = prefetcher._link(reads, 5, 5)
    assert rate == pytest.approx(400 * RECORD)
    for _ in range(100):
        rate = prefetcher._link(reads, 4, 2)  # half of it does
    assert rate == pytest.approx(200 * RECORD, rel=0.01)
