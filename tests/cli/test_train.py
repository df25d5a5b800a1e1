"""train pretrain as a user runs it: a recipe, a run, resume, Ctrl-C, then pack and generate."""

from __future__ import annotations

import importlib
import importlib.util
import json
import signal
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.recipes import TINY_MODEL

RECIPE = (
    TINY_MODEL
    + """lookahead_steps = 1
lookahead_hidden_size = 16

[tokenizer]
vocab_size = 270

[data]
path = "{data}"
validation_share = 0.3

[train]
steps = {steps}
batch_size = 2
seq_len = 16
warmup_steps = 2
log_every = 2
eval_every = 4
save_every = 4
"""
)


@pytest.fixture
def recipe(text: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(data=text.as_posix(), steps=8), "utf-8")
    return path


@pytest.mark.needs_backend
def test_train_pack_generate(chronos: Any, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = chronos("train", "pretrain", "-c", recipe, "-o", run)
    assert done.code == 0, done.err
    terms = "loss = ce (cross-entropy, nats per token) + 0.01 balance + 0.5 lookahead"
    assert done.err.splitlines()[0] == terms
    assert done.out.strip() == str(run / "model")
    for words in (
        "step 8/8",
        "tok/s",
        "left",
        "router/effective_experts",
        "router/largest_share",
        "valid_ce",
    ):
        assert words in done.err
    packed = tmp_path / "packed"
    assert chronos("pack", run / "model", "-o", packed).code == 0
    data = chronos("generate", packed, "-p", "def", "-n", 4, "--budget", "50%", "--json").json
    assert data["finish_reason"] in ("length", "stop")


@pytest.mark.needs_backend
def test_a_run_goes_on_with_resume_only(chronos: Any, recipe: Path, tmp_path: Path) -> None:
    flags = ("train", "pretrain", "-c", recipe, "-o", tmp_path / "run", "-q")
    assert chronos(*flags).code == 0
    again = chronos(*flags)
    assert again.code == 2 and "--resume" in again.error[-1]
    longer = recipe.read_text("utf-8").replace("steps = 8", "steps = 12")
    recipe.write_text(longer, "utf-8")
    data = chronos(*flags, "--resume", "--json").json
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines())
    tokens = {line["step"]: line["num_tokens"] for line in lines if "num_tokens" in line}
    assert 8 * 2 * 15 < tokens[8] < tokens[12] <= 12 * 2 * 16  # a few are padding
    assert tokens[12] - tokens[8] > 4 * 2 * 15
    assert data["step"] == 12 and data["model"] == str(tmp_path / "run" / "model")


@pytest.mark.needs_backend
def test_a_model_goes_on_with_a_longer_context(chronos: Any, recipe: Path, tmp_path: Path) -> None:
    assert chronos("train", "pretrain", "-c", recipe, "-o", tmp_path / "base", "-q").code == 0
    text = recipe.read_text("utf-8")
    before = json.loads((tmp_path / "base" / "model" / "config.json").read_text())
    context = before["max_position_embeddings"]
    head = f'[model]\npath = "base/model"\nmax_position_embeddings = {2 * context}\n'
    longer = tmp_path / "longer.toml"
    longer.write_text(head + text[text.index("[data]") :], "utf-8")
    flags = ("train", "pretrain", "-c", longer, "-o", tmp_path / "run")
    done = chronos(*flags)
    assert done.code == 0, done.err
    after = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert after["max_position_embeddings"] == 2 * context
    assert after["rope_scaling"]["factor"] == 2 and before["vocab_size"] == after["vocab_size"]
    first = [
        json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[0])["ce"]
        for run in ("base", "run")
    ]
    assert first[1] < first[0] - 0.1  # with the weights of before
    longer.write_text(longer.read_text("utf-8").replace("steps = 8", "steps = 9"), "utf-8")
    assert chronos(*flags, "--resume", "--json").json["step"] == 9
    model = tmp_path / "run" / "model"
    data = chronos("generate", model, "-p", "def " * (context // 2 - 8), "-n", 2, "--json").json
    assert len(data["tokens"]) == 2
    refused = {
        "is not longer": head.replace(str(2 * context), str(context)),
        "number of tokens": head.replace(str(2 * context), '"long"'),
        "'hidden_size'": head + "hidden_size = 16\n",
        "context that grows": head.replace("max_", "original_max_", 1),
    }
    for words, start in refused.items():
        longer.write_text(start + text[text.index("[data]") :], "utf-8")
        done = chronos(*flags[:-1], tmp_path / "no")
        assert done.code == 3 and words in done.err, done.err


@pytest.mark.needs_backend
def test_python_trains_what_the_command_trains(chronos: Any, recipe: Path, tmp_path: Path) -> None:
    from chronos import train

    importlib.import_module("chronos.train.pretrain")  # must not hide the function of that name
    done = chronos("train", "pretrain", "-c", recipe, "-o", tmp_path / "command", "--json").json
    events: list[dict[str, Any]] = []
    report = train.pretrain(recipe, tmp_path / "python", on_event=events.append)
    assert report.step == done["step"] == 8 and report.model == tmp_path / "python" / "model"
    assert [event["step"] for event in events if "loss" in event] == [1, 2, 4, 6, 8]
    assert any("held out" in event.get("message", "") for event in events)
    models = [tmp_path / run / "model" / "model.safetensors" for run in ("command", "python")]
    assert models[0].read_bytes() == models[1].read_bytes()


@pytest.mark.needs_backend
def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    chronos: Any, recipe: Path, tmp_path: Path
) -> None:
    text = recipe.read_text("utf-8") + "accumulate = 3\n"
    recipe.write_text(text.replace("steps = 8", "steps = 100"), "utf-8")
    before = sorted(tmp_path.rglob("*"))
    flags = ("train", "pretrain", "-c", recipe, "-o", tmp_path / "run", "--dry-run")
    plan = chronos(*flags, "--json").json
    shown = chronos(*flags)
    assert shown.code == 0 and "measured on 2 of 3 micro-batches" in shown.out
    assert sorted(tmp_path.rglob("*")) == before
    assert plan["stage"] == "pretrain" and "6 D" in plan["activations_are"]["layer"]
    assert plan["update"] | {"labels": 0} == {
        "micro_batches": 3, "rows": 2, "seq_len": 16, "labels": 0, "tokens": 96, "together": 1
    }  # fmt: skip
    parts = plan["memory"]
    assert parts["total"] == sum(parts.values()) - parts["total"]
    assert parts["optimizer"] == 2 * parts["parameters"] == 2 * parts["gradients"]
    took = plan["time"]
    assert took["measured_micro_batches"] == 2 and took["evaluate_s"] > 0
    run_s = 100 * (took["batches_s"] + took["update_s"]) + took["evaluate_s"]
    assert took["run_s"] == pytest.approx(run_s)
    refused = chronos(*flags, "--resume")
    assert refused.code == 2 and "--dry-run" in refused.err


def reported(folder: Path) -> dict[tuple[str, int], float]:
    """(name, step) -> value of the event files in a folder, in the order they were written."""
    from tensorboardX.proto import event_pb2

    found = {}
    for path in sorted(folder.iterdir()):
        raw, at = path.read_bytes(), 0
        while at < len(raw):  # records: length u64, its CRC, bytes, their CRC
            (size,) = struct.unpack_from("<Q", raw, at)
            event = event_pb2.Event.FromString(raw[at + 12 : at + 12 + size])
            at += size + 16
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


@pytest.mark.needs_backend
def test_what_is_reported_is_the_log(chronos: Any, recipe: Path, tmp_path: Path) -> None:
    """A resumed run adds to it."""
    run = tmp_path / "run"
    flags = ("train", "pretrain", "-c", recipe, "-o", run, "-q", "--report-to", "tensorboard")
    assert chronos(*flags).code == 0
    longer = recipe.read_text("utf-8").replace("steps = 8", "steps = 12")
    recipe.write_text(longer, "utf-8")
    assert chronos(*flags, "--resume").code == 0
    lines = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    logged = {
        (name, line["step"]): value
        for line in lines
        for name, value in line.items()
        if name != "step" and value is not None
    }
    found = reported(run / "tensorboard")
    assert found.keys() == logged.keys() and ("valid_ce", 12) in found
    for key, value in logged.items():
        assert found[key] == np.float32(value), key


def test_reporting_needs_its_package(
    chronos: Any, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else real(name, *a)
    )
    flags = ("train", "pretrain", "-c", recipe, "-o", tmp_path / "run", "--report-to")
    done = chronos(*flags, "wandb")
    assert done.code == 5 and "pip install wandb" in done.err
    assert not (tmp_path / "run").exists()
    assert chronos(*flags, "abacus").code == 2


def test_a_recipe_that_cannot_be_used(chronos: Any, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text("[train]\nstep = 3\n", "utf-8")
    done = chronos("train", "pretrain", "-c", recipe, "-o", tmp_path / "run")
    assert done.code == 3 and "did you mean 'steps'?" in done.error[-1]
    assert chronos("train", "pretrain", "-c", tmp_path / "absent.toml").code == 2


@pytest.mark.needs_backend
def test_data_can_be_named_on_the_command_line(chronos: Any, recipe: Path, tmp_path: Path) -> None:
    flags = ("train", "pretrain", "-c", recipe, "-o", tmp_path / "run")
    done = chronos(*flags, "--data", tmp_path / "absent.txt")
    assert done.code == 2 and "absent.txt" in done.err


@pytest.mark.needs_backend
def test_a_device_that_is_not_there(chronos: Any, recipe: Path, tmp_path: Path) -> None:
    flags = ("train", "pretrain", "-c", recipe, "-o", tmp_path / "run")
    done = chronos(*flags, "--device", "abacus")
    assert done.code == 2 and "unknown device 'abacus'" in done.err


@pytest.mark.needs_backend
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_leaves(
    command: list[str], recipe: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """C4: the step is finished and saved; what was saved can be resumed from."""
    run = tmp_path / "run"
    recipe.write_text(recipe.read_text("utf-8").replace("steps = 8", "steps = 100000"), "utf-8")
    arguments = [*command, "train", "pretrain", "-c", str(recipe), "-o", str(run)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == code, shown
    assert "stopped and saved at step" in shown and "Traceback" not in shown
    assert list((run / "checkpoints").glob("step-*.safetensors"))
