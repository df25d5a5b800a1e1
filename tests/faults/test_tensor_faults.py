"""S1-S4: damaged and hostile safetensors files are refused by name, without allocating.

Oracle: whatever our check lets through, the safetensors library reads too, and alike.
"""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from chronos.common.disk.header import parse_header, read_header
from chronos.common.disk.tensors import read_tensors, write_tensors
from chronos.common.errors import CorruptClusterError, CorruptFileError

QUIET = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def file_bytes(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.fixture
def healthy(tmp_path) -> Path:
    path = tmp_path / "cluster.ctsr"
    blob = random.Random(0).randbytes(14_000)
    write_tensors(path, [(f"t{i}", "BF16", (1_000, 7), blob) for i in range(4)])
    return path


@pytest.mark.parametrize("part", range(64))
def test_s1_truncation_is_named_with_both_sizes(healthy, part):
    size = healthy.stat().st_size
    os.truncate(healthy, size * part // 64)
    with pytest.raises(CorruptClusterError, match=r"cluster\.ctsr.*wanted.*there"):
        list(read_tensors(healthy))


@pytest.mark.parametrize(("more", "words"), [(-1, "is cut short"), (1, "goes on after its last")])
def test_s1_data_of_another_length_is_no_fault_of_the_header(healthy, more, words):
    os.truncate(healthy, healthy.stat().st_size + more)
    with pytest.raises(CorruptClusterError, match=words) as caught:
        read_header(healthy)
    assert "download" in caught.value.fix and "header" not in caught.value.what


@pytest.mark.parametrize("size", range(8))
def test_s1_less_than_a_length_field(tmp_path, size):
    (tmp_path / "x.safetensors").write_bytes(bytes(size))
    with pytest.raises(CorruptFileError, match=f"8 bytes wanted .* {size} bytes there"):
        read_header(tmp_path / "x.safetensors")


LIES = [1 << 63, (1 << 64) - 1, 100_000_001, 100_000_000, 99_000_000, 65, 57]


@pytest.mark.parametrize("length", LIES)
def test_s2_length_fields_beyond_the_file(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{" + b" " * 55)
    with pytest.raises(CorruptFileError):
        read_header(path)


def test_s2_nothing_is_allocated_for_them(tmp_path):
    """The address space is capped just above what is in use: 99 MB would not fit."""
    for number, length in enumerate(LIES):
        (tmp_path / f"{number}").write_bytes(struct.pack("<Q", length) + b"{" + b" " * 55)
    script = """
import resource, sys
from chronos.common.errors import CorruptFileError
from chronos.common.disk.header import read_header
def refuse(path):
    try:
        read_header(path)
    except CorruptFileError:
        return
    sys.exit("accepted " + path)
refuse(sys.argv[1])
used = next(int(line.split()[1]) for line in open("/proc/self/status") if "VmSize" in line)
resource.setrlimit(resource.RLIMIT_AS, ((used + 8192) * 1024,) * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    refuse(path)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
sys.exit(f"{grown} KiB more") if grown > 1024 else None
"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc to know how much address space is in use")
    paths = [str(tmp_path / str(number)) for number in range(len(LIES))]
    run = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def one(dtype: object = "F32", shape: object = (1,), span: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


BAD_HEADERS = {
    "overlap": {"a": one(), "b": one(span=[2, 6])},
    "same bytes twice": {"a": one(), "b": one()},
    "hole": {"a": one(), "b": one(span=[8, 12])},
    "hole at the start": {"a": one(span=[4, 8])},
    "trailing bytes": {"a": one(span=[0, 4])},
    "beyond the end": {"a": one(shape=[4], span=[0, 16])},
    "backwards": {"a": one(shape=[3], span=[12, 0])},
    "negative size": {"a": one(shape=[-1])},
    "negative offset": {"a": one(span=[-4, 0])},
    "wrapping shape": {"a": one(shape=[1 << 32, 1 << 32], span=[0, 0])},
    "wrapping to fit": {"a": one("U8", [(1 << 62) + 3, 4], [0, 12])},
    "huge with a zero": {"a": one(shape=[1 << 70, 0], span=[0, 0])},
    "float shape": {"a": one(shape=[3.0], span=[0, 12])},
    "bool shape": {"a": one(shape=[True], span=[0, 4])},
    "shape is no list": {"a": one(shape=3, span=[0, 12])},
    "three offsets": {"a": one(shape=[3], span=[0, 4, 12])},
    "offsets do not match": {"a": one(shape=[2], span=[0, 12])},
    "unknown dtype": {"a": one("F12", [3], [0, 12])},
    "dtype is no string": {"a": one(7, [3], [0, 12])},
    "half a byte": {"a": one("F4", [23], [0, 12])},
    "unknown field": {"a": one(shape=[3], span=[0, 12]) | {"x": 1}},
    "missing field": {"a": {"dtype": "F32", "shape": [3]}},
    "tensor is no object": {"a": [0, 12]},
    "metadata number": {"__metadata__": {"x": 1}, "a": one(shape=[3], span=[0, 12])},
    "metadata list": {"__metadata__": ["x"], "a": one(shape=[3], span=[0, 12])},
    "path as a name": {"../../x": one(shape=[3], span=[0, 12])},
    "root as a name": {"/x": one(shape=[3], span=[0, 12])},
    "control character": {"a\u001b[2J": one(shape=[3], span=[0, 12])},
    "empty name": {"": one(shape=[3], span=[0, 12])},
    "lone surrogate": {"\ud800": one(shape=[3], span=[0, 12])},
}
GOOD = json.dumps({"a": one(shape=[3], span=[0, 12])}).encode()
BAD_JSON = {
    "key twice": GOOD[:-1] + b"," + GOOD[1:],
    "dtype twice": GOOD.replace(b'"dtype"', b'"dtype":"F32","dtype"'),
    "not UTF-8": GOOD.replace(b'"a"', b'"\xff"'),
    "cut": GOOD[:-1],
    "comment": GOOD + b"//",
    "leading space": b" " + GOOD,
    "byte order mark": b"\xef\xbb\xbf" + GOOD,
    "a list": b"[]",
    "NaN": GOOD.replace(b"[3]", b"[NaN]"),
    "minus zero": GOOD.replace(b"[3]", b"[3,-0]"),
    "long number": GOOD.replace(b"[3]", b"[" + b"9" * 5_000 + b"]"),
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "NUL": GOOD.replace(b'"a"', b'"a\x00"'),
    "empty": b"",
}


@pytest.mark.parametrize("case", [*BAD_HEADERS, *BAD_JSON])
def test_s3_s4_bad_headers_are_refused(tmp_path, case):
    raw = BAD_JSON[case] if case in BAD_JSON else json.dumps(BAD_HEADERS[case]).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(file_bytes(raw, bytes(12)))
    with pytest.raises(CorruptFileError, match=r"bad\.safetensors"):
        read_header(path)


def test_the_header_those_are_made_from_is_fine():
    raw = GOOD + b"   "
    assert list(parse_header(raw, 8 + len(raw) + 12).entries) == ["a"]


def test_metadata_may_be_null():
    """MLX writes it so where it was given none, and the library reads it."""
    raw = b'{"__metadata__":null,' + GOOD[1:]
    assert parse_header(raw, 8 + len(raw) + 12).metadata == {}


numbers = st.one_of(
    st.integers(-2, 40), st.sampled_from([1 << 31, 1 << 32, 1 << 62, 1 << 63, 1 << 64, 1.0, True])
)
# Beside a 0 the library lets these through; no array library has such a shape.
STRICTER = {1 << 62, 1 << 63}
tensor = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "F8_E4M3", "C64", "Q4", "f32", None]),
        "shape": st.lists(numbers, max_size=3),
        "data_offsets": st.lists(numbers, min_size=1, max_size=3),
    },
    optional={"extra": st.integers()},
)
names = st.one_of(st.sampled_from(["a", "b", "c", "../x", "__metadata__"]), st.text(max_size=4))
headers = st.dictionaries(names, st.one_of(tensor, tensor, st.none()), max_size=4)


@QUIET
@given(headers, st.integers(0, 200), st.binary(max_size=3))
def test_s3_what_we_accept_the_library_reads_alike(header, nbytes, tail):
    agree(json.dumps(header).encode() + tail, bytes(nbytes))


@st.composite
def nearly_valid(draw) -> tuple[bytes, bytes]:
    """A valid header of up to four tensors with at most one thing changed."""
    bits = {"F32": 32, "BF16": 16, "U8": 8, "F4": 4, "I64": 64}
    fields, position = {}, 0
    for name in draw(st.lists(st.sampled_from("abcd"), unique=True, max_size=4)):
        dtype = draw(st.sampled_from(sorted(bits)))
        shape = [2, *draw(st.lists(st.integers(0, 3), max_size=2))]
        count = 1
        for size in shape:
            count *= size
        end = position + count * bits[dtype] // 8
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    if fields and draw(st.booleans()):
        victim = fields[draw(st.sampled_from(sorted(fields)))]
        where = draw(st.sampled_from(["shape", "data_offsets"]))
        index = draw(st.integers(0, len(victim[where]) - 1))
        victim[where][index] = draw(numbers.filter(lambda n: n not in STRICTER))
    raw = json.dumps(fields).encode() + b" " * draw(st.integers(0, 9))
    return raw, bytes(max(0, position + draw(st.sampled_from([0, 0, 0, -1, 1]))))


@QUIET
@given(nearly_valid())
def test_s3_nearly_valid_files_are_judged_as_the_library_does(case):
    raw, data = case
    assert agree(raw, data) == library_accepts(raw, data)


def library_accepts(raw: bytes, data: bytes) -> bool:
    try:
        deserialize(file_bytes(raw, data))
    except SafetensorError:
        return False
    return True


def agree(raw: bytes, data: bytes) -> bool:
    """Whether we accept; then the library must too, with the same tensors."""
    try:
        ours = parse_header(raw, 8 + len(raw) + len(data)).entries
    except CorruptFileError:
        return False
    theirs = dict(deserialize(file_bytes(raw, data)))
    assert ours.keys() == theirs.keys()
    for name, entry in ours.items():
        assert list(entry.shape) == theirs[name]["shape"] and entry.dtype == theirs[name]["dtype"]
        assert entry.nbytes == len(theirs[name]["data"])
    return True


@QUIET
@given(st.binary(max_size=80))
def test_s4_random_bytes_never_raise_anything_else(raw):
    for header in (raw, b"{" + raw, b'{"a":' + raw + b"}"):
        agree(header, b"")


@QUIET
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_s4_any_single_wrong_byte_is_judged_safely(position, value):
    agree(GOOD[:position] + bytes([value]) + GOOD[position + 1 :], bytes(12))
