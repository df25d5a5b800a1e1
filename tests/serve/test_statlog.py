"""The log that pages draw from: whole lines, while something happens, that add up."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from chronos.common.errors import ResourceError
from chronos.serve import statlog
from tests.support.serving import Running

pytestmark = pytest.mark.needs_backend
COUNTED = ("hits", "late", "misses", "bytes_read", "stall_s")


def test_a_line_adds_up_by_layer(server: Running) -> None:
    before = statlog.line(server.worker)
    server.chat(max_tokens=12)
    after = statlog.line(server.worker)
    assert after["generated"] - before["generated"] >= 12
    assert after["routed"] > before["routed"]
    for row in (before, after):
        assert row["hits"] + row["late"] + row["misses"] == row["routed"]
        for name in COUNTED:
            assert sum(each[name] for each in row["layers"]) == pytest.approx(row[name])
    layers = [each["layer"] for each in after["layers"]]
    assert layers == list(server.engine.feed.layout.moe_layers)  # type: ignore[union-attr]


def test_lines_come_while_something_changes(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statlog, "EVERY_S", 0.01)
    path = tmp_path / "experts.jsonl"

    async def watch() -> None:
        task = asyncio.create_task(statlog.follow(server.worker, path))
        await asyncio.sleep(0.1)
        quiet = len(path.read_text().splitlines())
        await asyncio.to_thread(server.chat, max_tokens=12)
        await asyncio.sleep(0.1)
        assert quiet == 1 < len(path.read_text().splitlines())
        task.cancel()

    asyncio.run(watch())
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[-1]["generated"] > rows[0]["generated"] and rows[-1]["running"] == 0


def test_a_long_file_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statlog, "_MOST_BYTES", 40)
    path = tmp_path / "experts.jsonl"
    for number in range(5):
        statlog.append(path, {"number": number, "filler": "x" * 10})
    assert json.loads(path.read_text().splitlines()[-1])["number"] == 4
    assert path.stat().st_size < 100
    with pytest.raises(ResourceError):
        statlog.append(tmp_path / "absent" / "x.jsonl", {})
