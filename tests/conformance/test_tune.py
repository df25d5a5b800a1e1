"""What trials are judged by: measuring disturbs no training, and reads are those of a store."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from chronos.common.text.sampling import SamplingParams
from chronos.common.traces.trace import TraceRecorder
from chronos.common.training.recipe import (
    CadenceRecipe,
    DataRecipe,
    OptimizerRecipe,
    Recipe,
    TokenizerRecipe,
)
from chronos.run.engine import load
from chronos.run.sequence import OneSequence
from chronos.testing.tiny import CONFIG, TEXTS, tiny_packed
from chronos.train.pretrain import PretrainRecipe, prepare
from chronos.tune import measured
from chronos.tune.measured import expert_bytes_per_token, measure
from chronos.tune.settings import TuneSettings

TOKENS = 200


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe[PretrainRecipe]:
    (tmp_path / "text").mkdir()
    for number in range(8):
        text = "".join(TEXTS) * 2 + f"# {number}\n"
        (tmp_path / "text" / f"{number}.txt").write_text(text, "utf-8")
    return Recipe(
        PretrainRecipe(batch_size=2, seq_len=16),
        model=dataclasses.replace(CONFIG, dropout=0.1),
        data=DataRecipe(path=str(tmp_path / "text"), validation_share=0.4),
        tokenizer=TokenizerRecipe(vocab_size=CONFIG.vocab_size),
        cadence=CadenceRecipe(steps=4, eval_batches=4),
        optimizer=OptimizerRecipe(warmup_steps=1),
    )


def trained(backend: Any, recipe: Any, folder: Path, judge: bool) -> tuple[list[Any], list[Any]]:
    """What is found after two of four updates, and the state after all."""
    task = prepare(recipe, backend, folder)
    step, found = backend.train_step(task.model, recipe.optimizer), []
    for number in range(4):
        step.step(task.batches.at(number), task.objective, 1e-3, number)
        if number == 1:
            terms = step.evaluate(task.valid, task.objective)
            valid = {f"valid_{name}": value for name, value in terms.items()}
            if judge:
                settings = TuneSettings(route_tokens=60, budget="50%")
                found = [measure(task, backend, settings, 2, valid), terms]
    return found, [(name, bytes(data)) for name, _, _, data in step.state()]


def test_a_trial_trains_as_if_nobody_judged_it(backend: Any, recipe: Any, tmp_path: Path) -> None:
    [found, terms], judged = trained(backend, recipe, tmp_path / "a", judge=True)
    _, alone = trained(backend, recipe, tmp_path / "b", judge=False)
    assert judged == alone
    assert found.step == 2 and found.loss == terms["ce"], "no weight of a term is in the loss"
    assert found.expert_bytes_per_token > 0
    assert 1 / CONFIG.num_experts < found.effective <= 1 and 0 < found.use <= 1


@pytest.mark.parametrize("source", ["gate", "history"])
def test_reads_are_those_of_a_store(
    backend: Any, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens decoded within a budget read what is counted on their routing, but for the
    order in which a warm store's ranking was reached."""
    monkeypatch.setattr(measured, "_WARMUP", 0.5)
    tiers = {"num_resident_experts": 2, "num_resident_experts_per_tok": 1}
    folder = tiny_packed(tmp_path / "model", routing_source=source, **tiers)
    sampling = SamplingParams(temperature=1.0, seed=3)
    options = {"prefetch": "off", "predictor": "lfu"} if source == "gate" else {}
    with load(folder, backend=backend.name, budget="50%", profile="off", **options) as engine:
        assert engine.feed is not None
        sequence = OneSequence(engine.session, record=True)
        token = sequence.prefill([5], sampling)
        sequence.routing()
        recorder = TraceRecorder(CONFIG.num_experts, CONFIG.num_experts_per_tok)
        for number in range(TOKENS):
            if number == TOKENS // 2:
                before = engine.feed.stats()
            token = sequence.decode(token, sampling)
        stats = engine.feed.stats().minus(before)
        for ids_TLK, _ in sequence.routing():
            recorder.append(ids_TLK)
        reads = stats.bytes_read / engine.layout.record_nbytes  # type: ignore[union-attr]
    per_token = expert_bytes_per_token(recorder.trace(), engine.config, "50%")  # type: ignore[arg-type]
    counted = per_token * (TOKENS // 2) / engine.layout.record_nbytes  # type: ignore[union-attr]
    assert reads > 20 and counted == pytest.approx(reads, rel=0.15), (reads, counted)
