"""A tokenizer as fields of a GGUF.

llama.cpp cuts text by rules that a file only names (`tokenizer.ggml.pre`), so a tokenizer is
written where its own rule is one of those known here, and refused else: with another one's name
text would become other ids, silently. Byte-level BPE, and SentencePiece's BPE as Llama's and
Mixtral's tokenizer.json have it. The rules are those of llama.cpp's src/llama-vocab.cpp, the
tokenizer.json files those of the models the names come from.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf

from chronos.common.errors import ConfigError
from chronos.common.model.guest import end_ids
from chronos.common.text.tokenizer import Tokenizer
from chronos.common.text.tokenizer_files import read_files

_SPACE = "\u2581"  # SentencePiece's mark
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# By the regular expression that cuts text before byte-level BPE. llama.cpp's "gpt-4o" is no exact
# one: it cuts otherwise at combining marks and at a space that ends a text.
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
    last = max([*core["model"]["vocab"].values(), *(a["id"] for a in core["added_tokens"])])
    if last >= vocab_size:
        raise ConfigError(
            f"the tokenizer has a token {last}, the model's vocabulary ends at {vocab_size - 1}",
            str(src / "tokenizer.json"),
            "put the tokenizer the model was trained with beside it, or take out what was added",
        )
    tokens, kinds = _tokens(core, vocab_size)
    if rule := _rule(core):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(rule)
        writer.add_token_merges([" ".join(pair) for pair in _merges(core)])
    elif (prefix := _space_prefix(core)) is not None:
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(prefix)
        writer.add_token_scores(_scores(core, tokens))
        kinds = [_piece_kind(core, token, kind) for token, kind in zip(tokens, kinds, strict=True)]
        writer.add_unk_token_id(core["model"]["vocab"][core["model"]["unk_token"]])
    else:
        raise ConfigError(
            "llama.cpp has no known name for the way this tokenizer cuts text",
            str(src / "tokenizer.json"),
            "without tokenizer.json beside the model a GGUF of ids alone is written",
        )
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _named(writer, Tokenizer.load(src), src)


def _merges(core: dict[str, Any]) -> list[list[str]]:
    """Pairs of tokens in the order in which they are merged."""
    return [p.split(" ") if isinstance(p, str) else p for p in core["model"]["merges"]]


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
        rule = _RULES.get(parts[0]["pattern"].get("Regex", ""), "")
        # Whether a word that is a token is taken as it is: llama.cpp does so by this name alone.
        whole = bool(core["model"].get("ignore_merges"))
        return "" if rule in ("llama-bpe", "qwen2") and whole != (rule == "llama-bpe") else rule
    return ""


def _space_prefix(core: dict[str, Any]) -> bool | None:
    """Whether a text begins with a space of its own, of a tokenizer of SentencePiece's BPE; None
    for others, and for merges that llama.cpp would do otherwise: it joins any two pieces that are
    a token together, the one of the best score first."""
    model, normalizer, cut = core["model"], core.get("normalizer"), core.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or not model.get("byte_fallback") or not model.get("unk_token"):
        return None
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if not cut and normalizer == {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": _SPACE}, replace],
    }:
        prefix = True
    elif normalizer is None and cut.get("type") == "Metaspace" and not cut.get("split"):
        prefix = cut.get("prepend_scheme") != "never"
    else:
        return None
    vocabulary, pairs = model["vocab"], {tuple(pair) for pair in _merges(core)}
    for token in vocabulary:
        for cut_at in range(1, len(token)):
            pair = token[:cut_at], token[cut_at:]
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in pairs:
                return None
    return prefix


def _scores(core: dict[str, Any], tokens: list[str]) -> list[float]:
    """The better, the earlier a token is merged."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(_merges(core)):
        rank.setdefault("".join(pair), number)
    return [-float(rank.get(token, len(tokens) + len(rank))) for token in tokens]


def _piece_kind(core: dict[str, Any], token: str, kind: int) -> int:
    if token == core["model"]["unk_token"]:
        return int(gguf.TokenType.UNKNOWN)
    return int(gguf.TokenType.BYTE) if _BYTE.fullmatch(token) else kind


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
