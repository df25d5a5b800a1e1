"""Ids of the Hugging Face hub: its cache as it lies on disk, and the library stood in for."""

from __future__ import annotations

import errno
import re
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chronos.common.errors import DiskFullError, MissingBackendError, ResourceError, UsageError
from chronos.common.layout import inspect, open_layout, pack
from chronos.run import hub
from chronos.run.models import resolve_model
from tests.support.tiny_guest import tiny_guest


class LocalEntryNotFoundError(OSError):
    pass


class HfHubHTTPError(OSError):
    pass


class RepositoryNotFoundError(HfHubHTTPError):
    pass


class GatedRepoError(RepositoryNotFoundError):
    pass


class Library:
    """What `chronos.run.hub` asks of huggingface_hub."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.calls = answer, list[dict[str, Any]]()
        self.drawn: list[bool] = []

    def snapshot_download(self, repo_id: str, **kwargs: Any) -> str:
        self.calls.append({"repo_id": repo_id, **kwargs})
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


@pytest.fixture
def library(monkeypatch):
    def stand_in(answer: Any) -> Library:
        library = Library(answer)
        known = (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError)
        errors = SimpleNamespace(**{error.__name__: error for error in known})
        monkeypatch.setitem(sys.modules, "huggingface_hub", library)
        monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
        utils = SimpleNamespace(disable_progress_bars=lambda: library.drawn.append(False))
        monkeypatch.setitem(sys.modules, "huggingface_hub.utils.tqdm", utils)
        return library

    return stand_in


@pytest.fixture
def cached(tmp_path) -> Path:
    """A snapshot as the hub's cache keeps it: links to blobs that are named by their digest."""
    home = tmp_path / "hub/models--org--tiny"
    blobs, snapshot = home / "blobs", home / "snapshots" / ("a" * 40)
    for folder in (blobs, snapshot, home / "refs"):
        folder.mkdir(parents=True)
    (home / "refs/main").write_text("a" * 40)
    source = tiny_guest(tmp_path / "files", shards=2)
    (source / "tokenizer.json").write_text("{}")
    (source / "LICENSE.txt").write_text("do what you like")
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.move(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def test_a_snapshot_of_links_is_packed_and_inspected(cached, tmp_path):
    report = pack(cached, tmp_path / "dst")
    assert report.records == 8 == len(open_layout(tmp_path / "dst").records)
    assert not any(path.is_symlink() for path in (tmp_path / "dst").rglob("*"))
    assert (tmp_path / "dst/LICENSE.txt").read_text() == "do what you like"
    assert (tmp_path / "dst/tokenizer.json").read_text() == "{}"
    assert inspect(cached)["experts_per_layer"] == 4


def test_the_library_finds_the_snapshot_in_its_cache(cached, monkeypatch):
    constants = pytest.importorskip(
        "huggingface_hub.constants", reason="the hub is of the extra guests"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cached.parents[2]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("org/tiny").resolve() == cached.resolve()
    assert resolve_model("org/tiny", fetch=True).resolve() == cached.resolve()
    with pytest.raises(UsageError, match="no model of that id") as caught:
        resolve_model("org/other", fetch=True)
    assert "HF_HUB_OFFLINE" in caught.value.fix


def test_only_packing_downloads_and_only_what_is_read(library, cached):
    found = library(cached)
    assert resolve_model("org/tiny", fetch=True) == cached
    assert resolve_model("org/tiny") == cached
    fetched, looked_up = found.calls
    assert (fetched["local_files_only"], looked_up["local_files_only"]) == (False, True)
    patterns = fetched["allow_patterns"]
    assert {"config.json", "tokenizer.json"} <= set(patterns)
    assert not any(".bin" in pattern or pattern == "*" for pattern in patterns)
    wanted = ["model-00001-of-00002.safetensors", "mtp.safetensors", "pytorch_model-1.safetensors"]
    others = ["consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin"]
    taken = [
        name
        for name in wanted + others
        if any(fnmatch(name, pattern) for pattern in patterns)
        and not any(fnmatch(name, pattern) for pattern in fetched["ignore_patterns"])
    ]
    assert taken == wanted


def test_a_folder_wins_over_an_id(library, tmp_path, monkeypatch):
    found = library(RuntimeError("asked"))
    monkeypatch.chdir(tmp_path)
    tiny_guest(tmp_path / "org/tiny")
    assert resolve_model("org/tiny", fetch=True) == Path("org/tiny")
    assert resolve_model(Path("org/tiny")) == Path("org/tiny")
    assert found.calls == []


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (LocalEntryNotFoundError("no network\nmore"), UsageError, "no model of that id"),
        (HfHubHTTPError("401 Client Error\nmore"), ResourceError, "401 Client Error$"),
        (RepositoryNotFoundError("404\nmore"), UsageError, "did not give"),
        (GatedRepoError("403\nmore"), ResourceError, "did not give"),
        (ValueError("bad id"), ResourceError, "bad id"),
        (EOFError("peer closed connection\nmore"), ResourceError, "broke off: peer closed conn"),
        (OSError(errno.ENOSPC, "No space left"), DiskFullError, "no room"),
    ],
)
def test_refusals_are_errors_of_one_line_each(library, answer, error, words):
    library(answer)
    with pytest.raises(error) as caught:
        resolve_model("org/tiny", fetch=True)
    assert re.search(words, caught.value.what) and "more" not in str(caught.value)
    with pytest.raises(error):
        resolve_model("org/tiny")


def test_bars_are_drawn_where_they_are_wanted(library, cached):
    found = library(cached)
    resolve_model("org/tiny")
    resolve_model("org/tiny", fetch=True, bars=True)
    assert found.drawn == []
    resolve_model("org/tiny", fetch=True)
    assert found.drawn == [False]


def test_without_the_library_both_readings_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingBackendError, match="no folder 'org/tiny'") as caught:
        resolve_model("org/tiny")
    assert "pip install" in caught.value.fix


@pytest.mark.parametrize(
    "text", ["tiny", "./org/tiny", "../tiny", "/org/tiny", "a/b/c", "~/x", "a/../b"]
)
def test_paths_are_never_ids(text, library):
    found = library(RuntimeError("asked"))
    assert not hub.is_model_id(text)
    with pytest.raises(UsageError, match="does not exist"):
        resolve_model(text)
    assert found.calls == []
