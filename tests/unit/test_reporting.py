"""What reporters are told: by the names and steps of the log, with stand-ins for their packages."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chronos.train import reporting

LINES = [{"step": 3, "loss": 1.5, "reward": None}, {"step": 4, "valid_ce": 2.0}]


@pytest.mark.parametrize("name", ["trackio", "wandb"])
@pytest.mark.parametrize("first", [0, 2])
def test_numbers_go_to_a_run_of_the_folder_s_name(
    name: str, first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: dict[str, Any] = {}
    told: list[Any] = []
    run = SimpleNamespace(
        log=lambda numbers, step: told.append((step, numbers)), finish=lambda: told.append("end")
    )
    package = SimpleNamespace(init=lambda **options: begun.update(options) or run)
    monkeypatch.setattr(reporting, "check", lambda name: None)
    monkeypatch.setattr(importlib, "import_module", lambda wanted: package)
    (tmp_path / "sft-3").mkdir()
    reporter = reporting.open_reporter(name, tmp_path / "sft-3", {"steps": 5}, first)
    for line in LINES:
        reporter.log(line)
    reporter.close()
    assert told == [(3, {"loss": 1.5}), (4, {"valid_ce": 2.0}), "end"]
    assert (begun["project"], begun["name"], begun["config"]) == ("chronos", "sft-3", {"steps": 5})
    assert (begun["resume"] == "allow") == (first > 0)


def test_a_wandb_run_goes_on_as_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids: list[str] = []
    run = SimpleNamespace(finish=lambda: None)
    package = SimpleNamespace(init=lambda **options: ids.append(options["id"]) or run)
    monkeypatch.setattr(reporting, "check", lambda name: None)
    monkeypatch.setattr(importlib, "import_module", lambda wanted: package)
    for first in (0, 3, 0):
        reporting.open_reporter("wandb", tmp_path, {}, first)
    assert ids[0] == ids[1] != ids[2]
