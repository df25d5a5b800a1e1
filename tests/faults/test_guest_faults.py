"""Guest checkpoints that are wrong, foreign, truncated, renamed or hostile; links that broke."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chronos.common.disk.header import TensorEntry, read_header, tensor_nbytes
from chronos.common.disk.linked import LINK
from chronos.common.disk.tensors import read_checkpoint
from chronos.common.errors import (
    ChronosError,
    ConfigError,
    CorruptFileError,
    ShapeMismatch,
    UsageError,
)
from chronos.common.layout import inspect, open_layout, pack, verify
from chronos.common.layout.guest import find_experts
from chronos.common.model.guest import GuestConfig
from chronos.run.models import resolve_model
from tests.support.tiny_guest import STYLES, E, shapes, tiny_guest, write_shards

EXPERT = "model.layers.2.mlp.experts.1.up_proj.weight"
STACK = "model.layers.1.mlp.experts.gate_up_proj"


pytestmark = pytest.mark.usefixtures("no_flushing")


def refused(folder: Path, error: type[ChronosError] = ChronosError) -> str:
    """Packing must say no in a typed error, before it publishes anything, and leave SRC alone."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    target = folder.with_name(folder.name + "-dst")
    with pytest.raises(error) as caught:
        pack(folder, target)
    assert not (target / "experts/cluster_manifest.json").exists()
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return str(caught.value)


def drop(arrays):
    del arrays[EXPERT]


def drop_expert(arrays):
    for name in [name for name in arrays if ".layers.1.mlp.experts.3." in name]:
        del arrays[name]


def add_expert(arrays):
    arrays[EXPERT.replace(".1.up", ".4.up")] = arrays[EXPERT]


def narrow(arrays):
    dtype, (rows, columns), data = arrays[EXPERT]
    arrays[EXPERT] = (dtype, (rows, columns - 1), data[: rows * (columns - 1) * 4])


def turn(arrays):
    dtype, shape, data = arrays[EXPERT]
    arrays[EXPERT] = (dtype, shape[::-1], data)


def mix(arrays):
    _, shape, data = arrays[EXPERT]
    arrays[EXPERT] = ("BF16", shape, data[: len(data) // 2])


def mix_projection(arrays):
    for name in [name for name in arrays if name.endswith("experts.gate_proj.weight")]:
        del arrays[name]
    for name in [
        name for name in arrays if ".layers.1." in name and name.endswith("up_proj.weight")
    ]:
        dtype, shape, data = arrays[name]
        arrays[name] = ("BF16", shape, data[: len(data) // 2])


def no_down(arrays):
    for name in [name for name in arrays if ".layers.1." in name and "down_proj" in name]:
        del arrays[name]


def no_gate(arrays):
    for name in [name for name in arrays if ".layers.1." in name and "experts.2.gate_proj" in name]:
        del arrays[name]


def both_forms(arrays):
    arrays["model.layers.2.mlp.experts.down_proj"] = ("F32", (E, 2, 2), bytes(E * 16))


def fp8(arrays):
    arrays[EXPERT + "_scale_inv"] = ("F32", (1, 1), bytes(4))


def rename(arrays):
    for name in [name for name in arrays if ".experts." in name]:
        arrays[name.replace("_proj", "_projection")] = arrays.pop(name)


def hide(arrays):
    for name in [name for name in arrays if ".experts." in name]:
        arrays[name.replace(".experts.", ".specialists.")] = arrays.pop(name)


def two_towers(arrays):
    for name in [name for name in arrays if ".experts." in name]:
        arrays[f"talker.{name}"] = arrays[name]


def twice(arrays):
    arrays[EXPERT.replace("up_proj", "w3")] = arrays[EXPERT]


def twice_by_number(arrays):
    arrays[EXPERT.replace(".1.up", ".01.up")] = arrays[EXPERT]


def fused(arrays):
    arrays[EXPERT.replace("up_proj", "gate_up_proj")] = arrays.pop(EXPERT)


def scalar(arrays):
    for expert in range(E):
        arrays[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] = ("F32", (), bytes(4))


def nan(arrays):
    dtype, shape, data = arrays[EXPERT]
    values = np.frombuffer(data, "<f4").copy()
    values[5] = np.inf
    arrays[EXPERT] = (dtype, shape, values.tobytes())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, f"tensor {EXPERT} is missing"),
        (drop_expert, "model.layers.1.mlp.experts.3."),
        (add_expert, "is of expert 4, config.json names 4"),
        (narrow, EXPERT),
        (turn, EXPERT),
        (mix, EXPERT),
        (mix_projection, "they are one matrix"),
        (no_down, "layer 1 have only gate_up_proj"),
        (no_gate, "model.layers.1.mlp.experts.2.gate_proj.weight is missing"),
        (both_forms, "is of one expert, others of the layer are stacked"),
        (fp8, "up_proj.weight_scale_inv is missing (3 experts in all)"),
        (rename, "under a name Chronos does not know"),
        (hide, "no tensor of the checkpoint is named as a routed expert is"),
        (twice, "model.layers.2.mlp.experts.1.w3.weight are the same weights"),
        (twice_by_number, "are the same weights"),
        (fused, "experts.1.gate_up_proj.weight lies among the routed experts under a name"),
        (scalar, "down_proj.weight of the experts is a single number"),
        (two_towers, "two models hold routed experts"),
        (nan, "layer 2, expert 1: gate_up_proj: element 133 is NaN or infinite"),
    ],
)
def test_tensors_that_do_not_add_up_are_named(tmp_path, change, words):
    source = tiny_guest(tmp_path / "src", change=change, shards=2)
    assert words in refused(source)
    if change is nan:
        assert len(verify(source, collect=True).problems) == 1
    else:
        for look in (verify, inspect):
            with pytest.raises(ChronosError, match=words.split(" is ")[0].replace(".", r"\.")):
                look(source)


@pytest.mark.parametrize("shape", [(E + 1, 16, 16), (E * 256,), (1, E, 256), (16, 16, E)])
def test_stacks_of_another_number_are_refused(tmp_path, shape):
    def change(arrays):
        dtype, _, data = arrays[STACK]
        arrays[STACK] = (dtype, shape, (data * 2)[: 4 * int(np.prod(shape))])

    source = tiny_guest(tmp_path / "src", "gpt_oss", change=change)
    assert STACK in refused(source, ShapeMismatch)


def test_experts_that_share_a_byte_are_refused(tmp_path):
    def change(arrays):
        arrays[STACK] = ("F4", (E, 1, 1), bytes(E // 2))

    source = tiny_guest(tmp_path / "src", "gpt_oss", change=change)
    assert STACK in refused(source, ShapeMismatch)


def test_a_stack_that_does_not_fit_its_fellow_is_refused(tmp_path):
    def change(arrays):
        arrays[STACK] = ("F32", (E, 8, 16), bytes(E * 512))

    source = tiny_guest(tmp_path / "src", "gpt_oss", change=change)
    assert "experts of layer 1 do not fit together" in refused(source, ShapeMismatch)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"auto_map": {"AutoModel": "modeling.Model"}}, "auto_map"),
        ({"num_experts": 5}, "experts.4."),
        ({"num_experts": 2}, "config.json names 2"),
        ({"num_experts": 10**9}, "num_experts must be"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be"),
        ({"num_hidden_layers": 1}, "no tensor of the checkpoint is named"),
        (
            {"quantization_config": {"quant_method": "mxfp4"}},
            r"quantization_config \(mxfp4\), but no weight(.|\n)*remove quantization_config",
        ),
    ],
)
def test_configs_that_do_not_fit_the_tensors(tmp_path, config, words):
    assert re.search(words, refused(tiny_guest(tmp_path / "src", config=config)))


@pytest.mark.parametrize("name", [EXPERT + "_scale_inv", "model.layers.0.mlp.gate.weight_q"])
def test_a_quantisation_that_is_not_read_is_named(tmp_path, name):
    def change(arrays):
        arrays[name] = ("I8", (2, 2), bytes(4))

    config = {"quantization_config": {"quant_method": "foo"}}
    assert "quantised (foo)" in refused(tiny_guest(tmp_path / "src", change=change, config=config))


def resized(arrays):
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        dtype, (rows, columns), data = arrays[name]
        arrays[name] = (dtype, (rows + 2, columns), data + bytes(8 * columns))


def shell(names):
    def change(arrays):
        for name in filter(names, arrays):
            arrays[name] = ("F32", (0,), b"")

    return change


def as_integers(arrays):
    for name, (_, shape, data) in list(arrays.items()):
        if ".experts." in name:
            arrays[name] = ("I32", shape, data)


def in_four_bits(arrays):
    arrays["model.table"] = ("F4", (2, 2), bytes(2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (resized, r"(lm_head|embed_tokens).weight is F32 \[26, .*implies \[24, .*\n.*\n.*: 26"),
        (shell(lambda name: True), r"weight has no elements \(\[0\]\)(.|\n)*ZeRO-3"),
        (shell(lambda name: ".experts." in name), r"experts\.\d.*no elements(.|\n)*ZeRO-3"),
        (shell(lambda name: ".experts." not in name), r"weight has no elements(.|\n)*zero_to_fp32"),
        (as_integers, r"experts\..* is I32, which experts are not computed in"),
        (in_four_bits, r"model\.table is F4, which neither library reads"),
    ],
)
def test_what_no_library_could_load_is_refused_by_name(tmp_path, change, words):
    assert re.search(words, refused(tiny_guest(tmp_path / "src", change=change), ShapeMismatch))


def test_odd_tensors_of_the_dense_part_come_along(tmp_path):
    odd = {
        "ids": ("I64", (3,)),
        "mask": ("BOOL", (2, 2)),
        "wide": ("F64", (2,)),
        "none": ("F32", (0,)),
    }

    def change(arrays):
        arrays |= {f"model.{n}": (k, s, bytes(tensor_nbytes(k, s))) for n, (k, s) in odd.items()}

    pack(tiny_guest(tmp_path / "src", change=change), tmp_path / "dst")
    found = {e.name: (e.dtype, e.shape) for e, _ in read_checkpoint(tmp_path / "dst")}
    assert {name: found[f"model.{name}"] for name in odd} == odd


def test_a_packed_folder_keeps_the_dtype_of_its_source(tmp_path):
    """What named it, an index or a tensor that came first, is not in the packed folder."""
    source = tiny_guest(tmp_path / "src", shards=2, config={"dtype": None})
    data = json.loads(index(source).read_text()) | {"metadata": {"dtype": "bfloat16"}}
    index(source).write_text(json.dumps(data))
    pack(source, tmp_path / "dst")
    pack(tmp_path / "dst", tmp_path / "again")
    found = [inspect(folder)["dtype"] for folder in (source, tmp_path / "dst", tmp_path / "again")]
    assert found == ["bfloat16"] * 3


def test_quantised_experts_in_the_manner_of_gpt_oss_say_what_to_do(tmp_path):
    def change(arrays):
        name = "model.layers.1.mlp.experts.gate_up_proj"
        arrays[name + "_blocks"] = ("U8", (E, 4, 1, 16), bytes(E * 64))
        arrays[name + "_scales"] = ("U8", (E, 4, 1), bytes(E * 4))
        del arrays[name]

    message = refused(tiny_guest(tmp_path / "src", "gpt_oss", change=change), ShapeMismatch)
    assert "gate_up_proj_blocks" in message and "convert it with MLX-LM" in message


@pytest.fixture
def sharded(tmp_path) -> Path:
    return tiny_guest(tmp_path / "src", shards=3)


def index(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


def edit_index(folder: Path, change) -> None:
    data = json.loads(index(folder).read_text())
    change(data["weight_map"])
    index(folder).write_text(json.dumps(data))


@pytest.mark.parametrize(
    "name",
    ["../src/model-00001-of-00003.safetensors", "/etc/passwd", "a/b.safetensors", ".safetensors"]
    + ["model.bin", "C:\\x.safetensors", "x\0.safetensors", 7, None, ""],
)
def test_shards_outside_of_the_folder_are_never_opened(sharded, name):
    edit_index(sharded, lambda weights: weights.update({EXPERT: name}))
    assert "which is not a file of this folder" in refused(sharded, CorruptFileError)


def test_an_index_that_names_what_is_not_there(sharded):
    edit_index(sharded, lambda weights: weights.update(ghost="model-00001-of-00003.safetensors"))
    assert "names tensor 'ghost'" in refused(sharded, CorruptFileError)


def test_a_tensor_in_two_shards(sharded, tmp_path):
    arrays = {e.name: (e.dtype, e.shape, bytes(d)) for e, d in read_checkpoint(sharded)}
    extra = {"model.twice": arrays["lm_head.weight"]}
    other = tmp_path / "other"
    other.mkdir()
    write_shards(other, {"lm_head.weight": arrays["lm_head.weight"], **extra}, 1)
    shutil.copy(other / "model.safetensors", sharded / "model-00004-of-00004.safetensors")
    edit_index(sharded, lambda w: w.update({"model.twice": "model-00004-of-00004.safetensors"}))
    assert "lm_head.weight" in refused(sharded, CorruptFileError)


def test_missing_swapped_and_foreign_shards(sharded, tmp_path):
    shards = sorted(sharded.glob("*.safetensors"))
    content = [shard.read_bytes() for shard in shards]
    shards[1].unlink()
    assert f"names {shards[1].name}, which is not there" in refused(sharded, CorruptFileError)
    shards[1].write_bytes(content[0])
    assert "names tensor" in refused(sharded, CorruptFileError)
    foreign = tiny_guest(tmp_path / "foreign", "mixtral", shards=3)
    shutil.copy(foreign / shards[1].name, shards[1])
    assert "names tensor" in refused(sharded, CorruptFileError)
    shards[1].write_bytes(b"<html>rate limited</html>")
    assert "page of HTML" in refused(sharded, CorruptFileError)
    shards[1].write_bytes(content[1])
    pack(sharded, tmp_path / "whole")


@pytest.mark.parametrize("part", range(0, 64, 5))
def test_a_truncated_shard_is_refused_before_anything_is_written(sharded, part):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) * part // 64])
    assert shard.name in refused(sharded, CorruptFileError)
    target = sharded.with_name(sharded.name + "-dst")
    assert not (target / "model.safetensors").exists()


def test_a_shard_cut_while_it_is_read(sharded, tmp_path, monkeypatch):
    """After the headers were checked: an error, no signal, and nothing is published."""
    module = sys.modules[pack.__module__]
    shard = sorted(sharded.glob("*.safetensors"))[2]
    write_dense = module._write_dense

    def cut_then_write(*args):
        os.truncate(shard, read_header(shard).data_start + 100)
        write_dense(*args)

    monkeypatch.setattr(module, "_write_dense", cut_then_write)
    with pytest.raises(CorruptFileError, match=shard.name):
        pack(sharded, tmp_path / "dst")
    assert not (tmp_path / "dst/experts/cluster_manifest.json").exists()


def test_a_shard_of_other_layers_only_may_be_absent(tmp_path):
    """As GLM's multi-token-prediction layer, in a file of its own, which packing leaves out."""
    source = tiny_guest(tmp_path / "src", shards=3)
    beyond = {"model.layers.3.eh_proj.weight": "mtp.safetensors", "mtp.norm": "x.safetensors"}
    edit_index(source, lambda weights: weights.update(beyond))
    assert pack(source, tmp_path / "dst").left_out == ()
    assert verify(source).problems == [] and inspect(source)["layers"] == 3
    edit_index(source, lambda w: w.update({"model.layers.2.extra.weight": "mtp.safetensors"}))
    assert "mtp.safetensors, which is not there (tensor model.layers.2." in refused(source)


FORMATS = [
    ("model-Q4.gguf", b"GGUF", "in GGUF", "--config DIR"),
    ("adapter_config.json", b'{"base_model_name_or_path": "a/b"}', "of 'a/b'", "merge_and_unload"),
    ("adapter_config.json", b"[", "of 'another model'", "merge_and_unload"),
    ("consolidated.safetensors", b"", "Mistral's own", "model-*.safetensors"),
    ("model.onnx", b"", "ONNX", "safetensors"),
    ("weights.npz", b"", "NumPy", "safetensors"),
    ("tf_model.h5", b"", "TensorFlow", "save_pretrained"),
    ("shard.distcp", b"", "pickled", "save_pretrained"),
    ("readme.txt", b"", "no model.safetensors and no model.safetensors.index.json", "whole"),
]


@pytest.mark.parametrize(("name", "content", "words", "fix"), FORMATS)
def test_another_format_is_named_with_the_way_out(tmp_path, name, content, words, fix):
    source = tiny_guest(tmp_path / "src")
    (source / "model.safetensors").unlink()
    (source / name).write_bytes(content)
    message = refused(source, CorruptFileError)
    assert words in message and fix in message
    (source / "config.json").unlink()
    expected = UsageError if name == "readme.txt" else CorruptFileError
    with pytest.raises(expected) as caught:
        resolve_model(source)
    assert name == "readme.txt" or words in str(caught.value)


def test_a_file_of_another_format_is_named_too(tmp_path):
    (tmp_path / "model-Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(CorruptFileError, match="in GGUF"):
        resolve_model(tmp_path / "model-Q4.gguf")


HEADS = [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    (b"GGUF\3\0\0\0", "--config DIR"),
    (b"PK\x03\x04", "save_pretrained"),
    (b"<!DOCTYPE html>", "download"),
]


@pytest.mark.parametrize(("head", "fix"), HEADS)
def test_what_is_no_safetensors_file_inside_is_named(sharded, head, fix):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(head)
    message = refused(sharded, CorruptFileError)
    assert shard.name in message and fix in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_pointers_in_place_of_json_are_named_before_anything_is_written(sharded, name):
    (sharded / name).write_bytes(HEADS[0][0])
    message = refused(sharded)
    assert "Git LFS pointer" in message and name in message


def test_shells_of_zero_3_say_how_to_gather(tmp_path):
    source = tiny_guest(tmp_path / "src")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    (source / "zero_to_fp32.py").write_text("")
    assert "python zero_to_fp32.py" in refused(source, CorruptFileError)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_with_what_to_do(tmp_path, name):
    source = tiny_guest(tmp_path / "src")
    (source / "model.safetensors").rename(source / name)
    for work in (refused, lambda folder: inspect(folder), lambda folder: verify(folder)):
        try:
            message = work(source)
        except CorruptFileError as error:
            message = str(error)
        assert f"pickled ({name})" in message and "save_pretrained" in message


def test_a_packed_guest_of_another_checkpoint_is_refused(tmp_path):
    pack(tiny_guest(tmp_path / "a"), tmp_path / "a-dst")

    def change(arrays):
        dtype, shape, data = arrays[EXPERT]
        arrays[EXPERT] = (dtype, shape, bytes(len(data)))

    pack(tiny_guest(tmp_path / "b", change=change), tmp_path / "b-dst")
    shutil.copy(tmp_path / "b-dst/model.safetensors", tmp_path / "a-dst/model.safetensors")
    with pytest.raises(CorruptFileError, match="another model"):
        open_layout(tmp_path / "a-dst")
    with pytest.raises(CorruptFileError, match="another model"):
        verify(tmp_path / "a-dst")


@pytest.fixture
def linked(sharded) -> Path:
    folder = sharded.with_name("linked")
    report = pack(sharded, folder, link=True)
    assert report.bytes == sum(path.stat().st_size for path in folder.glob("experts/*.ctsr"))
    return folder


def test_a_linked_folder_is_whole(sharded, linked, tmp_path):
    assert not (linked / "model.safetensors").exists()
    pack(sharded, tmp_path / "copied")
    for folder in (linked, tmp_path / "copied"):
        assert verify(folder).problems == []
    dense = {e.name: bytes(d) for e, d in read_checkpoint(linked)}
    assert dense == {e.name: bytes(d) for e, d in read_checkpoint(tmp_path / "copied")}
    assert open_layout(linked).fingerprint == open_layout(tmp_path / "copied").fingerprint
    assert inspect(linked)["dense_bytes"] == sum(map(len, dense.values()))
    pack(linked, tmp_path / "again")
    assert {e.name: bytes(d) for e, d in read_checkpoint(tmp_path / "again")} == dense


def test_links_notice_shards_that_moved_or_changed(sharded, linked):
    shards = sorted(sharded.glob("*.safetensors"))
    os.utime(shards[0])  # touched only: its bytes are the same
    assert verify(linked).problems == []
    content = shards[0].read_bytes()
    start = struct.unpack("<Q", content[:8])[0] + 8
    shards[0].write_bytes(content[:start] + bytes(len(content) - start))  # as a training run would
    with pytest.raises(CorruptFileError, match="has changed since"):
        list(read_checkpoint(linked))
    shards[0].write_bytes(content + b"more")
    with pytest.raises(CorruptFileError, match="has changed since"):
        verify(linked)
    shards[0].unlink()
    with pytest.raises(CorruptFileError, match=r"is linked to .*No such file") as caught:
        inspect(linked)
    assert "without --link" in caught.value.fix


def test_a_link_of_another_model_is_refused(linked, tmp_path):
    other = tiny_guest(tmp_path / "other", "mixtral")
    pack(other, tmp_path / "other-linked", link=True)
    shutil.copy(tmp_path / "other-linked" / LINK, linked / LINK)
    with pytest.raises(CorruptFileError, match=rf"another model than {LINK}"):
        open_layout(linked)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format="x"),
        lambda d: d.update(version=2),
        lambda d: d.update(version="1"),
        lambda d: d.pop("samples"),
        lambda d: d.pop("tensors"),
        lambda d: d.update(shards={}),
        lambda d: d["shards"][0].update(file="shard.safetensors"),
        lambda d: d["shards"][0].update(file="/x\0"),
        lambda d: d["shards"][0].update(file=7),
        lambda d: d["shards"][0].update(nbytes="7"),
        lambda d: d["shards"][0].pop("mtime_ns"),
        lambda d: d["tensors"].update(x=9),
        lambda d: d["tensors"].update(x=0),
        lambda d: d["tensors"].update(x=True),
        lambda d: d["shards"][0].update(file="/dev/zero", nbytes=0),
        lambda d: d["shards"][0].update(file="/etc/hostname"),
    ],
)
def test_bent_links_are_typed_errors(linked, change):
    data = json.loads((linked / LINK).read_text())
    change(data)
    (linked / LINK).write_text(json.dumps(data))
    for work in (verify, inspect, lambda folder: list(read_checkpoint(folder))):
        with pytest.raises((CorruptFileError, ConfigError)):
            work(linked)


COMPONENTS = "experts switch_mlp gate_proj up_proj w1 weight bias scales 0 9".split()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_the_names_and_shapes_it_is_laid_out_whole_or_refused(data):
    """Random checkpoints made of plausible names: all bytes are in a record or the dense part."""
    found = dict(shapes(data.draw(st.sampled_from(STYLES))))
    for _ in range(data.draw(st.integers(0, 4))):
        name = data.draw(st.sampled_from(sorted(found)))
        dtype, shape = found.pop(name)
        kind = data.draw(st.sampled_from(["drop", "rename", "shape", "dtype", "copy"]))
        parts = name.split(".")
        parts[data.draw(st.integers(0, len(parts) - 1))] = data.draw(st.sampled_from(COMPONENTS))
        if kind == "copy":
            found[name] = (dtype, shape)
        if kind in ("rename", "copy"):
            found[".".join(parts)] = (dtype, shape)
        if kind == "shape":
            found[name] = (dtype, tuple(data.draw(st.lists(st.integers(0, 9), max_size=4))))
        if kind == "dtype":
            found[name] = ("F16", shape)
    located, offset = {}, 0
    for name, (dtype, shape) in found.items():
        entry = TensorEntry(name, dtype, shape, offset, tensor_nbytes(dtype, shape))
        located[name], offset = (Path("x"), entry), offset + entry.nbytes
    config = GuestConfig("x", 24, 64, 3, E, 2)
    try:
        experts = find_experts(located, config)
    except ShapeMismatch:
        return
    covered = [(at[1].offset, at[1].nbytes) for at in experts.dense]
    covered += [(located[name][1].offset, located[name][1].nbytes) for name in experts.left_out]
    for layer, template in experts.templates.items():
        for expert in range(E):
            for tensor in template.tensors:
                places = list(experts.locate((layer, expert), tensor.name))
                assert sum(at[1].nbytes for at in places) == tensor.nbytes
                covered += [(at[1].offset, at[1].nbytes) for at in places]
    position = 0
    for start, nbytes in sorted(covered):
        assert start == position
        position += nbytes
    assert position == offset
