"""The reader and atomic writes: exact bytes, order, errors, and nothing left behind."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash

from chronos.common.disk.atomic import RunLock, atomic_write, sweep_orphans
from chronos.common.disk.io import ALIGN, FileIO, PacedIO, aligned_buffer, measure_read_rate
from chronos.common.disk.reader import RangedReader, Request
from chronos.common.errors import CorruptFileError, ResourceError, StoreError


@pytest.fixture
def blob(tmp_path: Path) -> tuple[Path, bytes]:
    data = os.urandom(64 * ALIGN + 123)
    path = tmp_path / "blob"
    path.write_bytes(data)
    return path, data


class GatedIO(FileIO):
    """Reads wait for `gate`; `order` records the offsets in the order they began."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)
        self.order: list[int] = []

    def preadv(self, fd, buffers, offset):
        self.order.append(offset)
        self.begun.release()
        assert self.gate.wait(10)
        return super().preadv(fd, buffers, offset)


@pytest.mark.parametrize("offset", [0, 8, ALIGN])
@pytest.mark.parametrize("nbytes", [0, 1, ALIGN - 1, ALIGN, 3 * ALIGN, 5 * ALIGN + 7])
def test_reads_exact_bytes(blob, offset, nbytes):
    path, data = blob
    buffer = aligned_buffer(nbytes)
    with RangedReader(threads=3, chunk_bytes=ALIGN) as reader:
        want = data[offset : offset + nbytes]
        digest = xxhash.xxh3_128_digest(want)
        request = reader.submit(path, offset, buffer, demand=True, digest=digest)
        assert request.wait(10) and request.error is None and request.done
        assert bytes(buffer) == want
        assert request.finished_at >= request.started_at > 0
        assert reader.stats.bytes_read == nbytes
        assert reader.queue_depth() == 0


def test_reads_the_odd_end_of_a_file(blob):
    path, data = blob
    buffer = aligned_buffer(len(data))
    with RangedReader(chunk_bytes=8 * ALIGN) as reader:
        request = reader.submit(path, 0, buffer, demand=False)
        assert request.wait(10) and request.error is None
    assert bytes(buffer) == data


def test_neighbours_queued_together_share_one_read(blob):
    path, data = blob
    io = GatedIO()
    buffers = [aligned_buffer(2 * ALIGN) for _ in range(6)]
    with RangedReader(threads=1, io=io) as reader:
        first = reader.submit(path, 40 * ALIGN, aligned_buffer(ALIGN), demand=True)
        assert io.begun.acquire(timeout=10)
        requests = [
            reader.submit(path, 2 * i * ALIGN, buffer, demand=True)
            for i, buffer in enumerate(buffers)
        ]
        io.gate.set()
        assert all(request.wait(10) for request in [first, *requests])
        assert reader.stats.reads == 2
    assert b"".join(buffers) == data[: 12 * ALIGN]


def test_demand_overtakes_prefetch_between_chunks(blob):
    path, data = blob
    io = GatedIO()
    big, small = aligned_buffer(8 * ALIGN), aligned_buffer(ALIGN)
    with RangedReader(threads=1, chunk_bytes=ALIGN, io=io) as reader:
        slow = reader.submit(path, 0, big, demand=False)
        assert io.begun.acquire(timeout=10)
        quick = reader.submit(path, 20 * ALIGN, small, demand=True)
        io.gate.set()
        assert quick.wait(10) and slow.wait(10)
    assert io.order[:3] == [0, 20 * ALIGN, ALIGN]
    assert bytes(big) == data[: 8 * ALIGN]


def test_one_worker_stays_free_of_prefetches(blob):
    path, _ = blob
    io = GatedIO()
    with RangedReader(threads=2, chunk_bytes=ALIGN, io=io) as reader:
        prefetches = [
            reader.submit(path, 4 * i * ALIGN, aligned_buffer(ALIGN), demand=False)
            for i in range(3)
        ]
        assert io.begun.acquire(timeout=10)
        demand = reader.submit(path, 30 * ALIGN, aligned_buffer(ALIGN), demand=True)
        assert io.begun.acquire(timeout=10)
        assert io.order == [0, 30 * ALIGN]
        io.gate.set()
        assert all(request.wait(10) for request in [demand, *prefetches])


@pytest.mark.parametrize(
    ("pages", "places"),
    [(48, [0, 12, 24, 36]), (24, [0, 12]), (12, [0])],
    ids=["a quarter each", "halves: quarters are too small", "one"],
)
def test_idle_workers_share_a_demand_read(blob, pages, places):
    path, data = blob
    io = GatedIO()
    io.gate.set()
    buffer = aligned_buffer(pages * ALIGN)
    with RangedReader(threads=4, chunk_bytes=8 * ALIGN, io=io) as reader:
        assert reader.submit(path, 0, buffer, demand=True).wait(10)
    assert sorted(io.order) == [place * ALIGN for place in places]
    assert buffer == data[: pages * ALIGN]


def test_promote_and_cancel(blob):
    path, _ = blob
    io = GatedIO()
    called: list[Request] = []
    with RangedReader(threads=1, io=io) as reader:

        def submit(block: int, demand: bool = False) -> Request:
            buffer = aligned_buffer(ALIGN)
            return reader.submit(path, block * ALIGN, buffer, demand=demand, on_done=called.append)

        running, dropped, late = submit(0), submit(10), submit(20)
        assert io.begun.acquire(timeout=10)
        assert reader.in_flight_prefetch_bytes() == 3 * ALIGN and reader.queue_depth() == 3
        reader.promote(late)
        reader.promote(late)
        assert reader.cancel(dropped) and not reader.cancel(dropped) and not reader.cancel(running)
        assert dropped.wait(0) and isinstance(dropped.error, StoreError)
        assert reader.in_flight_prefetch_bytes() == ALIGN
        other = submit(30)
        io.gate.set()
        assert late.wait(10) and other.wait(10)
        assert io.order == [0, 20 * ALIGN, 30 * ALIGN]
        assert called == [running, late, other]
        assert reader.in_flight_prefetch_bytes() == reader.queue_depth() == 0


def test_on_done_runs_once_on_a_worker_and_may_raise(blob, caplog):
    path, _ = blob
    threads: list[str] = []

    def done(request: Request) -> None:
        assert request.done
        threads.append(threading.current_thread().name)
        raise RuntimeError("callback bug")

    with RangedReader(chunk_bytes=ALIGN) as reader:
        request = reader.submit(path, 0, aligned_buffer(9 * ALIGN), demand=True, on_done=done)
        assert request.wait(10)
        again = reader.submit(path, 0, aligned_buffer(ALIGN), demand=True)
        assert again.wait(10) and again.error is None
    assert len(threads) == 1 and threads[0].startswith("read-")
    assert "callback bug" in caplog.text


def test_close_fails_what_is_queued_and_leaks_nothing(blob):
    path, _ = blob
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    threads = set(threading.enumerate())
    io = GatedIO()
    called: list[Request] = []
    reader = RangedReader(threads=2, chunk_bytes=ALIGN, io=io)
    requests = [
        reader.submit(path, 0, aligned_buffer(4 * ALIGN), demand=True, on_done=called.append)
        for _ in range(4)
    ]
    assert io.begun.acquire(timeout=10)
    closer = threading.Thread(target=reader.close)
    closer.start()
    io.gate.set()
    closer.join(10)
    assert not closer.is_alive()
    assert all(request.wait(10) for request in requests)
    assert sorted(map(id, called)) == sorted(map(id, requests))
    assert isinstance(requests[-1].error, StoreError)
    started = set(threading.enumerate()) - threads
    assert not [t for t in started if t.name.startswith("read-")]
    if before:
        assert set(os.listdir("/proc/self/fd")) <= before
    reader.close()
    with pytest.raises(StoreError):
        reader.submit(path, 0, aligned_buffer(ALIGN), demand=True)


def test_missing_short_and_wrong_files_are_named(blob, tmp_path):
    path, data = blob
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(path)
    with RangedReader() as reader:
        for name, offset in [("none", 0), ("folder", 0), ("link", 0), ("blob", len(data) - 8)]:
            where = tmp_path / name
            request = reader.submit(where, offset, aligned_buffer(64), demand=True)
            assert request.wait(10)
            assert isinstance(request.error, CorruptFileError), name
            assert name in str(request.error)
        fine = reader.submit(path, 0, aligned_buffer(64), demand=True)
        assert fine.wait(10) and fine.error is None


def test_open_files_stay_bounded(tmp_path):
    class Counting(FileIO):
        open_now = most = 0

        def open(self, path, direct=False):
            fd = super().open(path, direct)
            self.open_now += 1
            self.most = max(self.most, self.open_now)
            return fd

        def close(self, fd):
            self.open_now -= 1
            super().close(fd)

    io = Counting()
    for i in range(40):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * ALIGN)
    buffers = [aligned_buffer(ALIGN) for _ in range(40)]
    with RangedReader(threads=2, max_open=4, io=io) as reader:
        for _ in range(3):
            requests = [
                reader.submit(tmp_path / f"{i}", 0, buffers[i], demand=True) for i in range(40)
            ]
            assert all(request.wait(10) and not request.error for request in requests)
    assert all(bytes(buffers[i]) == bytes([i]) * ALIGN for i in range(40))
    assert io.most <= 4 and io.open_now == 0


def test_aligned_buffer_is_aligned_writable_and_zeroed():
    for nbytes in (0, 1, 5000, 3 << 20):
        buffer = aligned_buffer(nbytes)
        assert len(buffer) == nbytes and not buffer.readonly and not any(buffer[:4096])


def test_measure_read_rate(blob):
    assert measure_read_rate(blob[0], 8 * ALIGN, 2) > 0
    with pytest.raises(CorruptFileError):
        measure_read_rate(blob[0].parent / "none")


def test_atomic_write_takes_chunks_and_functions(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, [b"one", bytearray(b"two"), memoryview(b"three")], nbytes=11)
    assert path.read_bytes() == b"onetwothree"
    atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_write_keeps_the_old_file_when_the_source_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def chunks():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, chunks())
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_published_files_follow_the_umask(tmp_path):
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        try:
            atomic_write(tmp_path / "file", [b"x"])
        finally:
            os.umask(before)
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
        (tmp_path / "file").unlink()


def test_sweep_spares_writers_at_work_and_other_files(tmp_path):
    orphan = tmp_path / f".model.{os.getpid()}-0.chronos-tmp"  # even our own id may be reused
    orphan.write_bytes(b"half")
    (tmp_path / ".model.tmp").write_bytes(b"somebody else's")
    removed: list[Path] = []

    def write(file):
        removed.extend(sweep_orphans(tmp_path))
        file.write(b"whole")

    atomic_write(tmp_path / "model", write)
    assert removed == [orphan]
    assert sorted(os.listdir(tmp_path)) == [".model.tmp", "model"]
    assert sweep_orphans(tmp_path / "none") == []


def test_run_lock_names_its_holder_and_is_taken_over(tmp_path):
    with RunLock(tmp_path / "run"):
        with pytest.raises(ResourceError, match=str(os.getpid())):
            RunLock(tmp_path / "run").__enter__()
    (tmp_path / "run" / "run.lock").write_text("999999\n")  # left by a killed process
    with RunLock(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path / "run") == []


def test_reads_queued_together_all_end_or_none_begins(blob):
    path, data = blob

    def requests():
        return [
            Request(str(path), 2 * i * ALIGN, aligned_buffer(ALIGN), demand=bool(i % 2))
            for i in range(9)
        ]

    with RangedReader(threads=2) as reader:
        together = requests()
        reader.submit_many(together)
        assert all(request.wait(10) for request in together)
        for request in together:
            assert bytes(request.buffer) == data[request.offset : request.offset + ALIGN]
        reader.submit_many([])
    with pytest.raises(StoreError, match="closed"):
        reader.submit_many(requests())
    assert reader.queue_depth() == 0 and reader.in_flight_prefetch_bytes() == 0


def test_paced_reads_take_their_turns(blob, monkeypatch):
    """On a clock that sleeping moves: each read waits for its turn's end, an idle disk for none."""
    (path, data), now = blob, 10.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(
        "chronos.common.disk.io.time", SimpleNamespace(monotonic=lambda: now, sleep=sleep)
    )
    io, buffers = PacedIO(1000.0), [memoryview(bytearray(60)), memoryview(bytearray(40))]
    fd = io.open(path)
    try:
        for end in (10.1, 10.2):
            assert io.preadv(fd, buffers, 5) == 100
            assert now == pytest.approx(end)
        now = 20.0
        assert io.preadv(fd, buffers[:1], 0) == 60
        assert now == pytest.approx(20.06)
    finally:
        io.close(fd)
    assert bytes(buffers[1]) == data[65:105]


def test_a_fault_on_a_readers_thread_fails_its_request_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits hears of it; a worker that died would leave them waiting for ever."""
    path = tmp_path / "data"
    path.write_bytes(bytes(4 * ALIGN))
    check = RangedReader._check

    def fails(reader: RangedReader, request: Request) -> Any:
        if request.offset == 0:
            raise ZeroDivisionError("ours")
        return check(reader, request)

    monkeypatch.setattr(RangedReader, "_check", fails)
    with RangedReader(threads=1) as reader:
        requests = [Request(str(path), i * ALIGN, aligned_buffer(ALIGN), True) for i in range(3)]
        for request in requests:
            reader.submit_many([request])
            assert request.wait(20)
        assert "ZeroDivisionError" in str(requests[0].error)
        assert [request.error for request in requests[1:]] == [None, None]
        assert reader.queue_depth() == 0
