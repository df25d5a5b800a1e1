"""Streaming changes nothing but memory: acceptance checks 4, 5 and 10, on every backend.

The reference is the same backend with all experts in the model; logits are compared bit for bit
after the prompt and after every decoded token.
"""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.disk.io import FileIO
from chronos.common.errors import StoreError, UsageError
from chronos.common.experts.feed import FeedStep
from chronos.common.experts.foresight.forecast import ForecastModel
from chronos.common.experts.foresight.network import Geometry
from chronos.common.experts.residency import NOBODY
from chronos.common.layout import open_layout, pack
from chronos.common.model.weights import Key
from chronos.common.text.sampling import SamplingParams
from chronos.run.engine import Engine, load
from chronos.run.sequence import OneSequence
from chronos.testing.tiny import CONFIG, tiny_model, tiny_packed

LAYERS, EXPERTS, TOP_K = CONFIG.num_hidden_layers, CONFIG.num_experts, CONFIG.num_experts_per_tok
KEYS = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
GREEDY = SamplingParams()
LONG = [7 * i % CONFIG.vocab_size for i in range(3 * CONFIG.sliding_window)]
SHORT = [5, 80, 41]


def orders() -> dict[str, Any]:
    """Cluster layouts: by layer, one expert a cluster, across layers, shuffled."""
    shuffled = random.Random(3).sample(KEYS, len(KEYS))
    across: list[list[Key]] = [[(layer, e) for layer in range(LAYERS)] for e in range(EXPERTS)]
    return {
        "layer": "layer",
        "single": [[key] for key in KEYS],
        "across": across,
        "shuffled": [shuffled[at : at + 5] for at in range(0, len(KEYS), 5)],
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("streaming") / "model")


@pytest.fixture(scope="module")
def folders(source: Path) -> dict[str, Path]:
    packed = {}
    for name, order in orders().items():
        packed[name] = source.with_name(name)
        pack(source, packed[name], order=order)
    return packed


class Rollout:
    """What a model answered: logits after the prompt and after each token, tokens, routed needs."""

    def __init__(self, engine: Engine, prompt: Sequence[int], steps: int = 12) -> None:
        runner, store = OneSequence(engine.session, record=True), engine.feed
        self.live: list[int] = []
        before = store.stats() if store else None
        self.tokens = [runner.prefill(prompt, GREEDY)]
        self.logits = [runner.logits()]
        for _ in range(steps):
            self.tokens.append(runner.decode(self.tokens[-1], GREEDY))
            self.logits.append(runner.logits())
            if store:
                self.live.append(store.stats().live_bytes)
        self.stats = store.stats().minus(before) if store and before else None
        self.routed = sum(map(routed_needs, routing_by_call(runner.routing(), len(prompt))))

    def assert_same(self, other: Rollout) -> None:
        assert self.tokens == other.tokens
        for mine, theirs in zip(self.logits, other.logits, strict=True):
            assert np.array_equal(mine, theirs)


def routing_by_call(recorded: list[tuple[Any, Any]], prompt: int) -> list[np.ndarray]:
    """ids_TLK of the prompt's one call, then of each decoded token."""
    ids_TLK = np.concatenate([ids for ids, _ in recorded])
    return [ids_TLK[:prompt], *(ids_TLK[at : at + 1] for at in range(prompt, len(ids_TLK)))]


def routed_needs(ids_TLK: np.ndarray) -> int:
    """A call needs each expert of a layer once, however many of its tokens are routed to it."""
    return sum(len(np.unique(ids_TLK[:, layer])) for layer in range(ids_TLK.shape[1]))


@pytest.fixture(scope="module")
def resident(backend: Any, source: Path) -> dict[str, Rollout]:
    with load(source, backend=backend.name, budget="resident") as engine:
        return {
            "long": Rollout(engine, LONG),
            "short": Rollout(engine, SHORT),
            "brief": Rollout(engine, SHORT, steps=3),
        }


class JitterIO(FileIO):
    """Every read takes a random while, so experts arrive in another order each time."""

    def __init__(self, seed: int, longest_s: float) -> None:
        self.random, self.longest_s = random.Random(seed), longest_s

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        time.sleep(self.longest_s * self.random.random())
        return super().preadv(fd, buffers, offset)


def open_slots(backend: Any, folder: Path, slots: int, **options: Any) -> Engine:
    """An engine with room for exactly so many experts."""
    record = open_layout(folder).record_nbytes
    return load(folder, backend=backend.name, budget=slots * record, **options)


@pytest.mark.parametrize("prefetch", ["auto", "off"])
@pytest.mark.parametrize("slots", [TOP_K, TOP_K + 1, 5, TOP_K * LAYERS, 12, 23, len(KEYS)])
@pytest.mark.parametrize("order", orders())
def test_streamed_is_resident_bit_for_bit(
    backend: Any,
    folders: dict[str, Path],
    resident: dict[str, Rollout],
    order: str,
    slots: int,
    prefetch: str,
) -> None:
    with open_slots(backend, folders[order], slots, prefetch=prefetch) as engine:
        for prompt, name in ((LONG, "long"), (SHORT, "short")):
            rollout = Rollout(engine, prompt)
            rollout.assert_same(resident[name])
            stats = rollout.stats
            assert stats is not None
            assert stats.hits + stats.late + stats.misses == rollout.routed
            assert stats.fallbacks == 0 and stats.fallback_weight == 0.0
            assert max(rollout.live) <= engine.budget_bytes
            assert stats.peak_expert_bytes <= engine.budget_bytes
            if prefetch == "off":
                assert stats.bytes_prefetched == 0


@pytest.fixture(scope="module")
def forecast(folders: dict[str, Path]) -> Path:
    """An untrained forecaster with something to say: it is as wrong as can be."""
    geometry = Geometry(LAYERS, EXPERTS, TOP_K, hidden=16, rank=4)
    rng = np.random.default_rng(4)
    params = {
        name: rng.standard_normal(shape, np.float32) for name, shape in geometry.shapes.items()
    }
    path = folders["layer"].with_name("forecast.safetensors")
    ForecastModel(geometry, params).save(path)
    return path


@pytest.mark.parametrize("predictor", ["forecast", "token-table"])
@pytest.mark.parametrize("prefetch", ["auto", "off"])
@pytest.mark.parametrize("slots", [TOP_K, 5, 12, 23])
def test_a_predictor_decides_memory_and_not_one_bit_of_the_answer(
    backend: Any,
    folders: dict[str, Path],
    resident: dict[str, Rollout],
    forecast: Path,
    slots: int,
    prefetch: str,
    predictor: str,
) -> None:
    chosen = forecast if predictor == "forecast" else predictor
    options = {"prefetch": prefetch, "predictor": chosen}
    with open_slots(backend, folders["shuffled"], slots, **options) as engine:
        for prompt, name in ((LONG, "long"), (SHORT, "short")):
            rollout = Rollout(engine, prompt)
            rollout.assert_same(resident[name])
            assert rollout.stats is not None
            assert rollout.stats.routed == rollout.routed
            assert max(rollout.live) <= engine.budget_bytes
            assert prefetch == "auto" or rollout.stats.bytes_prefetched == 0


def test_what_a_forecaster_saw_of_a_prompt_is_its_tokens_one_by_one(
    backend: Any, folders: dict[str, Path], forecast: Path
) -> None:
    """After a prompt in one chunk it stands where token by token would have brought it."""
    seen = {}
    for at_once in (True, False):
        with open_slots(backend, folders["layer"], 12, predictor=forecast) as engine:
            runner = OneSequence(engine.session)
            if at_once:
                runner.prefill(LONG, GREEDY)
            else:
                runner.prefill(LONG[:1], GREEDY)
                for token in LONG[1:]:
                    runner.decode(token, GREEDY)
            assert engine.feed is not None
            policy: Any = engine.feed.tier.policy
            seen[at_once] = policy.next_uses().copy()
    np.testing.assert_allclose(seen[True], seen[False], rtol=1e-4)


def test_a_hundred_runs_with_experts_arriving_in_any_order(
    backend: Any, folders: dict[str, Path], resident: dict[str, Rollout]
) -> None:
    for prefetch in ("auto", "off"):
        options = {"prefetch": prefetch, "io": JitterIO(seed=1, longest_s=2e-4)}
        with open_slots(backend, folders["layer"], TOP_K + 2, **options) as engine:
            for _ in range(50):
                Rollout(engine, SHORT, steps=3).assert_same(resident["brief"])


def test_prefetch_on_and_off_at_equal_budget_and_latency(
    backend: Any, folders: dict[str, Path], resident: dict[str, Rollout]
) -> None:
    """Check 10: the same tokens and the same needs; only when the reads are made may differ."""
    needs = {}
    for prefetch in ("auto", "off"):
        options = {"prefetch": prefetch, "io": JitterIO(seed=2, longest_s=2e-3)}
        with open_slots(backend, folders["layer"], 2 * TOP_K * LAYERS, **options) as engine:
            rollout = Rollout(engine, LONG)
        rollout.assert_same(resident["long"])
        assert rollout.stats is not None
        needs[prefetch] = rollout.stats.routed
        assert rollout.stats.stall_s > 0
    assert needs["auto"] == needs["off"]


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"routing_source": "lookahead"},
        {"num_shared_experts": 0},
        {"norm_topk_prob": False, "num_experts_per_tok": 3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_models_stream_exactly_too(
    backend: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    source = tiny_model(tmp_path / "model", **changes)
    pack(source, tmp_path / "packed")
    with load(source, backend=backend.name) as whole:
        expected = Rollout(whole, SHORT)
    top_k = changes.get("num_experts_per_tok", TOP_K)
    with open_slots(backend, tmp_path / "packed", top_k) as engine:
        Rollout(engine, SHORT).assert_same(expected)


def test_a_prompt_of_several_chunks(backend: Any, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", max_position_embeddings=2048)
    pack(source, tmp_path / "packed")
    prompt = [11 * i % CONFIG.vocab_size for i in range(1100)]
    with load(source, backend=backend.name) as whole:
        expected = Rollout(whole, prompt, steps=2)
    with open_slots(backend, tmp_path / "packed", TOP_K) as engine:
        Rollout(engine, prompt, steps=2).assert_same(expected)


def test_a_sequence_that_an_error_cut_is_refused_until_it_is_reset(
    backend: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some layers have the token then and some do not: the next would be wrong."""
    with load(folders["layer"], backend=backend.name, budget="50%", prefetch="off") as engine:
        runner = OneSequence(engine.session)
        acquire = FeedStep.acquire

        def fails(step: FeedStep, layer: int, experts: Sequence[int], by: Any = NOBODY) -> Any:
            if layer == LAYERS - 1:
                raise StoreError("a disk that is gone")
            return acquire(step, layer, experts, by)

        runner.prefill(SHORT, GREEDY)
        expected = [runner.decode(token, GREEDY) for token in (9, 8, 7)]
        runner.reset()
        runner.prefill(SHORT, GREEDY)
        assert runner.decode(9, GREEDY) == expected[0]
        with monkeypatch.context() as patch:
            patch.setattr(FeedStep, "acquire", fails)
            with pytest.raises(StoreError, match="gone"):
                runner.decode(8, GREEDY)
        for again in (lambda: runner.decode(8, GREEDY), lambda: runner.prefill(SHORT, GREEDY)):
            with pytest.raises(UsageError, match="middle of a step"):
                again()
        runner.reset()
        runner.prefill(SHORT, GREEDY)
        assert [runner.decode(token, GREEDY) for token in (9, 8, 7)] == expected


def test_sampled_tokens_do_not_depend_on_the_budget(backend: Any, folders: dict[str, Path]) -> None:
    params = SamplingParams(temperature=1.3, top_k=60, top_p=0.95, seed=11)
    answers = set()
    for budget in ("resident", "all", "50%", "10%"):
        with load(folders["layer"], backend=backend.name, budget=budget) as engine:
            answers.add(tuple(engine.generate(SHORT, params, max_tokens=20).result.tokens))
    assert len(answers) == 1


def test_fallback_answers_without_waiting_and_says_how_much_it_replaced(
    backend: Any, folders: dict[str, Path]
) -> None:
    options = {"miss": "fallback", "io": JitterIO(seed=3, longest_s=0.05)}
    with open_slots(backend, folders["layer"], TOP_K, **options) as engine:
        stats = engine.generate(SHORT, max_tokens=8).result.stats
    assert stats["fallbacks"] > 0
    assert 0 < stats["fallback_weight"] <= stats["routed"]
    assert stats["stall_s"] == 0.0


_MEMORY = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_experts": 16, "moe_intermediate_size": 320,
}  # fmt: skip
_EXPERT_BYTES = 4 * 16 * 3 * 256 * 320 * 4  # of this geometry; everything else is 2 MB
_MEASURE = """
    import sys
    import chronos
    def peak():  # of this program; the rusage of a child begins with its parent's
        try:
            line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
            return int(line.split()[1]) << 10
        except FileNotFoundError:
            import resource
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    backend, small, large, budget = sys.argv[1:]
    def answer(folder):
        with chronos.load(folder, backend=backend, device="cpu", budget=budget) as engine:
            engine.generate([1, 2, 3], max_tokens=12).result
        return peak()
    before = answer(small)  # the framework's own memory comes first
    print(answer(large) - before)
"""


@pytest.mark.slow
def test_a_streamed_start_stays_below_the_size_of_the_model(backend: Any, tmp_path: Path) -> None:
    small = tiny_packed(tmp_path / "small")
    large = tiny_packed(tmp_path / "large", **_MEMORY)
    command = [sys.executable, "-c", textwrap.dedent(_MEASURE), backend.name, small, large]
    found = {}
    for budget in ("10%", "resident"):
        out = subprocess.run([*command, budget], capture_output=True, text=True, check=True)
        found[budget] = int(out.stdout)
    assert found["resident"] > _EXPERT_BYTES  # the measure itself works
    assert found["10%"] < 0.5 * _EXPERT_BYTES
