"""Rows for the fine-tuning stages: what is trained of them, how they share rows, and bad ones."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from chronos.common.data import (
    IGNORE,
    BadRows,
    Document,
    Example,
    FittedRows,
    PairBatches,
    ReadReport,
    encode_examples,
    encode_pairs,
    encode_prompts,
    read_documents,
    stdlib_functions,
)
from chronos.common.data.fitting import best_fit
from chronos.common.data.functions import damaged
from chronos.common.data.overview import overview
from chronos.common.errors import DataError, UsageError
from chronos.common.text.tokenizer import END, Tokenizer

USER = {"role": "user", "content": "hello there"}
REPLY = {"role": "assistant", "content": "general"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["hello there general kenobi"], 270)


def bad(allowed: int = 0) -> BadRows:
    return BadRows(allowed, ReadReport())


def test_a_chat_trains_its_answers_and_their_ends(tokenizer: Tokenizer) -> None:
    again = {"role": "assistant", "content": "kenobi"}
    chat = Document("f:1", "messages", messages=(USER, REPLY, USER, again))
    [example] = encode_examples(tokenizer, [chat], 99, bad())
    end = tokenizer.control_ids[END]
    parts = np.split(example.ids, np.flatnonzero(np.diff(example.trained)) + 1)
    answers = parts[1::2]
    assert [tokenizer.decode(part) for part in answers] == ["general", "kenobi"]
    assert all(part[-1] == end for part in answers)
    opened = tokenizer.apply_chat([USER])  # what `chronos chat` feeds
    assert example.ids[: example.prompt].tolist() == opened


def test_a_completion_is_encoded_apart_and_ends(tokenizer: Tokenizer) -> None:
    row = Document("f:1", "completion", prompt="for name in ", completion="names")
    [example] = encode_examples(tokenizer, [row], 99, bad())
    prompt = tokenizer.encode_prompt("for name in ")
    assert example.ids[: len(prompt)].tolist() == prompt
    assert not example.trained[: len(prompt)].any() and example.trained[len(prompt) :].all()
    assert example.ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(example.ids) == "for name in names"


def test_a_row_begins_once(tmp_path: Path) -> None:
    """As `chronos chat` and `generate` begin, with a tokenizer that puts a token before a text and
    a template that writes it too."""
    Tokenizer.train(["hello there general kenobi"], 270).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    core = tokenizers.Tokenizer.from_file(str(file))
    core.add_special_tokens(["<s>"])
    bos = core.token_to_id("<s>")
    core.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", bos)]
    )
    core.save(str(file))
    settings = {"eos_token": "<|eos|>", "pad_token": "<|pad|>", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text("utf-8"), "utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    rows = [
        Document("f:1", "messages", messages=(USER, REPLY)),
        Document("f:2", "completion", prompt="hello", completion=" there"),
        Document("f:3", text="hello there"),
        Document("f:4", "completion", prompt=(USER,), completion=(REPLY,)),
    ]
    fed = [
        tokenizer.apply_chat([USER]),
        tokenizer.encode_prompt("hello"),
        tokenizer.encode_prompt("hello there"),
        tokenizer.apply_chat([USER]),
    ]
    for example, start in zip(encode_examples(tokenizer, rows, 99, bad()), fed, strict=True):
        assert example.ids[: len(start)].tolist() == start
        assert (example.ids == bos).tolist() == [True] + [False] * (len(example.ids) - 1)
        assert not example.trained[0]


def test_padding_with_the_end_token_changes_no_label(tokenizer: Tokenizer) -> None:
    rows = [Document("f:1", "completion", prompt="a", completion=c) for c in ("b", "b" * 9)]
    examples = encode_examples(tokenizer, rows, 99, bad())
    batches = [
        next(FittedRows(examples, seq_len=20, pad_id=pad, seed=0, packed=False).sweep(2))
        for pad in (tokenizer.pad_id, tokenizer.eos_id)
    ]
    assert tokenizer.pad_id != tokenizer.eos_id
    assert np.array_equal(batches[0].labels_BT, batches[1].labels_BT)
    assert np.array_equal(batches[0].segments_BT, batches[1].segments_BT)
    ends = [labels[labels != IGNORE][-1] for labels in batches[1].labels_BT]
    assert ends == [tokenizer.eos_id] * 2


def test_rows_that_cannot_be_trained_are_named_or_counted(tokenizer: Tokenizer) -> None:
    good = Document("f:1", "completion", prompt="a", completion="b")
    long = Document("f:2", "completion", prompt="a", completion="b" * 50)
    with pytest.raises(DataError, match="f:2: 52 tokens; there is room for 9"):
        encode_examples(tokenizer, [good, long], 9, bad())
    allowed = bad(1)
    assert len(encode_examples(tokenizer, [good, long], 9, allowed)) == 1
    assert allowed.report.bad == ["f:2: 52 tokens; there is room for 9"]
    with pytest.raises(DataError, match="no row can be trained on"):
        encode_examples(tokenizer, [long], 9, bad(1))
    same = Document("f:3", "preference", prompt="a", chosen="b", rejected="b")
    with pytest.raises(DataError, match="f:3: chosen and rejected are the same"):
        encode_pairs(tokenizer, [same], 9, bad())
    with pytest.raises(DataError, match="f:1: a 'completion' row"):
        encode_pairs(tokenizer, [good], 9, bad())


def test_both_answers_of_a_pair_have_one_prompt(tokenizer: Tokenizer) -> None:
    row = Document("f:1", "preference", prompt=(USER,), chosen=(REPLY,), rejected=({
        "role": "assistant", "content": "kenobi"},))  # fmt: skip
    [pair] = encode_pairs(tokenizer, [row], 99, bad())
    n = pair.chosen.prompt
    assert n == pair.rejected.prompt > 0
    assert pair.chosen.ids[:n].tolist() == pair.rejected.ids[:n].tolist()


def test_prompts_keep_their_columns(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "2+2", "answer": 4}\n', "utf-8")
    [prompt] = encode_prompts(tokenizer, read_documents(file), 99, bad())
    assert prompt.ids == tokenizer.encode_prompt("2+2")
    assert prompt.row.columns == {"answer": 4}
    chat = Document("f:1", "messages", messages=(USER, REPLY, USER, REPLY))
    [prompt] = encode_prompts(tokenizer, [chat], 99, bad())
    assert prompt.ids == tokenizer.apply_chat([USER, REPLY, USER])


def test_best_fit_cuts_nothing_and_wastes_little() -> None:
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.lognormal(4.5, 0.8, 10_000).astype(int) + 2, 512).tolist()
    bins = best_fit(sizes, 512)
    assert sorted(item for each in bins for item in each) == list(range(len(sizes)))
    filled = [sum(sizes[item] for item in each) for each in bins]
    assert max(filled) <= 512
    assert sum(filled) / (512 * len(bins)) > 0.9
    assert best_fit([3, 3, 2], 5) == [[0, 2], [1]]
    with pytest.raises(UsageError, match="an item of 6"):
        best_fit([6], 5)


def example(length: int, prompt: int, first: int) -> Example:
    ids = np.arange(first, first + length, dtype=np.int32)
    return Example(ids, np.arange(length) >= prompt)


def test_rows_hold_whole_examples() -> None:
    examples = [example(5, 2, 10), example(4, 1, 20), example(3, 2, 30)]
    rows = FittedRows(examples, seq_len=7, pad_id=0, seed=0, packed=True)
    assert len(rows) == 2 and rows.tokens == 12
    batch = next(rows.sweep(2))
    assert batch.ids_BT.tolist() == [[10, 11, 12, 13, 20, 21, 22], [30, 31, 0, 0, 0, 0, 0]]
    assert batch.segments_BT.tolist() == [[0] * 4 + [1] * 3, [0, 0] + [-1] * 5]
    x = IGNORE
    assert batch.labels_BT.tolist() == [[x, 12, 13, 14, 21, 22, 23], [x, 32, x, x, x, x, x]]
    seen = [rows.batch(step, 1).ids_BT.tolist() for step in range(4)]
    assert sorted(map(str, seen[:2])) == sorted(map(str, seen[2:]))  # each epoch has each row
    alone = FittedRows(examples, seq_len=7, pad_id=0, seed=0, packed=False)
    assert len(alone) == 3 and next(alone.sweep(3)).ids_BT.shape == (3, 4)


def test_pairs_keep_their_company() -> None:
    from chronos.common.data import Pair

    pairs = [Pair(example(n, 1, 10 * n), example(n + 1, 1, 10 * n)) for n in (3, 9, 4, 8)]
    batches = PairBatches(pairs, batch_size=2, accumulate=1, pad_id=0, seed=3)
    shapes = {batch.ids_BT.shape for step in range(2) for batch in batches.at(step)}
    assert shapes == {(4, 4), (4, 9)}  # the two short pairs, the two long ones
    batches.extra = {0: {"reference": np.ones(4)}, 1: {"reference": np.zeros(4)}}
    for step in range(4):
        [group] = batches.groups(step)
        [batch] = batches.at(step)
        assert batch.extra["reference"][0] == 1 - group
    whole = PairBatches(pairs, batch_size=4, accumulate=1, pad_id=0, seed=3, prompts=True)
    [batch] = whole.at(0)
    assert (batch.labels_BT != IGNORE).sum() == sum(len(e.ids) - 1 for p in pairs for e in p)
    assert batch.extra["answer"].sum() == sum(int(e.trained[1:].sum()) for p in pairs for e in p)


def test_functions_of_the_standard_library() -> None:
    pairs = stdlib_functions("pairs")
    assert len(pairs) > 1000 and len({row.key for row in pairs}) == len(pairs)
    for row in pairs[::50]:
        assert row.chosen[0]["content"] != row.rejected[0]["content"]
        ast.parse(row.chosen[0]["content"])
        with pytest.raises(SyntaxError):
            ast.parse(row.rejected[0]["content"])
    assert damaged("def f():\n    return 1") == damaged("def f():\n    return 1")
    with pytest.raises(UsageError, match="no rows of the kind"):
        stdlib_functions("poems")


def test_overview(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "bc"}\n{"text": ""}\nnot json\n', "utf-8")
    found = overview(file, tokenizer)
    assert found["kinds"] == {"completion": 1} and found["bad"] == 2
    assert found["first"]["row"] == [("a", False), ("bc<|eos|>", True)]
    assert found["trained_tokens"] == 3 and found["length"]["longest"] == 4
    assert "rows.jsonl:3: not JSON" in found["bad_rows"][1]
    assert "first" not in overview(file, None)
