"""S5, S7-S9, S11 and S6 at rest: damaged or hostile packed folders are refused before use."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.disk.header import read_header
from chronos.common.errors import (
    ChronosError,
    ConfigError,
    CorruptClusterError,
    CorruptFileError,
    ShapeMismatch,
)
from chronos.common.layout import open_layout, pack, read_records, verify, write_experts
from chronos.common.model.config import ModelConfig
from chronos.common.model.weights import expert_tensors
from chronos.testing.faults import FaultyIO
from chronos.testing.tiny import tiny_model

SMALL = {"num_hidden_layers": 2, "num_experts": 4, "vocab_size": 300}
Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pack(tiny_model(folder / "src", **SMALL), folder / "packed")
    return folder / "packed"


@pytest.fixture
def packed(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "packed"))


def manifest_path(folder: Path) -> Path:
    return folder / "experts" / "cluster_manifest.json"


def cluster(folder: Path, number: int = 0) -> Path:
    return folder / "experts" / f"cluster-{number:05d}.ctsr"


def change(folder: Path, edit: Callable[[Manifest], object]) -> None:
    data = json.loads(manifest_path(folder).read_text())
    edit(data)
    manifest_path(folder).write_text(json.dumps(data))


def first(**fields: Any) -> Callable[[Manifest], object]:
    return lambda m: m["records"][0].update(fields)


def rename(name: str) -> Callable[[Manifest], object]:
    """The first cluster gets another name, in its records too."""

    def edit(m: Manifest) -> None:
        old, m["clusters"][0]["file"] = m["clusters"][0]["file"], name
        for record in m["records"]:
            if record["file"] == old:
                record["file"] = name

    return edit


def tensor(**fields: Any) -> Callable[[Manifest], object]:
    return lambda m: m["records"][0]["tensors"][1].update(fields)


EDITS: dict[str, Callable[[Manifest], object]] = {
    "parent folder": rename("../cluster-00000.ctsr"),
    "absolute path": rename("/etc/passwd.ctsr"),
    "sub folder": rename("sub/cluster-00000.ctsr"),
    "backslash": rename("..\\cluster-00000.ctsr"),
    "hidden": rename(".cluster.ctsr"),
    "other suffix": rename("cluster_manifest.json"),
    "NUL": rename("a\0.ctsr"),
    "name too long": rename("a" * 300 + ".ctsr"),
    "case collision": rename("CLUSTER-00001.ctsr"),
    "one file twice": rename("cluster-00001.ctsr"),
    "unknown file": first(file="cluster-00009.ctsr"),
    "record twice": lambda m: m["records"].append(m["records"][0]),
    "record in no cluster": lambda m: m["records"].pop(2),
    "no records": lambda m: m["records"].clear(),
    "layer out of range": first(layer=1 << 40),
    "negative expert": first(expert=-1),
    "expert beyond": first(expert=9),
    "boolean expert": first(expert=True),
    "float offset": first(offset=4096.0),
    "unaligned offset": first(offset=4097),
    "offset beyond the file": first(offset=1 << 40),
    "offset that wraps": first(offset=(1 << 64) - 4096),
    "overlap": lambda m: m["records"][0].update(offset=m["records"][1]["offset"]),
    "no bytes": first(nbytes=0),
    "unaligned size": first(nbytes=100),
    "size beyond the file": first(nbytes=1 << 40),
    "size too small": first(nbytes=4096),
    "digest too short": first(xxh3_128="00"),
    "digest not hexadecimal": first(xxh3_128="zz" * 16),
    "digest a number": first(xxh3_128=7),
    "no tensors": first(tensors=[]),
    "unknown record field": first(extra=1),
    "missing record field": lambda m: m["records"][0].pop("offset"),
    "record no object": lambda m: m["records"].append(7),
    "tensor twice": tensor(name="gate_up_proj"),
    "tensor name a path": tensor(name="../x"),
    "tensor dtype": tensor(dtype="Q4"),
    "tensor huge": tensor(shape=[1 << 40, 1 << 40]),
    "tensor negative": tensor(shape=[-1]),
    "tensor over another": tensor(offset=0),
    "tensor unaligned": tensor(offset=8001),
    "other format": lambda m: m.update(format="other"),
    "no version": lambda m: m.pop("version"),
    "old version": lambda m: m.update(version=1),
    "version a string": lambda m: m.update(version="2"),
    "unknown field": lambda m: m.update(extra=1),
    "clusters no list": lambda m: m.update(clusters={}),
    "negative cluster size": lambda m: m["clusters"][0].update(nbytes=-1),
}


@pytest.mark.parametrize("case", EDITS)
def test_s8_bad_manifests_are_refused_before_any_cluster_is_opened(packed, case):
    change(packed, EDITS[case])
    io = FaultyIO()
    with pytest.raises(CorruptClusterError, match="cluster_manifest"):
        open_layout(packed, io=io)
    assert io.opened == [str(manifest_path(packed))]


RAW = {
    "empty": b"",
    "not UTF-8": b"\xff\xfe{}",
    "not JSON": b"{",
    "a list": b"[]",
    "deep": b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "key twice": b'{"version":2,"version":2}',
    "infinity": b'{"version":Infinity}',
}


@pytest.mark.parametrize("case", RAW)
def test_s8_unreadable_manifests(packed, case):
    manifest_path(packed).write_bytes(RAW[case])
    with pytest.raises(CorruptClusterError, match="cluster_manifest"):
        open_layout(packed)


def test_s8_fifty_megabytes_of_manifest_are_not_read(packed):
    os.truncate(manifest_path(packed), 50 << 20)
    io = FaultyIO()
    with pytest.raises(CorruptFileError, match="52428800 bytes; at most"):
        open_layout(packed, io=io)
    assert io.reads == 0


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", ["manifest", "cluster"])
@pytest.mark.parametrize("kind", ["fifo", "link", "dangling link", "folder", "link to device"])
def test_s8_s9_only_regular_files_are_opened(packed, what, kind):
    path = manifest_path(packed) if what == "manifest" else cluster(packed)
    moved = path.with_name("moved")
    path.rename(moved)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        target = {"link": moved, "dangling link": "nowhere", "link to device": "/dev/zero"}[kind]
        path.symlink_to(target)
    with pytest.raises(CorruptFileError, match=path.name):
        open_layout(packed)


def test_s8_the_experts_folder_may_not_be_a_link(packed, tmp_path):
    (packed / "experts").rename(tmp_path / "elsewhere")
    (packed / "experts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptClusterError, match="symbolic link"):
        open_layout(packed)


def test_s9_a_missing_cluster_is_an_error_or_listed(packed):
    cluster(packed, 1).unlink()
    with pytest.raises(CorruptClusterError, match="cluster-00001.ctsr"):
        open_layout(packed)
    assert open_layout(packed, allow_missing=True).missing == {(1, e) for e in range(4)}


def test_s9_an_unreadable_cluster_is_named(packed, as_nobody):
    cluster(packed).chmod(0)
    run = as_nobody(
        packed,
        "from chronos.common.layout import open_layout\n"
        "from chronos.common.errors import ChronosError\n"
        "try:\n    open_layout(sys.argv[1])\n"
        "except ChronosError as error:\n    print(error, error.exit_code)\n",
    )
    assert "cluster-00000.ctsr cannot be opened: Permission denied" in run and run.endswith("3\n")


@pytest.mark.parametrize("part", range(0, 64, 3))
def test_s1_truncated_clusters(packed, part):
    path = cluster(packed)
    os.truncate(path, path.stat().st_size * part // 64)
    with pytest.raises(CorruptClusterError, match=r"cluster-00000\.ctsr.*wanted.*there"):
        open_layout(packed)


def test_clusters_of_another_size_are_refused(packed):
    change(packed, lambda m: m["clusters"][0].update(nbytes=m["clusters"][0]["nbytes"] + 4096))
    with pytest.raises(CorruptClusterError, match="bytes wanted|bytes there|wanted"):
        open_layout(packed)


def test_clusters_of_another_checkpoint_are_refused(packed, tmp_path):
    pack(tiny_model(tmp_path / "src", seed=9, **SMALL), tmp_path / "other")
    shutil.copy(cluster(tmp_path / "other"), cluster(packed))
    with pytest.raises(CorruptClusterError, match="another model"):
        open_layout(packed)


def test_dense_part_without_a_fingerprint_is_refused(packed, original):
    shutil.copy(original.parent / "src" / "model.safetensors", packed / "model.safetensors")
    with pytest.raises(CorruptClusterError, match="another model than model.safetensors"):
        open_layout(packed)


def test_swapped_experts_are_noticed(packed):
    """Names, shapes and sizes agree; only the place in the file does not."""

    def swap(m: Manifest) -> None:
        a, b = m["records"][:2]
        a["offset"], b["offset"] = b["offset"], a["offset"]

    change(packed, swap)
    with pytest.raises(CorruptClusterError, match=r"disagree about L0\.E0"):
        open_layout(packed)


def test_a_safetensors_file_is_no_cluster(packed):
    data = cluster(packed).read_bytes().replace(b'"format":"ctsr"', b'"format":"cats"')
    cluster(packed).write_bytes(data)
    with pytest.raises(CorruptClusterError, match="not a cluster"):
        open_layout(packed)


@pytest.mark.parametrize(
    "changes", [{"dtype": "bfloat16"}, {"moe_intermediate_size": 32}, {"hidden_size": 64}]
)
def test_s5_another_geometry_names_layer_and_expert(packed, tmp_path, changes):
    config = ModelConfig.from_json(tiny_model(tmp_path / "other", **(SMALL | changes)))
    with pytest.raises(ShapeMismatch, match="layer 0, expert 0: .*gate_up_proj.*implies"):
        open_layout(packed, config=config)


def test_s5_more_layers_or_experts_than_there_are(packed, tmp_path):
    config = ModelConfig.from_json(tiny_model(tmp_path / "a", **(SMALL | {"num_experts": 5})))
    with pytest.raises(ShapeMismatch, match="expert 4 of layer 0 is missing"):
        open_layout(packed, config=config)
    fewer = SMALL | {"num_hidden_layers": 1, "hybrid_pattern": ("mla",)}
    config = ModelConfig.from_json(tiny_model(tmp_path / "b", **fewer))
    with pytest.raises(ShapeMismatch, match="expert 0 of layer 1 is not in the config"):
        open_layout(packed, config=config)


def test_s6_every_flipped_byte_of_a_record_is_found(packed):
    """200 seeds; the same folder, one byte at a time, flipped and flipped back."""
    layout = open_layout(packed)
    start = read_header(cluster(packed)).data_start
    size = cluster(packed).stat().st_size
    for seed in range(200):
        number = seed % len(layout.files)
        position = random.Random(seed).randrange(start, size)
        with cluster(packed, number).open("r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ (1 << seed % 8)]))
        key = next(
            key for key, r in layout.records.items()
            if key[0] == number and r.offset <= position < r.offset + r.nbytes
        )  # fmt: skip
        with pytest.raises(CorruptClusterError, match=f"layer {key[0]}, expert {key[1]}"):
            list(read_records([(layout.path(k), r) for k, r in layout.records.items()]))
        with cluster(packed, number).open("r+b") as file:
            file.seek(position)
            file.write(bytes([byte]))
    assert verify(packed).problems == []


def test_s6_flips_anywhere_never_raise_anything_unnamed(packed):
    paths = [cluster(packed), manifest_path(packed), packed / "model.safetensors"]
    for seed in range(120):
        path, chance = paths[seed % 3], random.Random(seed)
        data = path.read_bytes()
        position = chance.randrange(min(len(data), 2_000))
        wrong = bytearray(data)
        wrong[position] ^= 1 << chance.randrange(8)
        path.write_bytes(wrong)
        try:
            verify(packed)
        except ChronosError as error:
            assert error.exit_code == 3 and str(error)
        path.write_bytes(data)


def test_s6_problems_can_be_collected(packed):
    for key in [(0, 1), (1, 3)]:
        record = open_layout(packed).records[key]
        with cluster(packed, key[0]).open("r+b") as file:
            file.seek(record.offset + 5)
            file.write(b"\x55\x55\x55")
    report = verify(packed, collect=True)
    assert len(report.problems) == 2 and report.records == 6
    first, second = (problem["where"] for problem in report.problems)
    assert "layer 0, expert 1" in first and "layer 1, expert 3" in second


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_s7_one_poisoned_expert_is_named(packed, tmp_path, value):
    config = ModelConfig.from_json(packed)
    random_ = np.random.default_rng(0)
    order = [[(layer, e) for e in range(4)] for layer in range(2)]

    def source(keys):
        for key in keys:
            data = {
                s.name: random_.standard_normal(s.shape, np.float32) for s in expert_tensors(config)
            }
            if key == (1, 2):
                data["down_proj"][3, 4] = value
            yield key, data

    shutil.rmtree(packed / "experts")
    fingerprint = read_header(packed / "model.safetensors").metadata["chronos_fingerprint"]
    write_experts(
        packed, order, expert_tensors(config), source, fingerprint=fingerprint, finite=False
    )
    with pytest.raises(CorruptFileError, match="layer 1, expert 2: down_proj: element 76 is NaN"):
        verify(packed)
    with pytest.raises(CorruptFileError, match="layer 1, expert 2: down_proj"):
        pack(packed, tmp_path / "again")


def test_s11_newer_formats_say_so(packed):
    change(packed, lambda m: m.update(version=4))
    with pytest.raises(CorruptClusterError, match="newer Chronos .version 4.*upgrade"):
        open_layout(packed)


def test_s11_newer_cluster_files_say_so(packed):
    data = cluster(packed).read_bytes().replace(b'"version":"1"', b'"version":"7"')
    cluster(packed).write_bytes(data)
    with pytest.raises(CorruptClusterError, match="version 7 .*upgrade"):
        open_layout(packed)


def test_a_folder_that_is_not_packed_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="chronos pack"):
        open_layout(tmp_path)


@pytest.fixture
def as_nobody(tmp_path):
    """Run a script on a folder without root's rights; returns what it printed."""

    def run(folder: Path, script: str) -> str:
        for parent in [folder, *folder.parents]:
            if parent.stat().st_uid == os.getuid() and parent != Path("/"):
                os.chmod(parent, 0o755)
        drop = "import os, sys\nif os.getuid() == 0:\n    os.setgid(65534); os.setuid(65534)\n"
        done = subprocess.run(
            [sys.executable, "-c", "import chronos.common.layout\n" + drop + script, str(folder)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
