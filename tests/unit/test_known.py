"""What a model announces: which keys are certain, for how long, and what that does to slots."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from chronos.common.disk.io import ALIGN
from chronos.common.disk.reader import RangedReader
from chronos.common.errors import UsageError
from chronos.common.experts.known import KnownAhead, known_ahead
from chronos.common.experts.residency import CERTAIN, Residency
from chronos.common.layout import inspect
from chronos.common.model.config import ModelConfig
from chronos.common.model.guest import GuestConfig
from chronos.common.text.sampling import SamplingParams, Work
from chronos.testing.fake_backend import FakeBackend
from chronos.testing.store_rig import GatedIO, feed_over, tiny_layout, until
from chronos.testing.tiny import tiny_model

CONFIG = ModelConfig(
    num_hidden_layers=3,
    num_experts=8,
    num_experts_per_tok=3,
    routing_source="history",
    num_resident_experts=2,
    num_resident_experts_per_tok=1,
)


def certain(policy: KnownAhead) -> set[tuple[int, int]]:
    return {(int(layer), int(e)) for layer, e in np.argwhere(policy.priority == CERTAIN)}


def test_what_always_stays_ranks_above_all_and_what_is_announced_above_what_is_used() -> None:
    policy = KnownAhead(CONFIG)
    for _ in range(50):
        policy.observe(0, [7])
    assert policy.announce(0, 1, [4, 5]) == ()
    rank = policy.priority
    assert np.isinf(rank[:, :2]).all() and not np.isinf(rank[:, 2:]).any()
    assert certain(policy) == {(1, 4), (1, 5)}
    assert CERTAIN > rank[0, 7] > rank[0, 6] == 0


def test_the_next_announcement_replaces_the_one_before() -> None:
    policy = KnownAhead(CONFIG)
    policy.announce(0, 1, [4, 5])
    policy.announce(0, 2, [6, 7])
    assert policy.announce(0, 1, [5, 6]) == (4, 5)
    assert certain(policy) == {(1, 5), (1, 6), (2, 6), (2, 7)} == set(policy.announced)


def test_sequences_announce_for_themselves() -> None:
    policy = KnownAhead(CONFIG)
    policy.announce(0, 1, [4, 5])
    policy.fork(0, 1)
    policy.announce(1, 1, [5, 6])
    assert certain(policy) == {(1, 4), (1, 5), (1, 6)}
    policy.drop(0)
    assert certain(policy) == {(1, 5), (1, 6)}
    policy.drop(1)
    policy.drop(1)
    assert certain(policy) == set() and policy.announced == []


def test_inspect_says_what_room_such_a_model_needs(tmp_path: Path) -> None:
    history = {"routing_source": "history", "num_resident_experts": 2}
    folder = tiny_model(tmp_path / "m", num_resident_experts_per_tok=1, **history)
    config = ModelConfig.from_json(folder)
    least, all_of_them = config.least_slots, config.num_routed_experts
    assert config.num_experts_per_tok < least < all_of_them
    shares = [f"{100 * count / all_of_them}%" for count in (least - 1, least)]
    held = inspect(folder, budgets=shares)["budgets"]
    assert [each["enough"] for each in held] == [False, True]


def test_the_least_room_is_what_stays_and_what_one_token_is_told() -> None:
    assert KnownAhead(CONFIG).least == 3 * (2 + 2)
    mixed = dataclasses.replace(CONFIG, routing_source=("gate", "history", "history"))
    policy = KnownAhead(mixed)
    assert policy.least == 2 * (2 + 2) + 3
    assert policy.resident == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert policy.streamed(0, [0, 5]) == [] and policy.streamed(1, [0, 5, 2]) == [5, 2]


def test_only_models_that_announce_have_it() -> None:
    assert isinstance(known_ahead(CONFIG), KnownAhead)
    assert known_ahead(dataclasses.replace(CONFIG, routing_source="informed"), "lfu") is None
    guest = GuestConfig.__new__(GuestConfig)
    assert known_ahead(guest, "lfu") is None
    with pytest.raises(UsageError, match="announces which experts it needs next"):
        known_ahead(CONFIG, "lfu")


def filled(slots: int) -> tuple[Residency, KnownAhead]:
    """What always stays, and other experts of layer 0 in the slots beside it."""
    policy = KnownAhead(CONFIG)
    residency = Residency(3, 8, slots, policy)
    others = [(layer, e) for layer in range(3) for e in range(2, 8)]
    for key in [*policy.resident, *others][:slots]:
        admission = residency.admit(key, demand=True)
        assert admission is not None
        residency.mark_ready(admission.slot)
    return residency, policy


def test_an_announced_expert_takes_any_slot_that_holds_nothing_certain() -> None:
    residency, policy = filled(9)  # three slots beside those of what stays
    policy.announce(0, 2, [5, 6])
    policy.announce(0, 1, [5, 6])
    residency.reconsider()
    taken = [residency.admit((2, 5), demand=False), residency.admit((2, 6), demand=False)]
    last = residency.admit((1, 5), demand=False)
    # Guesses may have half of the slots at most, and are spared for a time; these are no guesses.
    assert None not in taken and last is not None
    for admission in (*taken, last):
        assert admission is not None
        residency.mark_ready(admission.slot)
    assert residency.admit((1, 6), demand=False) is None  # it would displace one as certain
    assert set(policy.resident) <= residency.ready.keys()


def test_a_need_outranks_what_is_announced_and_never_what_stays() -> None:
    residency, policy = filled(7)  # one slot beside those of what stays
    policy.announce(0, 2, [5, 6])
    residency.reconsider()
    admission = residency.admit((2, 5), demand=False)
    assert admission is not None
    residency.mark_ready(admission.slot)
    need = residency.admit((0, 7), demand=True)
    assert need is not None and need.evicted == (2, 5)
    assert residency.admit((0, 6), demand=True) is None  # all others stay
    residency.mark_ready(need.slot)
    assert residency.admit((0, 6), demand=True) is not None


def test_once_used_it_is_spared_no_longer() -> None:
    residency, policy = filled(8)
    policy.announce(0, 2, [5, 6])
    residency.reconsider()
    for expert in (5, 6):
        admission = residency.admit((2, expert), demand=False)
        assert admission is not None
        residency.mark_ready(admission.slot)
    policy.announce(0, 2, [6, 7])
    residency.reconsider()
    admission = residency.admit((2, 7), demand=False)
    assert admission is not None and admission.evicted == (2, 5)


def test_what_is_announced_is_read_behind_what_is_needed_and_kept(tmp_path: Path) -> None:
    layout, io, policy = tiny_layout(tmp_path), GatedIO(), KnownAhead(CONFIG)
    work = [Work(0, [1], SamplingParams())]
    capacity = policy.least * layout.record_nbytes
    with (
        RangedReader(threads=1, chunk_bytes=ALIGN, io=io) as reader,
        feed_over(FakeBackend(), layout, capacity, policy=policy, prefetch=True, top_k=3,
                  reader=reader) as feed,
    ):  # fmt: skip
        until(lambda: feed.resident() >= set(policy.resident))  # read without being asked for
        io.begun.clear()
        io.gate.clear()
        with feed.step(work) as step:
            assert step.wants("announced") and not step.wants("lookahead")
            step.announce(0, [6])
            lease = step.acquire(0, [0, 2, 4])
            io.gate.set()
            assert {expert for expert, _ in lease} == {0, 2, 4}
            until(lambda: (0, 6) in feed.resident())
            assert io.begun == [layout.records[0, expert].offset for expert in (2, 4, 6)]
            for layer, expert in ((1, 7), (2, 7), (1, 5), (2, 5), (1, 3), (2, 3), (1, 2), (2, 2)):
                assert dict(step.acquire(layer, [expert])).keys() == {expert}
            # Ten experts went through six slots: others made room for each other.
            assert (0, 6) in feed.resident() and len(feed.resident()) == policy.least
            step.done(work[0])
        with feed.step(work) as step:
            step.announce(0, [5])
            assert len(dict(step.acquire(0, [0, 6, 4]))) == 3
            step.done(work[0])
        stats = feed.stats()
        assert (stats.announced, stats.announced_late, stats.unannounced) == (1, 0, 1)


def test_without_reading_ahead_the_counts_are_the_same(tmp_path: Path) -> None:
    layout, policy = tiny_layout(tmp_path), KnownAhead(CONFIG)
    work = [Work(0, [1], SamplingParams())]
    capacity = policy.least * layout.record_nbytes
    with feed_over(FakeBackend(), layout, capacity, policy=policy, top_k=3) as feed:
        for _ in range(3):
            with feed.step(work) as step:
                for layer in range(3):
                    step.announce(layer, [5, 6])
                    assert len(dict(step.acquire(layer, [0, 5, 6]))) == 3
                step.done(work[0])
        stats = feed.stats()
        # The first token's are the prompt's; then all stays where it is.
        assert (stats.announced, stats.announced_late, stats.unannounced) == (12, 0, 0)
        assert stats.bytes_prefetched == stats.bytes_loaded == 0
