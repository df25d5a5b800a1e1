"""Commands run in this process, on a tiny packed model made once per session."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.cli import main
from chronos.common.traces.trace import TraceRecorder
from chronos.testing.tiny import tiny_packed

TEXT = "def add(left, right):\n    return left + right\n"


@dataclass
class Done:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def error(self) -> list[str]:
        """The lines of the error; asserts that nothing else was printed."""
        assert self.code != 0
        assert self.out == ""
        lines = self.err.splitlines()
        assert all(line.startswith(("error: ", "where: ", "fix: ")) for line in lines), self.err
        return lines


class Stdin(io.TextIOWrapper):
    """Standard input that is no terminal."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")


Chronos = Callable[..., Done]


@pytest.fixture
def chronos(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Chronos:
    """`chronos("generate", model, "-n", 4)` as a user would type it, with a clean environment."""
    for name in [name for name in os.environ if name.startswith("CHRONOS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")
    for user in ("footer", "doctor"):  # who else uses this machine is not what is tested
        monkeypatch.setattr(f"chronos.cli.{user}.machine_load", lambda: None)

    def run(*args: object) -> Done:
        capsys.readouterr()
        code = main.run([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny packed model folder; `<name>-unpacked` beside it is its source. Read only."""
    return tiny_packed(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a few small text files."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(6):
        (folder / f"{number}.txt").write_text(TEXT * (number + 3) + f"# {number}\n", "utf-8")
    return folder


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """120 tokens of uneven routing: 2 layers, 4 experts, top-2."""
    random = np.random.default_rng(0)
    recorder = TraceRecorder(4, 2, model="none")
    for _ in range(120):
        layers = [random.choice(4, 2, False, [0.5, 0.3, 0.1, 0.1]) for _ in range(2)]
        recorder.append(np.stack(layers))
    recorder.trace().save(tmp_path / "trace.npz")
    return tmp_path / "trace.npz"


@pytest.fixture
def long_trace(tmp_path: Path) -> Path:
    """600 tokens in 12 sequences that walk over 8 experts: 2 layers, top-2."""
    recorder = TraceRecorder(8, 2, model="walk")
    for token in range(600):
        if token % 50 == 0:
            recorder.new_sequence()
        recorder.append(np.array([[token % 8, (token + 3) % 8], [(token + 1) % 8, token % 8]]))
    recorder.trace().save(tmp_path / "walk.npz")
    return tmp_path / "walk.npz"


@pytest.fixture
def chosen() -> str:
    """The backend that is used where none is named; "" where there is none."""
    order = ["torch", "mlx"]
    if sys.platform == "darwin" and platform.machine() == "arm64":
        order.reverse()
    return next((name for name in order if importlib.util.find_spec(name)), "")


@pytest.fixture
def command() -> list[str]:
    """The start of a command line for a process of its own."""
    return [sys.executable, "-m", "chronos"]
