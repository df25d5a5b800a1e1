"""What a worker makes of a trial's process: its lines, its end, its death. Scripts stand for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from chronos.tune import trial
from chronos.tune.measured import Measured
from chronos.tune.settings import TuneSettings
from chronos.tune.trial import Job, TrialError, run_apart

FOUND = {"step": 3, "loss": 2.5, "expert_bytes_per_token": 1e5, "effective": 0.9, "use": 0.2}
BEGIN = """
import json, os, signal, sys, time
job = json.loads(sys.stdin.readline())
def say(**line):
    print(json.dumps(line), flush=True)
"""
RUNG = f"""
say(rung={FOUND!r})
answer = sys.stdin.readline().strip()
say(end="done" if answer == "go" else "stopped", step=3)
"""


class Told:
    """What a worker is called with."""

    def __init__(self, *, goes_on: bool = True, ticks: int = 1 << 30) -> None:
        self.goes_on, self.ticks = goes_on, ticks
        self.judged: list[Measured] = []
        self.lines: list[dict[str, Any]] = []

    def judge(self, found: Measured) -> bool:
        self.judged.append(found)
        return self.goes_on

    def tick(self) -> bool:
        self.ticks -= 1
        return self.ticks >= 0


def run(
    monkeypatch: pytest.MonkeyPatch, script: str, told: Told, folder: Path = Path("trials/0000")
) -> bool:
    monkeypatch.setattr(trial, "CHILD", (sys.executable, "-c", BEGIN + script))
    monkeypatch.setattr(trial, "_TICK_S", 0.05)
    job = Job(folder, "pretrain", (1, 3), TuneSettings(), judged=1)
    return run_apart(job, told.judge, told.lines.append, told.tick)


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_trial_waits_at_its_rungs(monkeypatch: pytest.MonkeyPatch, goes_on: bool) -> None:
    told = Told(goes_on=goes_on)
    assert run(monkeypatch, "say(progress={'step': 1, 'ce': 3.0})" + RUNG, told)
    assert told.judged == [Measured(**FOUND)]  # type: ignore[arg-type]
    assert told.lines == [{"step": 1, "ce": 3.0}]


def test_a_trial_knows_its_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = f"open({str(tmp_path / 'job')!r}, 'w').write(json.dumps(job)); say(end='done', step=3)"
    assert run(monkeypatch, script, Told(), tmp_path)
    job = json.loads((tmp_path / "job").read_text("utf-8"))
    assert job["folder"] == str(tmp_path) and job["rungs"] == [1, 3] and job["judged"] == 1
    assert TuneSettings(**job["settings"]) == TuneSettings()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9, as the system does where"),
        ("sys.exit(3)", "ended with exit code 3"),
        ("say(end='error', kind='MemoryError', what='there was not enough memory')", "not enough"),
    ],
)
def test_a_trial_that_dies_says_how(
    monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    with pytest.raises(TrialError, match=message) as found:
        run(monkeypatch, script, Told())
    assert not found.value.diverged and found.value.where == "trials/0000"


def test_a_trial_that_diverges_is_told_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "kind='DivergedError', what='not finite', where='run', fix='', exit_code=1"
    with pytest.raises(TrialError, match="not finite") as found:
        run(monkeypatch, f"say(end='error', {line})", Told())
    assert found.value.diverged and found.value.where == "run"


def test_a_trial_is_asked_to_save_and_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    listening = """
signal.signal(signal.SIGTERM, lambda number, frame: (say(end="stopped", step=2), sys.exit(0)))
say(progress={"step": 1})
time.sleep(30)
"""
    told = Told(ticks=8)
    assert run(monkeypatch, listening, told) is False
    assert told.lines == [{"step": 1}]
    assert run(monkeypatch, "time.sleep(30)", Told(ticks=2)) is False  # before it listens
