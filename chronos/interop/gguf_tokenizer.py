"""A tokenizer as fields of a GGUF.

llama.cpp cuts text by rules that a file only names (`tokenizer.ggml.pre`), so a tokenizer is
written where its own rule is one of those known here, and refused else: with another one's name
text would become other ids, silently. Only byte-level BPE. The rules are those of llama.cpp's
src/llama-vocab.cpp, the tokenizer.json files those of the models the names come from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf

from chronos.common.errors import ConfigError
from chronos.common.model.guest import end_ids
from chronos.common.text.tokenizer import Tokenizer
from chronos.common.text.tokenizer_files import read_files

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# By the regular expression that cuts text before byte-level BPE.
_RULES = {
    f"{_WORDS}|[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    f"{_WORDS}|[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|\\p{{N}}{_REST}": "qwen2",
    f"{_UPPER}*{_LOWER}+{_WORDS}?|{_UPPER}+{_LOWER}*{_WORDS}?|\\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "gpt-4o",
}


def tokenizer_fields(writer: gguf.GGUFWriter, src: Path, vocab_size: int) -> None:
    """Write the tokens, merges, named ids and chat template of a folder. Raises ConfigError for a
    tokenizer that llama.cpp would read otherwise."""
    if not (src / "tokenizer.json").exists():
        writer.add_tokenizer_model("none")  # ids in, ids out
        return
    core = json.loads(read_files(src).core.to_str())
    bpe, rule = core["model"], _rule(core)
    if not rule:
        raise ConfigError(
            "llama.cpp has no known name for the way this tokenizer cuts text",
            str(src / "tokenizer.json"),
            "without tokenizer.json beside the model a GGUF of ids alone is written",
        )
    tokens, kinds = _tokens(core, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    writer.add_token_merges(pairs)
    _named(writer, Tokenizer.load(src), src)


def _rule(core: dict[str, Any]) -> str:
    """llama.cpp's name for how text is cut; "" where it is not known."""
    normalizer = (core.get("normalizer") or {"type": "NFC"}).get("type")
    if core["model"].get("type") != "BPE" or normalizer != "NFC":
        return ""
    cut = core.get("pre_tokenizer") or {}
    parts = cut.get("pretokenizers", [cut])
    if parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return ""
    kinds, own = [part["type"] for part in parts[:-1]], parts[-1].get("use_regex", True)
    if not kinds:
        return "gpt-2" if own else ""
    if kinds == ["Digits"] and parts[0].get("individual_digits") and own:
        return "smollm"
    if kinds == ["Split"] and not own and parts[0].get("behavior") == "Isolated":
        return _RULES.get(parts[0]["pattern"].get("Regex", ""), "")
    return ""


def _tokens(core: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Every id's token and kind; ids that name none are unused ones."""
    kind = gguf.TokenType
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    kinds = [int(kind.UNUSED)] * vocab_size
    for token, number in core["model"]["vocab"].items():
        tokens[number], kinds[number] = token, int(kind.NORMAL)
    for added in core["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = int(kind.CONTROL if added["special"] else kind.USER_DEFINED)
    return tokens, kinds


def _named(writer: gguf.GGUFWriter, tokenizer: Tokenizer, src: Path) -> None:
    """Ids that begin, end and fill, and the chat template."""
    before = tokenizer.encode_prompt("")
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(False)
    writer.add_bos_token_id(before[0] if before else tokenizer.eos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    others = sorted((tokenizer.stop_ids | end_ids(src)) - {tokenizer.eos_id})
    if others:
        writer.add_eot_token_id(others[0])
    if tokenizer.can_chat:
        writer.add_chat_template(tokenizer.template.source)
