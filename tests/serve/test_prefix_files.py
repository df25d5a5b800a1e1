"""Kept beginnings of prompts on disk: a second server begins warm with the bits of a cold one, and
what is damaged, another's or too much costs a line in the log and no token."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.errors import DiskFullError
from chronos.common.text.sampling import PIECE, SamplingParams
from chronos.run.engine import Engine, load
from chronos.run.generation import GenerationResult, Step
from chronos.serve import prefix_files
from chronos.serve.prefix_files import SUFFIX, PrefixFiles, fingerprint
from chronos.serve.worker import Job, Worker
from chronos.testing.tiny import CONFIG

VOCAB, MANY = CONFIG.vocab_size, 1 << 30
PROMPT = [17 * i % VOCAB for i in range(2 * PIECE + 9)]
Answer = tuple[int, list[int], list[Any]]


def ask(
    folder: Path, backend: str, disk: Path, *prompts: list[int], most: int = MANY, **options: Any
) -> list[Answer]:
    """What a server that begins and ends here answers, one prompt after another: how many tokens
    were there already, tokens, log-probabilities."""

    def opened() -> Engine:
        engine = load(folder, backend=backend, **({"budget": "50%"} | options))
        engine.stop_ids = frozenset()
        return engine

    worker = Worker({"m": opened}, prefix_bytes=1 << 26, prefix_files=PrefixFiles(disk, most))
    worker.start()
    worker.loaded.result()
    found = []
    for prompt in prompts:
        events: queue.Queue[Any] = queue.Queue()
        job = Job("m", prompt, SamplingParams(), 6, events.put, likely=3)
        worker.submit([job])
        likely: list[Any] = []
        while not isinstance(event := events.get(timeout=60), GenerationResult):
            assert not isinstance(event, Exception), event
            likely += [event.likely] if isinstance(event, Step) else []
        found.append((job.cached, event.tokens, likely))
    worker.close()
    return found


def test_a_server_that_begins_anew_has_the_bits_of_a_cold_one(
    backend: Any, folder: Path, tmp_path: Path
) -> None:
    other = [*PROMPT[: PIECE + 50], *range(40)]
    cold = ask(folder, backend.name, tmp_path / "a", PROMPT, other)
    assert [cached for cached, *_ in cold] == [0, 0]
    assert (tmp_path / "a").stat().st_mode & 0o077 == 0
    [warm] = ask(folder, backend.name, tmp_path / "a", PROMPT, budget="25%")
    assert warm == (2 * PIECE, *cold[0][1:])
    [warm] = ask(folder, backend.name, tmp_path / "a", other, budget="resident")
    assert warm == (PIECE, *cold[1][1:])


def test_a_damaged_file_is_read_again_and_written_anew(
    one_backend: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    [cold] = ask(folder, one_backend, tmp_path / "kept", PROMPT)
    [path] = (tmp_path / "kept").iterdir()
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    again, then = ask(folder, one_backend, tmp_path / "kept", PROMPT, PROMPT)
    assert again == (0, *cold[1:]) and then == (2 * PIECE, *cold[1:])
    assert "is removed and its prompt is read again" in caplog.text
    raw[-100] ^= 1
    assert path.read_bytes() == raw


IDS = np.arange(PIECE)
TENSORS = [("x", "F32", (3, 5), np.arange(15, dtype=np.float32).tobytes())]


@pytest.fixture
def files(tmp_path: Path) -> PrefixFiles:
    """A folder with one file."""
    files = PrefixFiles(tmp_path / "kept", 100_000)
    files.open("me")
    files.write(IDS, TENSORS)
    return files


def only(files: PrefixFiles) -> Path:
    [path] = files._folder.iterdir()
    return path


def test_what_was_written_is_read(files: PrefixFiles) -> None:
    assert files.find(np.arange(3 * PIECE), 0) == PIECE
    assert files.find(np.arange(3 * PIECE), PIECE) == files.find(IDS, 0) == 0
    assert files.find(np.arange(1, 3 * PIECE), 0) == 0
    found = files.read(IDS)
    assert found is not None
    [(entry, data)] = found
    assert (entry.name, entry.dtype, entry.shape, data.tobytes()) == TENSORS[0]


@pytest.mark.parametrize(
    "how",
    ["a bit", "an id", "the owner", "a name", "cut", "longer", "empty", "a header", "renamed"],
)
def test_what_is_damaged_is_never_read(
    how: str, files: PrefixFiles, caplog: pytest.LogCaptureFixture
) -> None:
    path = only(files)
    raw = bytearray(path.read_bytes())
    if how == "a bit":
        raw[-1] ^= 1
    elif how == "an id":
        raw[int.from_bytes(raw[:8], "little") + 8] ^= 1
    elif how == "the owner":
        raw = raw.replace(b'"owner":"me"', b'"owner":"he"')
    elif how == "a name":
        raw = raw.replace(b'"x"', b'"y"')
    elif how == "cut":
        del raw[-8:]
    elif how == "longer":
        raw += bytes(8)
    elif how == "empty":
        raw.clear()
    elif how == "a header":
        raw[:8] = b"\xff" * 8
    else:
        files.write(IDS + 1, TENSORS)
        raw = bytearray(files._path(IDS + 1).read_bytes())
        files._path(IDS + 1).unlink()
    assert raw != path.read_bytes()
    path.write_bytes(raw)
    assert files.read(IDS) is None
    assert "is removed and its prompt is read again" in caplog.text and not path.exists()
    files.write(IDS, TENSORS)
    assert files.read(IDS) is not None


KILLED = """
import sys
from pathlib import Path
import numpy as np
from chronos.serve.prefix_files import PrefixFiles
from chronos.testing.faults import WRITES, FaultyIO
for at in range(1, 100):
    child = os.fork()
    if child == 0:
        files = PrefixFiles(Path(sys.argv[1]), 100_000, FaultyIO(fail_at=at, ops=WRITES, kill=True))
        files.open("me")
        files.write(np.arange(int(sys.argv[2])) + at, [("x", "F32", (3, 5), bytes(range(60)))])
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(at, code, flush=True)
    if code == 0:
        break
"""


def test_killed_anywhere_in_a_write_nothing_broken_is_left(
    files: PrefixFiles, caplog: pytest.LogCaptureFixture
) -> None:
    """A file is there with all its bytes or not at all, and what was there before stays."""
    command = [sys.executable, "-c", "import os" + KILLED, str(files._folder), str(PIECE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    codes = {int(at): int(code) for at, code in map(str.split, done.stdout.splitlines())}
    assert len(codes) > 5 and set(list(codes.values())[:-1]) == {-signal.SIGKILL}
    anew = PrefixFiles(files._folder, 100_000)
    anew.open("me")
    assert not list(files._folder.glob(".*.chronos-tmp"))
    assert anew.read(IDS) is not None
    kept = [at for at in codes if anew.find(np.append(IDS + at, 0), 0)]
    assert max(codes) in kept and min(codes) not in kept
    for at in kept:
        [(_, data)] = anew.read(IDS + at) or [(None, memoryview(b""))]
        assert data == bytes(range(60))
    assert caplog.text == ""


def test_what_is_anothers_is_left_alone_and_told(
    files: PrefixFiles, caplog: pytest.LogCaptureFixture
) -> None:
    files.open("another")
    assert "1 files in" in caplog.text and "of another model, version or setting" in caplog.text
    assert files.find(np.arange(3 * PIECE), 0) == 0
    files.write(IDS, TENSORS)
    files.open("me")
    assert files.read(IDS) is not None and len(list(files._folder.iterdir())) == 2


def test_a_full_disk_costs_a_line_in_the_log(
    files: PrefixFiles, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise DiskFullError("the disk is full")

    monkeypatch.setattr(prefix_files, "write_tensors", full)
    files.write(IDS + 1, TENSORS)
    assert "is not kept on disk: the disk is full" in caplog.text
    assert files.read(IDS) is not None


def test_a_folder_stays_within_its_bytes(tmp_path: Path) -> None:
    """The files used least recently go first; none that is not ours."""
    (tmp_path / "notes.txt").write_text("mine")
    files = PrefixFiles(tmp_path, 100_000)
    files.open("me")
    ids = [np.arange(at, at + PIECE) for at in range(5)]
    for at, each in enumerate(ids):
        files.write(each, [("x", "U8", (30_000,), bytes([at]) * 30_000)])
        for age, path in enumerate(
            sorted(tmp_path.glob(f"*{SUFFIX}"), key=lambda p: p.stat().st_mtime)
        ):
            os.utime(path, (1000 + age, 1000 + age))
        if at == 1:
            assert files.read(ids[0]) is not None  # used last now
        assert sum(p.stat().st_size for p in tmp_path.glob(f"*{SUFFIX}")) <= 100_000
    there = [files.find(np.append(each, 1), 0) for each in ids]
    assert there == [0, 0, 0, PIECE, PIECE]
    assert files.read(ids[4])[0][1].tobytes() == bytes([4]) * 30_000  # type: ignore[index]
    files.write(ids[0], [("x", "U8", (100_000,), bytes(100_000))])  # more than all of it: not kept
    assert files.find(np.append(ids[0], 1), 0) == 0 and files.find(np.append(ids[4], 1), 0) == PIECE
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_inexact_answers_are_not_kept(one_backend: str, folder: Path, tmp_path: Path) -> None:
    ask(folder, one_backend, tmp_path / "kept", PROMPT, miss="fallback")
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_fingerprint_tells_what_bits_depend_on(
    one_backend: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the budget, which they do not depend on."""
    found = []
    for budget in ("25%", "resident"):
        with load(folder, backend=one_backend, budget=budget) as engine:
            found.append(fingerprint(engine))
    assert found[0] == found[1]
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    os.utime(copy / "config.json", (1, 1))
    for name, value in {"folder": copy, "threads": 77, "device": "x", "backend": "x"}.items():
        was = getattr(engine, name)
        setattr(engine, name, value)
        found.append(fingerprint(engine))
        setattr(engine, name, was)
    monkeypatch.setattr("chronos.__version__", "9")
    found.append(fingerprint(engine))
    assert len(set(found)) == len(found) - 1
