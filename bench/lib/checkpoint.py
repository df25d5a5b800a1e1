"""Writing a Qwen3-MoE that every runtime of the comparison can read.

Byte-level tokenizer whose 512 ids all have names; config.json in the spellings of Transformers 4
and 5; a GGUF in F16 beside it. Not covered: other architectures, quantised types.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen3MoeConfig

VOCABULARY = 512
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
PAD, EOS = len(_ALPHABET), len(_ALPHABET) + 2
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Tokenizer:
    # llama.cpp wants a merge: of two bytes that no text has.
    pair = ("\u00ff", "\u00fe")
    names = [*_ALPHABET, *_SPECIAL, "".join(pair)]
    spare = [f"<|spare{i}|>" for i in range(VOCABULARY - len(names))]
    vocabulary = {name: i for i, name in enumerate(names + spare)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[pair]))
    # Cut as GPT-2's, which has a name in llama.cpp; here all ways to cut give the same ids.
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in _SPECIAL])
    return made


def encode(text: str) -> np.ndarray[Any, Any]:
    """Ids of the text's bytes, uint16, as `tokenizer` gives them."""
    table = np.zeros(256, np.uint16)
    for character, byte in tokenizer_bytes().items():
        table[byte] = _ALPHABET.index(character)
    return table[np.frombuffer(text.encode("utf-8"), np.uint8)]


def tokenizer_bytes() -> dict[str, int]:
    """GPT-2's printable character of each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def config(
    *, layers: int, experts: int, top_k: int, hidden: int, expert_hidden: int
) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=expert_hidden,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def save_sides(folder: Path) -> None:
    """The tokenizer, and config.json in the spellings of old and new libraries."""
    tokenizer().save(str(folder / "tokenizer.json"))
    names = {"eos_token": _SPECIAL[2], "pad_token": _SPECIAL[0], "chat_template": _TEMPLATE}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | kind, indent=2))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    theta = config.get("rope_parameters", {}).get("rope_theta", config.get("rope_theta"))
    experts = config.get("num_local_experts", config.get("num_experts"))
    config |= {"num_experts": experts, "num_local_experts": experts, "rope_theta": theta}
    config |= {"torch_dtype": config.get("dtype"), "rope_scaling": None}
    path.write_text(json.dumps(config, indent=2))


def write_gguf(folder: Path, path: Path) -> None:
    """The same weights in F16 as llama.cpp reads them; norms and routers in float32."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "qwen3moe", use_temp_file=False)
    _write_header(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, config["num_hidden_layers"])
    tensors = _tensors(folder)
    for name in [n for n in tensors if ".experts." not in n]:
        _add(writer, names.get_name(name, try_suffixes=(".weight",)), tensors[name])
    for layer in range(config["num_hidden_layers"]):
        for part in ("gate", "up", "down"):
            prefix = f"model.layers.{layer}.mlp.experts"
            experts = [
                tensors[f"{prefix}.{e}.{part}_proj.weight"] for e in range(config["num_experts"])
            ]
            _add(writer, f"blk.{layer}.ffn_{part}_exps.weight", torch.stack(experts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_header(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_name("chronos-bench")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    control = gguf.TokenType.CONTROL
    types = [control if t in _SPECIAL else gguf.TokenType.NORMAL for t in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["\u00ff \u00fe"])
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(PAD)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def _add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor) -> None:
    small = tensor.ndim < 2 or "gate_inp" in name
    writer.add_tensor(name, tensor.float().numpy() if small else tensor.half().numpy())
