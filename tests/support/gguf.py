"""Tiny models as GGUF files, as llama.cpp's converter names and arranges them, by the gguf package.

The package writes and quantises; what has no writer there (K-quants) is drawn at random. `save`
gives the plain checkpoint that the file stands for, dequantised by the package: the reference.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file

from chronos.common.layout.gguf_names import ARCHITECTURES, gguf_name
from tests.support.quantised import _write as write_checkpoint

ARCHITECTURE_OF = {kind: name for name, a in ARCHITECTURES.items() for kind in a.model_types}
_EXPERT = re.compile(r"(model\.layers\.(\d+)\.\w+)\.(?:experts\.)?(.+)")
_ONE = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down"}
Coded = tuple[np.ndarray, np.ndarray]  # what lies in the file, and the float32 it stands for


# Of types that the gguf package does not write: where a block has its scales, and the largest
# number that the first of them is a factor of.
DRAWN = {
    "Q2_K": ((80, 82), 15 * 3),
    "Q3_K": ((108,), 32 * 4),
    "Q4_K": ((0, 2), 63 * 15),
    "Q5_K": ((0, 2), 63 * 31),
    "Q6_K": ((208,), 127 * 32),
    "IQ4_NL": ((0,), 127),
    "IQ4_XS": ((0,), 32 * 127),
}


def coded(weight: np.ndarray, kind: str) -> Coded:
    """A tensor in a type of ggml, by its rows."""
    kind_ = gguf.GGMLQuantizationType[kind]
    raw = _drawn(weight, kind) if kind in DRAWN else quantize(weight, kind_)
    return raw, dequantize(raw, kind_)


def _drawn(weight: np.ndarray, kind: str) -> np.ndarray:
    """Blocks with random codes and scales, their values about as large as the weight's."""
    rng = np.random.default_rng(weight.shape[-1])
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (weight.size // values, size), dtype=np.uint8)
    spread = float(np.abs(weight).max())
    at, most = DRAWN[kind]
    scale = (spread / most * rng.uniform(0.5, 1, (len(blocks), 1))).astype(np.float16)
    for i, offset in enumerate(at):
        blocks[:, offset : offset + 2] = (scale * 7 if i else scale).view(np.uint8)
    return blocks.reshape(*weight.shape[:-1], -1)


def paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head as llama.cpp rotates them: row by row from either half."""
    order = np.arange(len(rows)).reshape(heads, 2, -1).transpose(0, 2, 1).reshape(-1)
    return rows[order]


def unpaired(rows: np.ndarray, heads: int) -> np.ndarray:
    order = np.arange(len(rows)).reshape(heads, 2, -1).transpose(0, 2, 1).reshape(-1)
    out = np.empty_like(rows)
    out[order] = rows
    return out


def experts_of(tensors: dict[str, np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
    """By layer: gate, up [E, F, D] and down [E, D, F], and biases [E, N] as "gate.bias"."""
    found: dict[int, dict[str, Any]] = {}
    for name, array in tensors.items():
        if not (part := _EXPERT.fullmatch(name)):
            continue
        layer, rest = found.setdefault(int(part[2]), {}), part[3]
        if one := re.fullmatch(r"(\d+)\.(\w+)\.weight", rest):
            layer.setdefault(_ONE.get(one[2], "down"), {})[int(one[1])] = array
        elif rest == "gate_up_proj":  # gpt-oss: [E, D, 2F], interleaved
            layer["gate"], layer["up"] = (array[:, :, i::2].transpose(0, 2, 1) for i in (0, 1))
        elif rest == "gate_up_proj_bias":
            layer["gate.bias"], layer["up.bias"] = array[:, ::2], array[:, 1::2]
        elif rest == "down_proj":
            layer["down"] = array.transpose(0, 2, 1)
        elif rest == "down_proj_bias":
            layer["down.bias"] = array
        elif rest == "input_linear.weight":  # Granite
            layer["gate"], layer["up"] = np.split(array, 2, axis=1)
        elif rest == "output_linear.weight":
            layer["down"] = array
    for layer in found.values():
        for key, value in layer.items():
            if isinstance(value, dict):
                layer[key] = np.stack([value[e] for e in sorted(value)])
    return {layer: parts for layer, parts in found.items() if parts}


def is_expert(name: str) -> bool:
    rest = m[3] if (m := _EXPERT.fullmatch(name)) else ""
    routed = r"\d+\.\w+\.weight|gate_up_proj(_bias)?|down_proj(_bias)?|(in|out)put_linear\.weight"
    return bool(re.fullmatch(routed, rest)) and "mlp.shared" not in name


def save(
    model: Any,
    folder: Path,
    expert_type: Callable[[int, str], str],
    dense_type: str = "Q8_0",
    split_kv_b: bool = True,
    **options: Any,
) -> Path:
    """Write folder/source (config and tokenizer's place), folder/plain (what the file stands for),
    and folder/model.gguf. expert_type: of a layer's gate, up and down. Sets the model's weights."""
    config = model.config
    model.save_pretrained(folder / "source")
    state = load_file(folder / "source/model.safetensors")
    (folder / "source/model.safetensors").unlink()
    arrays = {name: t.float().numpy() for name, t in state.items()}
    name = ARCHITECTURE_OF[config.model_type]
    architecture = ARCHITECTURES[name]
    writer = gguf.GGUFWriter(folder / "model.gguf", name, **options)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    plain: dict[str, np.ndarray] = {}

    def put(gguf_: str, array: np.ndarray, kind: str) -> np.ndarray:
        small = array.ndim == 1 or array.shape[-1] % 32 or "gate_inp" in gguf_
        if array.shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]:
            kind = "Q8_0"  # as llama.cpp falls back
        if small or kind == "F32":
            writer.add_tensor(gguf_, np.ascontiguousarray(array))
            return array
        raw, value = coded(np.ascontiguousarray(array), kind)
        writer.add_tensor(gguf_, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
        return value

    for own, array in arrays.items():
        if is_expert(own):
            continue
        if own.endswith("kv_b_proj.weight") and split_kv_b:
            per_head = array.reshape(heads, -1, array.shape[-1])
            nope = config.qk_nope_head_dim
            at = f"blk.{own.split('.')[2]}"
            k_b = put(f"{at}.attn_k_b.weight", per_head[:, :nope].transpose(0, 2, 1), dense_type)
            v_b = put(f"{at}.attn_v_b.weight", per_head[:, nope:], dense_type)
            whole = np.concatenate([k_b.transpose(0, 2, 1), v_b], 1)
            plain[own] = whole.reshape(array.shape)
            continue
        theirs = gguf_name(architecture, own)
        assert theirs is not None, own
        count = heads if ".q_proj." in own else kv_heads if ".k_proj." in own else 0
        if architecture.permuted and count:
            plain[own] = unpaired(put(theirs, paired(array, count), dense_type), count)
        elif own.endswith("shared_expert_gate.weight"):
            plain[own] = put(theirs, array[0], dense_type)[None]
        else:
            plain[own] = put(theirs, array, dense_type)
    stacks = {}
    for layer, parts in experts_of({n: a for n, a in arrays.items() if is_expert(n)}).items():
        for part, array in parts.items():
            projection, _, kind = part.partition(".")
            theirs = f"blk.{layer}.ffn_{projection}_exps.{kind or 'weight'}"
            wanted = "F32" if kind else expert_type(layer, projection)
            stacks[layer, part] = put(theirs, array, wanted)
    for own, array in arrays.items():
        if is_expert(own):
            plain[own] = _given_back(own, array, stacks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.save_pretrained(folder / "plain")
    values = {
        n: torch.from_numpy(np.ascontiguousarray(a)).to(state[n].dtype) for n, a in plain.items()
    }
    write_checkpoint(folder / "plain", values)
    loaded = type(model).from_pretrained(folder / "plain", dtype=model.dtype)
    model.load_state_dict(loaded.state_dict())
    return folder / "model.gguf"


def _given_back(own: str, like: np.ndarray, stacks: dict[Any, np.ndarray]) -> np.ndarray:
    """A checkpoint's tensor of the stacks' values."""
    part = _EXPERT.fullmatch(own)
    assert part is not None
    layer, rest, out = int(part[2]), part[3], np.empty_like(like)
    if one := re.fullmatch(r"(\d+)\.(\w+)\.weight", rest):
        return stacks[layer, _ONE.get(one[2], "down")][int(one[1])]
    if rest == "gate_up_proj":
        out[:, :, ::2] = stacks[layer, "gate"].transpose(0, 2, 1)
        out[:, :, 1::2] = stacks[layer, "up"].transpose(0, 2, 1)
        return out
    if rest == "gate_up_proj_bias":
        out[:, ::2], out[:, 1::2] = stacks[layer, "gate.bias"], stacks[layer, "up.bias"]
        return out
    if rest == "input_linear.weight":
        return np.concatenate([stacks[layer, "gate"], stacks[layer, "up"]], 1)
    if rest == "down_proj":
        return stacks[layer, "down"].transpose(0, 2, 1)
    return stacks[layer, "down.bias" if rest == "down_proj_bias" else "down"]
