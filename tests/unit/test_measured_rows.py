"""What eval and trace read of rows that training takes: which tokens, and which are labels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from chronos.common.data import Document
from chronos.common.data.packing import IGNORE
from chronos.common.errors import DataError
from chronos.common.text.tokenizer import Tokenizer
from chronos.measure.evaluate import cut, packed, pieces_of, rows_of, sequence_loss, together

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
    text = Document("d", text="left and")
    rows = rows_of(packed(tokenizer, [CHAT, COMPLETION, text], 100), 1)
    said = [
        tokenizer.decode(labels_T[(labels_T != IGNORE) & (labels_T != tokenizer.eos_id)])
        for _, labels_T in pieces_of(rows)
    ]
    # The first token of a text has none before it.
    assert said == ["both of them", " right", tokenizer.decode(tokenizer.encode("left and")[1:])]
    with pytest.raises(DataError, match="d:9: a 'prompt' row"):
        packed(tokenizer, [Document("d:9", "prompt", prompt="a")], 100)


def test_the_rows_are_the_same_however_many_are_computed_at_a_time(tokenizer: Tokenizer) -> None:
    texts = [Document(f"d{n}", text="left and right, both " * (n + 1)) for n in range(7)]
    rows = rows_of(packed(tokenizer, texts, 8), 43)
    assert len(rows) == 5  # of 8 tokens: 40 of the 43 asked for
    for size in (1, 2, 3, 100):
        batches = list(together(rows, size))
        assert max(len(batch.ids_BT) for batch in batches) == min(size, 5)
        for name in ("ids_BT", "labels_BT", "segments_BT"):
            joined = np.concatenate([getattr(batch, name) for batch in batches])
            assert (joined == np.concatenate([getattr(row, name) for row in rows])).all()


def test_pieces_are_the_documents_parts_of_a_row(tokenizer: Tokenizer) -> None:
    """Without the padding of the last row, and every label once."""
    texts = [Document("a", text="left"), Document("b", text="both of them, both of them")]
    dataset = packed(tokenizer, texts, 6)
    rows = rows_of(dataset, 1000)
    pieces = list(pieces_of(rows))
    assert sum(len(ids_T) for ids_T, _ in pieces) == dataset.tokens
    assert sum((labels_T != IGNORE).sum() for _, labels_T in pieces) == sum(r.tokens for r in rows)
    whole = tokenizer.encode("left")
    assert any(ids_T.tolist() == [*whole, tokenizer.eos_id] for ids_T, _ in pieces)


def forward(ids_BT: np.ndarray) -> Any:
    """Each token's own id is as likely as e to its number says."""
    logits = np.tile(np.arange(4, dtype=np.float32), (*ids_BT.shape, 1))
    return SimpleNamespace(logits_BTV=logits)


def test_the_loss_is_the_labels_alone() -> None:
    nats = -np.log(np.exp(np.arange(4)) / np.exp(np.arange(4)).sum())
    pieces = [
        (np.array([0, 1, 2, 3]), np.array([IGNORE, 2, IGNORE, IGNORE])),
        (np.array([1]), np.array([IGNORE])),
        (np.array([3, 0]), np.array([0, IGNORE])),
    ]
    assert sequence_loss(forward, pieces)["ce"] == pytest.approx((nats[2] + nats[0]) / 2)
