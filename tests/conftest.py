"""The `backend` fixture: every conformance and parity test runs once per backend module.

CHRONOS_TEST_BACKENDS=torch,mlx names the backends to test; one that is missing is then an error.
Without it, those that are installed are tested.

CHRONOS_TEST_GPU=1 shows the tests an NVIDIA GPU, which is hidden from them otherwise.

`needs_backend` marks tests outside these suites that run a model. They are skipped only where
CHRONOS_TEST_WITHOUT hides every backend (tests/absent); without a framework they fail elsewhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest

BACKENDS = {"torch": "torch", "mlx": "mlx"}  # name -> the package it cannot do without


def wanted() -> list[str]:
    named = [name for name in os.environ.get("CHRONOS_TEST_BACKENDS", "").split(",") if name]
    if unknown := set(named) - BACKENDS.keys():
        raise pytest.UsageError(f"CHRONOS_TEST_BACKENDS: no backend is called {sorted(unknown)}")
    installed = [name for name, package in BACKENDS.items() if importlib.util.find_spec(package)]
    return named or installed


def hidden() -> set[str]:
    """The packages that tests/absent hides. Naming them while they can be found is an error."""
    named = set(os.environ.get("CHRONOS_TEST_WITHOUT", "").split(",")) - {""}
    if found := [name for name in sorted(named) if importlib.util.find_spec(name)]:
        raise pytest.UsageError(
            f"CHRONOS_TEST_WITHOUT needs PYTHONPATH=tests/absent to hide {found}"
        )
    return named


def pytest_configure(config: pytest.Config) -> None:
    """What is tested here runs on the CPU, whose bits it is compared with, also where there is a
    GPU: torch takes that by default. `make gpu` asks for it."""
    if not os.environ.get("CHRONOS_TEST_GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


NO_BACKEND = hidden() >= set(BACKENDS.values())


def pytest_runtest_setup(item: pytest.Item) -> None:
    if NO_BACKEND and item.get_closest_marker("needs_backend"):
        pytest.skip("runs a model; CHRONOS_TEST_WITHOUT hides every backend")


@pytest.fixture(scope="session", params=wanted())
def backend(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(f"chronos.backends.{request.param}")


@pytest.fixture(scope="session")
def both() -> tuple[Any, Any]:
    """The torch and the MLX backend, for tests that compare them with each other."""
    if absent := BACKENDS.keys() - set(wanted()):
        pytest.skip(f"compares the backends with each other; not tested here: {sorted(absent)}")
    torch, mlx = (importlib.import_module(f"chronos.backends.{name}") for name in BACKENDS)
    return torch, mlx


@pytest.fixture(scope="module")
def no_flushing() -> Iterator[None]:
    """Durability is tested in tests/faults; elsewhere flushing would be most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield
