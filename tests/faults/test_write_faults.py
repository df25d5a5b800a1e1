"""D4-D6: writes that do not fit, flushes that fail, folders that may not be written."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chronos.common.disk.atomic import RunLock, atomic_write, sweep_orphans
from chronos.common.disk.tensors import write_tensors
from chronos.common.errors import ChronosError, DiskFullError, ResourceError
from chronos.common.layout import is_packed, open_layout, pack, verify
from chronos.testing.faults import WRITES, FaultyIO
from chronos.testing.tiny import tiny_model

SMALL = {"num_hidden_layers": 2, "num_experts": 4, "vocab_size": 300}
FULL = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tiny_model(tmp_path_factory.mktemp("model") / "src", **SMALL)
    for path in folder.glob("*token*"):
        path.unlink()
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("error", [*FULL, errno.EIO, errno.EROFS, errno.EACCES])
def test_d4_d5_every_step_of_an_atomic_write_may_fail(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    for at in range(1, 8):
        io = FaultyIO(fail_at=at, ops=WRITES, error=error, max_write=3)
        try:
            atomic_write(path, [b"12345", b"67"], io)
        except ResourceError as caught:
            assert isinstance(caught, DiskFullError) is (error in FULL)
            assert (
                caught.exit_code == 4
                and "file" in str(caught)
                and os.strerror(error) in str(caught)
            )
            if error in FULL:
                assert "needed" in str(caught) and "bytes free" in str(caught)
            # Only the last step, the flush of the folder, comes after the new file is in place.
            assert path.read_bytes() == (b"old" if at < 7 else b"1234567")
            assert os.listdir(tmp_path) == ["file"]
        else:
            pytest.fail(f"step {at} did not fail")
    atomic_write(path, [b"12345", b"67"], FaultyIO(fail_at=8, ops=WRITES, max_write=3))


def test_d5_a_failed_flush_is_not_tried_again(tmp_path):
    io = FaultyIO(fail_at=1, times=1, ops={"fsync"})
    with pytest.raises(ResourceError, match="Input/output error"):
        atomic_write(tmp_path / "file", [b"x"], io)
    assert io.count == 1 and os.listdir(tmp_path) == []


def test_d4_what_cannot_fit_is_refused_before_it_is_begun(source, tmp_path):
    io = FaultyIO(free=100_000, ops=WRITES)
    with pytest.raises(DiskFullError, match="bytes needed, 100000 bytes free"):
        pack(source, tmp_path / "dst", io=io)
    with pytest.raises(DiskFullError, match="4099 bytes needed, 10 bytes free"):
        write_tensors(tmp_path / "x", [("a", "U8", (3,), b"abc")], io=FaultyIO(free=10))
    assert io.count == 0 and tree(tmp_path) == {}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_d4_every_write_of_pack_may_fail_and_the_next_run_continues(
    source, tmp_path, error, monkeypatch
):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # counted and failed above it
    before = tree(source)
    at, finished = 0, False
    while not finished:
        at += 1
        io = FaultyIO(fail_at=at, times=1, ops=WRITES, error=error)
        try:
            report = pack(source, tmp_path / "dst", io=io)
            assert report.records == 8
            finished = not io.failures
        except ResourceError as caught:
            assert isinstance(caught, DiskFullError) is (error == errno.ENOSPC)
            if is_packed(tmp_path / "dst"):  # only the folder's flush behind the manifest failed
                shutil.rmtree(tmp_path / "dst")
            assert not list(tmp_path.rglob("*.chronos-tmp")) and not list(
                tmp_path.rglob("run.lock")
            )
    assert at > 30 and tree(source) == before
    assert verify(tmp_path / "dst").records == 8


def test_d4_a_file_size_limit(tmp_path):
    """`ulimit -f`: EFBIG from the kernel, not a signal."""
    script = """
import resource, sys
from chronos.common.errors import DiskFullError
from chronos.common.disk.atomic import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    atomic_write(sys.argv[1], [bytes(60_000)] * 3)
except DiskFullError as error:
    print(error)
"""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    run = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert run.returncode == 0 and "File too large: more than 100000 bytes needed" in run.stdout
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def unprivileged(folder: Path, script: str) -> str:
    """Run a script with `folder` as its argument and without root's rights; what it printed."""
    for parent in [folder, *folder.parents]:
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            os.chmod(parent, 0o755)
    drop = "import os, sys\nif os.getuid() == 0:\n    os.setgid(65534); os.setuid(65534)\n"
    run = subprocess.run(
        [sys.executable, "-c", "import chronos.common.layout\n" + drop + script, str(folder)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_d6_a_folder_of_somebody_else(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    if os.getuid() != 0:
        folder.chmod(0o555)
    out = unprivileged(
        folder,
        """
from chronos.common.errors import ResourceError
from chronos.common.disk.atomic import RunLock, atomic_write, sweep_orphans
from chronos.common.layout import write_experts
from pathlib import Path
folder = Path(sys.argv[1])
if os.getuid() != 0 and os.stat(folder).st_uid == os.getuid():
    os.chmod(folder, 0o555)
for work in (
    lambda: atomic_write(folder / "file", [b"x"]),
    lambda: RunLock(folder).__enter__(),
    lambda: write_experts(folder, [], [], None, fingerprint=""),
):
    try:
        work()
    except ResourceError as error:
        print(error.exit_code, error.what)
print(sweep_orphans(folder))
""",
    )
    folder.chmod(0o755)
    assert out == (
        "4 cannot write file: Permission denied\n"
        "4 cannot write run.lock: Permission denied\n"
        "4 cannot write experts: Permission denied\n"
        "[]\n"
    )


def test_d6_packing_for_others_under_a_tight_umask(source, tmp_path):
    before = os.umask(0o077)
    try:
        pack(source, tmp_path / "dst")
    finally:
        os.umask(before)
    modes = {
        path.stat().st_mode & 0o777 for path in (tmp_path / "dst").rglob("*") if path.is_file()
    }
    assert modes == {0o600}


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for work in (
        lambda: atomic_write(tmp_path / "file" / "x", [b"x"]),
        lambda: RunLock(tmp_path / "file" / "run").__enter__(),
    ):
        with pytest.raises(ResourceError, match="Not a directory"):
            work()
    with pytest.raises(NotADirectoryError):
        sweep_orphans(tmp_path / "file")


MOUNT = pytest.mark.skipif(
    os.geteuid() != 0 or sys.platform != "linux" or not shutil.which("mount"),
    reason="needs root on Linux to mount a small tmpfs",
)


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@MOUNT
@pytest.mark.linux_root
def test_d4_a_real_full_disk(small_disk, source):
    path = small_disk / "file"
    path.write_bytes(b"old")
    with pytest.raises(DiskFullError, match="No space left on device"):
        atomic_write(path, (bytes(1 << 20) for _ in range(5)))
    assert path.read_bytes() == b"old" and os.listdir(small_disk) == ["file"]
    (small_disk / "filler").write_bytes(bytes(4_100_000))
    with pytest.raises(DiskFullError, match="not enough disk space: [0-9]+ bytes needed"):
        pack(source, small_disk / "dst")
    (small_disk / "filler").unlink()
    pack(source, small_disk / "dst")
    assert verify(small_disk / "dst").problems == []


@MOUNT
@pytest.mark.linux_root
def test_d6_a_read_only_mount(small_disk, source):
    pack(source, small_disk / "dst")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert open_layout(small_disk / "dst").num_experts == 4
    for work in (
        lambda: atomic_write(small_disk / "file", [b"x"]),
        lambda: pack(source, small_disk / "other"),
    ):
        with pytest.raises(ChronosError, match="Read-only file system") as caught:
            work()
        assert caught.value.exit_code == 4
