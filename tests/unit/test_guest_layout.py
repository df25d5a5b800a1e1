"""Packing other libraries' checkpoints: names, the bytes of every record, and what is left out."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from chronos.common.disk.tensors import read_checkpoint
from chronos.common.errors import DiskFullError, ResourceError, ShapeMismatch, UsageError
from chronos.common.layout import inspect, open_layout, pack, read_records, reorder, verify
from chronos.common.layout.naming import expert_part
from chronos.common.model.guest import GuestConfig, read_config
from chronos.testing.faults import FaultyIO
from tests.support.tiny_guest import STYLES, D, E, F, tiny_guest

pytestmark = pytest.mark.usefixtures("no_flushing")


def tensors(folder: Path) -> dict[str, bytes]:
    return {entry.name: bytes(data) for entry, data in read_checkpoint(folder)}


def experts(folder: Path) -> dict[tuple[int, int], dict[str, bytes]]:
    layout = open_layout(folder, config=read_config(folder))
    found = read_records([(layout.path(key), record) for key, record in layout.records.items()])
    return {
        record.key: {name: bytes(view) for name, view in record.views(data).items()}
        for record, data in found
    }


def expected(style: str, source: dict[str, bytes], layer: int, expert: int) -> dict[str, bytes]:
    """What the record of an expert must hold, spelled out for each style."""
    at = f"model.layers.{layer}."
    one = f"{at}{'feed_forward' if style == 'jamba' else 'mlp'}.experts.{expert}."

    def piece(name: str) -> bytes:
        whole = source[at + name]
        size = len(whole) // E
        return whole[expert * size : (expert + 1) * size]

    if style in ("mlx", "mlx-4bit"):
        prefix = at + "mlp.switch_mlp."
        names = [name.removeprefix(prefix) for name in source if name.startswith(prefix)]
        return {name: piece(f"mlp.switch_mlp.{name}") for name in names}
    if style == "gpt_oss":
        names = ["gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"]
        return {name: piece(f"mlp.experts.{name}") for name in names}
    if style == "granitemoe":
        moe = "block_sparse_moe."
        return {
            "gate_up_proj": piece(moe + "input_linear.weight"),
            "down_proj": piece(moe + "output_linear.weight"),
        }
    if style == "mixtral":
        w = {n: source[f"{at}block_sparse_moe.experts.{expert}.w{n}.weight"] for n in (1, 2, 3)}
        return {"gate_up_proj": w[1] + w[3], "down_proj": w[2]}
    if style == "nemotron_h":
        one = f"{at}mixer.experts.{expert}."
        return {
            "up_proj": source[one + "up_proj.weight"],
            "down_proj": source[one + "down_proj.weight"],
        }
    record = {
        "gate_up_proj": source[one + "gate_proj.weight"] + source[one + "up_proj.weight"],
        "down_proj": source[one + "down_proj.weight"],
    }
    if style == "biased":
        gate_up = source[one + "gate_proj.bias"] + source[one + "up_proj.bias"]
        record |= {"gate_up_proj_bias": gate_up, "down_proj_bias": source[one + "down_proj.bias"]}
    return record


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("style", STYLES)
def test_every_byte_arrives_where_its_library_looks_for_it(tmp_path, style, shards):
    source = tiny_guest(tmp_path / "src", style, shards=shards)
    before = {path: path.read_bytes() for path in source.iterdir()}
    report = pack(source, tmp_path / "dst")
    assert before == {path: path.read_bytes() for path in source.iterdir()}
    found, original = experts(tmp_path / "dst"), tensors(source)
    assert sorted(found) == [(layer, e) for layer in (1, 2) for e in range(E)]
    for (layer, expert), record in found.items():
        assert record == expected(style, original, layer, expert)
    dense = tensors(tmp_path / "dst")
    assert dense == {n: b for n, b in original.items() if expert_part(n) is None}
    routed = sum(len(b) for record in found.values() for b in record.values())
    assert routed + sum(map(len, dense.values())) == sum(map(len, original.values()))
    assert (tmp_path / "dst/config.json").read_bytes() == (source / "config.json").read_bytes()
    assert report.left_out == () and verify(tmp_path / "dst").problems == []


def test_shapes_in_the_record_are_those_of_the_librarys_modules(tmp_path):
    shapes = {}
    for style in ("qwen3_moe", "gpt_oss", "nemotron_h", "mlx-4bit"):
        pack(tiny_guest(tmp_path / style, style), tmp_path / f"{style}-packed")
        record = open_layout(tmp_path / f"{style}-packed").records[1, 0]
        shapes[style] = {tensor.name: (tensor.dtype, tensor.shape) for tensor in record.tensors}
    assert shapes["qwen3_moe"] == {
        "gate_up_proj": ("F32", (2 * F, D)),
        "down_proj": ("F32", (D, F)),
    }
    assert shapes["gpt_oss"]["gate_up_proj"] == ("F32", (D, 2 * F))
    assert shapes["gpt_oss"]["gate_up_proj_bias"] == ("F32", (2 * F,))
    assert list(shapes["nemotron_h"]) == ["up_proj", "down_proj"]
    assert shapes["mlx-4bit"]["gate_proj.weight"] == ("U32", (F, D // 8))
    assert list(shapes["mlx-4bit"])[:3] == [
        "gate_proj.weight",
        "gate_proj.scales",
        "gate_proj.biases",
    ]


@pytest.mark.parametrize(
    "prefix", ["model.language_model.", "language_model.model.", "backbone.", ""]
)
def test_nested_models(tmp_path, prefix):
    pack(tiny_guest(tmp_path / "src", "qwen3_moe", prefix=prefix), tmp_path / "dst")
    assert len(experts(tmp_path / "dst")) == 2 * E


def test_layers_may_differ_in_their_experts_and_have_none(tmp_path):
    def widen(arrays):
        for name in list(arrays):
            if ".layers.2.mlp.experts." in name:
                dtype, (rows, columns), data = arrays[name]
                wide = (rows, 2 * columns) if "down" in name else (2 * rows, columns)
                arrays[name] = (dtype, wide, data * 2)

    pack(tiny_guest(tmp_path / "src", change=widen), tmp_path / "dst")
    layout = open_layout(tmp_path / "dst", config=read_config(tmp_path / "dst"))
    assert layout.moe_layers == (1, 2)
    assert layout.records[2, 0].tensors[0].shape == (4 * F, D)
    assert layout.records[1, 0].tensors[0].shape == (2 * F, D)
    order = [[(layer, e) for e in range(E) for layer in (2, 1)]]  # records of two sizes in a file
    pack(tmp_path / "dst", tmp_path / "again", order=order)
    assert experts(tmp_path / "again") == experts(tmp_path / "dst")


def test_what_no_decoder_runs_is_left_out_and_told(tmp_path):
    def mtp(arrays):
        for name in [name for name in arrays if ".layers.2." in name]:
            arrays[name.replace(".layers.2.", ".layers.3.")] = arrays[name]
            arrays[name.replace("model.layers.2.", "mtp.layers.0.")] = arrays[name]
        arrays["vision.layers.9.norm.weight"] = arrays["model.layers.0.input_layernorm.weight"]

    report = pack(tiny_guest(tmp_path / "src", change=mtp), tmp_path / "dst")
    assert report.left_out and all(
        n.startswith(("model.layers.3.", "mtp.")) for n in report.left_out
    )
    dense = tensors(tmp_path / "dst")
    assert not dense.keys() & set(report.left_out)
    assert "vision.layers.9.norm.weight" in dense


def test_large_tensors_go_in_pieces(tmp_path, monkeypatch):
    """With pieces of 64 bytes and windows of 200, a record comes from many of both."""
    monkeypatch.setattr("chronos.common.disk.tensors._EXTENT", 64)
    monkeypatch.setattr("chronos.common.disk.tensors._AHEAD", 200)
    for style in ("mixtral", "gpt_oss"):
        source = tiny_guest(tmp_path / style, style, shards=2)
        pack(source, tmp_path / f"{style}-dst")
        for (layer, expert), record in experts(tmp_path / f"{style}-dst").items():
            assert record == expected(style, tensors(source), layer, expert)


def test_a_nan_is_named_by_its_place_in_the_whole_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr("chronos.common.disk.tensors._EXTENT", 64)

    def poison(name):
        def change(arrays):
            dtype, shape, data = arrays[name]
            values = np.frombuffer(data, "<f4").copy()
            values[100] = np.nan
            arrays[name] = (dtype, shape, values.tobytes())

        return change

    for name, words in (
        ("model.embed_tokens.weight", "model.embed_tokens.weight: element 100 is NaN"),
        ("model.layers.2.mlp.experts.1.down_proj.weight", "expert 1: down_proj: element 100 is"),
        ("model.layers.2.mlp.experts.1.up_proj.weight", "gate_up_proj: element 228 is"),
    ):
        source = tiny_guest(tmp_path / name, change=poison(name))
        with pytest.raises(Exception, match=words):
            pack(source, tmp_path / f"{name}-dst")
        assert words.split(": ")[-1] in str(verify(source, collect=True).problems) or "228" in words


def test_memory_does_not_grow_with_the_expert(tmp_path):
    """Nothing is copied: buffers of reads are mapped, which is not traced, and given on."""
    wide = 1 << 11

    def widen(arrays):
        for name in list(arrays):
            if ".experts." in name:
                del arrays[name]
        zeros = bytes(2 * 4 * wide * 1024 * 2)
        arrays["model.layers.1.mlp.experts.gate_up_proj"] = ("F32", (4, 2048, wide), zeros * 2)
        arrays["model.layers.1.mlp.experts.down_proj"] = ("F32", (4, wide, 1024), zeros)

    source = tiny_guest(tmp_path / "src", "gpt_oss", change=widen)
    tracemalloc.start()
    pack(source, tmp_path / "dst")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert open_layout(tmp_path / "dst").record_nbytes == 24 << 20
    assert peak < 8 << 20


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.7.mlp.experts.12.w3.weight", ("model.", 7, 12, "gate_up_proj", 1)),
        ("layers.3.ffn.experts.0.w2.weight", ("", 3, 0, "down_proj", 0)),
        ("a.b.layers.3.experts.gate_up_proj", ("a.b.", 3, None, "gate_up_proj", 0)),
        ("model.layers.3.mlp.experts.fc1.weight", ("model.", 3, None, "gate_up_proj", 0)),
        ("m.layers.3.mixer.switch_mlp.fc1.weight", ("m.", 3, None, "fc1.weight", 0)),
        ("m.layers.3.experts.switch_glu.up_proj.bias", ("m.", 3, None, "up_proj.bias", 0)),
        ("model.layers.3.mlp.experts.up_proj.scales", ("model.", 3, None, "up_proj.scales", 0)),
        ("model.layers.3.mlp.experts.e_score_correction_bias", None),
        ("model.layers.3.mlp.shared_experts.gate_proj.weight", None),
        ("model.layers.3.mlp.shared_expert.gate_proj.weight", None),
        ("model.layers.3.mlp.gate.weight", None),
        ("model.experts_norm.weight", None),
        (
            "model.layers.3.mlp.experts.7.w3.weight_scale_inv",
            ("model.", 3, 7, "up_proj.weight_scale_inv", 0),
        ),
        (
            "model.layers.3.mlp.experts.7.down_proj.g_idx",
            ("model.", 3, 7, "down_proj.g_idx", 0),
        ),
        (
            "model.layers.3.mlp.experts.gate_up_proj_blocks",
            ("model.", 3, None, "gate_up_proj_blocks", 0),
        ),
    ],
)
def test_names(name, part):
    assert expert_part(name) == part


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.experts.0.gate_proj.weight_g_idx",
        "model.layers.3.mlp.experts.0.gate_proj.weight.quant_state.bitsandbytes__nf4",
        "model.layers.3.mlp.experts.gate_up_proj_absmax",
        "model.layers.3.mlp.experts.w13_weight",
        "transformer.blocks.3.ffn.experts.mlp.w1",
        "model.layers.3.mlp.experts.0.adapter.weight",
    ],
)
def test_names_among_the_experts_that_are_not_understood_are_refused(name):
    with pytest.raises(ShapeMismatch, match="does not know") as caught:
        expert_part(name)
    assert name in str(caught.value) and "save" in caught.value.fix


def test_inspect_says_before_packing_what_the_packed_model_will_weigh(tmp_path):
    source = tiny_guest(tmp_path / "src", shards=2)
    before = inspect(source, budgets=["50%", "1kB"])
    pack(source, tmp_path / "dst")
    after = inspect(tmp_path / "dst", budgets=["50%", "1kB"])
    for key in before.keys() - {"kind"}:
        assert before[key] == after[key]
    layout = open_layout(tmp_path / "dst")
    assert after["expert_bytes_total"] == layout.total_bytes
    assert (after["layers"], after["layers_with_experts"], after["kind"]) == (3, 2, "packed")
    half, small = after["budgets"]
    assert half["experts"] == 4 and half["enough"] and not small["enough"]
    assert isinstance(read_config(source), GuestConfig)


def test_a_second_run_keeps_what_the_first_had_finished(tmp_path):
    source, target = tiny_guest(tmp_path / "src", shards=2), tmp_path / "dst"
    renames = 3 + 1  # dense part, config.json, names, the first cluster; the next one fails
    with pytest.raises(ResourceError):
        pack(source, target, io=FaultyIO(fail_at=renames + 1, ops={"replace"}))
    dense = (target / "model.safetensors").stat().st_mtime_ns
    cluster = (target / "experts/cluster-00000.ctsr").stat().st_mtime_ns
    report = pack(source, target)
    assert (report.reused_clusters, report.clusters) == (1, 2)
    assert dense == (target / "model.safetensors").stat().st_mtime_ns
    assert cluster == (target / "experts/cluster-00000.ctsr").stat().st_mtime_ns
    pack(source, tmp_path / "whole")
    for path in (tmp_path / "whole").rglob("*.*"):
        assert path.read_bytes() == (target / path.relative_to(tmp_path / "whole")).read_bytes()


def test_too_little_room_is_told_before_anything_is_written(tmp_path):
    source = tiny_guest(tmp_path / "src")
    with pytest.raises(DiskFullError, match="bytes needed, 20000 bytes free"):
        pack(source, tmp_path / "dst", io=FaultyIO(free=20_000))
    assert not list((tmp_path / "dst").glob("*"))


@pytest.mark.parametrize("link", [False, True])
def test_reordering_takes_the_place_of_the_folder_and_keeps_every_byte(tmp_path, link):
    source, target = tiny_guest(tmp_path / "src"), tmp_path / "dst"
    pack(source, target, link=link)
    before, dense = experts(target), tensors(target)
    keys = [(layer, expert) for expert in (2, 0, 3, 1) for layer in (2, 1)]
    (tmp_path / ".dst.chronos-new").mkdir()  # of a run that was killed
    report = reorder(target, [keys[:3], keys[3:]], {"method": "clusters"})
    layout = open_layout(target, config=read_config(target))
    assert layout.clusters() == [keys[:3], keys[3:]] and report.clusters == 2
    assert layout.manifest.order == {"method": "clusters"}
    assert (experts(target), tensors(target)) == (before, dense)
    assert (target / "model.safetensors").exists() is not link
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


@pytest.mark.parametrize("style", ["qwen3_moe", "gpt_oss"])
def test_another_models_folder_is_never_written_over(tmp_path, style):
    source, other = tiny_guest(tmp_path / "src", style), tiny_guest(tmp_path / "other", shards=2)
    before = {path: path.read_bytes() for path in other.iterdir()}
    for link in (False, True):
        with pytest.raises(UsageError, match="not packed by Chronos"):
            pack(source, other, link=link)
    assert {path: path.read_bytes() for path in other.iterdir()} == before


def test_progress_counts_every_byte_once(tmp_path):
    steps: list[tuple[int, int]] = []
    source = tiny_guest(tmp_path / "src")
    report = pack(source, tmp_path / "dst", progress=lambda *step: steps.append(step))
    assert steps == sorted(steps) and steps[0][0] < steps[-1][0] == steps[-1][1]
    assert len({total for _, total in steps}) == 1 and steps[-1][1] <= report.bytes
