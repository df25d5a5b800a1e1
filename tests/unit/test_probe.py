"""Finding backends and memory limits, and choosing: with fake machines, without a framework."""

from __future__ import annotations

from pathlib import Path

import pytest

from chronos import backends
from chronos.backends import probe
from chronos.common.errors import MissingBackendError, UsageError

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHRONOS_BACKEND", raising=False)


def machine(monkeypatch: pytest.MonkeyPatch, *installed: str, apple: bool = False) -> None:
    """A machine with these backends, Apple silicon or not."""

    def find(name: str) -> probe.Finding:
        if name in installed:
            return probe.Finding(name, True)
        return probe.Finding(name, False, reason=f"no {name}", fix=f"install {name}")

    monkeypatch.setattr(probe, "find", find)
    monkeypatch.setattr(probe, "is_apple_silicon", lambda: apple)


@pytest.mark.parametrize(
    ("installed", "apple", "chosen"),
    [
        (("torch", "mlx"), False, "torch"),  # on Linux mlx imports and has no GPU: not preferred
        (("torch", "mlx"), True, "mlx"),
        (("torch",), True, "torch"),
        (("mlx",), False, "mlx"),
    ],
)
def test_the_machine_decides(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], apple: bool, chosen: str
) -> None:
    machine(monkeypatch, *installed, apple=apple)
    assert backends.select() == backends.select("auto") == chosen


def test_the_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "torch", "mlx")
    monkeypatch.setenv("CHRONOS_BACKEND", "mlx")
    assert backends.select() == "mlx"
    assert backends.select("torch") == "torch"


def test_a_named_backend_that_is_missing_is_never_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, "torch")
    with pytest.raises(MissingBackendError) as caught:
        backends.select("mlx")
    assert (caught.value.where, caught.value.fix) == ("no mlx", "install mlx")
    assert caught.value.exit_code == 5


def test_no_backend_at_all_names_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    with pytest.raises(MissingBackendError) as caught:
        backends.select()
    assert "no torch" in caught.value.where and "no mlx" in caught.value.where
    assert caught.value.fix == "install torch"


def test_an_unknown_name_says_where_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "torch")
    with pytest.raises(UsageError, match="'jax'") as caught:
        backends.select("jax")
    assert caught.value.where == "--backend"
    monkeypatch.setenv("CHRONOS_BACKEND", "tensorflow")
    with pytest.raises(UsageError, match="'tensorflow'") as caught:
        backends.select()
    assert caught.value.where == "CHRONOS_BACKEND"


def test_find_tells_a_missing_package_from_a_missing_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe, "has_module", lambda name: name == "chronos.backends.torch")
    assert probe.find("torch").reason == "the package 'torch' is not installed"
    assert "chronos-moe[torch]" in probe.find("torch").fix
    assert probe.find("mlx").reason == "this version of Chronos has no mlx backend"


def test_an_empty_folder_is_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hollow_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not probe.has_module("hollow_package")
    assert not probe.has_module("hollow_package.inner.deep")
    assert probe.has_module("json.decoder")


def test_inspect_reports_a_framework_that_does_not_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, "torch")

    def broken(name: str) -> None:
        raise ImportError("libmissing.so: cannot open shared object file\nmore")

    monkeypatch.setattr(probe.importlib, "import_module", broken)
    found = probe.inspect("torch")
    assert not found.usable
    assert found.reason.endswith(
        "cannot be imported: libmissing.so: cannot open shared object file"
    )


def cgroup(root: Path, lines: str, files: dict[str, str]) -> Path:
    """A file system with /proc/self/cgroup and cgroup files."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_cgroup_v2_takes_the_tightest_folder_above_the_process(tmp_path: Path) -> None:
    root = cgroup(
        tmp_path,
        "0::/user/app\n",
        {
            "user/app/memory.max": "max\n",
            "user/app/memory.current": "5\n",
            "user/memory.max": f"{2 * GIB}\n",
            "user/memory.current": f"{GIB}\n",
            "memory.max": f"{3 * GIB}\n",
        },
    )
    assert probe.cgroup_limit(root) == (2 * GIB, GIB, "/sys/fs/cgroup/user/memory.max")


def test_cgroup_v1_reads_the_memory_controller(tmp_path: Path) -> None:
    root = cgroup(
        tmp_path,
        "5:cpuset:/\n4:cpu,memory:/job\n",
        {
            "memory/job/memory.limit_in_bytes": f"{GIB}\n",
            "memory/job/memory.usage_in_bytes": "77\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",  # v1's "no limit"
        },
    )
    source = "/sys/fs/cgroup/memory/job/memory.limit_in_bytes"
    assert probe.cgroup_limit(root) == (GIB, 77, source)


def test_a_container_sees_the_mount_although_its_path_is_the_hosts(tmp_path: Path) -> None:
    root = cgroup(tmp_path, "0::/docker/abc\n", {"memory.max": f"{GIB}\n"})
    assert probe.cgroup_limit(root) == (GIB, None, "/sys/fs/cgroup/memory.max")


@pytest.mark.parametrize("lines", ["", "0::/\n", "garbage\n", "4:memory:/../../etc\n"])
def test_no_limit_is_no_limit(tmp_path: Path, lines: str) -> None:
    assert probe.cgroup_limit(cgroup(tmp_path, lines, {})) == (None, None, "")
    assert probe.cgroup_limit(tmp_path / "nothing") == (None, None, "")


def test_the_limit_and_what_is_free_of_it() -> None:
    limits = probe.MemoryLimits(
        machine=8 * GIB, available=6 * GIB, cgroup=2 * GIB, cgroup_used=GIB, source="x"
    )
    assert (limits.limit, limits.free) == (2 * GIB, GIB)
    roomy = probe.MemoryLimits(8 * GIB, 6 * GIB, None, None, "")
    assert (roomy.limit, roomy.free) == (8 * GIB, 6 * GIB)
    over = probe.MemoryLimits(8 * GIB, 6 * GIB, GIB, 2 * GIB, "x")
    assert over.free == 0
    assert probe.memory_limits().limit > 0
