"""Packing, opening, verifying and inspecting a model folder, and the writer of packed experts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import deserialize

from chronos.common.disk.header import DTYPE_BITS, read_header
from chronos.common.disk.tensors import read_tensors, write_tensors
from chronos.common.errors import ConfigError, CorruptFileError, ShapeMismatch, UsageError
from chronos.common.layout import (
    inspect,
    is_packed,
    open_layout,
    pack,
    read_records,
    verify,
    write_experts,
)
from chronos.common.layout.finite import first_nonfinite
from chronos.common.model.config import ModelConfig
from chronos.common.model.weights import TensorSpec, expert_name
from chronos.testing.tiny import tiny_model

SMALL = {"num_hidden_layers": 2, "num_experts": 4, "vocab_size": 300}


pytestmark = pytest.mark.usefixtures("no_flushing")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "unpacked", **SMALL)


@pytest.fixture(scope="module")
def packed(source) -> Path:
    pack(source, source.with_name("packed"))
    return source.with_name("packed")


def tensors(path: Path) -> dict[str, bytes]:
    return {entry.name: bytes(data) for entry, data in read_tensors(path)}


def rewrite(path: Path, change) -> None:
    """Write a tensor file again after `change(dict of name: [dtype, shape, bytes])`."""
    header = read_header(path)
    items = {e.name: [e.dtype, e.shape, bytes(data)] for e, data in read_tensors(path)}
    change(items)
    write_tensors(path, ((name, *item) for name, item in items.items()), header.metadata)


def test_every_expert_arrives_whole(source, packed):
    original = tensors(source / "model.safetensors")
    layout = open_layout(packed, config=ModelConfig.from_json(packed))
    assert (layout.num_layers, layout.num_experts, layout.moe_layers) == (2, 4, (0, 1))
    assert layout.total_bytes == 8 * layout.record_nbytes
    found = read_records([(layout.path(key), record) for key, record in layout.records.items()])
    for record, data in found:
        assert record.offset % 4096 == 0 and record.nbytes % 4096 == 0
        for tensor in record.tensors:
            assert tensor.offset % 64 == 0
            name = expert_name(*record.key, tensor.name)
            assert bytes(record.views(data)[tensor.name]) == original.pop(name)
    assert tensors(packed / "model.safetensors") == original
    assert is_packed(packed) and not is_packed(source)


def test_cluster_files_are_plain_safetensors(source, packed):
    original = tensors(source / "model.safetensors")
    for layer, path in enumerate(open_layout(packed).files):
        found = dict(deserialize(path.read_bytes()))
        for expert in range(4):
            value = found[f"L{layer}.E{expert}.down_proj"]
            assert bytes(value["data"]) == original[expert_name(layer, expert, "down_proj")]


def test_side_files_travel_and_the_source_stays(source, packed):
    for name in ("config.json", "tokenizer.json", "lookahead.safetensors"):
        assert (packed / name).read_bytes() == (source / name).read_bytes()
    assert sorted(os.listdir(packed)) == sorted([*os.listdir(source), "experts"])


def test_packing_twice_is_idempotent_and_another_order_is_refused(source, packed):
    before = {p: p.stat().st_mtime_ns for p in packed.rglob("*")}
    report = pack(source, packed)
    assert report.reused_clusters == report.clusters == 2 and report.records == 8
    assert before == {p: p.stat().st_mtime_ns for p in packed.rglob("*")}
    with pytest.raises(UsageError, match="already holds"):
        pack(source, packed, order=[[(layer, e) for e in range(4) for layer in range(2)]])
    with pytest.raises(UsageError, match="same folder"):
        pack(source, source)


def test_clusters_in_any_order_from_either_form(source, packed, tmp_path):
    keys = [(layer, expert) for expert in range(4) for layer in range(2)]
    order = [keys[:3], keys[3:4], keys[4:]]
    steps: list[tuple[int, int]] = []
    pack(
        source,
        tmp_path / "a",
        order=order,
        how={"method": "why"},
        progress=lambda *s: steps.append(s),
    )
    pack(packed, tmp_path / "b", order=order)
    a, b = open_layout(tmp_path / "a"), open_layout(tmp_path / "b")
    assert (
        a.records == b.records and a.fingerprint == b.fingerprint == open_layout(packed).fingerprint
    )
    assert [len([r for r in a.records.values() if r.file == f.name]) for f in a.files] == [3, 1, 4]
    assert a.manifest.order == {"method": "why"}
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]


@pytest.mark.parametrize(
    "order",
    ["random", [[(0, 0)]], [[(0, e) for e in range(4)] + [(1, e) for e in (0, 1, 2, 2)]]],
)
def test_orders_must_hold_every_expert_once(source, tmp_path, order):
    with pytest.raises(UsageError):
        pack(source, tmp_path / "x", order=order)
    assert not (tmp_path / "x").exists()


def test_a_model_without_experts_is_refused(tmp_path):
    counts = {"vocab_size": 8, "max_position_embeddings": 8, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **counts}))
    with pytest.raises(ConfigError, match="no routed experts"):
        pack(tmp_path, tmp_path / "x")


@pytest.mark.parametrize("name", ["model.norm.weight", expert_name(1, 2, "down_proj")])
@pytest.mark.parametrize("fault", ["shape", "dtype", "missing", "nan"])
def test_pack_refuses_wrong_tensors_by_name(tmp_path, name, fault):
    source = tiny_model(tmp_path / "src", **SMALL)

    def change(items):
        item = items[name]
        if fault == "shape":
            item[1] = item[1][::-1] if len(item[1]) > 1 else (*item[1], 1)
        elif fault == "dtype":
            item[0] = "I32"
        elif fault == "missing":
            del items[name]
        else:
            item[2] = item[2][:-4] + np.float32("nan").tobytes()

    rewrite(source / "model.safetensors", change)
    with pytest.raises((ShapeMismatch, CorruptFileError)) as caught:
        pack(source, tmp_path / "dst")
    assert name in str(caught.value) or "layer 1, expert 2: down_proj" in str(caught.value)
    assert not is_packed(tmp_path / "dst")
    with pytest.raises((ShapeMismatch, CorruptFileError)):
        verify(source)


def test_pack_refuses_tensors_nobody_asked_for(tmp_path):
    source = tiny_model(tmp_path / "src", **SMALL)
    rewrite(source / "model.safetensors", lambda items: items.update(odd=["U8", (1,), b"x"]))
    with pytest.raises(ShapeMismatch, match="odd"):
        pack(source, tmp_path / "dst")


def test_the_fingerprint_tells_checkpoints_apart(source, packed, tmp_path):
    other = pack(tiny_model(tmp_path / "other", seed=1, **SMALL), tmp_path / "dst")
    assert other.fingerprint != open_layout(packed).fingerprint
    with pytest.raises(CorruptFileError, match="another model"):
        open_layout(packed, fingerprint=other.fingerprint)
    (tmp_path / "dst" / "model.safetensors").write_bytes(
        (packed / "model.safetensors").read_bytes()
    )
    with pytest.raises(CorruptFileError, match="another model"):
        open_layout(tmp_path / "dst")


def test_verify_reads_everything(source, packed):
    seen: list[tuple[int, int]] = []
    report = verify(packed, progress=lambda *step: seen.append(step))
    assert (
        report.records == 8 and report.problems == [] and seen[-1] == (report.bytes, report.bytes)
    )
    assert verify(source).tensors == report.tensors + 16
    assert verify(open_layout(packed).files[0]).records == 4
    json.dumps(report.to_json())


def test_inspect_reads_headers_only(source, packed):
    data = inspect(packed)
    assert data["kind"] == "packed" and data["clusters"] == 2 and data["order"] == "layer"
    assert data["expert_bytes_total"] == 8 * data["expert_bytes"]
    assert [held["budget"] for held in data["budgets"]] == ["12.5%", "25.0%", "50.0%"]
    assert data["budgets"][1] == {
        "budget": "25.0%",
        "bytes": 2 * data["expert_bytes"],
        "experts": 2,
        "experts_per_layer": 1.0,
        "enough": True,
        "least_bytes": data["experts_per_token"] * data["expert_bytes"],
    }
    assert inspect(source)["kind"] == "unpacked"
    assert inspect(open_layout(packed).files[1])["metadata.layers"] == "1"
    json.dumps(data)
    with pytest.raises(UsageError):
        inspect(packed / "nothing")


def test_write_experts_takes_any_source_within_bounded_memory(tmp_path):
    specs = [
        TensorSpec("gate_up_proj", (6, 5), "bfloat16"),
        TensorSpec("down_proj", (5, 3), "float16"),
    ]
    random = np.random.default_rng(0)
    asked = []

    def source(keys):
        for key in keys:
            asked.append(key)
            yield key, {spec.name: random.bytes(spec.nbytes) for spec in specs}

    clusters = [[(layer, e) for e in range(3)] for layer in (1, 3)]
    written = write_experts(tmp_path, clusters, specs, source, fingerprint="random", finite=False)
    layout = open_layout(tmp_path, fingerprint="random")
    assert layout.moe_layers == (1, 3) and layout.num_layers == 4 and layout.num_experts == 3
    assert layout.records == written.manifest.records and asked == sum(clusters, [])
    again = write_experts(tmp_path, clusters, specs, source, fingerprint="random", finite=False)
    assert again.reused == 2 and again.manifest == written.manifest and len(asked) == 6
    other = write_experts(tmp_path, clusters, specs, source, fingerprint="other", finite=False)
    assert other.reused == 0


@pytest.mark.parametrize("data", [b"", b"123"])
def test_write_experts_refuses_short_data(tmp_path, data):
    specs = [TensorSpec("w", (2,), "float32")]
    with pytest.raises(ShapeMismatch, match="layer 0, expert 0"):
        write_experts(
            tmp_path,
            [[(0, 0)]],
            specs,
            lambda keys: ((key, {"w": data}) for key in keys),
            fingerprint="",
        )
    assert os.listdir(tmp_path / "experts") == []


def test_nonfinite_values_are_found_in_every_float_dtype():
    bad = {
        "F64": ["7ff0000000000000", "fff8000000000001"], "F32": ["7f800000", "ffc00000"],
        "C64": ["7f800000" + "00000000"], "F16": ["7c00", "fe01"], "BF16": ["7f80", "ffc1"],
        "F8_E5M2": ["7c", "ff"], "F8_E4M3": ["7f", "ff"], "F8_E8M0": ["ff"],
        "F8_E4M3FNUZ": ["80"], "F8_E5M2FNUZ": ["80"],
    }  # fmt: skip
    fine = {
        "F64": "7fefffffffffffff", "F32": "7f7fffff", "C64": "3f8000007f7fffff", "F16": "7bff",
        "BF16": "7f7f", "F8_E5M2": "7b", "F8_E4M3": "7e", "F8_E8M0": "fe",
        "F8_E4M3FNUZ": "7f", "F8_E5M2FNUZ": "ff",
    }  # fmt: skip
    assert set(bad) - {"BF16"} == {
        dtype for dtype, bits in DTYPE_BITS.items() if dtype[0] in "FC" and bits >= 8
    }
    for dtype, patterns in bad.items():
        good = bytes.fromhex(fine[dtype])[::-1] * 3
        assert first_nonfinite(memoryview(good), dtype) is None
        for pattern in patterns:
            assert (
                first_nonfinite(memoryview(good + bytes.fromhex(pattern)[::-1]), dtype) is not None
            )
    assert first_nonfinite(memoryview(b"\xff" * 8), "I64") is None
