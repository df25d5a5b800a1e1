"""S6, S10, D1, D2, M5: reads that fail, come short, garbled or late, and files that change."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import xxhash

from chronos.common.disk.io import ALIGN, PacedIO, aligned_buffer
from chronos.common.disk.reader import RangedReader, Request
from chronos.common.disk.tensors import read_tensors
from chronos.common.errors import ChronosError, CorruptClusterError, CorruptFileError, StoreError
from chronos.common.layout import open_layout, pack, read_records, verify
from chronos.testing.faults import FaultyIO
from chronos.testing.tiny import tiny_model

SMALL = {"num_hidden_layers": 2, "num_experts": 4, "vocab_size": 300}
SIZE = 24 * ALIGN + 99


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("chronos.common.disk.io.RETRY_DELAYS_S", (0.0, 0.0, 0.0))


@pytest.fixture
def blob(tmp_path) -> tuple[Path, bytes]:
    path, data = tmp_path / "cluster.ctsr", random.Random(0).randbytes(SIZE)
    path.write_bytes(data)
    return path, data


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pack(tiny_model(folder / "src", **SMALL), folder / "packed")
    return folder / "packed"


def read_all(reader: RangedReader, path: Path, data: bytes) -> tuple[bytes, ChronosError | None]:
    buffer = aligned_buffer(len(data))
    digest = xxhash.xxh3_128_digest(data)
    request = reader.submit(path, 0, buffer, demand=True, digest=digest, label="layer 1, expert 2")
    assert request.wait(30)
    return bytes(buffer), request.error


@pytest.mark.parametrize("chunk", [ALIGN, 4 * ALIGN, 1 << 20])
@pytest.mark.parametrize(
    "fault",
    [
        {"max_read": 5 * ALIGN},
        {"max_read": 777},
        {"interrupt_every": 2},
        {"again_every": 3},
        {"max_read": 1_001, "interrupt_every": 3, "again_every": 4},
    ],
)
def test_d2_short_and_interrupted_reads_give_the_exact_bytes(blob, fault, chunk):
    with RangedReader(threads=2, chunk_bytes=chunk, io=FaultyIO(**fault)) as reader:
        assert read_all(reader, *blob) == (blob[1], None)


@pytest.mark.parametrize("fault", [{"max_read": 1}, {"interrupt_every": 2}, {"again_every": 2}])
def test_d2_headers_and_manifests_too(packed, fault):
    assert open_layout(packed, io=FaultyIO(**fault)).records == open_layout(packed).records


def test_d2_joined_reads_that_come_short(blob):
    path, data = blob
    buffers = [aligned_buffer(ALIGN) for _ in range(16)]
    slow = FaultyIO(max_read=ALIGN + 5, delay=lambda n: threading.Event().wait(0.002))
    with RangedReader(threads=1, io=slow) as reader:
        requests = [
            reader.submit(path, i * ALIGN, buffer, demand=True) for i, buffer in enumerate(buffers)
        ]
        assert all(request.wait(30) and not request.error for request in requests)
    assert b"".join(buffers) == data[: 16 * ALIGN]


def test_d1_one_bad_read_is_tried_again(blob):
    io = FaultyIO(fail_at=1, times=3, ops={"preadv"})
    with RangedReader(threads=1, io=io) as reader:
        assert read_all(reader, *blob) == (blob[1], None)
    assert io.failures == 3


def test_d1_a_bad_block_fails_its_request_and_no_other(blob):
    io = FaultyIO(fail_at=1, times=4, ops={"preadv"})
    with RangedReader(threads=1, chunk_bytes=ALIGN, io=io) as reader:
        _, error = read_all(reader, *blob)
        assert isinstance(error, StoreError) and "cluster.ctsr" in str(error)
        assert io.failures == 4
        for _ in range(3):
            assert read_all(reader, *blob) == (blob[1], None)
        assert reader.queue_depth() == 0


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("times", [1, 1_000])
def test_d1_every_operation_of_verify_may_fail(packed, error, times):
    """fail_at = 1, 2, 3 ... until nothing fails: a typed error or the right answer, each time."""
    at, failed, before = 0, True, set(threading.enumerate())
    while failed:
        at += 1
        io = FaultyIO(fail_at=at, times=times, error=error)
        try:
            assert verify(packed, io=io).problems == []
        except ChronosError as caught:
            assert os.strerror(error) in str(caught) and caught.exit_code in (1, 3)
            assert io.failures
        failed = io.failures > 0
    assert at > 20
    assert set(threading.enumerate()) <= before


def test_s6_bytes_garbled_on_the_way_are_read_again(blob):
    for chunk in (ALIGN, 1 << 20):
        with RangedReader(chunk_bytes=chunk, io=FaultyIO(flip_reads=1)) as reader:
            assert read_all(reader, *blob) == (blob[1], None)


def test_s6_bytes_wrong_on_the_disk_are_an_error_by_name(blob):
    path, data = blob
    wrong = bytearray(data)
    wrong[9_000] ^= 4
    path.write_bytes(wrong)
    io = FaultyIO()
    with RangedReader(threads=1, io=io) as reader:
        _, error = read_all(reader, path, data)
        assert isinstance(error, CorruptClusterError) and error.exit_code == 3
        assert "checksum" in str(error) and "layer 1, expert 2" in str(error)
        reads = io.reads
        path.write_bytes(data)
        assert read_all(reader, path, data) == (data, None)
    assert reads == 4  # once and once again, each in an aligned part and an odd end


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_calls_finishes_every_request_once(blob, seed):
    """Random submits, promotions and cancellations from two threads, on a disk that misbehaves."""
    path, data = blob
    told: list[int] = []
    io = FaultyIO(fail_at=40, times=9, ops={"preadv"}, max_read=5_000, interrupt_every=7)
    reader = RangedReader(threads=3, chunk_bytes=2 * ALIGN, io=io)
    requests: list[tuple[Request, bytes]] = []
    dropped: set[int] = set()

    def use(chance: random.Random) -> None:
        mine: list[Request] = []
        for _ in range(80):
            offset = chance.choice([0, ALIGN, 100]) + ALIGN * chance.randrange(8)
            want = data[offset : offset + chance.choice([0, 1, ALIGN, 5 * ALIGN, 30_001])]
            request = reader.submit(
                path, offset, aligned_buffer(len(want)), demand=chance.random() < 0.5,
                digest=xxhash.xxh3_128_digest(want), on_done=lambda r: told.append(id(r)),
            )  # fmt: skip
            mine.append(request)
            requests.append((request, want))
            other = chance.choice(mine)
            if chance.random() < 0.3:
                reader.promote(other)
            elif chance.random() < 0.2 and reader.cancel(other):
                dropped.add(id(other))

    users = [threading.Thread(target=use, args=(random.Random(2 * seed + i),)) for i in range(2)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert all(request.wait(30) and request.done for request, _ in requests)
    assert reader.queue_depth() == reader.in_flight_prefetch_bytes() == 0
    reader.close()
    assert sorted(told) == sorted({id(request) for request, _ in requests} - dropped)
    for request, want in requests:
        assert request.error is not None or bytes(request.buffer) == want
    failed = [request for request, _ in requests if request.error and id(request) not in dropped]
    assert len(failed) <= 3


@pytest.mark.parametrize("seed", range(20))
def test_s10_a_file_truncated_while_open(blob, seed):
    path, data = blob
    with RangedReader(threads=2, chunk_bytes=ALIGN) as reader:
        assert read_all(reader, path, data) == (data, None)
        os.truncate(path, random.Random(seed).randrange(SIZE))
        _, error = read_all(reader, path, data)
        assert isinstance(error, CorruptClusterError) and "ends too early" in str(error)
        with path.open("r+b") as file:
            file.write(data)
        assert read_all(reader, path, data) == (data, None)


def test_s10_a_file_replaced_while_open_is_still_the_old_one(blob):
    path, data = blob
    with RangedReader() as reader:
        assert read_all(reader, path, data) == (data, None)
        (path.parent / "new").write_bytes(bytes(SIZE))
        os.replace(path.parent / "new", path)
        assert read_all(reader, path, data) == (data, None)


def test_s10_truncation_under_a_reading_process_is_no_signal(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "packed"))
    script = """
import sys
from chronos.common.errors import CorruptFileError
from chronos.common.layout import open_layout, read_records
layout = open_layout(sys.argv[1])
print("ready", flush=True)
while True:
    try:
        list(read_records([(layout.path(k), r) for k, r in layout.records.items()]))
    except CorruptFileError as error:
        print(error.what)
        sys.exit(3)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        os.truncate(folder / "experts" / "cluster-00001.ctsr", 5 * ALIGN)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 3 != -signal.SIGBUS and "ends too early" in out


def test_d3_a_slow_disk_changes_nothing_but_time(packed):
    layout = open_layout(packed)
    wanted = [(layout.path(key), record) for key, record in layout.records.items()]
    fast = [bytes(data) for _, data in read_records(wanted)]
    assert [bytes(data) for _, data in read_records(wanted, PacedIO(20e6))] == fast


def test_d3_a_demand_read_does_not_wait_for_prefetches_on_a_slow_disk(blob):
    path, _ = blob
    order: list[str] = []
    with RangedReader(threads=2, chunk_bytes=ALIGN, io=PacedIO(2e6)) as reader:
        late = [
            reader.submit(
                path, 0, aligned_buffer(20 * ALIGN), demand=False,
                on_done=lambda request: order.append("prefetch"),
            )
            for _ in range(2)
        ]  # fmt: skip
        first = reader.submit(
            path, 0, aligned_buffer(ALIGN), demand=True, on_done=lambda r: order.append("demand")
        )
        assert first.wait(30) and all(request.wait(30) for request in late)
    assert order[0] == "demand"


def test_m5_many_clusters_and_few_descriptors(tmp_path):
    """RLIMIT_NOFILE 64, 120 cluster files: bounded by default; the limit is named."""
    script = """
import os, resource, sys
from pathlib import Path
import numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from chronos.common.errors import ResourceError
from chronos.common.disk.reader import RangedReader
from chronos.common.disk.io import aligned_buffer
from chronos.common.layout import open_layout, read_records, write_experts
from chronos.common.model.weights import TensorSpec
os.fsync = lambda fd: None
specs = [TensorSpec("w", (4,), "float32")]
data = lambda keys: ((key, {"w": np.full(4, key[1], "f4")}) for key in keys)
folder = Path(sys.argv[1])
write_experts(folder, [[(0, e)] for e in range(120)], specs, data, fingerprint="x")
layout = open_layout(folder)
wanted = [(layout.path(key), record) for key, record in layout.records.items()] * 2
for record, view in read_records(wanted):
    assert np.frombuffer(record.views(view)["w"], "f4")[0] == record.key[1]
buffer = aligned_buffer(4096)
with RangedReader(max_open=1000) as reader:  # runs into the limit, closes what is idle, goes on
    for path, record in wanted:
        request = reader.submit(path, record.offset, buffer, demand=True, digest=record.digest)
        request.wait()
        assert request.error is None, request.error
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
try:
    open_layout(folder)
except ResourceError as error:
    assert "64" in str(error) and "ulimit -n" in str(error), str(error)
with RangedReader() as reader:
    request = reader.submit(layout.files[0], 4096, buffer, demand=True)
    request.wait()
    assert isinstance(request.error, ResourceError), request.error
    os.close(held.pop())
    request = reader.submit(layout.files[0], 4096, buffer, demand=True)
    request.wait()
    assert request.error is None, request.error
print("fine")
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert run.stdout == "fine\n", run.stderr


def test_m5_no_more_threads(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(ChronosError, match="threads"):
        RangedReader()


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOENT])
def test_loading_the_dense_part_fails_by_name(packed, error):
    at, failed = 0, True
    while failed:
        at += 1
        io = FaultyIO(fail_at=at, error=error)
        try:
            names = [entry.name for entry, _ in read_tensors(packed / "model.safetensors", io=io)]
            assert "model.norm.weight" in names
        except (CorruptFileError, StoreError) as caught:
            assert "model.safetensors" in str(caught)
        failed = io.failures > 0


@pytest.mark.linux_root
@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("strace"), reason="needs root and strace to inject EIO"
)
@pytest.mark.parametrize(("when", "good"), [("3", True), ("3+", False)])
def test_d1_errors_injected_below_python(packed, when, good):
    """The kernel itself says EIO: once is survived, for ever is an error with exit code 1 or 3."""
    script = """
import sys
from chronos.common.errors import ChronosError
from chronos.common.layout import verify
try:
    verify(sys.argv[1])
except ChronosError as error:
    sys.exit(f"{type(error).__name__}: {error.what}")
print("fine")
"""
    inject = f"inject=preadv,preadv2:error=EIO:when={when}"
    run = subprocess.run(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=preadv,preadv2", "-e", inject,
         sys.executable, "-c", script, str(packed)],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    if "ptrace" in run.stderr.lower():
        pytest.skip("ptrace is not allowed here")
    assert (run.stdout == "fine\n") is good, run.stderr
    assert good or ("StoreError" in run.stderr and "Input/output error" in run.stderr)
