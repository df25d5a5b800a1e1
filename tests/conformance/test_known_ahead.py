"""Models that announce what they need: streamed as resident, and nothing needed that was not said.

Every figure here is a count; whether a read came in time is measured nowhere.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.disk.io import FileIO
from chronos.common.errors import BudgetError, UsageError
from chronos.common.experts.known import KnownAhead
from chronos.common.layout import open_layout, pack
from chronos.common.text.sampling import PIECE, SamplingParams, Work
from chronos.run.engine import Engine, load
from chronos.run.sequence import OneSequence
from chronos.testing.tiny import CONFIG, tiny_model

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=1.3, top_k=60, seed=11)
HISTORY: dict[str, Any] = {
    "routing_source": "history",
    "num_experts_per_tok": 3,
    "num_resident_experts": 2,
    "num_resident_experts_per_tok": 1,
    "max_position_embeddings": 4 * PIECE,
}
MODELS: dict[str, dict[str, Any]] = {
    "history": HISTORY,
    "one by one": HISTORY | {"num_resident_experts": 3, "num_resident_experts_per_tok": 2},
    "two decays": HISTORY | {"history_decay": (0.5, 0.95)},
    "each layer its own": HISTORY | {"routing_source": ("gate", "history", "informed")},
}
LAYERS, EXPERTS = CONFIG.num_hidden_layers, CONFIG.num_experts
PROMPTS = [
    [5],
    [80, 41, 7],
    [7 * i % CONFIG.vocab_size for i in range(3 * CONFIG.sliding_window)],
    [11 * i % CONFIG.vocab_size for i in range(PIECE + 30)],
]
STEPS = 12


def policy_of(model: str) -> KnownAhead:
    return KnownAhead(dataclasses.replace(CONFIG, **MODELS[model]))


def streamed_needs(model: str) -> int:
    """Of a token, in all layers."""
    changes = MODELS[model]
    sources = changes["routing_source"]
    layers = LAYERS if sources == "history" else sources.count("history")
    return layers * (changes["num_experts_per_tok"] - changes["num_resident_experts_per_tok"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, changes in MODELS.items():
        folder = tmp_path_factory.mktemp("known")
        pack(tiny_model(folder / "model", **changes), folder / "packed")
        found[name] = folder / "packed"
    return found


def opened(backend: Any, folder: Path, budget: str | int, **options: Any) -> Engine:
    """budget: as `load` takes it, or a number of experts."""
    if isinstance(budget, int):
        budget *= open_layout(folder).record_nbytes
    engine = load(folder, backend=backend.name, budget=budget, **options)
    engine.stop_ids = frozenset()
    return engine


def rollout(
    session: Any, prompt: Sequence[int], seq: int = 0, steps: int = STEPS
) -> tuple[list[int], np.ndarray]:
    """Greedy tokens, and the logits that each was taken from."""
    runner = OneSequence(session, seq=seq)
    tokens, logits = [runner.prefill(prompt, GREEDY)], [runner.logits()]
    for _ in range(steps):
        tokens.append(runner.decode(tokens[-1], GREEDY))
        logits.append(runner.logits())
    return tokens, np.stack(logits)


@pytest.fixture(scope="module")
def resident(backend: Any, folders: dict[str, Path]) -> dict[str, Any]:
    found = {}
    for name, folder in folders.items():
        with opened(backend, folder, "resident") as engine:
            found[name] = [rollout(engine.session, prompt) for prompt in PROMPTS]
    return found


@pytest.mark.parametrize("prefetch", ["auto", "off"])
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("model", MODELS)
def test_streamed_is_resident_and_every_streamed_need_was_announced(
    backend: Any,
    folders: dict[str, Path],
    resident: dict[str, Any],
    model: str,
    spare: int,
    prefetch: str,
) -> None:
    """spare: slots above the least that such a model takes."""
    slots = policy_of(model).least + spare
    with opened(backend, folders[model], slots, prefetch=prefetch) as engine:
        assert engine.feed is not None and engine.feed.slots == slots
        for prompt, (tokens, logits) in zip(PROMPTS, resident[model], strict=True):
            before = engine.feed.stats()
            found, found_logits = rollout(engine.session, prompt)
            stats = engine.feed.stats().minus(before)
            assert found == tokens
            np.testing.assert_array_equal(found_logits, logits)
            assert stats.announced == STEPS * streamed_needs(model)
            assert stats.unannounced == 0
            assert 0 <= stats.announced_late <= stats.announced
            assert stats.peak_expert_bytes <= engine.budget_bytes
            if prefetch == "off":
                assert stats.bytes_prefetched == 0
        assert engine.feed.ahead is None  # nothing is forecast


class JitterIO(FileIO):
    """Every read takes a random while, so experts arrive in another order each time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        time.sleep(1e-4 * self.random.random())
        return super().preadv(fd, buffers, offset)


def test_a_hundred_replies_with_experts_arriving_in_any_order(
    backend: Any, folders: dict[str, Path], resident: dict[str, Any]
) -> None:
    least = policy_of("history").least
    with opened(backend, folders["history"], least, io=JitterIO(1)) as engine:
        for seq in range(100):
            tokens, _ = rollout(engine.session, PROMPTS[1], seq, steps=3)
            assert tokens == resident["history"][1][0][:4]
            engine.session.drop(seq)
        assert engine.feed is not None and engine.feed.known is not None
        stats = engine.feed.stats()
        assert stats.announced == 100 * 3 * streamed_needs("history")
        assert stats.unannounced == 0
        assert engine.feed.known.announced == []  # with its sequence goes what it announced


@pytest.mark.parametrize(("model", "spare"), [("history", 0), ("each layer its own", 4)])
def test_sequences_side_by_side_write_what_each_writes_alone(
    backend: Any, folders: dict[str, Path], model: str, spare: int
) -> None:
    sampling = [GREEDY, SAMPLED, GREEDY, SAMPLED]
    with opened(backend, folders[model], "resident") as engine:
        alone = [
            engine.generate(prompt, each, max_tokens=STEPS).result.tokens
            for prompt, each in zip(PROMPTS, sampling, strict=True)
        ]
    slots = policy_of(model).least + spare
    with opened(backend, folders[model], slots) as engine:
        for at_a_time in (4, 2):
            results = engine.generate_many(
                PROMPTS, sampling, max_tokens=STEPS, max_sequences=at_a_time
            )
            assert [result.tokens for result in results] == alone
        assert engine.feed is not None
        stats = engine.feed.stats()
        assert stats.announced > 0 and stats.unannounced == 0


def test_a_fork_knows_what_its_sequence_announced(
    backend: Any, folders: dict[str, Path], resident: dict[str, Any]
) -> None:
    tokens, logits = resident["history"][2]
    slots = policy_of("history").least
    with opened(backend, folders["history"], slots) as engine:
        session, runner = engine.session, OneSequence(engine.session)
        runner.prefill(PROMPTS[2], GREEDY)
        for token in tokens[:4]:
            runner.decode(token, GREEDY)
        session.fork(0, 1)
        session.fork(0, 2)
        session.drop(0)
        for at, token in enumerate(tokens[4:STEPS], start=4):
            work = [Work(1, [token], GREEDY), Work(2, [token if at < 8 else 9], GREEDY)]
            assert session.run(work)[0] == tokens[at + 1]
            np.testing.assert_array_equal(session.logits(1), logits[at + 1])
            same = np.array_equal(session.logits(1), session.logits(2))
            assert same == (at < 8)
        assert engine.feed is not None
        assert engine.feed.stats().unannounced == 0 and engine.feed.stats().announced > 0


def test_a_conversation_goes_on_behind_a_second_prompt(
    backend: Any, folders: dict[str, Path]
) -> None:
    answers = []
    for budget in ("resident", policy_of("history").least):
        with opened(backend, folders["history"], budget) as engine:
            runner, found = OneSequence(engine.session), []
            for prompt in (PROMPTS[1], PROMPTS[2]):
                found.append(runner.prefill(prompt, GREEDY))
                for _ in range(5):
                    found.append(runner.decode(found[-1], GREEDY))
            answers.append(found)
            if engine.feed is not None:
                assert engine.feed.stats().announced == 10 * streamed_needs("history")
                assert engine.feed.stats().unannounced == 0
    assert answers[0] == answers[1]


def test_a_need_that_was_not_announced_is_counted(backend: Any, folders: dict[str, Path]) -> None:
    """The control of the tests above: routing that is forced from outside was never announced."""
    forced = np.array([[0, 2, 3]], np.int64), np.full((1, 3), 1 / 3, np.float32)
    with opened(backend, folders["history"], policy_of("history").least) as engine:
        runner = OneSequence(engine.session)
        token = runner.prefill(PROMPTS[1], GREEDY)
        assert engine.feed is not None and engine.feed.known is not None
        said = set(engine.feed.known.announced)
        [out] = engine.session.run([Work(0, [token], GREEDY)], route_override=lambda *_: forced)
        assert isinstance(out, int)
        stats = engine.feed.stats()
        needed = {(layer, expert) for layer in range(LAYERS) for expert in (2, 3)}
        assert needed - said
        assert stats.unannounced == len(needed - said)
        assert stats.announced == len(needed & said)


def test_what_always_stays_is_read_once(backend: Any, folders: dict[str, Path]) -> None:
    policy = policy_of("history")
    with opened(backend, folders["history"], policy.least) as engine:
        for seq, prompt in enumerate(PROMPTS):
            rollout(engine.session, prompt, seq)
            assert engine.feed is not None
            assert set(policy.resident) <= engine.feed.resident()
        read = engine.feed.stats()
        assert (
            read.bytes_loaded
            == len(policy.resident) * open_layout(folders["history"]).record_nbytes
        )


def test_a_budget_below_what_it_takes_is_refused(backend: Any, folders: dict[str, Path]) -> None:
    for model in MODELS:
        least, nbytes = policy_of(model).least, open_layout(folders[model]).record_nbytes
        with pytest.raises(BudgetError, match=f"take {least} experts") as refused:
            opened(backend, folders[model], least - 1)
        assert f"at least {least * nbytes} bytes" in refused.value.fix


@pytest.mark.parametrize("predictor", ["lfu", "token-table", "forecast", "mine.safetensors"])
def test_there_is_nothing_to_forecast(
    backend: Any, folders: dict[str, Path], predictor: str
) -> None:
    with pytest.raises(UsageError, match="announces which experts"):
        opened(backend, folders["history"], "75%", predictor=predictor)


def test_fallback_does_not_wait_for_what_was_announced(
    backend: Any, folders: dict[str, Path]
) -> None:
    with opened(backend, folders["history"], "60%", miss="fallback", io=JitterIO(3)) as engine:
        stats = engine.generate(PROMPTS[1], max_tokens=STEPS).result.stats
    assert stats["unannounced"] == 0 and stats["announced"] > 0
    assert stats["stall_s"] == 0.0
