"""Damaged and hostile trace files: refused by name, without running or allocating anything (X1)."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.errors import DataError, UsageError
from chronos.common.traces.trace import RoutingTrace

META = '{"model": "m", "num_experts": 8, "top_k": 2, "phase": "generation"}'


def arrays() -> dict[str, Any]:
    return {
        "ids": np.tile(np.array([3, 5], np.uint8), (4, 2, 1)),
        "weights": np.full((4, 2, 2), 0.5, np.float16),
        "seq": np.zeros(4, np.int32),
        "meta": np.array(META),
    }


def write(path: Path, members: dict[str, Any]) -> Path:
    np.savez_compressed(path, allow_pickle=True, **members)
    return path


def refused(path: Path, says: str = ".") -> None:
    with pytest.raises(DataError, match=says) as caught:
        RoutingTrace.load(path)
    assert caught.value.where == str(path)


class Canary:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT)


def test_the_undamaged_file_loads(tmp_path: Path) -> None:
    assert RoutingTrace.load(write(tmp_path / "t.npz", arrays())).num_tokens == 4


@pytest.mark.parametrize("name", ["ids", "weights", "seq", "meta"])
def test_object_arrays_are_refused_and_never_unpickled(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    hostile = np.empty((), object)
    hostile[()] = Canary(canary)
    refused(write(tmp_path / "t.npz", arrays() | {name: hostile}), "refused")
    assert not canary.exists()


def test_a_bare_pickle_is_no_archive(tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "t.npz"
    path.write_bytes(pickle.dumps(Canary(canary)))
    refused(path)
    assert not canary.exists()


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "t.npz", arrays()).read_bytes()
    path = tmp_path / "cut.npz"
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        refused(path)


def test_a_flipped_byte_is_an_error_or_no_change(tmp_path: Path) -> None:
    """Archive fields nobody reads (times, attributes) may change; values may not."""
    whole = bytearray(write(tmp_path / "t.npz", arrays()).read_bytes())
    path = tmp_path / "flipped.npz"
    expected = RoutingTrace.load(tmp_path / "t.npz")
    for at in range(0, len(whole), 5):
        flipped = bytearray(whole)
        flipped[at] ^= 0x55
        path.write_bytes(flipped)
        try:
            trace = RoutingTrace.load(path)
        except DataError:
            continue
        np.testing.assert_array_equal(trace.ids_TLK, expected.ids_TLK)
        np.testing.assert_array_equal(trace.seq_T, expected.seq_T)
        assert trace.meta == expected.meta


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ids": np.full((4, 2, 2), [3, 8], np.uint8)}, "8 experts"),
        ({"ids": np.full((4, 2, 2), 3, np.uint8)}, "one expert twice"),
        ({"ids": np.zeros((4, 2), np.uint8)}, "tokens, layers, k"),
        ({"ids": np.zeros((4, 2, 2), ">u2")}, "uint8 or uint16"),
        ({"ids": np.asfortranarray(np.tile(np.array([3, 5], np.uint8), (4, 2, 1)))}, "row-major"),
        ({"seq": np.array([0, 1, 1, 0], np.int32)}, "not contiguous"),
        ({"seq": np.zeros(3, np.int32)}, "seq must be"),
        ({"weights": np.full((4, 2, 2), np.inf, np.float16)}, "infinity"),
        ({"weights": np.zeros((4, 2, 2), complex)}, "refused"),
        ({"meta": np.array("{")}, "not a readable"),
        ({"meta": np.array("[" * 3000 + "]" * 3000)}, "not a"),
        ({"meta": np.array("[1]")}, "not a JSON object"),
        ({"meta": np.array(7)}, "not a JSON object"),
        ({"meta": np.array(META.replace("8", "1e9"))}, "num_experts"),
        ({"more": np.zeros(1)}, "'more'"),
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    refused(write(tmp_path / "t.npz", arrays() | change), says)


@pytest.mark.parametrize("name", ["ids", "seq", "meta"])
def test_a_missing_array_is_named(tmp_path: Path, name: str) -> None:
    members = arrays()
    del members[name]
    refused(write(tmp_path / "t.npz", members), name)


def header_for(shape: str, descr: str = "|u1") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "member",
    [
        header_for("(1000000000000, 24, 4)"),
        header_for("(18446744073709551616, 1, 1)"),
        header_for("(-4, -4, 1)") + bytes(16),
        header_for("(4, 2, 2)") + bytes(15),
        header_for("(4, 2, 2)") + bytes(17),
        header_for("(True, 2, 2)") + bytes(4),
        header_for("(0, 2, 2)", "<U0"),
        header_for("(4, 2, 2)", "nonsense"),
        header_for("(" * 4000),
        b"\x93NUMPY\x09\x00" + bytes(100),
        b"",
    ],
)
def test_a_header_that_lies_is_refused_before_allocating(tmp_path: Path, member: bytes) -> None:
    path = write(tmp_path / "t.npz", {k: v for k, v in arrays().items() if k != "ids"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("ids.npy", member)
    refused(path)


def test_an_array_named_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.npz", arrays())
    other = io.BytesIO()
    np.save(other, np.zeros(4, np.int32))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("seq.npy", other.getvalue())
    refused(path, "twice")


def test_no_file_a_folder_and_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such trace"):
        RoutingTrace.load(tmp_path / "absent.npz")
    refused(tmp_path)
    (tmp_path / "t.npz").touch()
    refused(tmp_path / "t.npz")
