"""Fixtures of one backend: torch's threads; MLX's guests, each made once for all test files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest


@pytest.fixture
def two_threads() -> Iterator[None]:
    """torch computes with two threads, also where `make test` gives each process one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def eager() -> Iterator[None]:
    """Compiling on a CPU starts a C++ compiler for every activation."""
    import mlx.core as mx

    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guests")


@pytest.fixture(scope="session")
def folder(home: Path) -> Callable[[str], Path]:
    """The unpacked folder of a model by name; its packed form lies beside it."""
    from chronos.common.layout import pack
    from tests.support.mlx_guests import packed, save

    @cache
    def make(name: str) -> Path:
        at = home / name
        save(name, at)
        pack(at, packed(at))
        return at

    return make
