"""A tiny packed model, and a server of it. What is the same on all backends is tested on one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from chronos.common.layout import pack
from chronos.common.text.sampling import PIECE
from chronos.testing.tiny import tiny_model
from tests.conftest import wanted
from tests.support.serving import Running, serving


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With room for four pieces of a prompt."""
    folder = tmp_path_factory.mktemp("serve")
    source = tiny_model(folder / "model", max_position_embeddings=4 * PIECE)
    pack(source, folder / "tiny")
    return folder / "tiny"


@pytest.fixture(scope="session")
def one_backend() -> str:
    return wanted()[0]


@pytest.fixture(scope="module")
def server(one_backend: str, folder: Path) -> Iterator[Running]:
    with serving(folder, backend=one_backend, prefix_bytes=1 << 24, queue=64) as running:
        yield running
