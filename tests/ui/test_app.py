"""The process without a browser: who may ask, and what browsers are told to leave alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from chronos.cli import main
from tests.ui.conftest import showing

pytest.importorskip("gradio", reason="pages need the extra [ui]")
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=address, timeout=60) as found:
        yield found


def test_the_pages_are_there_and_ask_nobody_else(client: httpx2.Client) -> None:
    answer = client.get("/")
    assert answer.status_code == 200 and "Chronos" in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False and config["stylesheets"] == []
    labels = [c["props"].get("label") for c in config["components"] if c["type"] == "tabitem"]
    named = "Config Pipeline Chat Export Benchmark Auto-Tune Routing Runs".split()
    assert set(named) <= set(labels) and "I/O monitor" in labels


def test_other_names_and_other_pages_are_refused(client: httpx2.Client, address: str) -> None:
    for path in ("/", "/config", "/gradio_api/info", "/gradio_api/startup-events"):
        assert client.get(path, headers={"host": "evil.example"}).status_code == 421
        assert client.get(path, headers={"origin": "https://evil.example"}).status_code == 403
        assert client.get(path, headers={"origin": address}).status_code == 200


def look(client: httpx2.Client, tab: str, given: Any, seen: Any, **head: str) -> httpx2.Response:
    return client.post(f"/live/{tab}", json={"given": given, "seen": seen}, headers=head)


def test_a_look_at_what_is_live_gets_what_has_changed(client: httpx2.Client, root: Path) -> None:
    folder = root / "runs" / "looked"
    folder.mkdir(parents=True)
    log = folder / "job.jsonl"
    row = {"event": "start", "time": 1.0, "kind": "bench", "args": ["bench", "demo"], "group": 1}
    log.write_text(json.dumps(row) + "\n")
    given = ["en", "looked"]
    first = look(client, "runs", given, []).json()
    run, told, command, printed, listing = (part["value"] for part in first["parts"])
    assert "value" not in run and ["looked", "looked"] in run["choices"]  # what is said is left
    assert command == "chronos bench demo" and printed == "" and "looked" in listing
    assert look(client, "runs", given, first["seen"]).status_code == 204
    with log.open("a") as file:
        file.write(json.dumps({"event": "out", "time": 2.0, "text": "<b>hello"}) + "\n")
    second = look(client, "runs", given, first["seen"]).json()
    assert [part and part["value"] for part in second["parts"]] == [None] * 3 + ["<b>hello", None]
    other = look(client, "runs", ["ja", "looked"], second["seen"]).json()
    assert other["parts"][1] is not None and other["parts"][3] is None
    shutil.rmtree(folder)
    assert look(client, "runs", given, second["seen"]).status_code == 200


def test_a_look_that_is_none(client: httpx2.Client, address: str) -> None:
    assert look(client, "config", ["en"], []).status_code == 404  # nothing on it is live
    assert look(client, "absent", ["en"], []).status_code == 404
    for given, seen in (
        (["xx", None], []), ([], []), ("en", []), ([{}], []), (["en", None], [1]), (["en"], []),
        (["en", None, None], []), (5, 5),
    ):  # fmt: skip
        assert look(client, "runs", given, seen).status_code == 400, (given, seen)
    for named in (None, 5, ["x"], "../x", "x" * 100, {"a": 1}):
        for tab, more in (("runs", []), ("bench", []), ("routing", [named]), ("experts", [named])):
            assert look(client, tab, ["en", named, *more], []).status_code == 200, (tab, named)
    text = client.post("/live/runs", content=b"{}", headers={"content-type": "text/plain"})
    assert text.status_code == 415
    assert client.post("/live/runs", content=b"[", headers=JSON).status_code == 400
    assert look(client, "runs", ["en", None], [], origin="https://evil.example").status_code == 403
    assert look(client, "runs", ["en", None], [], host="evil.example").status_code == 421


def test_files_of_the_machine_are_not_served(client: httpx2.Client, root: Path) -> None:
    for path in ("/etc/passwd", __file__, root / "recipes" / "tiny.toml"):
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_nothing_is_uploaded(client: httpx2.Client) -> None:
    answer = client.post("/gradio_api/upload", files={"files": ("x.zip", b"PK\x03\x04")})
    assert answer.status_code in (400, 413)


@pytest.mark.slow
def test_those_who_may_use_it(tmp_path: Path) -> None:
    with showing(tmp_path, "--auth", "me:secret") as address:
        with httpx2.Client(base_url=address, timeout=60) as client:
            assert client.get("/gradio_api/info").status_code == 401
            assert look(client, "runs", ["en", None], []).status_code == 401
            assert "Benchmark" not in client.get("/config").text
            wrong = client.post("/login", data={"username": "me", "password": "other"})
            assert wrong.status_code == 400
            right = client.post("/login", data={"username": "me", "password": "secret"})
            assert right.status_code == 200 and "Benchmark" in client.get("/config").text
            assert look(client, "runs", ["en", None], []).status_code == 200


def test_what_the_command_refuses(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    for name in [name for name in os.environ if name.startswith("CHRONOS_")]:
        monkeypatch.delenv(name)
    assert main.run(["ui", "--host", "0.0.0.0", "--root", str(tmp_path)]) == 2
    assert "lets others in" in capsys.readouterr().err
    assert main.run(["ui", "--auth", "me", "--root", str(tmp_path)]) == 2
    assert "NAME:PASSWORD" in capsys.readouterr().err
    assert main.run(["ui", "--root", str(tmp_path / "absent")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
