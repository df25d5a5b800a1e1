"""GGUF headers, whole and hostile, and the table of names against the gguf package's own."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.cli import main
from chronos.common.disk.gguf import TYPES, read_gguf, shards_of
from chronos.common.disk.io import FileIO
from chronos.common.errors import ChronosError, ConfigError, CorruptFileError, ShapeMismatch
from chronos.common.layout import pack
from chronos.common.layout.gguf import open_gguf
from chronos.common.layout.gguf_names import (
    ARCHITECTURES,
    checkpoint_name,
    expert_stack,
    gguf_name,
)

CONFIG = """{"model_type": "qwen3_moe", "vocab_size": 8, "num_hidden_layers": 1, "num_experts": 2,
 "num_experts_per_tok": 1, "max_position_embeddings": 32, "dtype": "bfloat16"}"""
STACKS = [(f"blk.0.ffn_{p}_exps.weight", (2, 32, 32), 8) for p in ("gate", "up", "down")]
EMBEDDING = ("token_embd.weight", (8, 32), 0)


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def written(
    path: Path,
    tensors: list[tuple[str, tuple[int, ...], int]],
    architecture: str = "qwen3moe",
    more: bytes = b"",
    keys: int = 0,
    **change: Any,
) -> Path:
    """A file written by hand. change: of the fields of the last tensor (offset, dims ...)."""
    head = text("general.architecture") + struct.pack("<I", 8) + text(architecture) + more
    infos, data = b"", b""
    for place, (name, shape, kind) in enumerate(tensors):
        last = change if place == len(tensors) - 1 else {}
        _, block, size = TYPES.get(kind, ("", 1, 4))
        nbytes = int(np.prod(shape)) // block * size
        dims = last.get("dims", shape[::-1])
        infos += text(last.get("name", name)) + struct.pack("<I", last.get("rank", len(dims)))
        infos += struct.pack(f"<{len(dims)}Q", *dims)
        infos += struct.pack("<IQ", last.get("kind", kind), last.get("offset", len(data)))
        data += bytes(nbytes + -nbytes % 32)
    count = change.get("count", len(tensors))
    raw = change.get("magic", b"GGUF") + struct.pack(
        "<IQQ", change.get("version", 3), count, 1 + keys
    )
    raw += head + infos
    raw += bytes(-len(raw) % 32)
    path.write_bytes(raw + data[: change.get("kept", len(data))])
    return path


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    more = text("a.list") + struct.pack("<IIQ", 9, 4, 2) + struct.pack("<II", 7, 8)
    more += text("a.texts") + struct.pack("<IIQ", 9, 8, 2) + text("x") + text("yy")
    path = written(tmp_path / "x.gguf", [EMBEDDING, *STACKS], more=more, keys=2)
    header = read_gguf(path)
    assert header.metadata == {
        "general.architecture": "qwen3moe",
        "a.list": [7, 8],
        "a.texts": None,
    }
    found = header.tensors["blk.0.ffn_down_exps.weight"]
    assert (found.type, found.shape, found.nbytes) == ("Q8_0", (2, 32, 32), 2 * 32 * 34)
    assert found.offset + found.nbytes == path.stat().st_size


def test_it_agrees_with_the_package(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    assert {
        (kind.value, kind.name, *sizes)
        for kind, sizes in gguf.GGML_QUANT_SIZES.items()
        if kind.value in TYPES
    } == {(number, *kind) for number, kind in TYPES.items()}
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_uint32("some.count", 5)
    writer.add_array("some.scores", [0.5] * 5000)
    writer.add_tensor("token_embd.weight", np.ones((8, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf(path)
    assert header.metadata["some.count"] == header.number("some.count") == 5
    assert header.metadata["some.scores"] is None  # long ones are not kept
    for tensor in gguf.GGUFReader(path).tensors:
        ours = header.tensors[tensor.name]
        assert (ours.offset, ours.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert ours.shape == tuple(int(n) for n in tensor.shape[::-1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"magic": b"GGML"}, "does not begin with GGUF"),
        ({"version": 1}, "version 1 is not read"),
        ({"version": 3 << 24}, "is not read here"),  # of the other byte order
        ({"count": 1 << 60}, "tensors do not fit"),
        ({"rank": 9}, "has 9 dimensions"),
        ({"rank": 0}, "has 0 dimensions"),
        ({"kind": 200}, "has the type 200"),
        ({"kind": 4}, "has the type 4"),  # removed from ggml
        ({"dims": (31, 32, 2)}, r"is Q8_0 \[2, 32, 31\]"),
        ({"dims": (32, 0, 2)}, r"is Q8_0 \[2, 0, 32\]"),
        ({"dims": (1 << 39, 1 << 39, 1 << 39)}, "bytes at"),
        ({"dims": (1 << 38, 32, 2)}, "cut short"),
        ({"offset": 3 << 61}, "bytes at"),
        ({"offset": 8}, "not aligned"),
        ({"offset": 0}, "overlaps"),
        ({"offset": 1 << 40}, "cut short"),
        ({"name": "token_embd.weight"}, "is there twice"),
        ({"name": "../x"}, "not allowed"),
        ({"kept": 100}, "cut short"),
    ],
)
def test_hostile_headers_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = written(tmp_path / "x.gguf", [EMBEDDING, *STACKS], **change)
    with pytest.raises(CorruptFileError, match=said):
        read_gguf(path)


def keyed(kind: int, value: bytes) -> bytes:
    return text("k") + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (keyed(8, struct.pack("<Q", 1 << 62)), "do not fit"),
        (keyed(9, struct.pack("<IQ", 8, 1 << 61)), "strings do not fit"),
        (keyed(9, struct.pack("<IQ", 12, 1 << 61)), "numbers do not fit"),
        (keyed(9, struct.pack("<IQ", 9, 1)), "elements of the type 9"),
        (keyed(77, b""), "a value has the type 77"),
        (keyed(8, struct.pack("<Q", 2) + b"\xff\xfe"), "utf-8"),
        (text("general.architecture") + struct.pack("<I", 8) + text("y"), "there twice"),
        (text("general.alignment") + struct.pack("<II", 4, 0), "alignment is 0"),
        (text("general.alignment") + struct.pack("<II", 4, 48), "alignment is 48"),
        (struct.pack("<Q", 1 << 63), "do not fit"),
    ],
)
def test_hostile_metadata_are_refused(more: bytes, said: str, tmp_path: Path) -> None:
    path = written(tmp_path / "x.gguf", [EMBEDDING, *STACKS], more=more, keys=1)
    with pytest.raises(CorruptFileError, match=said):
        read_gguf(path)


def test_every_cut_and_many_flips_end_in_an_error_of_ours(tmp_path: Path) -> None:
    whole = written(tmp_path / "x.gguf", [EMBEDDING, *STACKS]).read_bytes()
    start = len(whole) - 3 * 2 * 32 * 34 - 1024
    for end in range(0, start, 7):
        (tmp_path / "cut.gguf").write_bytes(whole[:end])
        with pytest.raises(CorruptFileError):
            read_gguf(tmp_path / "cut.gguf")
    rng = np.random.default_rng(0)
    for _ in range(300):
        raw = bytearray(whole)
        raw[rng.integers(start)] = rng.integers(256)
        (tmp_path / "flip.gguf").write_bytes(raw)
        try:
            read_gguf(tmp_path / "flip.gguf")
        except ChronosError:
            pass


def opened(tmp_path: Path, tensors: Any, config: str = CONFIG, **change: Any) -> Any:
    (tmp_path / "config.json").write_text(config)
    path = written(tmp_path / "x.gguf", tensors, **change)
    return open_gguf(path, tmp_path, FileIO())


def test_experts_and_the_rest_are_told_apart(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    late = ("blk.1.nextn.eh_proj.weight", (32, 64), 0)
    quantised = ("blk.0.attn_q.weight", (64, 32), 8)
    model = opened(tmp_path, [EMBEDDING, quantised, *STACKS, late])
    assert [(e.name, e.dtype, e.shape) for _, e in model.dense] == [
        ("model.embed_tokens.weight", "F32", (8, 32)),
        ("model.layers.0.self_attn.q_proj.weight", "BF16", (64, 32)),
    ]
    assert [(t.name, t.dtype, t.shape) for t in model.templates[0].tensors] == [
        ("gate_proj.q8_0", "U8", (32, 34)),
        ("up_proj.q8_0", "U8", (32, 34)),
        ("down_proj.q8_0", "U8", (32, 34)),
    ]
    assert model.left_out == ("blk.1.nextn.eh_proj.weight",)


@pytest.mark.parametrize(
    ("tensors", "change", "error", "said"),
    [
        ([*STACKS], {"architecture": "bert"}, ConfigError, "architecture 'bert'"),
        ([*STACKS], {"architecture": "llama"}, ConfigError, "holds a llama .mixtral., config.json"),
        ([EMBEDDING], {}, ShapeMismatch, "no stack of routed experts"),
        ([*STACKS[:2]], {}, ShapeMismatch, "do not fit each other"),
        ([*STACKS[:2], (STACKS[2][0], (2, 64, 32), 8)], {}, ShapeMismatch, "do not fit each other"),
        ([(n, (3, *s[1:]), k) for n, s, k in STACKS], {}, ShapeMismatch, "2 experts"),
        ([(n, (2, 256, 256), 18) for n, _, _ in STACKS], {}, ConfigError, "is IQ3_XXS, which"),
        ([*STACKS, ("blk.0.odd.weight", (4,), 0)], {}, ShapeMismatch, "not one that a qwen3moe"),
    ],
)
def test_what_does_not_fit_is_refused(
    tensors: Any, change: Any, error: type[ChronosError], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        opened(tmp_path, tensors, **change)


def test_a_scale_that_is_nan_is_found_while_packing(tmp_path: Path) -> None:
    opened(tmp_path, [EMBEDDING, *STACKS])
    path = tmp_path / "x.gguf"
    raw, at = bytearray(path.read_bytes()), read_gguf(path).tensors[STACKS[1][0]].offset
    raw[at + 32 * 34 + 5 * 34 + 1] = 0x7E  # expert 1, block 5
    path.write_bytes(raw)
    with pytest.raises(CorruptFileError, match="ffn_up_exps.weight, expert 1: .* block 5 is NaN"):
        pack(path, tmp_path / "packed", config=tmp_path)


def test_parts_belong_together(tmp_path: Path) -> None:
    first = tmp_path / "m-00001-of-00002.gguf"
    first.touch()
    with pytest.raises(CorruptFileError, match="1 of 2 parts are missing: m-00002-of-00002.gguf"):
        shards_of(first)
    (tmp_path / "m-00002-of-00002.gguf").touch()
    assert [path.name[2:7] for path in shards_of(first)] == ["00001", "00002"]
    assert shards_of(tmp_path / "whole.gguf") == [tmp_path / "whole.gguf"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "no config.json(.|\n)*--config DIR"),
        (["--config", ".", "--link"], "nothing of it can stay"),
        (["--config", ".", "--calibrate", "stdlib"], "layer by layer"),
    ],
)
def test_flags_that_do_not_go_with_it(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    opened(tmp_path, [EMBEDDING, *STACKS])
    flags = [str(tmp_path) if flag == "." else flag for flag in flags]
    out = ["-o", str(tmp_path / "packed"), "--force"]
    assert main.run(["pack", str(tmp_path / "x.gguf"), *flags, *out]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "packed").exists()


# What gguf's own table calls otherwise, or has under no name of a checkpoint.
OTHERWISE = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    arch = next(a for a, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    theirs, compared = gguf.get_tensor_name_map(arch, 2), 0
    architecture = ARCHITECTURES[name]
    wanted = {gguf.TENSOR_NAMES[t].format(bid=1) for t in gguf.MODEL_TENSORS[arch]}
    for own, checkpoint in architecture.names.items():
        if own in OTHERWISE:
            continue
        stem = own.removesuffix(".weight")
        if f"blk.1.{stem}" not in wanted:  # of another member of the family
            continue
        assert theirs.get_name(f"model.layers.1.{checkpoint}") == f"blk.1.{stem}"
        full = f"blk.1.{own}" if own.endswith(".weight") else f"blk.1.{own}.weight"
        back = checkpoint_name(architecture, full)
        assert back is not None and gguf_name(architecture, back) == full
        compared += 1
    assert compared > 6
    assert expert_stack("blk.12.ffn_up_exps.bias") == (12, "up_proj", "bias")
    assert checkpoint_name(architecture, "output_norm.weight") == "model.norm.weight"
