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
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from chronos.common.disk.atomic import atomic_write
from chronos.common.errors import CorruptFileError, DataError
from chronos.common.model.guest import end_ids
from chronos.common.text.chat_template import (
    CHAT_TEMPLATE,
    NO_TEMPLATE,
    ChatTemplate,
    Messages,
)
from chronos.common.text.tokenizer_files import read_files

PAD, EOS, END = "<|pad|>", "<|eos|>", "<|end|>"
SPECIAL_TOKENS = (PAD, EOS, "<|user|>", "<|assistant|>", "<|system|>", END)
_OWN_NAMES = {"eos_token": EOS, "pad_token": PAD}
_SPACE = "\u2581"  # SentencePiece's mark
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Decoders of the SentencePiece style: token by token they do what `_spaced_bytes` does.
_SPACED = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class Tokenizer:
    """Encodes and decodes; knows its named tokens and its chat template."""

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        template: str | None = None,
        named: Mapping[str, str] | None = None,
        ends: Iterable[int] = (),
        vocab_size: int = 0,
        where: str = "",
    ) -> None:
        """template, named: as in `TokenizerFiles`; None for those of Chronos' own
        vocabulary. ends: ids that end a text where no eos_token is named. vocab_size: ids of the
        model; those that name no token decode to nothing.

        leading_space: whether the first token of a text carries a space that is not in the text."""
        self._core = core
        core.encode_special_tokens = True  # special-token text in the input is text
        core.no_truncation()
        core.no_padding()
        self._own = all(core.token_to_id(name) is not None for name in SPECIAL_TOKENS)
        fallback = CHAT_TEMPLATE if self._own else NO_TEMPLATE
        self.template = ChatTemplate(fallback if template is None else template)
        self._named = (_OWN_NAMES if self._own else {}) | dict(named or {})
        self._ends, self._where = sorted(ends), where
        self._bytes, self.leading_space = _token_bytes(core, where)
        self._bytes += [b""] * (vocab_size - len(self._bytes))
        self._whole = threading.Lock()  # held while special-token text is not text

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
        files = read_files(folder)
        return cls(
            files.core,
            template=files.template,
            named=files.named,
            ends=end_ids(folder),
            vocab_size=vocab_size,
            where=str(folder / "tokenizer.json"),
        )

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self._named,
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

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token as it is written, and its id."""
        return dict(self._core.get_vocab(with_added_tokens=True))

    @cached_property
    def eos_id(self) -> int:
        """The id that closes a document. Raises DataError where the model's files name none."""
        found = self._named_id("eos_token")
        if found is None:
            found = next((i for i in self._ends if self._core.id_to_token(i)), None)
        if found is None:
            raise DataError(
                "the tokenizer names no end token",
                self._where,
                "name one as eos_token in tokenizer_config.json",
            )
        return found

    @cached_property
    def pad_id(self) -> int:
        """The id that fills a row; never a label, so any will do where none is named."""
        found = self._named_id("pad_token")
        found = self._named_id("eos_token") if found is None else found
        return 0 if found is None else found

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a reply: the end token and, of Chronos' own vocabulary, the end of a turn.
        What ends another model's reply beside its eos_token is said by its own files."""
        found = [self._named_id("eos_token"), self._core.token_to_id(END) if self._own else None]
        return frozenset(token for token in found if token is not None)

    @cached_property
    def control_ids(self) -> dict[str, int]:
        """Ids of the special tokens by their text."""
        added = self._core.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never a special token. Raises DataError on a lone surrogate."""
        self._check(text)
        with self._whole:
            ids: list[int] = self._core.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text from its very start: after the ids the tokenizer begins one with."""
        return self._prefix + self.encode(text)

    @cached_property
    def _prefix(self) -> list[int]:
        """Control tokens before a text (Llama's `<s>`); none where the files add none."""
        given = self._core.encode("a", add_special_tokens=True)
        masked = zip(given.ids, given.special_tokens_mask, strict=True)
        return [token for token, _ in itertools.takewhile(lambda pair: pair[1], masked)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts on all cores."""
        for text in texts:
            self._check(text)
        with self._whole:
            return [e.ids for e in self._core.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids without special tokens; bytes that are not UTF-8 become U+FFFD."""
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.leading_space else text

    def token_bytes(self, token: int) -> bytes:
        """The bytes one id stands for, empty for special tokens. Raises DataError if unknown."""
        if not 0 <= token < len(self._bytes):
            raise DataError(f"token id {token} is outside the vocabulary of {len(self._bytes)}")
        return self._bytes[token]

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        return self.template.source != NO_TEMPLATE

    def apply_chat(
        self,
        messages: Messages,
        *,
        reply: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of a conversation under the chat template, opened for the assistant if `reply`.
        variables: what else the template may read, as `tools`."""
        return self.apply_chats([(messages, reply)], variables)[0]

    def apply_chats(
        self, chats: Sequence[tuple[Messages, bool]], variables: Mapping[str, Any] | None = None
    ) -> list[list[int]]:
        """`apply_chat` of many (messages, reply), for one rendering. Raises TemplateError."""
        for text in _strings([variables or {}, *(messages for messages, _ in chats)]):
            self._check(text)
        known = self._named | dict(variables or {})
        rendered = self.template.render_all(chats, tuple(self.control_ids), **known)
        return [self._encode_rendered(parts) for parts in rendered]

    def _encode_rendered(self, parts: list[str]) -> list[int]:
        """Ids of text, control token, text, ..., text; what looks like a control token in a text
        is text."""
        whole = "".join(parts)
        if self._control.findall(whole) == parts[1::2]:
            # As other libraries do: how a piece is cut may hang on what is before.
            with self._whole:
                self._core.encode_special_tokens = False
                try:
                    return list(self._core.encode(whole, add_special_tokens=False).ids)
                finally:
                    self._core.encode_special_tokens = True
        ids = self.encode(parts[0])
        for name, text in zip(parts[1::2], parts[2::2], strict=True):
            ids += [self.control_ids[name], *self.encode(text)]
        return ids

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Matches every special token's text, the longest first."""
        names = sorted(filter(None, self.control_ids), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def _named_id(self, name: str) -> int | None:
        text = self._named.get(name)
        found: int | None = None if text is None else self._core.token_to_id(text)
        return found

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
        except KeyError:  # a token put in by hand, which the decoder gives as it is written
            table[index] = token.encode()
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


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
