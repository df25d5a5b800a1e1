"""Tensor files: what is written is read back, here and by the safetensors library."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import deserialize

from chronos.common.disk import tensors
from chronos.common.disk.header import DTYPE_BITS, read_header, tensor_nbytes
from chronos.common.disk.tensors import (
    first_dtype,
    locate_tensors,
    read_checkpoint,
    read_tensors,
    write_tensors,
)
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
    monkeypatch.setattr(tensors, "_EXTENT", 10_000)
    monkeypatch.setattr(tensors, "_AHEAD", 20_000)
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
        ("model-9.safetensors", r"names model-9.safetensors, which is not there \(tensor scalar\)"),
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


@pytest.mark.parametrize("change", [{"scalar": "model-1.safetensors"}, {"scalar": None}])
def test_a_tensor_that_the_index_has_elsewhere_or_not_at_all_is_found(tmp_path, change):
    """Transformers opens the shards that are named, and takes what is in them."""
    arrays = sharded(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    weights = json.loads(path.read_text())["weight_map"] | change
    weights = {name: shard for name, shard in weights.items() if shard}
    path.write_text(json.dumps({"weight_map": weights}))
    assert {e.name for e, _ in read_checkpoint(tmp_path)} == arrays.keys()


def overlay(folder: Path, shard: str) -> None:
    """Another `scalar`, in a shard of its own that the index names."""
    sharded(folder)
    write(folder / shard, {"scalar": np.array(7.0, np.float32)})
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["scalar"] = shard
    path.write_text(json.dumps(index))


def test_of_two_copies_the_index_decides(tmp_path):
    overlay(tmp_path, "model-overlay.safetensors")
    (found,) = [bytes(data) for _, data in read_checkpoint(tmp_path, ["scalar"])]
    assert np.frombuffer(found, np.float32) == [7.0]


def test_where_libraries_would_take_the_other_copy_it_is_refused(tmp_path):
    overlay(tmp_path, "a-fix.safetensors")  # read before the stale one, which would win
    with pytest.raises(CorruptFileError, match="'scalar', and so does a-fix") as caught:
        list(read_checkpoint(tmp_path))
    assert "out of date" in caught.value.fix


def test_shards_without_an_index_are_those_that_mlx_lm_finds(tmp_path):
    arrays = sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    write(tmp_path / "other.safetensors", {"other": arrays["scalar"]})
    assert {e.name for e, _ in read_checkpoint(tmp_path)} == arrays.keys()
    write(tmp_path / "model-2.safetensors", {"scalar": arrays["scalar"]})
    with pytest.raises(CorruptFileError, match="'scalar', and so does model-0.safetensors"):
        list(read_checkpoint(tmp_path))


def test_a_missing_index_of_missing_shards(tmp_path):
    write(tmp_path / "model-00001-of-00003.safetensors", {"a": np.zeros(2, np.float32)})
    with pytest.raises(CorruptFileError, match="index.json is missing, and so is model-00002-of"):
        list(read_checkpoint(tmp_path))


def test_a_shard_may_be_absent_if_nothing_of_it_is_used(tmp_path):
    arrays = sharded(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    found = locate_tensors(tmp_path, unused=lambda names: {"empty", "b/bytes"} & set(names))
    assert found.keys() == {"a.weight", "scalar"} < arrays.keys()
    for unused in (None, lambda names: {"empty"}):
        with pytest.raises(CorruptFileError, match="model-1.safetensors, which is not there"):
            locate_tensors(tmp_path, unused=unused)


@pytest.mark.parametrize(
    ("metadata", "order", "dtype"),
    [
        ({}, ("b", "a"), "F16"),  # in order of names; integers and FP8 do not count
        ({"dtype": "bfloat16"}, ("b", "a"), "bfloat16"),
        ({"dtype": "torch.float16"}, ("b", "a"), "float16"),
    ],
)
def test_the_dtype_of_a_checkpoint_that_names_none(tmp_path, metadata, order, dtype):
    kinds = {"a": "F16", "b": "F32", "A.ids": "I64", "A.small": "F8_E4M3"}
    items = [(name, kinds[name], (2,), bytes(16)) for name in ("b", "a", "A.ids", "A.small")]
    items = [(n, k, s, d[: tensor_nbytes(k, s)]) for n, k, s, d in items]
    write_tensors(tmp_path / "model-1.safetensors", items)
    write_tensors(tmp_path / "model-2.safetensors", [("0", "F32", (1,), bytes(4))])
    weights = dict.fromkeys(kinds, "model-1.safetensors") | {"0": "model-2.safetensors"}
    index = {"metadata": metadata, "weight_map": weights}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert first_dtype(tmp_path) == dtype


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
