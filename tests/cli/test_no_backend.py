"""Without PyTorch and MLX: what needs a backend exits 5 with the cure, everything else works.

Every command runs in a process of its own that sees neither package (tests/absent), so these tests
mean the same wherever they run.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from chronos.common.traces.trace import TraceRecorder

ABSENT = Path(__file__).parents[1] / "absent"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(command: list[str]) -> Run:
    """`run("generate", model)` as a user without a framework would type it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("CHRONOS_")}
    path = [str(ABSENT), *filter(None, [env.get("PYTHONPATH")])]
    env |= {"PYTHONPATH": os.pathsep.join(path), "CHRONOS_TEST_WITHOUT": "torch,mlx"}

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        line = [*command, *map(str, args)]
        return subprocess.run(
            line, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
        )

    return run


def test_generate_names_what_is_missing_and_the_cure(run: Run, packed: Path) -> None:
    done = run("generate", packed, "-p", "x")
    assert (done.returncode, done.stdout) == (5, "")
    error, where, fix = done.stderr.splitlines()
    assert error == "error: no backend can be used here"
    assert "'torch' is not installed" in where and "'mlx" in where
    assert fix.startswith("fix: ")
    assert any(f"-m pip install 'chronos-moe[{name}]'" in fix for name in ("torch", "mlx"))


@pytest.mark.parametrize("name", ["torch", "mlx"])
def test_a_named_backend_has_its_own_cure(run: Run, packed: Path, name: str) -> None:
    done = run("generate", packed, "-p", "x", "--backend", name)
    assert (done.returncode, done.stdout) == (5, "")
    assert f"error: backend '{name}' cannot be used" in done.stderr
    assert f"pip install 'chronos-moe[{name}]'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "args",
    [
        ("eval", "{packed}", "--data", "{text}"),
        ("trace", "{packed}", "--data", "{text}", "-o", "{out}"),
        ("bench", "decode", "{packed}"),
        ("demo", "{packed}"),
    ],
    ids=lambda args: args[0],
)
def test_what_runs_a_model_exits_5(
    run: Run, packed: Path, text: Path, tmp_path: Path, args: tuple[str, ...]
) -> None:
    out = tmp_path / "t.npz"
    done = run(*(arg.format(packed=packed, text=text, out=out) for arg in args))
    assert done.returncode == 5, done.stderr
    assert "pip install 'chronos-moe[" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not out.exists()


def test_doctor_says_why(run: Run, packed: Path) -> None:
    done = run("doctor", packed, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["chosen"] == "" and not any(found["usable"] for found in data["backends"])
    for found in data["backends"]:
        assert f"chronos-moe[{found['name']}]" in found["fix"]
    assert data["disk"]["bytes_per_s"] > 0


def test_folders_need_no_backend(run: Run, packed: Path, tmp_path: Path) -> None:
    source, folder = packed.with_name(packed.name + "-unpacked"), tmp_path / "packed"
    for args in (("pack", source, "-o", folder), ("inspect", folder), ("verify", folder)):
        done = run(*args)
        assert done.returncode == 0, done.stderr
    assert "no problems" in done.stdout


def test_traces_and_help_need_no_backend(run: Run, tmp_path: Path) -> None:
    recorder = TraceRecorder(4, 2)
    recorder.append(np.tile(np.array([[0, 1], [2, 3]]), (8, 1, 1)))
    recorder.trace().save(tmp_path / "t.npz")
    for args in (("simulate", tmp_path / "t.npz", "--budget", "50%"), ("--help",)):
        done = run(*args)
        assert done.returncode == 0 and done.stdout, done.stderr
