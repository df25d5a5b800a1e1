"""From documents to token ids, with the tokens that may be trained on marked.

Plain text trains on everything, a conversation on the assistant's turns, a completion on itself.
Not covered: preference pairs and bare prompts, which the alignment stages encode themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from chronos.common.data.rows import Document, Message
from chronos.common.errors import DataError
from chronos.common.text.tokenizer import Tokenizer

# Bounds what the tokenizer's own objects take at a time; large enough to keep all cores busy.
_CHUNK = 256
Mask = npt.NDArray[np.bool_]


class Encoded(NamedTuple):
    """Per document: its ids (int32) and, of the same length, which of them may be labels."""

    ids: list[npt.NDArray[np.int32]]
    trained: list[Mask]


def encode_documents(tokenizer: Tokenizer, documents: Iterable[Document]) -> Encoded:
    """Tokenise documents of kind text, messages or completion, in their order.

    Raises DataError naming the document that has nothing to train on or that the chat template
    refuses.
    """
    encoded, source = Encoded([], []), iter(documents)
    while chunk := list(islice(source, _CHUNK)):
        texts = iter(tokenizer.encode_batch([d.text for d in chunk if d.kind == "text"]))
        for document in chunk:
            if document.kind == "text":
                ids = next(texts)
                mask = np.ones(len(ids), bool)
            else:
                ids, mask = _encode_row(tokenizer, document)
            encoded.ids.append(np.array(ids, np.int32))
            encoded.trained.append(mask)
    return encoded


def _encode_row(tokenizer: Tokenizer, document: Document) -> tuple[list[int], Mask]:
    if document.kind == "messages":
        return _encode_chat(tokenizer, document.messages, 0, document.where)
    if document.kind != "completion":
        raise DataError(f"{document.where}: a {document.kind!r} row cannot be trained on here")
    prompt, completion = document.prompt, document.completion
    if isinstance(prompt, str) or isinstance(completion, str):
        before, after = tokenizer.encode_prompt(str(prompt)), tokenizer.encode(str(completion))
        ids = before + after
        return ids, np.arange(len(ids)) >= len(before)
    return _encode_chat(tokenizer, prompt + completion, len(prompt), document.where)


def _encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], first: int, where: str
) -> tuple[list[int], Mask]:
    """Ids of the conversation; true at the assistant's turns from message `first` on.

    A turn is what the template adds to the opened conversation before it, so a template must only
    ever add; one that rewrites earlier turns is refused.
    """
    turns = [i for i, m in enumerate(messages) if i >= first and m["role"] == "assistant"]
    chats = [(messages, False)]
    for i in turns:
        chats += [(messages[:i], True), (messages[: i + 1], False)]
    try:
        ids, *prefixes = tokenizer.apply_chats(chats)
    except DataError as error:
        raise DataError(f"{where}: {error.what}", error.where, error.fix) from None
    mask = np.zeros(len(ids), bool)
    for start, end in _pairs(prefixes):
        if ids[: len(end)] != end or end[: len(start)] != start:
            raise DataError(f"{where}: the chat template rewrites earlier turns")
        # What a template writes behind the token that ends a turn is nobody's to say.
        ends = [i for i in range(len(start), len(end)) if ids[i] in tokenizer.stop_ids]
        mask[len(start) : ends[-1] + 1 if ends else len(end)] = True
    return ids, mask


def _pairs(prefixes: list[list[int]]) -> Iterator[tuple[list[int], list[int]]]:
    return zip(prefixes[::2], prefixes[1::2], strict=True)
