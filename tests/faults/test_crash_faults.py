"""C1, C3, C6: packing killed anywhere, power lost anywhere, two writers at once."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chronos.common.disk.atomic import RunLock
from chronos.common.errors import ChronosError, ConfigError, ResourceError
from chronos.common.layout import is_packed, open_layout, pack, verify
from chronos.testing.faults import JournalIO, Tree
from chronos.testing.tiny import tiny_model
from tests.support.tiny_guest import tiny_guest

SMALL = {"num_hidden_layers": 2, "num_experts": 4, "vocab_size": 300}
# Each pack runs in a fork of one process that has everything imported: half a second saved each.
KILL_AT = """
import os, signal, sys, time
from chronos.common.layout import pack
from chronos.testing.faults import FaultyIO
source, target, ops = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
os.fsync = lambda fd: None  # a killed process loses nothing it wrote; power loss is tested below
print("ready", flush=True)
for line in sys.stdin:
    at = float(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            pack(source, target, io=FaultyIO(fail_at=int(at), ops=ops, kill=True))
            code = 0
        finally:
            os._exit(code)
    if 0 < at < 1:
        time.sleep(at)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.fixture(scope="module", params=["chronos", "guest"])
def source(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "src"
    if request.param == "guest":  # shards, experts one by one, a first layer without any
        return tiny_guest(folder, "mixtral", shards=2)
    tiny_model(folder, **SMALL)
    for path in folder.glob("*token*"):
        path.unlink()
    return folder


@pytest.fixture(scope="module")
def expected(source) -> Tree:
    pack(source, source.with_name("reference"))
    return tree(source.with_name("reference"))


def tree(folder: Path) -> Tree:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def check_what_is_there(folder: Path, expected: Tree) -> None:
    """Either no manifest, or everything it names; and no final file that is not whole."""
    if is_packed(folder):
        open_layout(folder)
        assert verify(folder).problems == []
    else:
        with pytest.raises(ConfigError):
            open_layout(folder)
    for name, content in tree(folder).items():
        if name != "run.lock" and not name.endswith(".chronos-tmp"):
            assert content == expected[name]


class Killer:
    """Packs in a child process that is killed on its way."""

    def __init__(self, source: Path, target: Path, ops: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", KILL_AT, source, target, ops],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"

    def pack(self, kill_at: float) -> int:
        """Kill before that operation, or after that part of a second; 0 lets it come through.

        The child's exit code: -9 when it was killed, 0 when it came through.
        """
        assert self.process.stdin and self.process.stdout
        print(kill_at, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def __enter__(self) -> Killer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=30)


@pytest.mark.parametrize("ops", ["replace", "fsync"])  # before each rename; and behind each
def test_c1_killed_around_each_rename(source, expected, tmp_path, ops):
    target = tmp_path / "dst"
    with Killer(source, target, ops) as killer:
        at, code = 0, -signal.SIGKILL
        while code:
            at += 1
            code = killer.pack(at)
            assert code in (0, -signal.SIGKILL)
            check_what_is_there(target, expected)
            assert killer.pack(0) == 0
            assert tree(target) == expected, "the second run did not clean up and finish"
            shutil.rmtree(target)
    assert at > len(expected)


@pytest.mark.slow
def test_c1_killed_before_any_operation_without_a_clean_run_between(source, expected, tmp_path):
    """Each run continues what the last one left, and dies one operation later than it."""
    target = tmp_path / "dst"
    with Killer(source, target, "open,create,write,fsync,replace,unlink") as killer:
        for at in range(1, 2_000):
            code = killer.pack(at)
            check_what_is_there(target, expected)
            if code == 0:
                break
        assert code == 0
    assert tree(target) == expected


@pytest.mark.slow
def test_c1_killed_at_random_times(source, expected, tmp_path):
    target, chance, killed = tmp_path / "dst", random.Random(0), 0
    with Killer(source, target) as killer:
        for _ in range(50):
            killed += killer.pack(chance.uniform(0.001, 0.15)) == -signal.SIGKILL
            check_what_is_there(target, expected)
            if is_packed(target):
                shutil.rmtree(target)
        assert killed
        assert killer.pack(0) == 0
    assert tree(target) == expected


def test_c3_power_lost_at_any_moment(source, expected, tmp_path):
    """Whatever was not flushed is gone: still no manifest that names a missing or short file."""
    io, target = JournalIO(), tmp_path / "dst"
    pack(source, target, io=io)
    assert len(io.states) > 4 * len(expected)
    seen: list[Tree] = []
    for number, state in enumerate(io.states):
        if state in seen:
            continue
        seen.append(state)
        folder = tmp_path / f"state-{number}"
        for path, content in state.items():
            copy = folder / os.path.relpath(path, target)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)
        if is_packed(folder):
            assert verify(folder).problems == []
        elif folder.exists():
            pack(source, folder)
            assert tree(folder) == expected
        shutil.rmtree(folder, ignore_errors=True)
    assert {os.path.relpath(path, target): data for path, data in io.states[-1].items()} == expected


HOLD = """
import sys
from chronos.common.disk.atomic import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_c6_the_second_writer_fails_fast_and_a_dead_one_is_replaced(source, tmp_path):
    target = tmp_path / "dst"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        for work in (lambda: RunLock(target).__enter__(), lambda: pack(source, target)):
            with pytest.raises(ResourceError, match=f"process {holder.pid} is already writing"):
                work()
        holder.kill()
        holder.wait()
    assert (target / "run.lock").exists()
    pack(source, target)
    assert not (target / "run.lock").exists() and verify(target).problems == []


def test_c7_readers_of_a_folder_never_see_it_change(source, tmp_path):
    """A new clustering is a new folder: what is published is never written again."""
    target = tmp_path / "dst"
    pack(source, target)
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    keys = list(reversed(open_layout(target).records))
    with pytest.raises(ChronosError, match="choose another folder"):
        pack(source, target, order=[keys])
    assert before == {path: path.stat().st_mtime_ns for path in target.rglob("*")}
