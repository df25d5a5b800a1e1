"""What `chronos tune machine` found of a model on a machine: settings that change no token.

A profile lies beside the model as chronos-machine.json, or in the user's cache where the folder is
not to be written to. It says which machine it was made on; on another one it is ignored, and that
is said. What a caller asks for wins over it. Not covered: how settings are found (`chronos.tune`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chronos.backends.probe import memory_limits
from chronos.common.budget import parse_budget
from chronos.common.disk.atomic import atomic_write, make_folder
from chronos.common.experts.foresight.choose import predictors
from chronos.run.models import DEMO, resolve_model

_log = logging.getLogger("chronos")
FILE = "chronos-machine.json"
RESIDENT = "resident"
# Options of `engine.load` that a profile may set, and what each is where nobody asked.
DEFAULTS: dict[str, Any] = {
    "threads": None, "readers": None, "direct": None, "warm": 0, "prefetch": "auto",
    "predictor": "auto",
}  # fmt: skip
_MOST_BYTES = 1 << 20  # of a file


@dataclass(frozen=True)
class Entry:
    """Settings for one way of running the model. device: as asked for, "" for the default one.
    budget: bytes for routed experts, or `resident`. measured: what they came to."""

    backend: str
    device: str
    budget: int | str
    options: dict[str, Any]
    measured: dict[str, float] = field(default_factory=dict)

    def same_run(self, other: Entry) -> bool:
        own = (self.backend, self.device, self.budget)
        return own == (other.backend, other.device, other.budget)


@dataclass(frozen=True)
class Profile:
    """A profile as it was read. here: whether it was made on this machine."""

    path: Path
    machine: dict[str, Any]
    expert_bytes: int
    entries: tuple[Entry, ...]
    here: bool


@functools.cache
def this_machine() -> dict[str, Any]:
    """What settings depend on: system, processor, cores, memory in GiB."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(memory_limits().machine / (1 << 30)),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def places(model: str | Path) -> list[Path]:
    """Where a model's profile may be, the first one preferred. The model that ships is not written
    beside: its folder is the package's."""
    folder = resolve_model(model)
    name = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=12).hexdigest()
    cached = _cache() / "chronos" / "machines" / f"{name}.json"
    shipped = folder == resolve_model(DEMO)
    return [cached] if shipped else [folder / FILE, cached]


def _cache() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def find(model: str | Path) -> Profile | None:
    """A model's profile, or None. One that cannot be read is passed over, and that is said."""
    for path in places(model):
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise ValueError("too large")
            data = json.loads(path.read_text("utf-8"))
            entries = tuple(_entry(entry) for entry in data["entries"])
            machine, total = dict(data["machine"]), int(data["expert_bytes"])
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            _log.warning("%s is no profile and is not used: %s", path, error)
            continue
        return Profile(path, machine, total, entries, machine == this_machine())
    return None


def _entry(data: Mapping[str, Any]) -> Entry:
    entry = Entry(
        str(data["backend"]), str(data["device"]), data["budget"], dict(data["options"]),
        dict(data.get("measured", {})),
    )  # fmt: skip
    for name, value in entry.options.items():
        if not _fits(name, value):
            raise ValueError(f"{name} cannot be {value!r}")
    return entry


def _fits(name: str, value: Any) -> bool:
    if name in ("threads", "readers"):
        return type(value) is int and 1 <= value <= 1024
    kinds: dict[str, tuple[Any, ...]] = {
        "direct": (True, False), "prefetch": ("auto", "off"), "predictor": tuple(predictors()),
    }  # fmt: skip
    return value in kinds[name] if name in kinds else name == "warm" and type(value) is str


def chosen(
    model: str | Path, backend: str, device: str | None, budget: str | int, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Options of `engine.load` in place of those that nobody asked for.

    given: the options as they were asked for. Empty where no profile is of this machine and run.
    """
    profile = find(model)
    if profile is None:
        return {}
    if not profile.here:
        made = f"{profile.machine.get('cpu')}, {profile.machine.get('cores')} cores"
        _log.warning(
            "%s is of another machine (%s) and is not used; chronos tune machine makes one for this"
            " one", profile.path, made,
        )  # fmt: skip
        return {}
    text = str(budget).strip().lower()
    wanted = RESIDENT if text == RESIDENT else parse_budget(budget, profile.expert_bytes)
    run = Entry(backend, device or "", wanted, {})
    for entry in profile.entries:
        if entry.same_run(run):
            return {
                name: value for name, value in entry.options.items()
                if str(given.get(name)) == str(DEFAULTS[name])
            }  # fmt: skip
    return {}


def save(model: str | Path, expert_bytes: int, entry: Entry) -> Path | None:
    """Keep an entry in place of what was known of the same run; one without options removes that.

    Returns the file, None where nothing is left to say.
    """
    old = find(model)
    kept = [] if old is None or not old.here else [e for e in old.entries if not e.same_run(entry)]
    if entry.options:
        kept.append(entry)
    if not kept:
        if old is not None and old.here:
            old.path.unlink(missing_ok=True)
        return None
    text = json.dumps(
        {
            "machine": this_machine(),
            "expert_bytes": expert_bytes,
            "entries": [dataclasses.asdict(each) for each in kept],
        },
        indent=1,
    )
    *beside, cached = places(model)
    path = next((each for each in beside if os.access(each.parent, os.W_OK)), cached)
    make_folder(path.parent)
    atomic_write(path, [text.encode(), b"\n"])
    return path
