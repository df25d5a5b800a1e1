"""tune as a user runs it: trials in processes of their own, killed, gone on with, applied."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from chronos import backends
from chronos.testing.tiny import tiny_tokenizer
from tests.support.recipes import TINY_MODEL

pytest.importorskip("optuna")
STUDY = (
    TINY_MODEL
    + """lookahead_steps = 0

[tokenizer]
path = "{tokenizer}"

[data]
path = "{data}"
validation_share = 0.3

[train]
steps = 9
batch_size = 2
seq_len = 16
warmup_steps = 2
log_every = 2

[tune]
trials = {trials}
repeats = 0
budget = "75%"
min_effective = 0.1
max_use = 1.0
"""
)


@pytest.fixture
def study(text: Path, tmp_path: Path) -> Any:
    tiny_tokenizer().save(tmp_path / "tokenizer")

    def make(trials: int) -> Path:
        path = tmp_path / "study.toml"
        where = {"data": text.as_posix(), "tokenizer": (tmp_path / "tokenizer").as_posix()}
        path.write_text(STUDY.format(trials=trials, **where), "utf-8")
        return path

    return make


def _events(run: Path, event: str) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line["event"] == event]


@pytest.mark.slow
@pytest.mark.needs_backend
@pytest.mark.timeout(600)
def test_a_study_from_start_to_recipe(
    chronos: Any, study: Any, tmp_path: Path, command: list[str]
) -> None:
    """A worker is killed in the middle of its only trial; the trial that goes on ends with the loss
    of a run that nobody disturbed, to the last bit."""
    run, file = tmp_path / "run", study(1)
    with_backend = ("--backend", backends.select(None))  # a process elsewhere may see others
    worker = subprocess.Popen(
        [*command, "tune", "start", "-c", str(file), "-o", str(run), "-q", *with_backend],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while len(_events(run, "rung")) < 2:
        assert worker.poll() is None
        time.sleep(0.02)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert not _events(run, "end")
    flags = ("tune", "start", "-c", file, "-q", *with_backend)
    done = chronos(*flags, "-o", run, "--json").json
    assert done["trials"] == 1 and not done["stopped"]
    [best] = chronos("tune", "status", run, "--json").json["best"]
    assert best["trial"] == 1 and best["own"] and best["folder"] == "trials/0000"
    assert best["measured"]["step"] == 9
    folder = run / "trials" / "0000"
    assert (folder / "model").is_dir() and not (folder / "checkpoints").exists()
    assert _events(run, "rung")[-1]["goes_on"] is None

    shown = chronos("tune", "status", run)
    assert shown.code == 0 and "1 (yours)" in shown.out and "best of 1 whole" in shown.out
    recipe = tmp_path / "best.toml"
    done = chronos("tune", "apply", run, "-o", recipe, "--json").json
    assert done["trial"] == 1 and done["changes"] == {}
    assert "[tune]" not in recipe.read_text("utf-8")
    # The trial's own recipe, by hand and at once, ends with the same loss.
    hand = chronos(
        "train", "pretrain", "-c", folder / "recipe.toml", "-o", tmp_path / "h", "--json",
        *with_backend,
    )  # fmt: skip
    assert hand.json["last"]["valid_ce"] == best["measured"]["loss"]
    assert chronos("tune", "stop", run, "--json").json == {"run": str(run), "stopped": 0}


def test_what_cannot_be_tuned_is_said(chronos: Any, study: Any, tmp_path: Path) -> None:
    file, run = study(2), tmp_path / "run"
    for command in ("status", "stop"):
        done = chronos("tune", command, run)
        assert done.code == 2 and "holds no study" in done.error[0]
    bad = chronos("tune", "start", "-c", file, "-o", run, "--study", "nonsense")
    assert bad.code == 2 and "cannot be opened" in bad.error[0]
    file.write_text(file.read_text("utf-8") + "trails = 3\n", "utf-8")
    done = chronos("tune", "start", "-c", file, "-o", run)
    assert done.code == 3 and "'trails'" in done.error[0] and "trials" in done.error[-1]


@pytest.mark.needs_backend
def test_a_machine_s_settings_change_no_token(
    chronos: Any, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On real runs; what they measure is replaced, so that one setting wins."""
    import shutil

    from chronos.tune import machine

    model, ratio, knobs = tmp_path / "model", machine._ratio, machine._Continuation.knobs
    shutil.copytree(packed, model)
    tried = {"readers": [16], "prefetch": ["off"]}  # of all there are, for want of time

    def few(runs: machine._Continuation) -> machine.Knobs:
        assert {"readers", "prefetch", "predictor"} <= {name for name, _ in knobs(runs)}
        return list(tried.items())

    monkeypatch.setattr(machine._Continuation, "knobs", few)
    flags = ("generate", model, "-p", "def", "-n", 12, "--budget", "50%", "--json")
    before = chronos(*flags).json
    tune = ("tune", "machine", model, "--budget", "50%", "-n", 12, "--rounds", 1, "--json")
    monkeypatch.setattr(machine, "_ratio", lambda old, new: 1.0)
    nothing = chronos(*tune).json
    assert nothing["options"] == {} and nothing["profile"] is None
    assert [trial["verdict"] for trial in nothing["tried"]] == ["not 3 % faster"] * 2

    monkeypatch.setattr(machine, "_SLOWEST", 1e9)
    monkeypatch.setattr(machine, "_HITS", 1.0)
    monkeypatch.setattr(machine, "_ratio", lambda old, new: 1.0 + 0.5 * ratio(old, old))
    found = chronos(*tune).json
    assert found["profile"] == str(model / "chronos-machine.json")
    assert found["options"] == {"readers": 16, "prefetch": "off"}
    after = chronos(*flags).json
    assert after["tokens"] == before["tokens"]
    assert after["stats"]["bytes_prefetched"] == 0 < before["stats"]["bytes_prefetched"]
    off = chronos(*flags, "--profile", "off").json
    assert off["stats"]["bytes_prefetched"] > 0
    shown = chronos("doctor", model)
    assert "chronos-machine.json" in shown.out and "readers 16" in shown.out
    assert chronos("doctor", model, "--json").json["profile"]["here"] is True
    assert chronos(*flags, "--profile", "on").code == 2
