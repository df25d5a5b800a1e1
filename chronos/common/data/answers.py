"""Rows that answer a prompt, encoded for the stages that fine-tune; bad ones named or counted.

What is trained are an assistant's turns or a completion, with the token that ends it. A chat is
rendered as `chronos chat` feeds it. A prompt and its answer are encoded apart, so the prompt's ids
do not depend on the answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from chronos.common.data.documents import BadRows
from chronos.common.data.encode import Mask, encode_documents
from chronos.common.data.rows import Document
from chronos.common.errors import DataError
from chronos.common.text.tokenizer import Tokenizer

_T = TypeVar("_T")
Ids = npt.NDArray[np.int32]


class Example(NamedTuple):
    """Ids, and of the same length which of them are trained."""

    ids: Ids
    trained: Mask

    @property
    def prompt(self) -> int:
        """Ids before the first that is trained."""
        return int(self.trained.argmax())


class Pair(NamedTuple):
    """Two answers to one prompt."""

    chosen: Example
    rejected: Example


class Prompt(NamedTuple):
    """What an answer is sampled after, and the row it is of."""

    ids: list[int]
    row: Document


def encode_examples(
    tokenizer: Tokenizer, documents: Iterable[Document], max_tokens: int, bad: BadRows
) -> list[Example]:
    """Texts, chats and completions, of at most `max_tokens` tokens each.

    A row that is longer, trains nothing or that the template refuses is bad: DataError with its
    place, unless `bad` may pass over it.
    """
    return _each(documents, lambda d: _example(tokenizer, d, max_tokens), bad)


def encode_pairs(
    tokenizer: Tokenizer, documents: Iterable[Document], max_tokens: int, bad: BadRows
) -> list[Pair]:
    """Preferences; besides, two answers that are the same are bad."""

    def pair(document: Document) -> Pair:
        if document.kind != "preference":
            raise DataError(f"a {document.kind!r} row; a preference has prompt, chosen, rejected")
        prompt, answers = document.prompt, (document.chosen, document.rejected)
        rows = [
            Document(document.where, "completion", prompt=prompt, completion=a) for a in answers
        ]
        found = Pair(*(_example(tokenizer, row, max_tokens) for row in rows))
        if np.array_equal(found.chosen.ids, found.rejected.ids):
            raise DataError("chosen and rejected are the same")
        return found

    return _each(documents, pair, bad)


def encode_prompts(
    tokenizer: Tokenizer, documents: Iterable[Document], max_tokens: int, bad: BadRows
) -> list[Prompt]:
    """What answers are sampled after: prompts, or what comes before the answer of other rows."""

    def prompt(document: Document) -> Prompt:
        turns = document.prompt
        if document.kind == "messages":
            last = max(i for i, m in enumerate(document.messages) if m["role"] == "assistant")
            turns = document.messages[:last]
        if not turns:
            raise DataError(f"a {document.kind!r} row has no prompt")
        if isinstance(turns, str):
            ids = tokenizer.encode_prompt(turns)
        else:
            ids = tokenizer.apply_chat(turns)
        _check_length(len(ids), max_tokens)
        return Prompt(ids, dataclasses.replace(document, prompt=turns))

    return _each(documents, prompt, bad)


def _example(tokenizer: Tokenizer, document: Document, max_tokens: int) -> Example:
    (ids,), (trained,) = encode_documents(tokenizer, [document])
    if document.kind == "text":  # begins as a prompt does, which other kinds see to themselves
        start = np.array(tokenizer.encode_prompt(""), np.int32)
        ids, trained = np.append(start, ids), np.append(np.zeros(len(start), bool), trained)
    if len(ids) and ids[-1] not in tokenizer.stop_ids and trained[-1]:  # a chat ends by itself
        ids, trained = np.append(ids, np.int32(tokenizer.eos_id)), np.append(trained, True)
    _check_length(len(ids), max_tokens)
    if not trained[1:].any():
        raise DataError("nothing to learn: no token of an answer has one before it")
    return Example(ids, trained)


def _check_length(tokens: int, limit: int) -> None:
    if tokens > limit:
        raise DataError(f"{tokens} tokens; there is room for {limit}")


def _each(documents: Iterable[Document], make: Callable[[Document], _T], bad: BadRows) -> list[_T]:
    found: list[_T] = []
    for document in documents:
        try:
            found.append(make(document))
        except DataError as error:
            reason = error.what.removeprefix(f"{document.where}: ")
            bad.spend(document.where, reason, error.fix or "shorten or correct the row")
    if not found:
        raise DataError("no row can be trained on", "", "see the reasons, or give other data")
    return found


def lengths(examples: Sequence[Example]) -> list[int]:
    """Tokens of each that a row needs room for: the last one is a label only."""
    return [len(example.ids) - 1 for example in examples]
