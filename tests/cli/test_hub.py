"""Ids of the hub over HTTP: huggingface_hub downloads from a server on this machine.

Commands run in processes of their own, since the library reads its environment when it is imported.
The server answers as the hub does for small files; large ones come from another host there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from chronos.common.layout import open_layout
from tests.support.tiny_guest import tiny_guest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="the hub is of the extra guests"
)
ID, COMMIT = "org/tiny", "a" * 40
Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


class Hub(ThreadingHTTPServer):
    """One model's files. `cut` breaks off that file halfway; `gated` refuses to list them."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        self.cut, self.gated, self.sent = "", False, list[str]()
        self._thread = threading.Thread(target=self.serve_forever)
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path, files = self.path.partition("?")[0], self.server.files
        refused = {"X-Error-Code": "GatedRepo"} if self.server.gated else {}
        if path in (f"/api/models/{ID}", f"/api/models/{ID}/revision/main"):
            siblings = [{"rfilename": name} for name in files]
            self.answer_json({"id": ID, "sha": COMMIT, "siblings": siblings}, refused)
        elif path == f"/api/models/{ID}/tree/{COMMIT}":
            self.answer_json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
                    for name, data in files.items()
                ]
            )
        elif path.startswith(f"/{ID}/resolve/{COMMIT}/") and path.rpartition("/")[2] in files:
            name = path.rpartition("/")[2]
            self.answer(200, files[name], {"ETag": f'"{_digest(files[name])}"'}, name)
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer_json(self, data: object, refused: dict[str, str] | None = None) -> None:
        headers = {"Content-Type": "application/json"} | (refused or {})
        self.answer(403 if refused else 200, json.dumps(data).encode(), headers)

    def answer(self, code: int, data: bytes, headers: dict[str, str], name: str = "") -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if name:
            self.server.sent.append(name)
        if name and name == self.server.cut:
            data, self.close_connection = data[: len(data) // 2], True
        self.wfile.write(data)


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as the hub has them, with files that Chronos has no use for."""
    folder = tiny_guest(tmp_path_factory.mktemp("hub") / "tiny", "mixtral", shards=2)
    for name in ("LICENSE", "README.md", "pytorch_model.bin", "flax_model.msgpack"):
        (folder / name).write_text(name, "utf-8")
    return folder


@pytest.fixture
def hub(source: Path) -> Iterator[Hub]:
    server = Hub(source)
    yield server
    server.stop()


@pytest.fixture
def run(command: list[str], hub: Hub, tmp_path: Path) -> Run:
    """`run("pack", ID, ...)` with a cache of its own and the server for a hub."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "CHRONOS_"))}
    kept["HF_HOME"] = str(tmp_path / "home")
    kept["HF_ENDPOINT"] = f"http://127.0.0.1:{hub.server_port}"
    kept["NO_PROXY"] = "127.0.0.1"

    def start(*args: object, **env: str) -> Done:
        words = [*command, *map(str, args)]
        return subprocess.run(words, env=kept | env, capture_output=True, text=True, check=False)

    return start


def test_a_model_is_fetched_packed_and_then_there_without_a_network(
    run: Run, hub: Hub, source: Path, tmp_path: Path
) -> None:
    done = run("pack", ID, "-o", tmp_path / "a", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and json.loads(done.stdout)["records"] == 8
    shards = [f"model-0000{n}-of-00002.safetensors" for n in "12"]
    wanted = ["LICENSE", "config.json", *shards, "model.safetensors.index.json"]
    assert sorted(hub.sent) == sorted(wanted)
    assert run("verify", tmp_path / "a").returncode == 0
    hub.stop()
    for number, env in enumerate(({}, {"HF_HUB_OFFLINE": "1"})):
        target = tmp_path / f"again-{number}"
        done = run("pack", ID, "-o", target, **env)
        assert done.returncode == 0, done.stderr
        assert open_layout(target).fingerprint == open_layout(tmp_path / "a").fingerprint
    done = run("inspect", ID, "--json", HF_HUB_OFFLINE="1")
    assert json.loads(done.stdout)["model_type"] == "mixtral"
    assert len(hub.sent) == len(wanted)


def test_a_download_that_breaks_off_goes_on_with_what_is_missing(
    run: Run, hub: Hub, tmp_path: Path
) -> None:
    hub.cut = "model-00002-of-00002.safetensors"
    done = run("pack", ID, "-o", tmp_path / "a", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert done.returncode == 4, done.stderr
    assert f"error: the download of '{ID}' broke off: " in done.stderr
    assert "bug" not in done.stderr and not (tmp_path / "a").exists()
    done = run("inspect", ID)
    assert done.returncode == 2 and f"chronos pack {ID}" in done.stderr
    cut, hub.cut = hub.cut, ""
    hub.sent.clear()
    done = run("pack", ID, "-o", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert cut in hub.sent and "model-00001-of-00002.safetensors" not in hub.sent


def test_what_the_hub_does_not_have_or_does_not_give(run: Run, hub: Hub, tmp_path: Path) -> None:
    done = run("pack", "org/absent", "-o", tmp_path / "a")
    assert done.returncode == 2 and "error: the hub did not give 'org/absent'" in done.stderr
    assert "fix: is it spelled so" in done.stderr
    hub.gated = True
    done = run("pack", ID, "-o", tmp_path / "a")
    assert done.returncode == 4 and f"error: the hub did not give '{ID}'" in done.stderr
    assert not (tmp_path / "a").exists()


def test_a_model_without_safetensors_says_so(run: Run, hub: Hub, tmp_path: Path) -> None:
    for name in [name for name in hub.files if name.endswith((".safetensors", ".index.json"))]:
        del hub.files[name]
    done = run("pack", ID, "-o", tmp_path / "a")
    assert done.returncode == 3 and "safetensors" in done.stderr.splitlines()[0]
    assert "pytorch_model.bin" not in hub.sent


@pytest.mark.parametrize("env", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_without_a_network_or_a_cache(
    run: Run, hub: Hub, tmp_path: Path, env: dict[str, str]
) -> None:
    hub.stop()
    done = run("pack", ID, "-o", tmp_path / "a", **env)
    assert done.returncode == 2 and "no model of that id in the hub's cache" in done.stderr
    assert "fix: go online" in done.stderr and "Traceback" not in done.stderr
