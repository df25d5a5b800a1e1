"""What eval and trace read of rows that training takes: which tokens, and which are labels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from chronos.common.data import Document
from chronos.common.errors import DataError
from chronos.common.text.tokenizer import Tokenizer
from chronos.measure.evaluate import cut, labelled, sequence_loss

USER = {"role": "user", "content": "left and right"}
REPLY = {"role": "assistant", "content": "both of them"}
CHAT = Document("d:1", "messages", messages=(USER, REPLY))
COMPLETION = Document("d:2", "completion", prompt="left", completion=" right")
TURNS = Document("d:3", "completion", prompt=(USER,), completion=(REPLY,))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["left and right, both of them"] * 4, 280)


def test_each_kind_is_read_as_the_model_would_read_it(tokenizer: Tokenizer) -> None:
    def read(document: Document) -> list[int]:
        [ids] = cut(tokenizer, [document], 100)
        return ids

    assert read(CHAT) == read(TURNS) == tokenizer.apply_chat([USER, REPLY], reply=False)
    assert read(COMPLETION) == tokenizer.encode("left right")
    assert read(Document("d:4", "prompt", prompt="left right")) == tokenizer.encode("left right")
    assert read(Document("d:5", "prompt", prompt=(USER,))) == tokenizer.apply_chat([USER])
    with pytest.raises(DataError, match="d:6: a 'preference' row"):
        read(Document("d:6", "preference", prompt="a", chosen="b", rejected="c"))


def test_a_row_is_read_to_its_end(tokenizer: Tokenizer) -> None:
    whole = tokenizer.apply_chat([USER, REPLY], reply=False)
    pieces = list(cut(tokenizer, [CHAT, Document("d", text="left and")], 5))
    assert max(map(len, pieces)) == 5
    joined = [token for ids in pieces for token in ids]
    left = whole[: len(whole) - (len(whole) % 5 == 1)]  # one token alone says nothing
    assert joined == left + tokenizer.encode("left and")


def test_labels_are_those_of_training(tokenizer: Tokenizer) -> None:
    pieces = list(labelled(tokenizer, [CHAT, COMPLETION, Document("d", text="left and")], 100))
    said = [
        tokenizer.decode(token for token, label in zip(ids, mask, strict=True) if label)
        for ids, mask in pieces
    ]
    assert said == ["both of them", " right", "left and"]
    with pytest.raises(DataError, match="d:9: a 'prompt' row"):
        list(labelled(tokenizer, [Document("d:9", "prompt", prompt="a")], 100))


def forward(ids_BT: np.ndarray) -> Any:
    """Each token's own id is as likely as e to its number says."""
    logits = np.tile(np.arange(4, dtype=np.float32), (*ids_BT.shape, 1))
    return SimpleNamespace(logits_BTV=logits)


def test_the_loss_is_the_labels_alone() -> None:
    nats = -np.log(np.exp(np.arange(4)) / np.exp(np.arange(4)).sum())
    rows = [([0, 1, 2, 3], [True, False, True, False]), ([3, 0], [False, True])]
    found = sequence_loss(forward, rows, max_tokens=100)["ce"]
    assert found == pytest.approx((nats[2] + nats[0]) / 2)
    assert sequence_loss(forward, rows, max_tokens=3)["ce"] == pytest.approx(nats[2])
    with pytest.raises(DataError, match="no token of the data is a label"):
        sequence_loss(forward, rows, max_tokens=1)
