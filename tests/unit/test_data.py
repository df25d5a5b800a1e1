"""Documents, their encoding and the batches made of them."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from chronos.common.data import (
    IGNORE,
    Document,
    ReadReport,
    encode_documents,
    pack_documents,
    read_documents,
    split_documents,
    stdlib_documents,
)
from chronos.common.errors import DataError, UsageError
from chronos.common.text.tokenizer import Tokenizer

EOS, PAD = 1, 0
DOCUMENTS = [[10, 11, 12], [20], [30, 31, 32, 33, 34], [], [40, 41]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["def add(left, right):\n    return left + right\n"], 280)


def packed(seq_len: int = 4, **kwargs):
    return pack_documents(DOCUMENTS, seq_len=seq_len, eos_id=EOS, **kwargs)


def test_rows_cover_the_stream_once() -> None:
    stream = [t for d in DOCUMENTS for t in [*d, EOS]]
    batches = list(packed().sweep(2))
    ids = np.concatenate([b.ids_BT for b in batches]).reshape(-1)
    real = np.concatenate([b.segments_BT for b in batches]).reshape(-1) >= 0
    assert ids[real].tolist() == stream
    assert (ids[~real] == PAD).all()


def test_labels_are_the_next_token_of_the_same_document() -> None:
    dataset = packed()
    assert dataset.tokens == 16
    batch = next(dataset.sweep(4))
    for ids, labels, segments in zip(batch.ids_BT, batch.labels_BT, batch.segments_BT, strict=True):
        for t in range(3):
            if segments[t] == segments[t + 1] >= 0:
                assert labels[t] == ids[t + 1]
            else:
                assert labels[t] == IGNORE
    # 30 | 31 32 33 34 are cut apart: a label may cross the row, never the document.
    assert batch.labels_BT[1].tolist() == [EOS, IGNORE, 31, 32]


def test_segments_restart_in_every_row() -> None:
    batch = next(packed().sweep(4))
    assert batch.ids_BT.tolist()[0] == [10, 11, 12, EOS]
    assert batch.segments_BT.tolist()[:2] == [[0, 0, 0, 0], [0, 0, 1, 1]]
    assert all(row[0] == 0 for row in batch.segments_BT)


def test_last_row_is_padded() -> None:
    batch = next(packed(seq_len=7).sweep(3))
    assert batch.ids_BT[2].tolist() == [41, EOS, PAD, PAD, PAD, PAD, PAD]
    assert batch.labels_BT[2].tolist() == [EOS, *[IGNORE] * 6]
    assert batch.segments_BT[2].tolist() == [0, 0, -1, -1, -1, -1, -1]


def test_batches_depend_on_the_step_alone() -> None:
    first, again = packed(seed=3), packed(seed=3)
    forward = [first.batch(step, 3) for step in range(9)]
    for step in reversed(range(9)):
        np.testing.assert_array_equal(again.batch(step, 3).ids_BT, forward[step].ids_BT)
        np.testing.assert_array_equal(again.batch(step, 3).labels_BT, forward[step].labels_BT)


def test_an_epoch_visits_every_row_once_in_a_new_order() -> None:
    dataset = pack_documents([list(range(2, 66))], seq_len=2, eos_id=EOS, seed=1)
    assert len(dataset) == 32
    starts = np.concatenate([dataset.batch(step, 4).ids_BT[:, 0] for step in range(16)])
    epochs = [starts[:32].tolist(), starts[32:].tolist()]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(2, 66, 2))
    assert epochs[0] != epochs[1] != sorted(epochs[1])


def test_the_order_is_fixed_for_ever() -> None:
    """A run is resumed under another NumPy too: the order is part of the format."""
    dataset = pack_documents([list(range(2, 18))], seq_len=2, eos_id=EOS, seed=7)
    assert dataset.batch(0, 8).ids_BT[:, 0].tolist() == [14, 8, 10, 2, 6, 16, 12, 4]


def test_masked_tokens_are_never_labels() -> None:
    masks = [[False, True, True], [False], [True] * 5, [], [True, True]]
    labels = np.concatenate([b.labels_BT for b in packed(trained=masks).sweep(4)])
    found = labels[labels != IGNORE].tolist()
    # 10, 20, 30 and 40 follow nothing; 20 is masked, and so is the end it leads to.
    assert found == [11, 12, EOS, 31, 32, 33, 34, EOS, 41, EOS]


def test_rows_without_labels_are_left_out_and_counted() -> None:
    masks = [[False] * 40 + [True] * 2]
    dataset = pack_documents([list(range(2, 44))], seq_len=4, eos_id=EOS, trained=masks)
    assert (len(dataset), dataset.dropped_rows) == (2, 9)
    assert all(dataset.batch(step, 1).tokens for step in range(8))


@pytest.mark.parametrize("documents", [[], [[]], [[5]], [[], []]])
def test_a_single_token_still_leads_to_its_end(documents) -> None:
    if documents == [[5]]:
        assert len(pack_documents(documents, seq_len=4, eos_id=EOS)) == 1
        return
    with pytest.raises(DataError, match="nothing to learn from"):
        pack_documents(documents, seq_len=4, eos_id=EOS)


def test_bad_numbers_are_usage_errors() -> None:
    with pytest.raises(UsageError):
        packed(seq_len=0)
    with pytest.raises(UsageError):
        packed().batch(-1, 2)


def test_fingerprint_knows_every_difference() -> None:
    prints = {packed().fingerprint(), packed(seed=1).fingerprint(), packed(seq_len=5).fingerprint()}
    masked = packed(trained=[[True] * (len(d) - 1) + [False] * bool(d) for d in DOCUMENTS])
    assert len(prints | {masked.fingerprint()}) == 4
    assert packed().fingerprint() in prints


def test_split_is_by_key_and_keeps_equal_rows_together() -> None:
    documents = [Document(f"f:{i}", text="x", key=f"k{i % 500}") for i in range(1000)]
    train, validation = split_documents(documents, 0.1)
    assert len(train) + len(validation) == 1000
    assert 60 <= len(validation) <= 140
    assert not {d.key for d in train} & {d.key for d in validation}
    assert split_documents(documents[::-1], 0.1)[1] == validation[::-1]


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "no"},
]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "a", "id": 3}, "text"),
        ({"messages": CHAT}, "messages"),
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:2]}, "completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": "a"}, "prompt"),
    ],
)
def test_row_kinds(tmp_path, row, kind: str) -> None:
    write(tmp_path / "d.jsonl", [row])
    (document,) = read_documents(tmp_path / "d.jsonl")
    assert document.kind == kind
    assert document.where == "d.jsonl:1"


def test_a_folder_is_read_in_order(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfline\r\nline\r\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("no")
    write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    with gzip.open(tmp_path / "sub" / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "three"}\n\n{"text": "four"}')
    report = ReadReport()
    documents = list(read_documents(tmp_path, report=report))
    assert [(d.where, d.text) for d in documents] == [
        ("a.jsonl:1", "one"),
        ("a.jsonl:2", "two"),
        ("b.txt", "line\nline\n"),
        ("sub/c.jsonl.gz:1", "three"),
        ("sub/c.jsonl.gz:3", "four"),
    ]
    text = "5 documents from 3 files, 1 blank line, 1 file of another kind"
    assert str(report) == text


def test_chat_trains_on_the_assistant_alone(tokenizer: Tokenizer) -> None:
    encoded = encode_documents(tokenizer, [Document("d:1", "messages", messages=tuple(CHAT))])
    ids, mask = encoded.ids[0], encoded.trained[0]
    assert ids.tolist() == tokenizer.apply_chat(CHAT, reply=False)
    assert tokenizer.decode(ids[mask]) == "yesno"
    end = tokenizer.apply_chat(CHAT[:1], reply=False)[-1]
    assert mask[ids == end].tolist() == [False, True, False, True]


def test_completions_train_on_the_answer_alone(tokenizer: Tokenizer) -> None:
    rows = [
        Document("d:1", "completion", prompt="left", completion=" right"),
        Document("d:2", "completion", prompt=tuple(CHAT[:3]), completion=tuple(CHAT[3:])),
        Document("d:3", text="left"),
    ]
    encoded = encode_documents(tokenizer, rows)
    trained = [tokenizer.decode(i[m]) for i, m in zip(*encoded, strict=True)]
    assert trained == [" right", "no", "left"]
    assert encoded.ids[2].dtype == np.int32


def test_rows_nobody_can_train_on_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="d:7: a 'prompt' row"):
        encode_documents(tokenizer, [Document("d:7", "prompt", prompt="a")])


def test_standard_library_is_sources_only(tmp_path, monkeypatch) -> None:
    kept = {
        "argparse.py": b"import os\n",
        "asyncio/base.py": b"# -*- coding: latin-1 -*-\r\n# \xe9\r\n",
        "encodings/utf_8.py": b"decoding = 1\n",
    }
    left_out = [
        "site-packages/numpy.py",
        "test/test_os.py",
        "ctypes/test/test_x.py",
        "idlelib/run.py",
        "_sysconfigdata__linux.py",
        "sitecustomize.py",
        "empty.py",
        "data.txt",
    ]
    tables = {"encodings/cp1252.py": b"x = 1\ndecoding_table = (\n)\n", "bad.py": b"\xff\n"}
    for name, data in {**kept, **dict.fromkeys(left_out, b""), **tables}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    report = ReadReport()
    documents = stdlib_documents(report)
    assert [d.where for d in documents] == sorted(kept)
    assert documents[1].text == "# -*- coding: latin-1 -*-\n# \xe9\n"
    assert report.bad[0].startswith("bad.py: ")
    assert (report.documents, len(report.bad)) == (3, 1)
