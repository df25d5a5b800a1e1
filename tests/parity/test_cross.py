"""The two backends against each other: what one writes the other reads and continues."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.disk.tensors import read_tensors, write_tensors
from chronos.common.layout import pack
from chronos.common.text.sampling import SamplingParams
from chronos.common.training.recipe import OptimizerRecipe
from chronos.run.engine import Engine, load
from chronos.run.models import resolve_model
from chronos.run.sequence import OneSequence
from chronos.testing.model_tests import CONFIG, tokens
from chronos.testing.tiny import tiny_packed
from chronos.testing.tolerances import TOLERANCE, assert_close
from chronos.testing.train_tests import TINY, batch, difference, objective

Both = tuple[Any, Any]
RECIPE = OptimizerRecipe(seed=5)


@pytest.fixture(params=["torch writes", "MLX writes"])
def pair(both: Both, request: pytest.FixtureRequest) -> Both:
    """(writer, reader)"""
    return both if request.param == "torch writes" else both[::-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_of_one_is_a_folder_of_the_other(pair: Both, tmp_path: Path, dtype: str) -> None:
    writer, reader = pair
    model = writer.build(dataclasses.replace(CONFIG, dtype=dtype, num_shared_experts=2), seed=3)
    writer.save(model, tmp_path / "first")
    own = writer.load(tmp_path / "first", device="cpu", resident=True)
    other = reader.load(tmp_path / "first", device="cpu", resident=True)
    ids = tokens(33)
    for name, value in writer.forward(own, ids)._asdict().items():
        if name != "ids_LNK":
            assert_close(getattr(reader.forward(other, ids), name), value, "logits", name)
    reader.save(other, tmp_path / "again")
    for name in ("config.json", "model.safetensors", "lookahead.safetensors"):
        first, again = ((tmp_path / f / name).read_bytes() for f in ("first", "again"))
        assert first == again, name


def test_packed_experts_are_read_by_both(both: Both, tmp_path: Path) -> None:
    """In clusters across layers, so that no layer's experts lie together."""
    across = [[(layer, e) for layer in range(CONFIG.num_hidden_layers)] for e in range(8)]
    both[0].save(both[0].build(CONFIG, seed=3), tmp_path / "model")
    pack(tmp_path / "model", tmp_path / "packed", order=across)
    ids = tokens(9)
    for backend in both:
        whole, packed = (
            backend.load(tmp_path / name, device="cpu", resident=True)
            for name in ("model", "packed")
        )
        first, second = (backend.forward(model, ids).logits_BTV for model in (whole, packed))
        assert np.array_equal(first, second)


def test_a_run_goes_on_in_the_other_backend(pair: Both, tmp_path: Path) -> None:
    """Weights, moments and step number cross over: the continuation is the writer's own."""
    writer, reader = pair
    path = tmp_path / "state.safetensors"
    step = writer.train_step(writer.build(TINY, seed=7), RECIPE)
    for i in range(3):
        step.step([batch(i)], objective(step), 1e-2, i)
    write_tensors(path, step.state(), {})
    taken_over = reader.train_step(reader.build(TINY, seed=8), RECIPE)
    taken_over.load_state(read_tensors(path))
    write_tensors(tmp_path / "copy.safetensors", taken_over.state(), {})
    assert values(path) == values(tmp_path / "copy.safetensors")
    for i in range(3, 6):
        terms, own = (
            taken_over.step([batch(i)], objective(taken_over), 1e-2, i),
            step.step([batch(i)], objective(step), 1e-2, i),
        )
        assert terms.keys() == own.keys()
        assert_close(terms["loss"], own["loss"], "loss curve")
        assert_close(terms["grad_norm"], own["grad_norm"], "loss curve")


@pytest.mark.parametrize(("name", "apart"), [("adamw", 1e-4), ("muon", 0.1), ("adafactor", 0.05)])
def test_an_optimizer_is_the_same_in_both(
    pair: Both, tmp_path: Path, name: str, apart: float
) -> None:
    """Its state crosses over, and the next update moves the weights alike: as far as torch's Muon,
    which orthogonalises in bfloat16, and the floors of two Adafactors let it."""
    path, recipe = tmp_path / "state.safetensors", dataclasses.replace(RECIPE, name=name)
    steps = [b.train_step(b.build(TINY, seed=7), recipe) for b in pair]
    for i in range(2):
        steps[0].step([batch(i)], objective(steps[0]), 1e-2, i)
    write_tensors(path, steps[0].state(), {})
    steps[1].load_state(read_tensors(path))
    write_tensors(tmp_path / "copy.safetensors", steps[1].state(), {})
    assert values(path) == values(tmp_path / "copy.safetensors")
    moves = []
    for step in steps:
        before = {n: np.frombuffer(bytes(x), np.float32) for n, _, _, x in step.state()}
        step.step([batch(2)], objective(step), 1e-2, 2)
        after = {n: np.frombuffer(bytes(x), np.float32) for n, _, _, x in step.state()}
        weights = [n for n in before if n.startswith(("model.", "lookahead."))]
        moves.append({n: after[n] - before[n] for n in weights})
    assert difference(moves[1], moves[0]) < apart


def values(path: Path) -> dict[str, bytes]:
    return {entry.name: bytes(data) for entry, data in read_tensors(path)}


def test_an_untrained_state_crosses_over_too(pair: Both, tmp_path: Path) -> None:
    writer, reader = pair
    path = tmp_path / "state.safetensors"
    write_tensors(path, writer.train_step(writer.build(TINY, seed=7), RECIPE).state(), {})
    step = reader.train_step(reader.build(TINY, seed=8), RECIPE)
    step.load_state(read_tensors(path))
    assert step.step([batch()], objective(step), 1e-2, 0)["skipped"] == 0.0


@pytest.mark.parametrize("budget", ["resident", "25%"])
@pytest.mark.parametrize("model", ["tiny", pytest.param("demo", marks=pytest.mark.slow)])
def test_the_same_tokens_greedily(both: Both, tmp_path: Path, model: str, budget: str) -> None:
    """64 tokens. Where two logits nearly tie the backends may part; both then go on with torch's
    token, and the logits before it must agree."""
    folder = tiny_packed(tmp_path / "packed") if model == "tiny" else resolve_model(model)
    engines = [load(folder, backend=b.name, device="cpu", budget=budget) for b in both]
    try:
        follow(*engines, prompt=[7, 1, 200, 31, 5], steps=64)
    finally:
        for engine in engines:
            engine.close()


def follow(first: Engine, second: Engine, prompt: list[int], steps: int) -> None:
    """Let both engines go where the first one goes."""
    greedy = SamplingParams()
    runners = [OneSequence(each.session) for each in (first, second)]
    chosen = [runner.prefill(prompt, greedy) for runner in runners]
    for step in range(steps):
        logits = [runner.logits() for runner in runners]
        assert_close(logits[1], logits[0], "logits", f"token {step}")
        if chosen[0] != chosen[1]:
            gap = logits[0].max() - logits[0][chosen[1]]
            assert gap <= 2 * TOLERANCE["logits"] * max(1.0, np.abs(logits[0]).max()), step
        chosen = [runner.decode(chosen[0], greedy) for runner in runners]
