"""The training loop under faults: kills, changed recipes, damaged checkpoints, divergence.

Rows C2, T3 and T4. A stand-in backend whose "weights" are a running digest of every batch and rate
it was given: equal digests mean the very same updates. Real backends resume in TrainTests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from chronos.common.data import PackedBatches, pack_documents
from chronos.common.disk.header import read_header
from chronos.common.disk.tensors import read_tensors, write_tensors
from chronos.common.errors import ConfigError, CorruptFileError, UsageError
from chronos.common.model.config import ModelConfig
from chronos.common.text.tokenizer import Tokenizer
from chronos.common.training.objectives import NextToken
from chronos.common.training.recipe import CadenceRecipe, OptimizerRecipe, Recipe
from chronos.train.loop import DivergedError, Event, Report, Task, checkpoints, run
from chronos.train.pretrain import PretrainRecipe

DOCUMENTS = [np.arange(i, i + 40) % 290 for i in range(20)]
RECIPE = Recipe(
    PretrainRecipe(batch_size=2, seq_len=8),
    model=ModelConfig(hidden_size=8, vocab_size=300),
    cadence=CadenceRecipe(
        steps=12, log_every=1, eval_every=5, save_every=3, keep_checkpoints=3, max_skipped=3
    ),
    optimizer=OptimizerRecipe(warmup_steps=2),
)


class DigestStep:
    """A TrainStep whose state is 32 bytes; from step `bad_from` on its loss is not finite."""

    def __init__(self, bad_from: int, slow_s: float) -> None:
        self.digest, self.bad_from, self.slow_s = bytes(32), bad_from, slow_s

    def step(
        self, batches: Sequence[Any], objective: Any, rate: float, number: int
    ) -> dict[str, float]:
        time.sleep(self.slow_s)
        if number >= self.bad_from:
            return {"loss": float("nan"), "skipped": 1.0}
        text = b"".join(batch.ids_BT.tobytes() for batch in batches) + repr(rate).encode()
        self.digest = hashlib.sha256(self.digest + text).digest()
        return {"loss": 1.0, "skipped": 0.0}

    def evaluate(self, batches: Sequence[Any], objective: Any) -> dict[str, float]:
        return {"ce": float(len(batches))}

    def state(self) -> Iterator[tuple[str, str, tuple[int, ...], memoryview]]:
        yield "digest", "U8", (32,), memoryview(self.digest)

    def load_state(self, tensors: Iterable[Any]) -> None:
        for _, data in tensors:
            self.digest = bytes(data)


class DigestBackend:
    """The functions of a backend that the loop calls."""

    name = "digest"

    def __init__(self, bad_from: int = 1 << 60, slow_s: float = 0.0) -> None:
        self.made: list[DigestStep] = []
        self.bad_from, self.slow_s = bad_from, slow_s

    def train_step(self, model: None, recipe: OptimizerRecipe) -> DigestStep:
        self.made.append(DigestStep(self.bad_from, self.slow_s))
        return self.made[-1]

    def processes(self) -> Any:
        return SimpleNamespace(rank=0, count=1, any=lambda flag: flag)

    def save(self, model: None, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)


def train(
    out: Path,
    backend: Any,
    recipe: Recipe[PretrainRecipe] = RECIPE,
    documents: Sequence[Any] = DOCUMENTS,
    **options: Any,
) -> Report:
    data = pack_documents(documents, seq_len=8, eos_id=1)
    batches, valid = PackedBatches(data, recipe.stage.batch_size), [data.batch(0, 2)]
    task = Task(recipe, None, Tokenizer.train(["abc"], 300), batches, NextToken(), valid)
    return run(lambda: task, backend, out, **options)


def with_changes(steps: int = 12, **optimizer: Any) -> Recipe[PretrainRecipe]:
    return dataclasses.replace(
        RECIPE,
        cadence=dataclasses.replace(RECIPE.cadence, steps=steps),
        optimizer=dataclasses.replace(RECIPE.optimizer, **optimizer),
    )


def finish(out: Path, recipe: Recipe[PretrainRecipe] = RECIPE, resume: bool = False) -> bytes:
    backend = DigestBackend()
    report = train(out, backend, recipe, resume=resume)
    assert report.step == recipe.cadence.steps and report.model == out / "model"
    return backend.made[0].digest


def steps_logged(out: Path) -> list[int]:
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return finish(tmp_path_factory.mktemp("straight") / "run")


def test_a_run_stopped_at_any_step_ends_the_same(tmp_path: Path, straight: bytes) -> None:
    for stop in range(1, 12):
        out = tmp_path / str(stop)

        def interrupt(event: Event, stop: int = stop) -> None:
            if event.get("step") == stop and "loss" in event:
                os.kill(os.getpid(), signal.SIGTERM)

        first = train(out, DigestBackend(), on_event=interrupt)
        assert first.signal == signal.SIGTERM and first.step in (stop, stop + 1)
        assert checkpoints(out)[-1][0] == first.step
        assert finish(out, resume=True) == straight
        assert steps_logged(out) == list(range(1, 13))


def test_metrics_are_kept_once_and_the_newest_checkpoints_too(tmp_path: Path) -> None:
    finish(tmp_path)
    assert steps_logged(tmp_path) == list(range(1, 13))
    assert [step for step, _ in checkpoints(tmp_path)] == [6, 9, 12]


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    finish(tmp_path)
    with pytest.raises(UsageError, match="step 12"):
        finish(tmp_path)


def test_resume_with_another_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    finish(tmp_path)
    changed = with_changes(15, learning_rate=5e-3)
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate: 0\.001 -> 0\.005"):
        finish(tmp_path, changed, resume=True)
    report = train(tmp_path, DigestBackend(), changed, resume=True, force=True)
    assert report.step == 15


def test_resume_on_other_data_is_refused(tmp_path: Path) -> None:
    finish(tmp_path)
    other: dict[str, Any] = {"recipe": with_changes(15), "documents": [np.arange(60) % 290] * 9}
    with pytest.raises(ConfigError, match="training data is not the run's"):
        train(tmp_path, DigestBackend(), resume=True, **other)
    assert train(tmp_path, DigestBackend(), resume=True, force=True, **other).step == 15


def test_cadence_and_length_may_change(tmp_path: Path) -> None:
    finish(tmp_path)
    cadence = dataclasses.replace(RECIPE.cadence, steps=14, log_every=2, save_every=7)
    assert finish(tmp_path, dataclasses.replace(RECIPE, cadence=cadence), resume=True)


def test_a_run_whose_recipe_had_one_section_goes_on(tmp_path: Path) -> None:
    """Checkpoints from before [train] became [cadence], [optimizer] and the stage's section, and
    from before an optimizer had a name."""
    finish(tmp_path)
    path = checkpoints(tmp_path)[-1][1]
    metadata = dict(read_header(path).metadata)
    now = json.loads(metadata["recipe"])
    old = {name: now[name] for name in ("model", "data", "tokenizer")}
    old["train"] = now["cadence"] | now["optimizer"] | now["pretrain"]
    del old["train"]["name"]
    metadata["recipe"] = json.dumps(old)
    tensors = [(e.name, e.dtype, e.shape, bytes(d)) for e, d in read_tensors(path)]
    write_tensors(path, tensors, metadata)
    assert finish(tmp_path, with_changes(15), resume=True)
    with pytest.raises(ConfigError, match=r"optimizer\.clip: 1\.0 -> 2\.0"):
        finish(tmp_path, with_changes(15, clip=2.0), resume=True)
    with pytest.raises(ConfigError, match=r"optimizer\.name: 'adamw' -> 'muon'"):
        finish(tmp_path, with_changes(15, name="muon"), resume=True)


@pytest.mark.parametrize("damage", ["truncate", "flip the header", "empty"])
def test_a_damaged_newest_checkpoint_is_passed_over(
    tmp_path: Path, straight: bytes, damage: str
) -> None:
    finish(tmp_path)
    path = checkpoints(tmp_path)[-1][1]
    raw = path.read_bytes()
    damaged = {"truncate": raw[:-5], "flip the header": b"\xff" * 9 + raw[9:], "empty": b""}
    path.write_bytes(damaged[damage])
    events: list[Event] = []
    backend = DigestBackend()
    report = train(tmp_path, backend, on_event=events.append, resume=True)
    assert any(path.name in event.get("warning", "") for event in events)
    assert report.step == 12 and backend.made[0].digest == straight


def test_no_readable_checkpoint_is_an_error(tmp_path: Path) -> None:
    finish(tmp_path)
    for _, path in checkpoints(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(CorruptFileError, match="no checkpoint"):
        finish(tmp_path, resume=True)


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="3 updates in a row"):
        train(tmp_path, DigestBackend(bad_from=7))
    assert [step for step, _ in checkpoints(tmp_path)] == [3, 6]
    last = json.loads((tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert last["step"] == 10 and last["loss"] is None and last["skipped_total"] == 3
    assert finish(tmp_path, resume=True)


_CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import {module} as t
t.train(Path(sys.argv[1]), t.DigestBackend(slow_s=0.002), t.with_changes(60),
        resume=sys.argv[2] == "resume")
"""


@pytest.mark.slow
def test_killed_at_random_the_run_goes_on(tmp_path: Path) -> None:
    """C2: SIGKILL again and again; a start after it loses at most `save_every` steps and the end is
    that of a run nobody killed."""
    recipe = with_changes(60)
    expected = finish(tmp_path / "straight", recipe)
    out, rng, kills = tmp_path / "run", random.Random(0), 0
    here = Path(__file__)
    code = _CHILD.format(folder=str(here.parent), module=here.stem)
    for _ in range(40):
        mode = "resume" if checkpoints(out) else "new"
        child = subprocess.Popen([sys.executable, "-c", code, str(out), mode])
        before = checkpoints(out)[-1][0] if mode == "resume" else 0
        deadline = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < deadline:
            saved = checkpoints(out)
            if saved and saved[-1][0] > before:
                time.sleep(rng.random() * 0.02)
                child.kill()
                kills += 1
                break
            time.sleep(0.001)
        if child.wait() == 0:
            break
    assert kills >= 5
    assert finish(out, recipe, resume=True) == expected
    assert steps_logged(out) == list(range(1, 61))
    assert not [path for path in (out / "checkpoints").iterdir() if path.suffix != ".safetensors"]
