"""A token in stages, as CUDA graphs run it, on a CPU: the same bits as the model itself.

Without capture every stage runs its function and copies what it gives to where a graph would have
put it, so what this can get wrong (order, stale buffers, what is passed on) is wrong here too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import chronos
from chronos.backends.torch import checkpoint
from chronos.backends.torch.fast.graphs import Stage, Steps, usable
from chronos.common.layout import pack
from chronos.common.text.sampling import SamplingParams
from chronos.run.sequence import OneSequence
from chronos.testing.tiny import CONFIG, tiny_model
from tests.support.toy_codec import NAME, register

GREEDY = SamplingParams()
PROMPT = [7 * i % CONFIG.vocab_size for i in range(CONFIG.sliding_window - 8)]  # then it slides
STEPS = 24


@pytest.fixture(scope="module", params=[1, 0], ids=["shared", "no shared"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    pack(tiny_model(folder / "model", num_shared_experts=request.param), folder / "packed")
    return folder / "packed"


def rollout(engine: Any, staged: bool, replay: Any = None) -> tuple[np.ndarray, Any]:
    """Logits after the prompt and each token, and the routing, of two sequences."""
    session, logits, routing = engine.session, [], []
    session.steps = Steps(session.model, capture=False) if staged else None
    for prompt in (PROMPT, PROMPT[:5]):
        runner = OneSequence(session, record=True, route_override=replay)
        token = runner.prefill(prompt, GREEDY)
        logits.append(runner.logits())
        for _ in range(STEPS):
            token = runner.decode(token, GREEDY)
            logits.append(runner.logits())
        routing += runner.routing()
    ids, weights = (np.concatenate(found) for found in zip(*routing, strict=True))
    return np.stack(logits), (ids, weights)


@pytest.mark.parametrize("budget", ["resident", "25%", "50%", "all"])
def test_stages_give_the_models_bits(packed: Path, budget: str) -> None:
    with chronos.load(packed, backend="torch", device="cpu", budget=budget) as engine:
        logits, routing = rollout(engine, staged=False)
        staged, its_routing = rollout(engine, staged=True)
    np.testing.assert_array_equal(staged, logits)
    np.testing.assert_array_equal(its_routing[0], routing[0])
    np.testing.assert_array_equal(its_routing[1], routing[1])


def test_dense_matrices_of_16_bits_are_widened_wherever_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(tiny_model(tmp_path / "model", dtype="bfloat16"), tmp_path / "packed")
    results = []
    for large in (1 << 60, 1):
        monkeypatch.setattr(checkpoint, "LARGE", large)
        for budget in ("resident", "50%"):
            with chronos.load(
                tmp_path / "packed", backend="torch", device="cpu", budget=budget
            ) as engine:
                dtype = engine.session.model.model.embed_tokens.weight.dtype
                assert (dtype == torch.bfloat16) == (large == 1)
                results += [rollout(engine, staged)[0] for staged in (False, True)]
    for logits in results[1:]:  # below the size from which on libraries differ: the same bits
        np.testing.assert_array_equal(logits, results[0])


def test_replayed_routing_takes_the_gates_place(packed: Path) -> None:
    def replay(layer: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array([[layer, layer + 3]] * replay.tokens)  # type: ignore[attr-defined]
        return ids, np.array([[0.75, 0.5]] * len(ids), np.float32)

    with chronos.load(packed, backend="torch", device="cpu", budget="50%") as engine:
        session, found = engine.session, []
        for steps in (None, Steps(session.model, capture=False)):
            session.steps = steps
            runner = OneSequence(session, record=True, route_override=replay)
            replay.tokens = 3  # type: ignore[attr-defined]
            runner.prefill([1, 2, 3], GREEDY)
            replay.tokens = 1  # type: ignore[attr-defined]
            runner.decode(5, GREEDY)
            ids, _ = runner.routing()[-1]
            assert ids[-1].tolist() == [[layer, layer + 3] for layer in range(len(ids[-1]))]
            found.append(runner.logits())
    np.testing.assert_array_equal(*found)


def test_experts_of_another_encoding_are_copied_as_their_codec_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, "torch")
    pack(tiny_model(tmp_path / "model"), tmp_path / "packed", encoding=NAME)
    for budget in ("resident", "25%", "all"):
        with chronos.load(
            tmp_path / "packed", backend="torch", device="cpu", budget=budget
        ) as engine:
            logits, _ = rollout(engine, staged=False)
            np.testing.assert_array_equal(rollout(engine, staged=True)[0], logits)


def test_a_stage_keeps_its_place() -> None:
    x = torch.zeros(3)
    stage = Stage(lambda: (x + 1, x * 2), None)
    first, second = stage.out
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert stage.run()[0] is first
    assert (first.tolist(), second.tolist()) == ([2, 3, 4], [2, 4, 6])


def test_only_models_of_ours_on_a_gpu_are_captured(packed: Path) -> None:
    with chronos.load(packed, backend="torch", device="cpu", budget="all") as engine:
        assert engine.session.steps is None
        assert not usable(engine.session.model, exact=True)


def test_none_is_captured_in_a_plain_run(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with chronos.load(packed, backend="torch", device="cpu", budget="all") as engine:
        model = engine.session.model
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
        assert usable(model, exact=True)
        monkeypatch.setenv("CHRONOS_PLAIN", "1")
        assert not usable(model, exact=True)
