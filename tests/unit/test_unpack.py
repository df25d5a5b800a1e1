"""`unpack` undoes `pack`: every tensor has its name, dtype, shape and bytes again.

What `--dequantize` computes is compared in `tests/native/test_torch_quantised.py`.
"""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from chronos.common.disk.tensors import read_checkpoint
from chronos.common.errors import CorruptFileError, UsageError
from chronos.common.layout import open_layout, pack, reorder, unpack, verify
from chronos.testing.tiny import tiny_model
from tests.support.tiny_guest import STYLES, tiny_guest


def contents(folder: Path) -> dict[str, Any]:
    with closing(read_checkpoint(folder)) as stream:
        return {entry.name: (entry.dtype, entry.shape, bytes(data)) for entry, data in stream}


@pytest.mark.parametrize("style", STYLES)
def test_a_guest_has_its_names_and_bytes_again(style: str, tmp_path: Path) -> None:
    source = tiny_guest(tmp_path / "src", style, shards=2)
    pack(source, tmp_path / "packed")
    done: list[tuple[int, int]] = []
    report = unpack(tmp_path / "packed", tmp_path / "out", progress=lambda *at: done.append(at))
    assert contents(tmp_path / "out") == contents(source)
    assert (report.tensors, report.files) == (len(contents(source)), 3)
    assert done[-1] == (report.bytes, report.bytes)
    assert (tmp_path / "out/config.json").read_bytes() == (source / "config.json").read_bytes()
    pack(tmp_path / "out", tmp_path / "again")
    layouts = [open_layout(tmp_path / name) for name in ("packed", "again")]
    assert layouts[0].fingerprint == layouts[1].fingerprint


def test_a_native_model_too_whatever_became_of_its_packed_folder(tmp_path: Path) -> None:
    """Packed again, reordered, linked."""
    source = tiny_model(tmp_path / "model")
    pack(source, tmp_path / "one")
    pack(tmp_path / "one", tmp_path / "packed", link=True)
    keys = sorted(open_layout(tmp_path / "packed").records, key=lambda key: key[::-1])
    reorder(tmp_path / "packed", [keys], {"method": "test"})
    unpack(tmp_path / "packed", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)
    for file in (path.name for path in source.iterdir() if path.suffix in (".json", ".jinja")):
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()


def test_experts_numbered_in_another_way_are_packed_and_have_no_names(tmp_path: Path) -> None:
    def change(arrays: Any) -> None:
        for name in [name for name in arrays if ".experts.1." in name]:
            arrays[name.replace(".experts.1.", ".experts.01.")] = arrays.pop(name)

    pack(tiny_guest(tmp_path / "src", change=change), tmp_path / "packed")
    with pytest.raises(UsageError, match="does not say what"):
        unpack(tmp_path / "packed", tmp_path / "out")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pack(tiny_guest(tmp_path / "src"), tmp_path / "packed")
    return tmp_path / "packed"


def test_names_are_guarded_by_their_digest_and_put_back(packed: Path, tmp_path: Path) -> None:
    path = packed / "experts/names.json"
    path.write_text(path.read_text().replace("layers.1", "layers.3", 1))
    with pytest.raises(CorruptFileError, match=r"names.json is not what was packed"):
        unpack(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    path.unlink()  # as of a folder that an older Chronos packed
    with pytest.raises(UsageError, match=r"does not say what(.|\n)*pack the model from its source"):
        unpack(packed, tmp_path / "out")
    pack(tmp_path / "src", packed)
    assert verify(packed).problems == []
    unpack(packed, tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: [],
        lambda data: data | {"version": 2},
        lambda data: data | {"layers": {"one": {}}},
        lambda data: data | {"layers": {"1": {"down_proj": [["a", "b", "c"]]}}},
        lambda data: data | {"layers": {"1": {"down_proj": [[1]]}}},
        lambda data: data | {"layers": {"1": {"down_proj": [["a", "b"]]}}},
    ],
)
def test_names_that_are_no_names_are_refused(change: Any, packed: Path, tmp_path: Path) -> None:
    path = packed / "experts/names.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(CorruptFileError, match="names"):
        unpack(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_unpacked_says_why(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no packed model"):
        unpack(tmp_path / "src", tmp_path / "out")
    with pytest.raises(UsageError, match="not quantised"):
        unpack(packed, tmp_path / "out", dequantise=lambda *_: b"")
    shutil.copytree(packed, tmp_path / "out")
    with pytest.raises(UsageError, match="not empty"):
        unpack(packed, tmp_path / "out")


def test_a_flipped_bit_is_found_before_anything_is_written(packed: Path, tmp_path: Path) -> None:
    record = open_layout(packed).records[2, 1]
    with (packed / "experts" / record.file).open("r+b") as file:
        file.seek(record.offset + 3)
        file.write(b"\x7f")
    with pytest.raises(CorruptFileError):
        unpack(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
