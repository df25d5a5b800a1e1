"""Packing into a folder that is finished, unfinished, has lost a file, or is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import chronos
from chronos.common.disk.linked import LINK
from chronos.common.errors import CorruptFileError, UsageError
from chronos.common.layout import inspect, pack, verify
from chronos.common.layout.pack import check_destination
from tests.support.tiny_guest import tiny_guest

pytestmark = pytest.mark.usefixtures("no_flushing")


@pytest.fixture
def sharded(tmp_path) -> Path:
    return tiny_guest(tmp_path / "src", shards=3)


@pytest.fixture
def linked(sharded, tmp_path) -> Path:
    pack(sharded, tmp_path / "linked", link=True)
    return tmp_path / "linked"


def test_packing_again_mends_a_link_or_does_without(sharded, linked, tmp_path):
    """The error says so: the shards moved, or shall be copied after all."""
    pack(sharded, tmp_path / "copied")
    moved = sharded.rename(tmp_path / "moved")
    with pytest.raises(CorruptFileError, match="is linked to"):
        verify(linked)
    pack(moved, linked, link=True)
    assert verify(linked).problems == [] and not (linked / "model.safetensors").exists()
    pack(moved, linked)
    assert not (linked / LINK).exists()
    dense = (tmp_path / "copied/model.safetensors").read_bytes()
    assert (linked / "model.safetensors").read_bytes() == dense


def test_packing_again_puts_back_what_was_lost_and_removes_nothing(sharded, tmp_path):
    target, other = tmp_path / "dst", tmp_path / "other"
    pack(sharded, target)
    before = {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}
    for name in before:
        (target / name).unlink()
        pack(sharded, target)
        assert (target / name).read_bytes() == before[name]
    (target / "config.json").write_text(json.dumps(json.loads(before["config.json"]) | {"x": 1}))
    pack(sharded, target)
    assert json.loads((target / "config.json").read_text())["x"] == 1
    pack(target, other, link=True)
    pack(other, target, link=True)  # a link to itself would be the end of the weights
    assert (target / "model.safetensors").read_bytes() == before["model.safetensors"]
    assert verify(other).problems == []


def test_a_folder_whose_packing_was_stopped_says_so(sharded, tmp_path):
    target = tmp_path / "dst"
    pack(sharded, target)
    (target / "experts/cluster_manifest.json").unlink()
    for read in (inspect, verify, lambda path: pack(path, tmp_path / "again"), chronos.load):
        with pytest.raises(CorruptFileError, match="was not finished") as caught:
            read(target)
        assert f"-o {target}" in caught.value.fix
    shutil.rmtree(target / "experts")
    with pytest.raises(CorruptFileError, match="was not finished"):
        inspect(target)
    pack(sharded, target)
    assert verify(target).problems == []


def test_the_destination_is_a_file(sharded, tmp_path):
    (tmp_path / "dst").write_text("notes")
    with pytest.raises(UsageError, match="is a file"):
        pack(sharded, tmp_path / "dst")
    assert (tmp_path / "dst").read_text() == "notes"


def test_files_of_others_are_never_written_over(sharded, tmp_path):
    """A folder of a project, say, named by mistake or by an empty variable."""
    (sharded / "LICENSE").write_text("the model's")
    (tmp_path / "project").mkdir()
    (tmp_path / "project/LICENSE").write_text("the project's")
    with pytest.raises(UsageError, match="holds a LICENSE that was not"):
        pack(sharded, tmp_path / "project")
    assert [path.name for path in (tmp_path / "project").iterdir()] == ["LICENSE"]
    assert (tmp_path / "project/LICENSE").read_text() == "the project's"


def test_a_folder_of_other_files_is_no_place_for_a_model(sharded, tmp_path):
    (project := tmp_path / "project").mkdir()
    (project / "notes.txt").write_text("mine")
    for check in (pack, check_destination):
        with pytest.raises(UsageError, match="holds other files: notes.txt"):
            check(sharded, project)
    assert [path.name for path in project.iterdir()] == ["notes.txt"]
    (project / "notes.txt").rename(project / ".notes")
    pack(sharded, project)  # hidden ones may be there, of a repository made for the model
    (project / "notes.txt").write_text("written later")
    pack(sharded, project)
    assert (project / ".notes").read_text() == "mine"
