"""Our streaming reader and writer beside the safetensors library, by mmap and by pread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from chronos.common.disk.header import read_whole
from chronos.common.disk.tensors import read_tensors, write_tensors
from chronos.common.errors import CorruptFileError
from chronos.common.experts.foresight.params import read_params, write_params

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I32": "<i4", "U16": "<u2", "U8": "u1"}
ARRAYS = {
    name: np.random.default_rng(number).integers(0, 99, (3, 5, number)).astype(dtype)
    for number, (name, dtype) in enumerate(DTYPES.items())  # the first holds nothing
}
PARAMS = {name: ARRAYS[name] for name in ("F32", "U16", "U8")}


def opened(path: Path, backend: str) -> dict[str, Any]:
    try:
        file = safe_open(path, "np", backend=backend)
    except TypeError:
        pytest.skip("this version of safetensors has one way to read")
    with file:
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_what_we_write_the_library_reads(tmp_path: Path, backend: str) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, [(n, n, a.shape, a.tobytes()) for n, a in ARRAYS.items()], {"by": "us"})
    found = opened(path, backend)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_what_it_writes_we_read_as_it_does(tmp_path: Path, backend: str) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(save(ARRAYS, {"by": "the library"}))
    ours = {entry.name: bytes(view) for entry, view in read_tensors(path)}
    theirs = {name: array.tobytes() for name, array in opened(path, backend).items()}
    assert ours == theirs


def test_side_files_are_read_by_both(tmp_path: Path) -> None:
    path = tmp_path / "side.safetensors"
    write_params(path, PARAMS, {"format": "a side file"})
    for found in (read_params(path), opened(path, "mmap")):
        assert found.keys() == PARAMS.keys()
        assert all(np.array_equal(found[name], array) for name, array in PARAMS.items())
        assert all(found[name].dtype == array.dtype for name, array in PARAMS.items())


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_a_file_cut_short_is_refused_by_all(tmp_path: Path, backend: str) -> None:
    path = tmp_path / "t.safetensors"
    whole = save(ARRAYS)
    for size in (0, 7, 8, 60, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptFileError, match=r"t\.safetensors"):
            read_whole(path, 1 << 20)
        with pytest.raises(SafetensorError):
            opened(path, backend)


def test_the_library_lets_pass_what_a_side_file_may_not_have(tmp_path: Path) -> None:
    """So the strict check stands before it: a key that is there twice, a name like a path."""
    path, array = tmp_path / "t.safetensors", np.zeros(1, np.float32)
    named = save({"../x": array})
    twice = save({"ab": array, "cd": array}).replace(b'"cd"', b'"ab"')
    for raw in (named, twice):
        path.write_bytes(raw)
        with pytest.raises(CorruptFileError):
            read_whole(path, 1 << 20)
    path.write_bytes(named)
    assert list(opened(path, "mmap")) == ["../x"]


def test_a_side_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(save(PARAMS))
    with pytest.raises(CorruptFileError, match="at most 64"):
        read_whole(path, 64)
