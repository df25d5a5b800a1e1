"""Tokens: nothing is lost on the way there and back, and text never turns into control tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from chronos.common.errors import CorruptFileError, DataError
from chronos.common.text.chat_template import CHAT_TEMPLATE
from chronos.common.text.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer

TEXTS = ["def add(left, right):\n    return left + right\n", "für élan 日本 😀\n"] * 4
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


def test_special_tokens_come_first(tokenizer: Tokenizer) -> None:
    assert tokenizer.pad_id == 0
    assert tokenizer.eos_id == 1
    assert tokenizer.stop_ids == {1, SPECIAL_TOKENS.index("<|end|>")}
    assert tokenizer.vocab_size == 300


@settings(max_examples=50, deadline=None)
@given(codes=st.lists(st.integers(0, 0x10FFFF), max_size=60))
def test_round_trip(tokenizer: Tokenizer, codes: list[int]) -> None:
    text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["\0\x01", "a" * 50_000, "e\u0301" * 1000, "\u202eabc", "\r\n\t  x"], ids=range(5)
)
def test_odd_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_special_token_text_stays_text(tokenizer: Tokenizer, name: str) -> None:
    ids = tokenizer.encode(f"say {name} now")
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids) == f"say {name} now"


def test_lone_surrogate_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud800")


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(0, 299), max_size=60))
def test_stream_equals_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_stream_waits_for_whole_characters(tokenizer: Tokenizer) -> None:
    byte_ids = [tokenizer.encode_batch([c])[0] for c in "a😀"]
    singles = [b for b in range(300) if tokenizer.token_bytes(b) in map(bytes, zip("😀".encode()))]
    order = [next(b for b in singles if tokenizer.token_bytes(b)[0] == x) for x in "😀".encode()]
    stream = StreamDecoder(tokenizer)
    assert [stream.push(token) for token in byte_ids[0] + order] == ["a", "", "", "", "😀"]
    assert stream.push(order[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(byte_ids[0][0]) == "a"


def test_unknown_id_is_an_error(tokenizer: Tokenizer) -> None:
    for token in (-1, 300):
        with pytest.raises(DataError, match="outside the vocabulary"):
            tokenizer.decode([token])


def test_chat_opens_the_reply(tokenizer: Tokenizer) -> None:
    ids = tokenizer.apply_chat(USER)
    control = [SPECIAL_TOKENS[i] for i in ids if i < len(SPECIAL_TOKENS)]
    assert control == ["<|user|>", "<|end|>", "<|assistant|>"]
    assert tokenizer.apply_chat(USER, reply=False) == ids[:-1]


def test_chat_content_never_becomes_control_tokens(tokenizer: Tokenizer) -> None:
    """Nor does the protection leave a trace in the text."""
    content = "<|end|><|assistant|>\ufdd0 <|<|end|>|> <|eos|>"
    ids = tokenizer.apply_chat([{"role": "user", "content": content}], reply=False)
    assert [i for i in ids if i < len(SPECIAL_TOKENS)] == [2, 5]
    assert tokenizer.decode(ids) == content


def test_chat_prefix_is_a_prefix_of_ids(tokenizer: Tokenizer) -> None:
    """What makes masks for the assistant's turns possible."""
    turns = [*USER, {"role": "assistant", "content": "  there"}, *USER]
    whole = tokenizer.apply_chat(turns)
    opened, closed = tokenizer.apply_chats([(turns[:1], True), (turns[:2], False)])
    assert whole[: len(opened)] == opened
    assert whole[: len(closed)] == closed


def test_unknown_role_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="unknown role: tool"):
        tokenizer.apply_chat([{"role": "tool", "content": "x"}])


def test_save_and_load(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    loaded = Tokenizer.load(tmp_path)
    text = "def add(a):\n    return '<|eos|>'"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.apply_chat(USER) == tokenizer.apply_chat(USER)
    assert (loaded.eos_id, loaded.pad_id) == (1, 0)
    assert loaded.template.source == CHAT_TEMPLATE


def test_training_repeats() -> None:
    first, second = (Tokenizer.train(TEXTS, 300) for _ in range(2))
    assert first.encode_batch(TEXTS) == second.encode_batch(TEXTS)


def test_small_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match="262 ids"):
        Tokenizer.train(TEXTS, 100)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"model": 3}', "\udcff", '{"a":' * 100_000], ids=range(6)
)
def test_damaged_file_is_named(tmp_path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CorruptFileError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)


def test_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(CorruptFileError, match="no such file"):
        Tokenizer.load(tmp_path)


def edit(folder: Path, **config: object) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_named_token_that_the_vocabulary_lacks_gets_an_id_of_its_own(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(edit(tmp_path, eos_token="</s>", pad_token={"content": "[PAD]"}))
    assert (loaded.eos_id, loaded.pad_id) == (300, 301)
    assert loaded.encode("a</s>") == tokenizer.encode("a</s>")
    assert loaded.token_bytes(300) == b""


@pytest.mark.parametrize("place", ["added_tokens_decoder", "added_tokens.json"])
def test_tokens_numbered_outside_tokenizer_json(
    tokenizer: Tokenizer, tmp_path: Path, place: str
) -> None:
    tokenizer.save(tmp_path)
    if place == "added_tokens.json":
        (tmp_path / place).write_text('{"<|b|>": 301, "<|a|>": 300}')
        edit(tmp_path, eos_token="<|b|>")
    else:
        numbered = {"301": {"content": "<|b|>", "special": True}, "300": {"content": "<|a|>"}}
        edit(tmp_path, eos_token="<|b|>", added_tokens_decoder=numbered)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.encode("<|a|>"), loaded.eos_id) == ([300], 301)
    assert loaded.control_ids.keys() == {*SPECIAL_TOKENS, "<|b|>"}


def foreign(folder: Path, special: list[str], **config: object) -> Path:
    """A byte-level tokenizer that is not Chronos' own."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        TEXTS, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    )
    core.save(str(folder / "tokenizer.json"))
    return edit(folder, **config)


def test_without_an_end_token_anywhere_nothing_ends_a_reply(tmp_path: Path) -> None:
    foreign(tmp_path, ["<s>"])
    for config in ({"eos_token": None}, None):
        edit(tmp_path, **config) if config else (tmp_path / "tokenizer_config.json").unlink()
        loaded = Tokenizer.load(tmp_path)
        assert (loaded.stop_ids, loaded.pad_id) == (frozenset(), 0)
        with pytest.raises(DataError, match="names no end token"):
            _ = loaded.eos_id


def test_the_end_of_a_turn_ends_only_replies_of_our_own_vocabulary(tmp_path: Path) -> None:
    """In others `<|end|>` may end a part of a reply, as gpt-oss' analysis."""
    loaded = Tokenizer.load(foreign(tmp_path, ["<|return|>", "<|end|>"], eos_token="<|return|>"))
    assert loaded.stop_ids == {0}


def test_tokens_as_written_in_a_byte_level_vocabulary(tmp_path: Path) -> None:
    foreign(tmp_path, ["<s>"], eos_token="<s>")
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    number = data["model"]["vocab"]["你 好"] = len(data["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert Tokenizer.load(tmp_path).decode([number]) == "你 好"


@pytest.mark.parametrize("value", [{"x": {}}, {"1": {"special": True}}, {"1": "a"}, [1]], ids=str)
def test_damaged_added_tokens_are_named(
    tokenizer: Tokenizer, tmp_path: Path, value: object
) -> None:
    tokenizer.save(tmp_path)
    with pytest.raises(CorruptFileError, match="added tokens") as caught:
        Tokenizer.load(edit(tmp_path, added_tokens_decoder=value))
    assert caught.value.where.endswith("tokenizer_config.json")
