"""Quantised checkpoints without a framework: which are read, which are refused, and by what words.

`tests/native/test_torch_quantised.py` has what they compute.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.errors import ChronosError, ConfigError, CorruptFileError, ShapeMismatch
from chronos.common.layout import inspect, open_layout, pack, verify
from chronos.common.layout.quantised import shape_of, split
from chronos.common.model.quantization import coding_of
from tests.support.tiny_guest import Arrays, E, tiny_guest

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GROUPS = {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": GROUPS,
}


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, ("mxfp4", "mxfp4")),
        (FP8, ("fp8", "fp8-128x128")),
        (FP8 | {"weight_block_size": None}, ("fp8 without weight_block_size", "")),
        (FP8 | {"weight_block_size": [0, 128]}, ("fp8 without weight_block_size", "")),
        (FP8 | {"weight_block_size": [True, 128]}, ("fp8 without weight_block_size", "")),
        (PACKED, ("compressed-tensors", "compressed-int4")),
        (PACKED | {"format": "marlin-24"}, ("compressed-tensors marlin-24", "")),
        (PACKED | {"config_groups": [1]}, ("compressed-tensors pack-quantized", "")),
        (PACKED | {"config_groups": {"a": {"weights": {"num_bits": 3, "type": "int"}}}},
         ("compressed-tensors pack-quantized", "")),
        ({"quant_method": "gptq", "bits": 4}, ("gptq", "gptq-int4")),
        ({"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"},
         ("gptq", "gptq2-int8")),
        ({"quant_method": "gptq", "bits": 3}, ("gptq", "")),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, ("gptq", "")),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, ("awq", "")),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("bitsandbytes", "")),
        ({"bits": 4}, ("unknown", "")),
        ({"quant_method": 7}, ("7", "")),
    ],
)  # fmt: skip
def test_a_method_is_an_encoding_or_refused(settings: Any, found: tuple[str, str]) -> None:
    assert coding_of(settings) == found


@pytest.mark.parametrize(
    ("encoding", "kinds", "shape"),
    [
        ("mxfp4", {"blocks": ("U8", (48, 2, 16)), "scales": ("U8", (48, 2))}, (48, 64)),
        ("fp8-128x128", {"weight": ("F8_E4M3", (576, 7168)),
                         "weight_scale_inv": ("F32", (5, 56))}, (576, 7168)),
        ("fp8-128x128", {"weight": ("F8_E4M3", (192, 64)),
                         "weight_scale_inv": ("F8_E8M0", (2, 1))}, (192, 64)),
        ("compressed-int4", {"weight_packed": ("I32", (24, 8)), "weight_scale": ("BF16", (24, 2)),
                             "weight_shape": ("I64", (2,)),
                             "weight_zero_point": ("I32", (3, 2))}, (24, 64)),
        ("compressed-fp8", {"weight": ("F8_E4M3", (24, 64)), "weight_scale": ("BF16", (24, 1))},
         (24, 64)),
        ("gptq-int4", {"qweight": ("I32", (8, 24)), "scales": ("F16", (2, 24)),
                       "qzeros": ("I32", (2, 3)), "g_idx": ("I32", (64,))}, (24, 64)),
        ("awq-int4", {"qweight": ("I32", (64, 3)), "scales": ("F16", (2, 24)),
                      "qzeros": ("I32", (2, 3))}, (24, 64)),
        ("mlx-affine6", {"weight": ("U32", (24, 12)), "scales": ("BF16", (24, 2)),
                         "biases": ("BF16", (24, 2))}, (24, 64)),
        ("mlx-nvfp4", {"weight": ("U32", (24, 8)), "scales": ("U8", (24, 4))}, (24, 64)),
    ],
)  # fmt: skip
def test_shapes_say_how_large_a_matrix_is(
    encoding: str, kinds: Any, shape: tuple[int, int]
) -> None:
    assert shape_of(encoding, kinds, "x") == shape
    assert shape_of(encoding, kinds | {"bias": ("F32", (24,))}, "x") == shape
    for kind, (dtype, size) in kinds.items():
        if kind != "weight_zero_point":
            with pytest.raises(ShapeMismatch, match="x is no matrix as"):
                shape_of(encoding, {k: v for k, v in kinds.items() if k != kind}, "x")
        for wrong in ((dtype, (*size, 1)), (dtype, (0, *size[1:])), ("I8", size)):
            if kind == "weight_scale" and wrong[1] == (0, 1):
                continue
            with pytest.raises(ShapeMismatch, match="x is no matrix as"):
                shape_of(encoding, kinds | {kind: wrong}, "x")


def test_names_are_taken_apart() -> None:
    assert split("gate_up_proj_blocks") == ("gate_up_proj", "blocks")
    assert split("gate_up_proj_bias") == ("gate_up_proj", "bias")
    assert split("gate_up_proj") == ("gate_up_proj", "weight")
    assert split("a.q_proj.weight_scale_inv") == ("a.q_proj", "weight_scale_inv")
    assert split("model.embed_tokens.weight") == ("model.embed_tokens", "weight")


def as_mxfp4(arrays: Arrays) -> None:
    """The experts of a gpt-oss of tiny_guest's sizes, 32 wide."""
    for name in [name for name in arrays if ".experts." in name]:
        del arrays[name]
    for layer in (1, 2):
        at = f"model.layers.{layer}.mlp.experts."
        arrays[at + "gate_up_proj_blocks"] = ("U8", (E, 64, 1, 16), bytes(range(16)) * (E * 64))
        arrays[at + "gate_up_proj_scales"] = ("U8", (E, 64, 1), bytes([120]) * (E * 64))
        arrays[at + "gate_up_proj_bias"] = ("BF16", (E, 64), bytes(E * 128))
        arrays[at + "down_proj_blocks"] = ("U8", (E, 32, 1, 16), bytes(range(16)) * (E * 32))
        arrays[at + "down_proj_scales"] = ("U8", (E, 32, 1), bytes([121]) * (E * 32))
        arrays[at + "down_proj_bias"] = ("BF16", (E, 32), bytes(E * 64))


def gpt_oss(folder: Path, change: Callable[[Arrays], object] = lambda arrays: None) -> Path:
    def both(arrays: Arrays) -> None:
        as_mxfp4(arrays)
        change(arrays)

    config = {"quantization_config": {"quant_method": "mxfp4"}}
    return tiny_guest(folder, "gpt_oss", change=both, config=config)


def test_a_record_has_the_bytes_of_the_source_and_is_told_by_inspect(tmp_path: Path) -> None:
    source = gpt_oss(tmp_path / "src")
    pack(source, tmp_path / "dst")
    layout = open_layout(tmp_path / "dst")
    record = layout.records[1, 0]
    assert [(t.name, t.nbytes) for t in record.tensors] == [
        ("gate_up_proj_blocks", 1024), ("gate_up_proj_scales", 64), ("gate_up_proj_bias", 128),
        ("down_proj_blocks", 512), ("down_proj_scales", 32), ("down_proj_bias", 64),
    ]  # fmt: skip
    for folder in (source, tmp_path / "dst"):
        found = inspect(folder)
        assert (found["encoding"], found["quantization"]) == ("mxfp4", "mxfp4")
        assert (found["dialect"], found["expert_bytes"]) == ("quantised", record.nbytes)
    assert verify(tmp_path / "dst").encodings == ["mxfp4"]
    assert verify(source).records == 2 * E


AT = "model.layers.2.mlp.experts."


def put(name: str, array: tuple[str, tuple[int, ...], bytes]) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({AT + name: array})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (put("down_proj_scales", ("U8", (E, 32, 1), bytes(127) + b"\xff")), CorruptFileError,
         "expert 3: down_proj_scales: element 31 is NaN"),
        (put("down_proj_bias", ("BF16", (E, 32), b"\x80\x7f" * (E * 32))), CorruptFileError,
         "down_proj_bias: element 0 is NaN"),
        (put("down_proj_scales", ("U8", (E, 32), bytes(E * 32))), ShapeMismatch,
         "down_proj of the experts of layer 2 is no matrix as mxfp4 stores them"),
        (put("down_proj_blocks", ("U8", (E, 32, 2, 8), bytes(E * 512))), ShapeMismatch,
         "is no matrix as mxfp4"),
        (put("down_proj_blocks", ("I8", (E, 32, 1, 16), bytes(E * 512))), ShapeMismatch,
         "blocks I8"),
        (lambda arrays: arrays.pop(AT + "gate_up_proj_scales"), ShapeMismatch,
         "gate_up_proj of the experts of layer 2 is no matrix"),
        (lambda arrays: arrays.pop(AT + "down_proj_blocks"), ShapeMismatch, "have only"),
        (put("down_proj_zeros", ("U8", (E, 32, 1), bytes(E * 32))), ShapeMismatch,
         "down_proj_zeros lies among the routed experts under a name"),
        (lambda arrays: arrays.update({
            AT + "down_proj_blocks": ("U8", (E, 16, 1, 16), bytes(E * 256)),
            AT + "down_proj_scales": ("U8", (E, 16, 1), bytes(E * 16)),
         }), ShapeMismatch, "experts of layer 2 do not fit together"),
        (lambda arrays: arrays.update(
            {"model.layers.1.self_attn.q_proj.weight": ("F8_E4M3", (4, 4), bytes(16))}
         ), ShapeMismatch, "q_proj is no matrix as mxfp4 stores them: weight F8_E4M3"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_what_they_should_be(
    change: Callable[[Arrays], object], error: type[ChronosError], words: str, tmp_path: Path
) -> None:
    source = gpt_oss(tmp_path / "src", change)
    with pytest.raises(error, match=words):
        pack(source, tmp_path / "dst")
    assert not (tmp_path / "dst/experts/cluster_manifest.json").exists()


def test_a_scale_that_rots_is_found(tmp_path: Path) -> None:
    pack(gpt_oss(tmp_path / "src"), tmp_path / "dst")
    record = open_layout(tmp_path / "dst").records[2, 1]
    scales = next(t for t in record.tensors if t.name == "down_proj_scales")
    with (tmp_path / "dst/experts" / record.file).open("r+b") as file:
        file.seek(record.offset + scales.offset + 5)
        file.write(b"\x7a")
    found = verify(tmp_path / "dst", collect=True)
    assert "checksum mismatch" in found.problems[0]["what"]


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "torchao", "foo"])
def test_other_methods_are_refused_before_a_byte_is_packed(method: str, tmp_path: Path) -> None:
    source = gpt_oss(tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"quantised \({method}\)(.|\n)*MLX-LM"):
        pack(source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_experts_in_an_order_that_points_nowhere_are_refused(tmp_path: Path) -> None:
    def change(arrays: Arrays) -> None:
        for name in [name for name in arrays if ".experts." in name]:
            matrix = name.removesuffix(".weight")
            _, (rows, columns), _ = arrays.pop(name)
            arrays[f"{matrix}.qweight"] = ("I32", (columns // 8, rows), bytes(columns * rows // 2))
            arrays[f"{matrix}.qzeros"] = ("I32", (1, rows // 8), bytes(rows // 2))
            arrays[f"{matrix}.scales"] = ("F16", (1, rows), bytes(2 * rows))
            arrays[f"{matrix}.g_idx"] = ("I32", (columns,), bytes(4 * columns))
        name = "model.layers.2.mlp.experts.1.up_proj.g_idx"
        dtype, shape, _ = arrays[name]
        arrays[name] = (dtype, shape, np.array([0] * 15 + [1], "<i4").tobytes())

    config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    source = tiny_guest(tmp_path / "src", change=change, config=config)
    with pytest.raises(CorruptFileError, match=r"up_proj.g_idx: 1 is no index below 1"):
        pack(source, tmp_path / "dst")
