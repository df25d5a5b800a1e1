"""What this machine offers: backends, devices, memory and its limits.

`find_spec` and the platform come first, since importing a framework costs seconds; only `inspect`,
which `chronos doctor` calls, imports one. Nothing here decides: `chronos.backends.select` does.
Not covered: AMD and Intel accelerators.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("torch", "mlx")
# What to look for, and the pip line that cures its absence.
_MODULES = {"torch": "torch", "mlx": "mlx.core"}
_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


@dataclass(frozen=True)
class Finding:
    """One backend: usable, or the reason why not and the line that cures it."""

    name: str
    usable: bool
    version: str = ""
    devices: tuple[str, ...] = ()
    reason: str = ""
    fix: str = ""
    threads: int | None = None  # of a product on a CPU; None where the framework has no such number

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class MemoryLimits:
    """Bytes. `limit` is the smallest of the machine's memory and each cgroup of this process."""

    machine: int
    available: int
    cgroup: int | None
    cgroup_used: int | None
    source: str

    @property
    def limit(self) -> int:
        return self.machine if self.cgroup is None else min(self.machine, self.cgroup)

    @property
    def free(self) -> int:
        """What this process may still take before the machine or its cgroup says no."""
        if self.cgroup is None or self.cgroup_used is None:
            return self.available
        return max(0, min(self.available, self.cgroup - self.cgroup_used))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"limit": self.limit, "free": self.free}


def is_apple_silicon() -> bool:
    """An Apple GPU that MLX prefers: macOS on arm64 (a Rosetta Python says x86_64)."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def has_module(name: str) -> bool:
    """Whether `import name` would find a module; imports at most its parent package."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None  # not an empty folder of that name


def find(name: str) -> Finding:
    """Look for a backend without importing its framework."""
    if not has_module(f"chronos.backends.{name}"):
        return Finding(
            name,
            False,
            reason=f"this version of Chronos has no {name} backend",
            fix=f"use --backend torch ({_pip_line('torch')})",
        )
    if not has_module(_MODULES[name]):
        return Finding(
            name, False, reason=f"the package {name!r} is not installed", fix=_pip_line(name)
        )
    return Finding(name, True, version=_version(name))


def inspect(name: str) -> Finding:
    """As `find`, then import the framework and list its devices."""
    found = find(name)
    if not found.usable:
        return found
    try:
        module = importlib.import_module(_MODULES[name])
        devices = _DEVICES[name](module)
    except (ImportError, OSError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        return Finding(
            name,
            False,
            found.version,
            reason=f"{name} is installed, but cannot be imported: {first}",
            fix=_pip_line(name),
        )
    threads = module.get_num_threads() if hasattr(module, "get_num_threads") else None
    return dataclasses.replace(found, devices=devices, threads=threads)


def _pip_line(name: str) -> str:
    return f"{Path(sys.executable).name} -m pip install 'chronos-moe[{name}]'"


def _version(name: str) -> str:
    from importlib import metadata  # with an e-mail parser, which no `--help` waits for

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _torch_devices(torch: Any) -> tuple[str, ...]:
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gib = torch.cuda.get_device_properties(index).total_memory / 2**30
            devices.append(f"cuda:{index} ({torch.cuda.get_device_name(index)}, {gib:.0f} GiB)")
    devices.append(f"cpu ({torch.get_num_threads()} threads)")
    if torch.backends.mps.is_available():
        devices.append("mps (by name only)")
    return tuple(devices)


def _mlx_devices(mx: Any) -> tuple[str, ...]:
    return ("gpu (Metal)", "cpu") if mx.metal.is_available() else ("cpu (no Metal here)",)


_DEVICES = {"torch": _torch_devices, "mlx": _mlx_devices}


def memory_limits(root: Path = Path("/")) -> MemoryLimits:
    """Memory of the machine and of this process's cgroups, v1 and v2.

    psutil reports the host's memory inside a memory cgroup, so the cgroup files are read as well.
    """
    import psutil

    memory = psutil.virtual_memory()
    limit, used, source = cgroup_limit(root)
    return MemoryLimits(memory.total, memory.available, limit, used, source)


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cgroup_limit(root: Path = Path("/")) -> tuple[int | None, int | None, str]:
    """(limit, bytes in use, file) of the tightest memory cgroup above this process, or Nones."""
    tightest: tuple[int | None, int | None, str] = (None, None, "")
    for folder, limit_name, used_name in _cgroup_folders(root):
        limit = _read_number(folder / limit_name)
        if limit is None or limit >= _UNLIMITED:
            continue
        if tightest[0] is None or limit < tightest[0]:
            name = "/" + str((folder / limit_name).relative_to(root))
            tightest = (limit, _read_number(folder / used_name), name)
    return tightest


def _cgroup_folders(root: Path) -> list[tuple[Path, str, str]]:
    """This process's memory cgroup and its parents, for whichever versions are mounted.

    In a container the path in /proc/self/cgroup may be the host's; folders that are not there are
    left out, and the mount's own top is always looked at.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            mount, names = "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            mount = "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            folder = root.joinpath(mount, *parts[:depth])
            if (folder / names[0]).is_file():
                found.append((folder, *names))
    return found


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
