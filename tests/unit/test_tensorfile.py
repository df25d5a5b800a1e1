"""Tensor files: what is written is read back, here and by the safetensors library."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import deserialize

from chronos.common.disk import tensors as tensorfile
from chronos.common.disk.header import DTYPE_BITS, read_header, tensor_nbytes
from chronos.common.disk.tensors import read_checkpoint, read_tensors, write_tensors
from chronos.common.errors import CorruptFileError


def sample() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "a.weight": random.standard_normal((50, 33), np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(7, np.int64),
        "b/bytes": random.integers(0, 255, (5001,), np.uint8),
    }


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    names = {"float32": "F32", "int64": "I64", "uint8": "U8"}
    write_tensors(
        path, ((n, names[str(a.dtype)], a.shape, a) for n, a in arrays.items()), {"k": "v"}
    )


def test_round_trip_and_the_library_agrees(tmp_path):
    path, arrays = tmp_path / "x.safetensors", sample()
    write(path, arrays)
    header = read_header(path)
    assert list(header.entries) == list(arrays) and header.metadata == {"k": "v"}
    assert header.data_start % 4096 == 0 and header.file_bytes == path.stat().st_size
    theirs = {name: bytes(value["data"]) for name, value in deserialize(path.read_bytes())}
    for entry, data in read_tensors(path):
        assert bytes(data) == arrays[entry.name].tobytes() == theirs.pop(entry.name)
        assert entry.shape == arrays[entry.name].shape and not data.readonly
    assert not theirs


def test_only_the_asked_tensors_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, sample())
    found = {entry.name for entry, _ in read_tensors(path, ["scalar", "empty", "not there"])}
    assert found == {"scalar", "empty"}


def test_views_stay_valid_and_large_tensors_span_extents(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfile, "_EXTENT", 10_000)
    monkeypatch.setattr(tensorfile, "_AHEAD", 20_000)
    path = tmp_path / "x.safetensors"
    random = np.random.default_rng(1)
    arrays = {
        str(i): random.integers(0, 255, n, np.uint8) for i, n in enumerate([7, 9_999, 30_001] * 5)
    }
    write(path, arrays)
    kept = list(read_tensors(path))
    assert all(bytes(data) == arrays[entry.name].tobytes() for entry, data in kept)


def test_data_may_be_functions_called_in_turn(tmp_path):
    path, calls = tmp_path / "x.safetensors", []

    def data(name: str):
        calls.append(name)
        return name.encode() * 4

    names = ["a", "b", "c"]
    write_tensors(path, [(n, "U8", (4,), lambda n=n: data(n)) for n in names])
    assert calls == names
    assert [bytes(view) for _, view in read_tensors(path)] == [b"aaaa", b"bbbb", b"cccc"]


@pytest.mark.parametrize(
    "tensor",
    [
        ("", "U8", (1,), b"x"),
        ("../x", "U8", (1,), b"x"),
        ("a", "Q8", (1,), b"x"),
        ("a", "F4", (1,), b"x"),
        ("a", "U8", (2,), b"x"),
    ],
)
def test_unwritable_tensors_leave_no_file(tmp_path, tensor):
    with pytest.raises(ValueError):
        write_tensors(tmp_path / "x.safetensors", [tensor])
    assert os.listdir(tmp_path) == []


def test_a_name_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="twice"):
        write_tensors(tmp_path / "x", [("a", "U8", (1,), b"x")] * 2)


def test_sizes_of_dtypes():
    assert {tensor_nbytes(dtype, (8, 2)) * 8 // 16 for dtype in DTYPE_BITS} <= set(
        DTYPE_BITS.values()
    )
    assert tensor_nbytes("F4", (3, 2)) == 3 and tensor_nbytes("F6_E2M3", (4,)) == 3
    for shape in [(1 << 62, 2), (0, 1 << 62, 4), (1 << 40, 1 << 40, 0)]:
        with pytest.raises(ValueError, match="too large"):
            tensor_nbytes("F32", shape)


def sharded(folder: Path) -> dict[str, np.ndarray]:
    arrays = sample()
    index: dict[str, str] = {}
    for number, names in enumerate((["a.weight", "scalar"], ["empty", "b/bytes"])):
        shard = f"model-{number}.safetensors"
        write(folder / shard, {name: arrays[name] for name in names})
        index |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return arrays


def test_sharded_checkpoints_read_as_one(tmp_path):
    arrays = sharded(tmp_path)
    found = {entry.name: bytes(data) for entry, data in read_checkpoint(tmp_path)}
    assert found == {name: array.tobytes() for name, array in arrays.items()}
    assert [e.name for e, _ in read_checkpoint(tmp_path, ["scalar", "none"])] == ["scalar"]


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../model-0.safetensors", "not a file of this folder"),
        ("/etc/passwd", "not a file of this folder"),
        ("sub/model.safetensors", "not a file of this folder"),
        ("model-0.bin", "not a file of this folder"),
        (7, "not a file of this folder"),
        ("model-9.safetensors", "does not say"),
        ("model-1.safetensors", "does not say"),
    ],
)
def test_bad_indexes_are_refused(tmp_path, shard, message):
    sharded(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["scalar"] = shard
    path.write_text(json.dumps(index))
    with pytest.raises(CorruptFileError, match=message):
        list(read_checkpoint(tmp_path))


def test_an_index_may_not_name_what_is_not_there(tmp_path):
    sharded(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = "model-0.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CorruptFileError, match="ghost"):
        list(read_checkpoint(tmp_path))


def test_linked_snapshots_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    write(tmp_path / "blobs" / "abc", sample())
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "blobs" / "abc")
    assert len(list(read_checkpoint(tmp_path / "model"))) == 4
