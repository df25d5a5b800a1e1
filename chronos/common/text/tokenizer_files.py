"""What the files of a model folder say of its tokenizer, put together as Transformers 5 does it.

tokenizer.json holds the vocabulary; fine-tuned folders name more tokens in tokenizer_config.json,
special_tokens_map.json and added_tokens.json, which get their ids while loading. Whether a
text begins with a bos token is tokenizer.json's alone: `add_bos_token` has no effect beside one.
Knows no bytes and no template language.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from chronos.common.errors import CorruptFileError

# Far above any vocabulary in use; a larger tokenizer.json is refused unread.
_MAX_FILE_BYTES = 256 << 20
_FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")


@dataclass(frozen=True)
class TokenizerFiles:
    """core: the vocabulary with every token that the files name. named: texts by name, as
    "eos_token". template: the chat template, None without one."""

    core: tokenizers.Tokenizer
    named: dict[str, str]
    template: str | None


def read_files(folder: Path) -> TokenizerFiles:
    """Read a folder's tokenizer. Raises CorruptFileError naming the file."""
    path, config_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    data, config = _read_json(path), _read_json(config_path, optional=True)
    try:
        core = tokenizers.Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # the library raises plain Exception
        raise CorruptFileError(f"not a tokenizer: {error}", str(path)) from None
    if "added_tokens_decoder" not in config:
        config |= _read_json(folder / "special_tokens_map.json", optional=True)
    named = _named(config)
    try:
        _add_tokens(core, named, config, _read_json(folder / "added_tokens.json", optional=True))
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise CorruptFileError(f"added tokens: {error!r}", str(config_path)) from None
    file = folder / "chat_template.jinja"
    template = read_text(file) if file.exists() else _template(config.get("chat_template"))
    return TokenizerFiles(core, named, template)


def read_text(path: Path) -> str:
    """A file of UTF-8 of a sane size. Raises CorruptFileError."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise CorruptFileError(f"larger than {_MAX_FILE_BYTES >> 20} MiB", str(path))
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise CorruptFileError("no such file", str(path), "name a model folder") from None
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"cannot be read: {error}", str(path)) from None


def _named(config: dict[str, Any]) -> dict[str, str]:
    """Texts of the tokens that have a name: eos_token, image_token ..."""
    given = {key: value for key, value in config.items() if key.endswith("_token")}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(config.get(key), dict):
            given |= config[key]
    texts = {key: _content(value) for key, value in given.items()}
    return {key: text for key, text in texts.items() if text}


def _add_tokens(
    core: tokenizers.Tokenizer,
    named: dict[str, str],
    config: dict[str, Any],
    added: dict[str, Any],
) -> None:
    """Give ids to the tokens that tokenizer.json lacks: by number those that have one in the files,
    then those that are named. A token that is there keeps its id and becomes a special one."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    special = [*named.values()]
    special += [_content(value) for value in extra] if isinstance(extra, list) else []
    numbered = {
        int(number): tokenizers.AddedToken(
            value["content"], **{key: value[key] for key in _FLAGS if key in value}
        )
        for number, value in (config.get("added_tokens_decoder") or {}).items()
    }
    if "added_tokens_decoder" not in config:
        for text, number in added.items():
            mine = text in special
            numbered[number] = tokenizers.AddedToken(text, special=mine, normalized=not mine)
    known = {token.content for token in core.get_added_tokens_decoder().values()}
    in_order = (numbered[number] for number in sorted(numbered))
    core.add_tokens([token for token in in_order if token.content not in known])
    known = {token.content for token in core.get_added_tokens_decoder().values() if token.special}
    core.add_special_tokens(
        [
            tokenizers.AddedToken(text, special=True, normalized=False)
            for text in dict.fromkeys(special)
            if text and text not in known
        ]
    )


def _content(value: Any) -> str:
    """A token is given by its text or by an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _template(value: Any) -> str | None:
    """tokenizer_config.json may hold several templates by name."""
    if isinstance(value, list):
        named = {v.get("name"): v.get("template") for v in value if isinstance(v, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"not JSON: {error}", str(path)) from None
    if not isinstance(data, dict):
        raise CorruptFileError("not a JSON object", str(path))
    return data
