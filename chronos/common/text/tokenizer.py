"""Text to token ids and back, in linear time and without losing a byte.

Special tokens written in text stay text; only `apply_chat` emits control tokens, and only those the
template itself wrote. Any `tokenizer.json` can be loaded whose tokens stand for bytes: byte-level
BPE, and the SentencePiece style (a mark for the space, `<0x0A>` for a byte that no token has).
Not covered: other decoders (WordPiece), tokenizers that need code.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from chronos.common.disk.atomic import atomic_write
from chronos.common.errors import CorruptFileError, DataError
from chronos.common.model.guest import end_ids
from chronos.common.text.chat_template import CHAT_TEMPLATE, NO_TEMPLATE, ChatTemplate

PAD, EOS, END = "<|pad|>", "<|eos|>", "<|end|>"
SPECIAL_TOKENS = (PAD, EOS, "<|user|>", "<|assistant|>", "<|system|>", END)
# Far above any vocabulary in use; a larger tokenizer.json is refused unread.
_MAX_FILE_BYTES = 256 << 20
# Noncharacters, one of which marks special-token text that came from a message (see apply_chats).
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_SPACE = "\u2581"  # SentencePiece's mark
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Decoders of the SentencePiece style: token by token they do what `_spaced_bytes` does.
_SPACED = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}

# [{"role": "user", "content": "..."}, ...]
Messages = Sequence[Mapping[str, Any]]


class Tokenizer:
    """Encodes and decodes; knows its end and pad tokens and its chat template."""

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        template: str = CHAT_TEMPLATE,
        eos: str = EOS,
        pad: str = PAD,
        bos: str = "",
        vocab_size: int = 0,
        where: str = "",
    ) -> None:
        """vocab_size: ids of the model; those that name no token decode to nothing."""
        self._core = core
        core.encode_special_tokens = True  # special-token text in the input is text
        core.no_truncation()
        core.no_padding()
        self.template = ChatTemplate(template)
        self._eos, self._bos = eos, bos
        self.eos_id, self.pad_id = self._special_id(eos, where), self._special_id(pad, where)
        self._bytes, self._leading_space = _token_bytes(core, where)
        self._bytes += [b""] * (vocab_size - len(self._bytes))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from `texts`; at most `vocab_size` ids, the special tokens first."""
        least = 256 + len(SPECIAL_TOKENS)
        if vocab_size < least:
            raise DataError(f"a byte-level vocabulary needs {least} ids or more, not {vocab_size}")
        core = tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        core.train_from_iterator(texts, trainer)
        return cls(core)

    @classmethod
    def load(cls, folder: str | Path, vocab_size: int = 0) -> Tokenizer:
        """Read tokenizer.json and what lies beside it. Raises CorruptFileError naming the file."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        config = _read_json(folder / "tokenizer_config.json", optional=True)
        try:
            core = tokenizers.Tokenizer.from_str(json.dumps(_read_json(path)))
        except CorruptFileError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise CorruptFileError(f"not a tokenizer: {error}", str(path)) from None
        own = core.token_to_id(EOS) is not None
        file = folder / "chat_template.jinja"
        template = _read(file) if file.exists() else _template(config.get("chat_template"), own)
        eos = _token_name(config.get("eos_token"), EOS if own else _end_token(core, folder))
        own_pad = core.token_to_id(PAD) is not None
        pad = _token_name(config.get("pad_token"), PAD if own_pad else eos)
        bos = _token_name(config.get("bos_token"), "")
        return cls(
            core,
            template=template,
            eos=eos,
            pad=pad,
            bos=bos,
            vocab_size=vocab_size,
            where=str(path),
        )

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._eos,
            "pad_token": self._core.id_to_token(self.pad_id),
            **({"bos_token": self._bos} if self._bos else {}),
            "clean_up_tokenization_spaces": False,
        }
        core = json.loads(self._core.to_str())
        texts = {
            "tokenizer.json": json.dumps(core, ensure_ascii=False, indent=1) + "\n",
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
            "chat_template.jinja": self.template.source,
        }
        for name, text in texts.items():
            atomic_write(folder / name, [text.encode()])

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a reply: end of text and, where the vocabulary has it, end of turn."""
        end = self._core.token_to_id(END)
        return frozenset({self.eos_id} if end is None else {self.eos_id, end})

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never a special token. Raises DataError on a lone surrogate."""
        self._check(text)
        ids: list[int] = self._core.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text from its very start: after the ids the tokenizer begins one with."""
        return self._prefix + self.encode(text)

    @cached_property
    def _prefix(self) -> list[int]:
        """Control tokens before a text (Llama's `<s>`); none where tokenizer.json adds none."""
        given = self._core.encode("a", add_special_tokens=True)
        masked = zip(given.ids, given.special_tokens_mask, strict=True)
        return [token for token, _ in itertools.takewhile(lambda pair: pair[1], masked)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts on all cores."""
        for text in texts:
            self._check(text)
        return [e.ids for e in self._core.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids without special tokens; bytes that are not UTF-8 become U+FFFD."""
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._leading_space else text

    def token_bytes(self, token: int) -> bytes:
        """The bytes one id stands for, empty for special tokens. Raises DataError if unknown."""
        if not 0 <= token < len(self._bytes):
            raise DataError(f"token id {token} is outside the vocabulary of {len(self._bytes)}")
        return self._bytes[token]

    def apply_chat(self, messages: Messages, *, reply: bool = True) -> list[int]:
        """Ids of a conversation under the chat template, opened for the assistant if `reply`."""
        return self.apply_chats([(messages, reply)])[0]

    def apply_chats(self, chats: Sequence[tuple[Messages, bool]]) -> list[list[int]]:
        """`apply_chat` of many (messages, reply), for one rendering. Raises TemplateError.

        Special-token text inside a message is marked before rendering, so that only the template's
        own control tokens match; the mark is taken out again before the text is encoded.
        """
        mark = _free_mark(chats)

        def protect(text: str) -> str:
            self._check(text)
            return self._control.sub(lambda m: m[0][0] + mark + m[0][1:], text)

        marked = [(_map_strings(messages, protect), reply) for messages, reply in chats]
        texts = self.template.render_all(marked, bos_token=self._bos, eos_token=self._eos)
        return [self._encode_rendered(text, mark) for text in texts]

    def _encode_rendered(self, text: str, mark: str) -> list[int]:
        if mark not in text:  # as other libraries do: how a piece is cut may hang on what is before
            self._core.encode_special_tokens = False
            try:
                return list(self._core.encode(text, add_special_tokens=False).ids)
            finally:
                self._core.encode_special_tokens = True
        ids: list[int] = []
        end = 0
        for match in self._control.finditer(text):
            ids += self.encode(text[end : match.start()].replace(mark, ""))
            ids.append(self._special_id(match[0]))
            end = match.end()
        return ids + self.encode(text[end:].replace(mark, ""))

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Matches every special token's text, the longest first."""
        added = self._core.get_added_tokens_decoder().values()
        names = sorted((t.content for t in added if t.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def _special_id(self, name: str, where: str = "") -> int:
        token = self._core.token_to_id(name)
        if token is None:
            raise CorruptFileError(f"the vocabulary has no token {name!r}", where)
        return int(token)

    @staticmethod
    def _check(text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"lone surrogate at character {error.start}: not valid text") from None


class StreamDecoder:
    """Turns ids into text one at a time; holds a character's bytes back until it is complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Text that `token` completes, possibly empty. Constant time per byte."""
        return self._utf8.decode(self._bytes_of(token))

    def flush(self) -> str:
        """What an unfinished character leaves: U+FFFD or nothing. Starts over."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _token_bytes(core: tokenizers.Tokenizer, where: str) -> tuple[list[bytes], bool]:
    """Bytes per id, added tokens as written, and whether a text begins with a space of its own."""
    steps = _decoder_steps(core)
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        byte_of = _byte_of()
    elif steps and kinds <= _SPACED:
        byte_of = {}
    else:
        raise CorruptFileError(
            f"tokens of this decoder stand for no bytes: {sorted(kinds) or 'none'}", where
        )
    added = core.get_added_tokens_decoder()
    vocabulary = core.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        if index in added:
            table[index] = b"" if added[index].special else token.encode()
            continue
        try:
            table[index] = bytes(byte_of[c] for c in token) if byte_of else _spaced_bytes(token)
        except KeyError:
            raise CorruptFileError(f"token {index} is not byte-level: {token!r}", where) from None
    leading = any(
        (step["type"] == "Strip" and step.get("start"))
        or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )
    return table, leading


def _decoder_steps(core: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder's parts; none where there is no decoder."""
    if core.decoder is None:
        return []
    state: dict[str, Any] = json.loads(core.decoder.__getstate__())
    steps: list[dict[str, Any]] = state.get("decoders", [state])
    return steps


def _spaced_bytes(token: str) -> bytes:
    """SentencePiece's: a byte written as such, or text with marks for its spaces."""
    if byte := _BYTE.fullmatch(token):
        return bytes.fromhex(byte[1])
    return token.replace(_SPACE, " ").encode()


def _byte_of() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, the rest for 256, 257, ..."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in set(plain)]
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


def _free_mark(chats: Sequence[tuple[Messages, bool]]) -> str:
    text = json.dumps(chats, ensure_ascii=False, default=str)
    for mark in _MARKS:
        if mark not in text:
            return mark
    raise DataError("the messages use every Unicode noncharacter from U+FDD0 to U+FDEF")


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value


def _template(value: Any, own: bool) -> str:
    """tokenizer_config.json may hold several templates by name; ours is for our own tokens."""
    if isinstance(value, list):
        named = {v.get("name"): v.get("template") for v in value if isinstance(v, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else CHAT_TEMPLATE if own else NO_TEMPLATE


def _end_token(core: tokenizers.Tokenizer, folder: Path) -> str:
    """The token that the model's own files end a text with."""
    names = map(core.id_to_token, sorted(end_ids(folder)))
    return next((name for name in names if name), EOS)


def _token_name(value: Any, default: str) -> str:
    """tokenizer_config.json names a token by its text or by an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else default


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise CorruptFileError(f"larger than {_MAX_FILE_BYTES >> 20} MiB", str(path))
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise CorruptFileError("no such file", str(path), "name a model folder") from None
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"cannot be read: {error}", str(path)) from None


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        data = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"not JSON: {error}", str(path)) from None
    if not isinstance(data, dict):
        raise CorruptFileError("not a JSON object", str(path))
    return data
