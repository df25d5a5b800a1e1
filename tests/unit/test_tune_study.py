"""A study's life with trials that train nothing: what is found, told, shared and taken up again.

`Planted` stands where a trial's process does, and makes a loss of the recipe in the trial's folder.
Processes and real trainings: tests/cli/test_tune.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.errors import BudgetError, ConfigError, UsageError
from chronos.common.model.config import ModelConfig
from chronos.common.traces.trace import TraceRecorder
from chronos.common.training import flops
from chronos.testing.tiny import CONFIG, tiny_model, tiny_tokenizer
from chronos.tune import worker
from chronos.tune.apply import apply
from chronos.tune.measured import Measured, expert_bytes_per_token
from chronos.tune.pareto import front, goes_on, order
from chronos.tune.report import status
from chronos.tune.settings import load_tuning
from chronos.tune.study import JOURNAL, Study, mend_journal
from chronos.tune.trial import Job, TrialError

pytest.importorskip("optuna")
ROOT = Path(__file__).parents[2]
RECIPE = """
[model]
hidden_size = 64
num_hidden_layers = 2
num_experts = 16
num_experts_per_tok = 2
moe_intermediate_size = 32

[tokenizer]
path = "{tokenizer}"

[cadence]
steps = 9

[optimizer]
learning_rate = 5e-4

[tune]
trials = {trials}
repeats = 0
{more}
"""
RATE, BALANCE = 3e-3, 0.02


class Planted:
    """Trials whose loss is least at RATE and BALANCE. collapse: whether a low rate makes the router
    collapse, which looks better than all else. at: called with (trial's folder, step) at rungs."""

    def __init__(
        self, *, collapse: bool = False, at: Callable[[Path, int], None] = lambda folder, step: None
    ) -> None:
        self.collapse, self.at = collapse, at
        self.steps: list[tuple[str, int]] = []

    def __call__(self, job: Job, judge: Any, progress: Any, tick: Any) -> bool:
        recipe = tomllib.loads((job.folder / "recipe.toml").read_text("utf-8"))
        rate = recipe.get("optimizer", {}).get("learning_rate", 1e-4)
        balance = recipe.get("loss", {}).get("balance", 0.01)
        off = math.log(rate / RATE) ** 2 + 0.1 * math.log(balance / BALANCE) ** 2
        collapsed = self.collapse and rate < 1e-3
        loss = 3.0 + off if not collapsed else 1.0
        seed = recipe.get("optimizer", {}).get("seed", 0)
        for step in job.rungs:
            if step <= job.judged:
                continue
            self.steps.append((job.folder.name, step))
            self.at(job.folder, step)
            if not tick():
                return False
            progress({"step": step})
            effective, use = (0.15, 1.0) if collapsed else (0.9, 0.2)
            reads = 1e4 if collapsed else 1e5 * (1 + balance)
            noise = 0.001 * seed + 1 / step
            if not judge(Measured(step, loss + noise, reads, effective, use)):
                return True
        return True


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a study's file and reads it: study(trials, "more = 1")."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a busy disk is not what is tested
    tiny_tokenizer().save(tmp_path / "tokenizer")

    def make(trials: int, more: str = "") -> Any:
        path = tmp_path / "study.toml"
        where = (tmp_path / "tokenizer").as_posix()
        path.write_text(RECIPE.format(tokenizer=where, trials=trials, more=more), "utf-8")
        return load_tuning(path)

    return make


def events(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text("utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event]


def test_a_planted_optimum_is_found_in_20_trials(study: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    worker.start(study(20), run, run=Planted())
    found = status(Study.of(run, None))
    assert sum(found["counts"].values()) == 20
    done = apply(run, tmp_path / "best.toml")
    best = tomllib.loads((tmp_path / "best.toml").read_text("utf-8"))
    assert abs(math.log(best["optimizer"]["learning_rate"] / RATE)) < math.log(1.5)
    assert done.values["loss"][0] < 3.0 + math.log(5e-4 / RATE) ** 2 / 4
    assert done.changes["optimizer.learning_rate"][0] == 5e-4
    assert "tune" not in best and best["cadence"]["steps"] == 9
    own = [row for row in found["trials"] if row["own"]]
    assert [row["trial"] for row in own] == [0] and own[0]["state"] == "whole"
    with pytest.raises(UsageError, match="there already"):
        apply(run, tmp_path / "best.toml")


def test_a_collapsed_router_is_infeasible_not_best(study: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    worker.start(study(12), run, run=Planted(collapse=True))
    found = status(Study.of(run, None))
    collapsed = [row for row in found["trials"] if row["measured"].get("effective", 1) < 0.4]
    assert collapsed and all(row["state"] == "infeasible" for row in collapsed)
    assert min(row["measured"]["loss"] for row in collapsed) < 3
    assert found["best"] and all(row["measured"]["loss"] > 3 for row in found["best"])
    assert found["trials"][0]["own"] and found["trials"][0]["state"] == "infeasible"
    chosen = next(row for row in found["trials"] if row["trial"] == found["apply"])
    assert chosen["state"] == "whole"


def test_few_trials_come_to_their_end(study: Any, tmp_path: Path) -> None:
    planted = Planted()
    worker.start(study(18), tmp_path / "run", run=planted)
    found = status(Study.of(tmp_path / "run", None))
    early = [row for row in found["trials"] if row["state"] == "ended early"]
    assert len(early) >= 4 and all(len(row["rungs"]) < 3 for row in early)
    whole = [folder for folder, step in planted.steps if step == 9]
    assert len(whole) == found["counts"]["whole"] <= 18 - len(early)
    best = found["best"][0]["rungs"][0]["values"]["loss"]
    assert best < min(row["rungs"][0]["values"]["loss"] for row in early)


def test_the_best_are_run_again_with_other_seeds(study: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tuning = study(6)
    tuning = dataclasses.replace(tuning, settings=dataclasses.replace(tuning.settings, repeats=2))
    worker.start(tuning, run, run=Planted())
    found = status(Study.of(run, None))
    repeats = [row for row in found["trials"] if row["repeat_of"] is not None]
    again = {row["repeat_of"] for row in repeats}
    assert 0 in again and found["best"][0]["trial"] in again
    assert sorted(row["seed"] for row in repeats if row["repeat_of"] == 0) == [1, 2]
    seeds = found["best"][0]["seeds"]["loss"]
    assert seeds["runs"] == 3 and seeds["stdev"] == pytest.approx(0.001)
    before = len(found["trials"])
    worker.start(tuning, run, run=Planted())
    assert len(status(Study.of(run, None))["trials"]) == before, "a study that is done stays so"


# Threads stand for processes, and share the list of filters that each of these has to itself.
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("url", [False, True])
def test_two_workers_share_a_study(study: Any, tmp_path: Path, url: bool) -> None:
    tuning, run = study(12), tmp_path / "run"
    place = f"sqlite:///{tmp_path}/study.db" if url else None
    both, failed = threading.Barrier(2, timeout=30), list[BaseException]()
    met = set[int]()

    def at(folder: Path, step: int) -> None:
        name = threading.get_ident()
        if name not in met:  # each has a trial before one goes on
            met.add(name)
            both.wait()

    def work() -> None:
        try:
            worker.start(tuning, run, study=place, run=Planted(at=at))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(met) == 2
    found = status(Study.of(run, place))
    assert sum(found["counts"].values()) == 12 and "running" not in found["counts"]
    params = [json.dumps(row["params"], sort_keys=True) for row in found["trials"]]
    assert len(set(params)) == 12, "workers drew the same"
    assert [row["own"] for row in found["trials"]].count(True) == 1


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}]
from pathlib import Path
from chronos.tune import worker
from chronos.tune.settings import load_tuning
from tests.unit.test_tune_study import Planted
def at(folder, step):
    if folder.name == "0001" and step > 1:
        os.kill(os.getpid(), signal.SIGKILL)
class Long(Planted):
    def __call__(self, job, judge, progress, tick):
        return super().__call__(job, lambda found: judge(found) or True, progress, tick)
worker.start(load_tuning({file!r}), {run!r}, run=Long(at=at))
"""


def test_a_killed_worker_s_trial_goes_on(study: Any, tmp_path: Path) -> None:
    run, tuning = tmp_path / "run", study(3)
    file = tmp_path / "study.toml"
    code = KILLED.format(root=str(ROOT), file=str(file), run=str(run))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {row.number: row.state for row in Study.of(run, None).trials()}
    assert left == {0: "whole", 1: "running"}
    planted = Planted()
    worker.start(tuning, run, run=planted)
    found = status(Study.of(run, None))
    assert sum(found["counts"].values()) == 3
    again = next(row for row in found["trials"] if row["folder"] == "trials/0001")
    assert again["trial"] == 2 and [rung["step"] for rung in again["rungs"]][0] == 1
    assert ("0001", 1) not in planted.steps, "what was judged is not judged again"
    assert [e["why"] for e in events(run, "trial") if e["state"] == "interrupted"] == [
        "its worker was killed"
    ]


def test_workers_of_other_machines_are_given_time(study: Any, tmp_path: Path) -> None:
    """Their processes cannot be looked at: how long they gave no sign decides."""
    tuning, run = study(5), tmp_path / "run"
    opened = Study.open(tuning, run, None)
    for seconds in (10, 1000):
        asked = opened.ask(tuning)
        asked.trial.set_user_attr("worker", {"host": "elsewhere", "pid": 1, "began": 0.0})
        asked.trial.set_user_attr("alive", time.time() - seconds)
    assert opened.recover() == [1] and opened.recover() == []
    assert [trial.state for trial in opened.trials()] == ["running", "interrupted"]
    assert opened.waiting() == 1


def test_a_choice_that_kills_its_workers_is_given_up(study: Any, tmp_path: Path) -> None:
    tuning, run = study(5), tmp_path / "run"
    opened = Study.open(tuning, run, None)
    for _ in range(3):
        asked = opened.ask(tuning)
        asked.trial.set_user_attr("worker", {"host": "elsewhere", "pid": 1, "began": 0.0})
        asked.trial.set_user_attr("alive", 0.0)
        assert opened.recover() == [asked.number]
    assert opened.waiting() == 0
    assert [trial.state for trial in opened.trials()] == ["interrupted", "interrupted", "failed"]


def test_what_is_too_large_is_never_built(study: Any, tmp_path: Path) -> None:
    planted = Planted()
    worker.start(study(3, "max_parameters = 0.5"), tmp_path / "run", run=planted)
    rows = status(Study.of(tmp_path / "run", None))["trials"]
    assert planted.steps == [] and {row["state"] for row in rows} == {"infeasible"}
    assert all(row["constraints"]["parameters"] > 0 for row in rows if row["own"])


def test_a_study_that_is_stopped_goes_on(study: Any, tmp_path: Path) -> None:
    run, tuning = tmp_path / "run", study(4)

    def stop(folder: Path, step: int) -> None:
        if folder.name == "0002":
            Study.of(run, None).ask_to_stop(True)
            time.sleep(worker._STOP_S * 1.1)

    done = worker.start(tuning, run, run=Planted(at=stop))
    assert done.stopped and done.signal == 0 and done.trials == 2
    assert worker.stop(Study.of(run, None)) == 1
    assert status(Study.of(run, None))["waiting"] == 1
    assert not worker.start(tuning, run, run=Planted()).stopped
    found = status(Study.of(run, None))
    assert sum(found["counts"].values()) == 4 and found["stopping"] is False
    assert "trials/0002" in {row["folder"] for row in found["trials"]}


def test_a_signal_ends_a_worker_and_loses_nothing(study: Any, tmp_path: Path) -> None:
    def press(folder: Path, step: int) -> None:
        if folder.name == "0001":
            os.kill(os.getpid(), signal.SIGINT)

    done = worker.start(study(3), tmp_path / "run", run=Planted(at=press))
    assert done.signal == signal.SIGINT and done.trials == 1
    assert Study.of(tmp_path / "run", None).waiting() == 1


def test_trials_that_fail_do_not_end_a_study(study: Any, tmp_path: Path) -> None:
    def fail(folder: Path, step: int) -> None:
        if folder.name == "0001":
            raise TrialError("the trial's process was killed by signal 9")
        if folder.name == "0002":
            error = TrialError("10 updates in a row were not finite")
            error.diverged = True
            raise error

    run = tmp_path / "run"
    worker.start(study(5), run, run=Planted(at=fail))
    rows = {row["trial"]: row for row in status(Study.of(run, None))["trials"]}
    assert len(rows) == 5
    assert rows[1]["state"] == "failed" and "signal 9" in rows[1]["why"]
    assert rows[2]["state"] == "infeasible" and rows[2]["constraints"]["diverged"] == 1


def test_what_fails_always_ends_it(study: Any, tmp_path: Path) -> None:
    def fail(folder: Path, step: int) -> None:
        raise TrialError("no such data", "books", "name what is there")

    with pytest.raises(TrialError, match="no such data"):
        worker.start(study(5), tmp_path / "run", run=Planted(at=fail))
    assert Study.of(tmp_path / "run", None).waiting() == 1, "the recipe is tried again"

    def later(folder: Path, step: int) -> None:
        if folder.name != "0000":
            fail(folder, step)

    with pytest.raises(TrialError, match="5 trials in a row"):
        worker.start(study(20), tmp_path / "run", run=Planted(at=later))


def test_a_model_that_is_gone_on_with_gives_the_geometry(tmp_path: Path) -> None:
    model, file = tiny_model(tmp_path / "model"), tmp_path / "study.toml"
    text = '[model]\npath = "model"\n[sft]\nbatch_size = 2\nseq_len = 32\n[cadence]\nsteps = 5\n'
    file.write_text(text + "[tune]\ntrials = 2\nrepeats = 0\n", "utf-8")
    run = tmp_path / "run"
    worker.start(load_tuning(file), run, run=Planted())
    [begun] = events(run, "start")
    assert begun["operations"] == 3 * 5 * 2 * 32 * flops.forward(CONFIG, 32)
    assert begun["parameters"] == ["optimizer.learning_rate", *_WEIGHTS]
    own = tomllib.loads((run / "trials" / "0000" / "recipe.toml").read_text("utf-8"))
    assert own["model"] == {"path": str(model)} and "tokenizer" not in own
    file.write_text(text + "[lora]\nrank = 4\n", "utf-8")
    with pytest.raises(ConfigError, match="has adapters"):
        load_tuning(file)


_WEIGHTS = ["loss.balance", "loss.temporal", "loss.locality"]


def test_another_recipe_is_another_study(study: Any, tmp_path: Path) -> None:
    worker.start(study(1), tmp_path / "run", run=Planted())
    worker.start(study(2), tmp_path / "run", run=Planted())  # more trials: the same study
    with pytest.raises(ConfigError, match="differ from the study's"):
        worker.start(study(2, 'budget = "50%"'), tmp_path / "run", run=Planted())
    with pytest.raises(UsageError, match="holds no study"):
        Study.of(tmp_path / "other", None)
    with pytest.raises(UsageError, match="cannot be opened"):
        Study.of(tmp_path / "other", "nonsense://x")


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_one_objective_has_optuna_s_pruners(study: Any, tmp_path: Path, pruner: str) -> None:
    more = f'objective = "loss"\npruner = "{pruner}"'
    worker.start(study(12, more), tmp_path / "run", run=Planted())
    found = status(Study.of(tmp_path / "run", None))
    assert found["objectives"] == ["loss"] and found["counts"]["ended early"] >= 2
    states = {row["state"] for row in found["trials"]}
    assert len(found["trials"]) == 12 and states <= {"whole", "ended early", "infeasible"}


def test_importances_have_a_control(study: Any, tmp_path: Path) -> None:
    """What the loss follows is beyond chance; what nothing uses is not."""
    more = "rungs = 1\nsearch = ['optimizer', 'loss']"
    worker.start(study(40, more), tmp_path / "run", run=Planted())
    found = status(Study.of(tmp_path / "run", None))["importances"]
    assert next(iter(found)) == "optimizer.learning_rate"
    assert found["optimizer.learning_rate"]["beyond_chance"]
    for name in ("loss.temporal", "loss.locality"):  # sampled where they are on, and never used
        assert found[name]["used_in"] < 40 and not found[name]["beyond_chance"], found
    assert all(0 <= i["shuffled_mean"] <= i["shuffled_high"] for i in found.values())


def test_a_torn_journal_is_mended(study: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    worker.start(study(2), run, run=Planted())
    journal = run / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"wor')
    worker.start(study(3), run, run=Planted())
    assert sum(status(Study.of(run, None))["counts"].values()) == 3
    assert (run / (JOURNAL + ".torn")).read_bytes().startswith(whole)
    assert journal.read_bytes().startswith(whole)

    class Unused:
        def acquire(self) -> None:
            raise AssertionError("a whole journal is left alone")

    assert not mend_journal(journal, Unused())


def test_domination_then_loss() -> None:
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.0, 3.0), (4.0, 4.0)]
    assert front(points) == [0, 1, 2]
    assert order(points) == [1, 2, 0, 3, 4]
    assert front([(1.0,), (1.0,), (2.0,)]) == [0, 1]
    assert goes_on((1.0, 1.0), [], 3) and goes_on((0.9, 9.0), points, 3)
    assert not goes_on((5.0, 5.0), points[:2], 3)


HISTORY = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_experts=8, num_experts_per_tok=2,
    moe_intermediate_size=16, routing_source="history", num_resident_experts=2,
    num_resident_experts_per_tok=1,
)  # fmt: skip
RECORD = 8192  # 3 * 32 * 16 float32, in whole pages


def recorded(tokens: int = 64) -> Any:
    """A resident and a streamed expert a token; the streamed ones walk over six, a step each."""
    recorder = TraceRecorder(8, 2, model="walk")
    for token in range(tokens):
        recorder.append(np.array([[token % 2, 2 + token % 6], [0, 2 + (token + 3) % 6]]))
    return recorder.trace()


def test_reads_are_those_of_the_store_s_policy() -> None:
    # Residents stay, and of each layer the streamed expert is read for each token: in 8 slots 4 are
    # residents and 2 what comes next; LFU would keep no more of a walk over 12.
    assert expert_bytes_per_token(recorded(), HISTORY, str(8 * RECORD)) == pytest.approx(
        2 * RECORD, rel=0.35
    )
    assert expert_bytes_per_token(recorded(), HISTORY, "all") == 0
    with pytest.raises(BudgetError, match="a token needs"):
        expert_bytes_per_token(recorded(), HISTORY, str(4 * RECORD))
