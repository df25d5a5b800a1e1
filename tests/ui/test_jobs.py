"""Jobs: started, followed, stopped and found again, without a page."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chronos.common.disk.header import read_header
from chronos.common.disk.tensors import read_tensors
from chronos.common.errors import ResourceError, UsageError
from chronos.train.loop import checkpoints
from chronos.ui import keeper
from chronos.ui.jobs import Job, Jobs
from chronos.ui.root import Root
from chronos.ui.rows import Rows

# Instead of a training: it says that it began, then waits for the signals that commands know.
SLEEPER = """
import signal, sys, time
def ended(number, frame):
    print("saved", flush=True)
    sys.exit(128 + number)
if "deaf" not in sys.argv:
    signal.signal(signal.SIGINT, ended)
else:
    signal.signal(signal.SIGINT, lambda number, frame: print("not now", flush=True))
print("began", flush=True)
time.sleep(60)
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """Jobs in a folder where `python -m chronos` is the program above."""
    (tmp_path / "chronos").mkdir()
    (tmp_path / "chronos" / "__init__.py").write_text("")
    (tmp_path / "chronos" / "__main__.py").write_text(SLEEPER)
    # The keeper itself is imported from where this test found it.
    (tmp_path / "chronos" / "ui").symlink_to(Path(keeper.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = Jobs(Root(tmp_path))
    yield found
    for job in found.jobs():
        if job.alive:
            os.killpg(job.group, signal.SIGKILL)
    for started in found._keepers:
        started.wait()


def until(job: Callable[[], Job], done: Callable[[Job], bool], seconds: float = 20.0) -> Job:
    end = time.monotonic() + seconds
    while not done(found := job()):
        assert time.monotonic() < end, found
        time.sleep(0.01)
    return found


def said(word: str) -> Callable[[Job], bool]:
    return lambda job: word in job.lines()


def test_a_job_is_followed_stopped_and_found_again(jobs: Jobs) -> None:
    job = jobs.start("one", "train", ["train", "-c", "x"])
    assert (job.state, job.kind, job.args) == ("running", "train", ("train", "-c", "x"))
    until(lambda: jobs.job("one"), said("began"))
    restarted = Jobs(jobs.root)  # another process would know as little
    assert [found.state for found in restarted.jobs()] == ["running"]
    with pytest.raises(ResourceError, match="a job is running"):
        restarted.start("one", "train", ["train"])
    restarted.stop("one")
    ended = until(lambda: jobs.job("one"), lambda job: not job.alive)
    assert ended.lines()[-1] == "saved"
    assert (ended.state, ended.code) == ("stopped", 130)
    assert Jobs(jobs.root).job("one") == ended


def test_a_second_stop_is_sharper(jobs: Jobs) -> None:
    jobs.start("one", "train", ["deaf"])
    until(lambda: jobs.job("one"), said("began"))
    jobs.stop("one")
    stopping = until(lambda: jobs.job("one"), said("not now"))
    assert stopping.state == "stopping" and stopping.alive
    jobs.stop("one")
    ended = until(lambda: jobs.job("one"), lambda job: not job.alive)
    assert (ended.state, ended.code) == ("stopped", -signal.SIGTERM)
    jobs.stop("one")  # it has ended: nothing is signalled
    assert [r["signal"] for r in ended.rows if r["event"] == "stop"] == ["SIGINT", "SIGTERM"]


def test_a_job_outlives_its_keeper_and_can_be_stopped(jobs: Jobs) -> None:
    job = jobs.start("one", "train", ["train"])
    until(lambda: jobs.job("one"), said("began"))
    os.kill(job.group, signal.SIGKILL)  # the keeper leads the group
    jobs._keepers[0].wait()
    assert jobs.job("one").state == "running"
    with pytest.raises(ResourceError):
        jobs.start("one", "train", ["train"])
    jobs.stop("one")
    lost = until(lambda: jobs.job("one"), lambda job: not job.alive)
    assert (lost.state, lost.code) == ("lost", None)  # nobody was there to write its end


def test_the_next_job_of_a_folder_follows_in_its_log(jobs: Jobs) -> None:
    jobs.start("one", "train", ["train"])
    until(lambda: jobs.job("one"), said("began"))
    jobs.stop("one")
    until(lambda: jobs.job("one"), lambda job: not job.alive)
    again = jobs.start("one", "train", ["train", "--resume"])
    assert again.args == ("train", "--resume") and again.alive and "saved" not in again.lines()
    log = (again.folder / "job.jsonl").read_text("utf-8")
    assert log.count('"event": "start"') == 2


def test_a_result_is_the_last_object_printed(tmp_path: Path) -> None:
    folder = Root(tmp_path).run("one")
    folder.mkdir(parents=True)
    rows = [
        {"event": "start", "time": 1.0, "kind": "bench", "args": [], "group": 1},
        {"event": "out", "time": 2.0, "text": json.dumps({"a": 1})},
        {"event": "err", "time": 2.0, "text": '{"b": 2}'},
        {"event": "end", "time": 3.0, "code": 3},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "job.jsonl").write_text(text + "{torn")
    job = Jobs(Root(tmp_path)).job("one")
    assert (job.state, job.code, job.result()) == ("failed", 3, {"a": 1})


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "-v", "a b", "x" * 65, "a\0"])
def test_names_of_runs_are_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        Jobs(Root(tmp_path)).start(name, "train", [])
    assert not (tmp_path / "runs").exists()


def test_paths_stay_below_the_root(tmp_path: Path) -> None:
    (tmp_path / "root" / "in").mkdir(parents=True)
    (tmp_path / "root" / "out").symlink_to(tmp_path)
    root = Root(tmp_path / "root")
    assert root.existing("in") == root.folder / "in"
    outside = (
        *("/etc/passwd", "../x", "in/../../x", "out", "out/x", "~", "~root", "-c", "", " ", "a\0b"),
        str(tmp_path),
    )
    for text in outside:
        with pytest.raises(UsageError):
            root.path(text)
    with pytest.raises(UsageError, match="no such file"):
        root.existing("absent")
    assert root.path(str(tmp_path / "root" / "in")) == root.folder / "in"


def test_listings_leave_out_links_and_logs(tmp_path: Path) -> None:
    for name in ("a/config.json", "b/c/config.json", ".d/config.json", "rows.jsonl", "x.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    root = Root(tmp_path)
    assert root.models() == ["a", "b/c"]
    assert (root.data(), root.recipes(), root.traces()) == (["rows.jsonl"], ["x.toml"], [])


def test_rows_are_read_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    rows = Rows(path)
    assert rows.read() == []
    path.write_text('{"a": 1}\n{"a": 2}\nnot json\n[1]\n{"a"')
    assert rows.read() == [{"a": 1}, {"a": 2}]
    with path.open("a") as file:
        file.write(": 3}\n")
    assert [row["a"] for row in rows.read()] == [1, 2, 3]
    path.write_text('{"a": 9}\n')  # begun anew
    assert rows.read() == [{"a": 9}]
    path.unlink()
    assert rows.read() == []


@pytest.mark.slow
@pytest.mark.needs_backend
@pytest.mark.timeout(300)
def test_two_start_one_run_and_a_stop_in_a_save_loses_nothing(root: Path) -> None:
    """It saves after every update, so a stop comes in a save or right before one."""
    recipe = (root / "recipes" / "quick.toml").read_text().partition("[tune]")[0]
    recipe = recipe.replace("steps = 30", "steps = 5000").replace(
        "save_every = 50", "save_every = 1"
    )
    (root / "recipes" / "saves.toml").write_text(recipe)
    args = ["train", "pretrain", "-c", "recipes/saves.toml", "-o", "runs/saves"]
    pages = [Jobs(Root(root)), Jobs(Root(root))]
    begun, refused = list[Job](), list[str]()

    def start(jobs: Jobs) -> None:
        try:
            begun.append(jobs.start("saves", "train", args))
        except ResourceError as error:
            refused.append(str(error))

    both = [threading.Thread(target=start, args=(jobs,)) for jobs in pages]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(begun) == 1 and "a job is running in this folder" in refused[0]

    def saved() -> list[int]:
        return [number for number, _ in checkpoints(root / "runs" / "saves")]

    reached = 0
    for more in ([], ["--resume"]):
        if more:
            pages[1].start("saves", "train", [*args, *more])
        wanted = reached + 5
        until(lambda: pages[0].job("saves"), lambda job: max(saved(), default=0) > wanted, 120)  # noqa: B023
        for _ in range(2):  # the second one ends it at once
            pages[0].stop("saves")
        ended = until(lambda: pages[1].job("saves"), lambda job: not job.alive, 60)
        assert ended.state == "stopped", ended.lines()
        number, path = checkpoints(root / "runs" / "saves")[-1]
        assert read_header(path).metadata["step"] == str(number) and number > reached
        assert len(dict(read_tensors(path))) > 20
        reached = number  # the second run begins from the first one's
    for jobs in pages:
        for keeper_ in jobs._keepers:
            keeper_.wait()
