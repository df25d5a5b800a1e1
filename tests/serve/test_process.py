"""`chronos serve` as a process: what it prints, how it ends, what it refuses before it begins."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from chronos.cli import main
from chronos.common.text.sampling import PIECE
from chronos.serve.prefix_files import SUFFIX
from tests.support.serving import CHAT, HELLO, TEXT

pytestmark = pytest.mark.needs_backend


@contextmanager
def process(*args: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server and its address, once it says that it listens."""
    command = [sys.executable, "-m", "chronos", "serve", *map(str, args), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None and server.stderr is not None
            line = server.stdout.readline()
            assert line.startswith("listening on http://127.0.0.1:"), server.stderr.read()
            yield server, line.split()[-1]
        finally:
            server.kill()


def test_it_listens_loads_answers_and_drains(folder: Path, tmp_path: Path) -> None:
    """/v1/models answers while the model is loaded; SIGTERM lets a stream end whole."""
    stats = tmp_path / "stats.jsonl"
    flags = ("--name", "it", "--alias", "other", "--budget", "50%", "--stats", stats)
    with process(folder, *flags) as (server, url):
        with httpx2.Client(base_url=url, timeout=60) as http:
            assert http.get("/v1/models").json()["data"][0]["id"] == "it"
            while http.get("/health").json()["status"] == "loading":
                pass
            assert server.stdout is not None
            assert server.stdout.readline() == "ready: the model is loaded\n"
            body: dict[str, Any] = {"messages": HELLO, "logit_bias": {"1": -100, "5": -100}}
            body |= {"max_tokens": 600, "model": "other"}
            whole = http.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
            with http.stream("POST", CHAT, json=body | {"stream": True}) as response:
                lines = response.iter_lines()
                first = next(lines)
                server.send_signal(signal.SIGTERM)
                refused = http.post(CHAT, json=body)
                while refused.status_code == 200:  # the signal is on its way
                    refused = http.post(CHAT, json=body | {"max_tokens": 1})
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "shutting_down"
                rest = [line for line in lines if line]
            assert "assistant" in first and rest[-1] == "data: [DONE]"
            assert sum(len(line) for line in rest) > len(whole)
        assert server.wait(timeout=30) == 0
        assert server.stderr is not None and server.stderr.read() == ""
    lines = [json.loads(line) for line in stats.read_text("utf-8").splitlines()]
    assert lines[0]["generated"] == 0 < lines[-1]["generated"]


def test_a_server_that_is_killed_begins_anew_with_the_same_answers(
    folder: Path, tmp_path: Path
) -> None:
    """kill -9 in the middle of a stream; what it had kept on disk of a prompt is there again."""
    kept = tmp_path / "kept"
    flags = ("--name", "it", "--budget", "50%", "--prefix-cache-dir", kept)
    prompt = [7 * i % 300 for i in range(PIECE + 20)]
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 8, "logprobs": 2, "temperature": 0}
    told = []
    for turn in range(2):
        with (
            process(folder, *flags) as (server, url),
            httpx2.Client(base_url=url, timeout=60) as http,
        ):
            while http.get("/health").status_code != 200:
                time.sleep(0.02)
            told.append(http.post(TEXT, json=body).json())
            while not list(kept.glob(f"*{SUFFIX}")):  # written while nobody asks
                time.sleep(0.02)
            endless = body | {"max_tokens": 900, "stream": True}
            with http.stream("POST", TEXT, json=endless) as response:
                next(response.iter_lines())
                server.kill()
                assert server.wait(30) == -signal.SIGKILL
            assert server.stderr is not None and server.stderr.read() == ""
        cached = told[turn]["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached == turn * PIECE
    assert told[0]["choices"] == told[1]["choices"]


Refused = Callable[..., tuple[int, str]]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """The exit code and the error of a command that ends by itself, in this process."""
    for name in [name for name in os.environ if name.startswith("CHRONOS_")]:
        monkeypatch.delenv(name)

    def run(*args: object) -> tuple[int, str]:
        code = main.run(["serve", *map(str, args)])
        told = capsys.readouterr()
        assert told.out == ""
        return code, told.err

    return run


def test_others_are_let_in_with_a_key_only(refused: Refused, folder: Path, tmp_path: Path) -> None:
    code, told = refused(folder, "--host", "0.0.0.0")
    assert code == 2 and "error: listening on 0.0.0.0 lets others in" in told
    (tmp_path / "keys").write_text("\n")
    code, told = refused(folder, "--host", "0.0.0.0", "--api-key-file", tmp_path / "keys")
    assert code == 2 and "holds no key" in told


def test_a_port_that_is_taken_and_a_host_that_is_none(refused: Refused, folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, told = refused(folder, "--port", taken.getsockname()[1])
    assert code == 4 and told.startswith("error: port ")
    code, told = refused(folder, "--host", "no host", "--api-key", "k")
    assert code == 2 and "--host" in told


def test_a_model_that_cannot_run_ends_the_process(folder: Path) -> None:
    """Its folder is fine and its budget is not: told once the engine is opened."""
    command = [sys.executable, "-m", "chronos", "serve", str(folder), "--port", "0"]
    done = subprocess.run([*command, "--budget", "1kB"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 4 and done.stderr.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "args",
    [("no-such-folder",), ("demo", "--name", "a", "--name", "b"), ("demo", "demo"),
     ("demo", "--kv-cache", "much"), ("demo", "--api-key", "")],
)  # fmt: skip
def test_nonsense_is_refused_before_anything_is_read(
    refused: Refused, args: tuple[str, ...]
) -> None:
    code, told = refused(*args)
    assert code == 2 and told.startswith("error: ")
