"""--threads and CHRONOS_THREADS on every command that computes, on both backends; doctor and footer
on a busy machine."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import chronos as package
from chronos.cli import docs
from chronos.cli.main import app
from chronos.common.errors import UsageError
from chronos.common.tuning import Load

COMPUTE = (
    "demo,generate,chat,train pretrain,pack,trace,fit,bench decode,bench replay,eval"
).split(",")  # fmt: skip


@pytest.fixture
def torch() -> Iterator[Any]:
    found = pytest.importorskip("torch")
    before = found.get_num_threads()
    yield found
    found.set_num_threads(before)


@pytest.mark.parametrize("name", COMPUTE)
def test_every_command_that_computes_has_the_flag(name: str) -> None:
    command = dict(docs.commands(typer.main.get_command(app), "chronos"))[f"chronos {name}"]
    [option] = [p for p in command.params if "--threads" in p.opts]
    assert option.envvar == "CHRONOS_THREADS"


def test_the_flag_its_variable_and_load(
    chronos: Any, packed: Path, torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("generate", packed, "-p", "def", "-n", 2, "--json", "--backend", "torch")
    assert chronos(*line, "--threads", 3).json["threads"] == 3 == torch.get_num_threads()
    assert chronos(*line).json["threads"] == 3  # none asked for: as it was
    monkeypatch.setenv("CHRONOS_THREADS", "2")
    assert chronos(*line).json["threads"] == 2
    with package.load(packed, backend="torch", threads=1) as engine:
        assert engine.threads == torch.get_num_threads() == 1


def test_tokens_do_not_depend_on_it(chronos: Any, packed: Path, torch: Any) -> None:
    line = ("generate", packed, "-p", "def", "-n", 8, "--json", "--backend", "torch")
    one, two = (chronos(*line, "--threads", count).json["tokens"] for count in (1, 2))
    assert one == two


def test_no_threads_are_refused_before_anything_is_loaded(chronos: Any, packed: Path) -> None:
    done = chronos("generate", packed, "-p", "def", "--threads", 0)
    assert done.code == 2 and "--threads" in done.error[0]
    with pytest.raises(UsageError, match="0 threads"):
        package.load(packed, threads=0)


def test_a_backend_without_the_number_says_so(
    packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlx.core")
    with package.load(packed, backend="mlx", threads=2) as engine:
        assert engine.threads is None
    assert "threads=2 has no effect: mlx takes its own number" in caplog.text


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_training_takes_the_flag_over_the_recipe(
    chronos: Any, tmp_path: Path, text: Path, backend: str, torch: Any
) -> None:
    pytest.importorskip("mlx.core" if backend == "mlx" else backend)
    from tests.cli.test_train import RECIPE

    recipe = tmp_path / "own.toml"
    written = RECIPE.format(data=text.as_posix(), steps=1) + "threads = 1\n"
    recipe.write_text(written, "utf-8")
    line = ("train", "pretrain", "-c", recipe, "-o", tmp_path / "run", "--backend", backend)
    before = torch.get_num_threads()
    done = chronos(*line, "--threads", 3)
    assert done.code == 0, done.err
    if backend == "torch":
        assert torch.get_num_threads() == 3
    else:
        assert "threads = 3 has no effect: mlx takes its own number" in done.err
        assert torch.get_num_threads() == before


@pytest.mark.needs_backend
def test_the_footer_says_when_the_machine_was_busy(
    chronos: Any, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("generate", packed, "-p", "def", "-n", 2)
    assert "busy" not in chronos(*line).err
    monkeypatch.setattr("chronos.cli.footer.machine_load", lambda: Load(5.25, 2))
    assert "busy: 5.2 threads wanted its 2 cores" in chronos(*line).err.splitlines()[-1]
    assert "busy" not in chronos(*line, "-q").err
    assert chronos(*line, "--json").json["load"] == 5.25


def test_doctor_shows_threads_how_they_wait_and_the_load(
    chronos: Any, torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chronos.cli.doctor.machine_load", lambda: Load(5.25, 2))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    shown = " ".join(chronos("doctor").out.split())
    assert f"torch: {torch.get_num_threads()} for a product on a CPU, waiting asleep" in shown
    assert "5.2 threads wanted one of 2 cores: busy" in shown
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    data = chronos("doctor", "--json").json
    assert data["waiting"] == "as OMP_WAIT_POLICY=active says" and data["load"] == 5.25
    [found] = [b for b in data["backends"] if b["name"] == "torch"]
    assert found["threads"] == torch.get_num_threads()


def test_doctor_tells_of_another_package_of_this_name(
    chronos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "import name" not in chronos("doctor").out
    metadata = importlib.import_module("importlib.metadata")
    both = {"chronos": ["chronos_moe", "chronos-forecasting", "chronos-forecasting"]}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: both)
    shown = " ".join(chronos("doctor").out.split())
    assert "chronos-forecasting is imported as `chronos` too" in shown
    data = chronos("doctor", "--json").json
    assert data["import_name_shared_with"] == ["chronos-forecasting"]
