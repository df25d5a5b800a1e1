"""The search for a machine's settings with runs that take no time; what becomes of a profile."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from chronos.common.disk.io import CachedIO, drop_file_pages
from chronos.common.errors import UsageError
from chronos.run import profile
from chronos.run.profile import Entry
from chronos.testing.tiny import tiny_packed
from chronos.tune.machine import Sample, search

KNOBS = [("threads", [1, 4]), ("prefetch", ["off"]), ("predictor", ["lfu", "lru"])]


class Machine:
    """Tokens take 10 ms; each option's speed is a factor on that. runs: all options asked for."""

    def __init__(self, speed: Mapping[tuple[str, Any], float], **changes: Any) -> None:
        self.speed, self.changes = dict(speed), changes
        self.runs: list[dict[str, Any]] = []

    def __call__(self, options: Mapping[str, Any]) -> Sample:
        self.runs.append(dict(options))
        seconds, slowest, hits, bits = 0.01, 1.0, 0.8, "same"
        for pair in options.items():
            seconds /= self.speed.get(pair, 1.0)
            slowest *= self.changes.get("slowest", {}).get(pair, 1.0)
            hits += self.changes.get("hits", {}).get(pair, 0.0)
            bits = self.changes.get("bits", {}).get(pair, bits)
        if pair_refused := self.changes.get("refuses"):
            if pair_refused in options.items():
                raise UsageError("has nothing to forecast")
        return Sample((seconds,) * 50 + (seconds * slowest,), bits, hits)


def test_what_helps_is_kept_together() -> None:
    machine = Machine({("threads", 1): 0.5, ("threads", 4): 1.2, ("predictor", "lru"): 1.1})
    found = search(machine, KNOBS)
    assert found.options == {"threads": 4, "predictor": "lru"}
    assert found.after is not None and found.before is not None
    assert found.after.tps / found.before.tps == pytest.approx(1.32)
    verdicts = {(t.knob, t.value): t.verdict for t in found.tried}
    assert verdicts[("threads", 4)] == "taken" and verdicts[("predictor", "lfu")].startswith(
        "not 3"
    )
    # The last pairs: what was found first, the defaults after it.
    assert machine.runs[-2:] == [found.options, {}] and machine.runs[-6:-4] == [found.options, {}]


def test_nothing_is_kept_where_nothing_helps() -> None:
    found = search(Machine({("threads", 4): 1.029}), KNOBS)
    assert found.options == {} and "nothing" in found.verdict


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"bits": {("threads", 4): "other"}}, "other bits"),
        ({"hits": {("threads", 4): -0.01}}, "fewer hits"),
        ({"slowest": {("threads", 4): 4.0}}, "longer slowest tokens"),
        ({"refuses": ("threads", 4)}, "refused: has nothing to forecast"),
    ],
)
def test_faster_is_not_enough(changes: dict[str, Any], verdict: str) -> None:
    found = search(Machine({("threads", 4): 2.0}, **changes), KNOBS)
    assert found.options == {}
    assert next(t.verdict for t in found.tried if t.value == 4) == verdict


def test_what_the_order_made_faster_is_not_confirmed() -> None:
    """A machine that is faster the second time, whatever its options."""

    class Warming(Machine):
        def __call__(self, options: Mapping[str, Any]) -> Sample:
            sample = super().__call__(options)
            factor = 1.0 if len(self.runs) % 2 else 0.8  # the first run of all is a pair's second
            return Sample(tuple(s * factor for s in sample.token_s), sample.bits, sample.hit_rate)

    flipped = Warming({})
    flipped.runs.append({})
    found = search(flipped, [("prefetch", ["off"])])
    assert found.tried[0].verdict == "taken"
    assert found.options == {} and "not confirmed" in found.verdict


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tiny_packed(tmp_path / "model")


ENTRY = Entry("torch", "", 1 << 16, {"threads": 1, "prefetch": "off"}, {"after_tps": 2.0})


def test_a_profile_is_followed_where_it_was_made(folder: Path) -> None:
    path = profile.save(folder, 1 << 18, ENTRY)
    assert path == folder / profile.FILE
    chosen = profile.chosen(folder, "torch", None, "25%", profile.DEFAULTS)
    assert chosen == {"threads": 1, "prefetch": "off"}
    assert profile.chosen(folder, "torch", None, 1 << 16, profile.DEFAULTS) == chosen
    asked = profile.DEFAULTS | {"threads": 2}
    assert profile.chosen(folder, "torch", None, "25%", asked) == {"prefetch": "off"}
    for other in (("mlx", None, "25%"), ("torch", "cuda", "25%"), ("torch", None, "50%"),
                  ("torch", None, "resident")):  # fmt: skip
        assert profile.chosen(folder, *other, profile.DEFAULTS) == {}


def test_a_profile_of_another_machine_is_told_and_ignored(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = profile.save(folder, 1 << 18, ENTRY)
    assert path is not None
    data = json.loads(path.read_text("utf-8"))
    data["machine"]["cpu"] = "Another CPU"
    path.write_text(json.dumps(data), "utf-8")
    with caplog.at_level(logging.WARNING, "chronos"):
        assert profile.chosen(folder, "torch", None, "25%", profile.DEFAULTS) == {}
    assert "another machine (Another CPU" in caplog.text
    profile.save(folder, 1 << 18, ENTRY)  # one made here takes its place
    assert profile.chosen(folder, "torch", None, "25%", profile.DEFAULTS)


@pytest.mark.parametrize(
    "broken",
    ["{", "[]", '{"entries": 3}',
     '{"machine": {}, "expert_bytes": 1, "entries": [{"backend": "torch", "device": "",'
     ' "budget": 1, "options": {"threads": -1}}]}',
     '{"machine": {}, "expert_bytes": 1, "entries": [{"backend": "torch", "device": "",'
     ' "budget": 1, "options": {"predictor": "../../x.safetensors"}}]}'],
)  # fmt: skip
def test_a_broken_profile_is_passed_over(
    folder: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / profile.FILE).write_text(broken, "utf-8")
    with caplog.at_level(logging.WARNING, "chronos"):
        assert profile.find(folder) is None
    assert "is no profile" in caplog.text


def test_what_no_longer_helps_is_forgotten(folder: Path) -> None:
    other = Entry("torch", "", "resident", {"threads": 2})
    profile.save(folder, 1 << 18, ENTRY)
    profile.save(folder, 1 << 18, other)
    nothing = Entry("torch", "", 1 << 16, {})
    assert profile.save(folder, 1 << 18, nothing) == folder / profile.FILE
    found = profile.find(folder)
    assert found is not None and found.entries == (other,)
    assert profile.save(folder, 1 << 18, Entry("torch", "", "resident", {})) is None
    assert not (folder / profile.FILE).exists()


def test_a_folder_that_may_not_be_written_to_has_its_profile_in_the_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != folder)
    path = profile.save(folder, 1 << 18, ENTRY)
    assert path is not None and path.is_relative_to(tmp_path / "cache")
    assert profile.chosen(folder, "torch", None, "25%", profile.DEFAULTS)
    assert profile.places("demo")[0].is_relative_to(tmp_path / "cache"), "not into the package"


def test_pages_are_dropped_and_files_read_through_the_cache(folder: Path) -> None:
    assert drop_file_pages(folder) is hasattr(os, "posix_fadvise")
    io = CachedIO()
    fd = io.open(folder / "config.json", direct=True)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    io.close(fd)
    assert not flags & getattr(os, "O_DIRECT", 0)
