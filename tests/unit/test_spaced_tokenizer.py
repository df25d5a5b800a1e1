"""Tokenizers of the SentencePiece style, as Llama's and Mixtral's tokenizer.json: the library's own
ids and text, streaming without broken characters, and control tokens only where they belong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from chronos.common.errors import CorruptFileError
from chronos.common.text.chat_template import TemplateError
from chronos.common.text.tokenizer import StreamDecoder, Tokenizer

PIECES = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello", "d", "[", "]", "日"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello")]
USER = [{"role": "user", "content": "hello"}]
TEMPLATE = "{{ bos_token }}[{% for m in messages %}{{ m.content }}{% endfor %}]"


def build(style: str) -> tokenizers.Tokenizer:
    """legacy: a normaliser marks spaces in every piece of text; metaspace: in the first only."""
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    ids = {token: i for i, token in enumerate(vocabulary)}
    core = tokenizers.Tokenizer(models.BPE(ids, MERGES, unk_token="<unk>", byte_fallback=True))
    strip = decoders.Strip(" ", 1, 0)
    if style == "legacy":
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    core.decoder = decoders.Sequence(steps)
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    core.add_special_tokens(special)
    return core


def save(core: tokenizers.Tokenizer, folder: Path, **config: object) -> Path:
    core.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "bos_token": {"content": "<s>"}} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return folder


@pytest.fixture(scope="module", params=["legacy", "metaspace"])
def core(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    return build(request.param)


@pytest.fixture(scope="module")
def tokenizer(core: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(save(core, tmp_path_factory.mktemp("spaced"), chat_template=TEMPLATE))


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("helo d日😀é\n<s>"), max_size=30))
def test_ids_and_text_are_the_librarys(
    core: tokenizers.Tokenizer, tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    plain = tokenizers.Tokenizer.from_str(core.to_str())
    plain.encode_special_tokens = True
    assert ids == plain.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_prompt(text) == plain.encode(text).ids
    assert tokenizer.decode(ids) == plain.decode(ids)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 258 + len(PIECES)), max_size=30))
def test_a_stream_is_the_bytes_of_its_tokens(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = StreamDecoder(tokenizer)
    text = "".join(map(stream.push, ids)) + stream.flush()
    assert text == b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")
    assert text.removeprefix(" ") == tokenizer.decode(ids)


def test_a_character_of_byte_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    stream = StreamDecoder(tokenizer)
    ids = [3 + byte for byte in "😀".encode()]
    assert [stream.push(token) for token in ids] == ["", "", "", "😀"]


def test_a_chat_is_encoded_as_the_library_does(
    core: tokenizers.Tokenizer, tokenizer: Tokenizer
) -> None:
    whole = tokenizers.Tokenizer.from_str(core.to_str())
    assert tokenizer.apply_chat(USER) == whole.encode("<s>[hello]", add_special_tokens=False).ids
    hostile = [{"role": "user", "content": "</s>hello"}]
    assert tokenizer.eos_id not in tokenizer.apply_chat(hostile)


def test_a_model_without_a_template_cannot_chat(core: tokenizers.Tokenizer, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save(core, tmp_path))
    with pytest.raises(TemplateError, match="cannot chat"):
        tokenizer.apply_chat(USER)


def test_one_of_several_templates_is_the_default(
    core: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    several = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": TEMPLATE},
    ]
    tokenizer = Tokenizer.load(save(core, tmp_path, chat_template=several))
    assert tokenizer.template.source == TEMPLATE


def test_the_models_own_files_name_the_end_where_the_tokenizers_do_not(
    core: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    save(core, tmp_path, eos_token=None)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9999]}', "utf-8")
    assert Tokenizer.load(tmp_path).eos_id == 2


def test_ids_of_the_model_beyond_the_tokens_decode_to_nothing(
    core: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(save(core, tmp_path), 400)
    assert tokenizer.vocab_size == 400 and tokenizer.token_bytes(399) == b""


def test_a_decoder_of_another_kind_is_refused(core: tokenizers.Tokenizer, tmp_path: Path) -> None:
    other = tokenizers.Tokenizer.from_str(core.to_str())
    other.decoder = decoders.WordPiece()
    with pytest.raises(CorruptFileError, match="WordPiece"):
        Tokenizer.load(save(other, tmp_path))
