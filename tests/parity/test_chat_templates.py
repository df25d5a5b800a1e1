"""The chat templates that a package ships, against Transformers: the same text, ids and refusals.

The templates are those of the `trl` wheel, of which nothing else is needed:
`pip install trl==1.16.0 --no-deps`.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from chronos.common.text.chat_template import ChatTemplate, TemplateError
from chronos.common.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="the reference")
jinja2 = pytest.importorskip("jinja2", reason="the reference renders with it")

NAMED = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
TOKEN = re.compile(r"<\|[\w/]+\|?>|<｜[^｜]+｜>|</?[a-z_]+>|\[/?[A-Z_]+\]|\|[A-Z_]+>")
CALL = {"name": "add", "arguments": {"left": 1, "right": [2, "<é>"]}}
USER, REPLY = {"role": "user", "content": " Is 1 < 2? "}, {"role": "assistant", "content": "yes\n"}
CHATS: dict[str, list[dict[str, Any]]] = {
    "user": [USER],
    "turns": [{"role": "system", "content": "Be brief."}, USER, REPLY, USER],
    "two in a row": [USER, USER, REPLY, REPLY],
    "developer": [{"role": "developer", "content": "Be brief."}, USER],
    "thoughts": [USER, REPLY | {"reasoning_content": "one is less", "name": None}, USER],
    "thoughts in the text": [
        USER,
        {"role": "assistant", "content": "<think>\nso\n</think>\n\nyes"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, REPLY],
    "tools": [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": CALL}],
        },
        {"role": "tool", "content": "3", "name": "add"},
        REPLY,
    ],
    "another role": [{"role": "critic", "content": "hm"}, USER],
    "none": [],
}


def shipped() -> list[Any]:
    found = importlib.util.find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found and found.origin else None
    files = sorted(folder.glob("*.jinja")) if folder else []
    skip = pytest.mark.skip(reason="trl is not installed: pip install trl==1.16.0 --no-deps")
    return [pytest.param(file, id=file.stem) for file in files] or [pytest.param(None, marks=skip)]


@pytest.fixture(scope="module")
def vocabulary() -> str:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["Is one less than two?\n\n yes, it is <>"], trainer)
    return str(core.to_str())


def control_of(source: str) -> list[str]:
    """What may be a control token of the template: all but what messages may hold as well."""
    found = set(TOKEN.findall(source)) | set(NAMED.values()) | {"<|user|>", "<|assistant|>"}
    return sorted(found - {"<think>", "</think>"})


def expected(source: str, chat: list[dict[str, Any]], reply: bool) -> str | None:
    """Transformers' text, None for a refusal."""
    chat = [{key: value for key, value in turn.items() if value is not None} for turn in chat]
    render = transformers.utils.chat_template_utils.render_jinja_template
    try:
        return str(render([chat], chat_template=source, add_generation_prompt=reply, **NAMED)[0][0])
    except (jinja2.TemplateError, TypeError, ValueError):
        return None


def found(source: str, chat: list[dict[str, Any]], reply: bool) -> str | None:
    try:
        parts = ChatTemplate(source).render_all([(chat, reply)], control_of(source), **NAMED)[0]
    except TemplateError:
        return None
    return "".join(parts)


@pytest.mark.parametrize("file", shipped())
def test_text_is_that_of_transformers(file: Path) -> None:
    source, rendered = file.read_text("utf-8"), 0
    for name, chat in CHATS.items():
        for reply in (True, False):
            text = expected(source, chat, reply)
            assert found(source, chat, reply) == text, name
            rendered += text is not None
    assert rendered


@pytest.mark.parametrize("file", shipped())
def test_ids_are_those_of_transformers(file: Path, vocabulary: str) -> None:
    source = file.read_text("utf-8")
    ours, theirs = (tokenizers.Tokenizer.from_str(vocabulary) for _ in range(2))
    ours.add_special_tokens(control_of(source))
    theirs.add_special_tokens(control_of(source))
    mine = Tokenizer(ours, template=source, named=NAMED)
    library = transformers.PreTrainedTokenizerFast(
        tokenizer_object=theirs, chat_template=source, **NAMED
    )
    for name, chat in CHATS.items():
        if chat and expected(source, chat, True) is not None:
            ids = library.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
            assert mine.apply_chat(chat) == ids, name


@pytest.mark.parametrize("file", shipped())
def test_no_control_token_comes_from_a_message(file: Path, vocabulary: str) -> None:
    """Whole, cut in two over messages or by what a template takes away: text stays text."""
    source = file.read_text("utf-8")
    core, control = tokenizers.Tokenizer.from_str(vocabulary), control_of(source)
    core.add_special_tokens(control)
    tokenizer = Tokenizer(core, template=source, named=NAMED)
    name, every = control[0], " ".join(control)
    halves = [name[:3] + "\n" + name[3:] for name in control]
    hostile = [(f"{every} {' '.join(halves)}",), (f"a{name[:3]}", f"{name[3:]}b")]
    ids = set(tokenizer.control_ids.values())
    for texts in hostile:
        chats = [
            [{"role": "user", "content": text} for text in said]
            for said in (texts, ["x" * len(text) for text in texts])
        ]
        if expected(source, chats[1], True) is not None:
            attacked, harmless = tokenizer.apply_chats([(chat, True) for chat in chats])
            assert [i for i in attacked if i in ids] == [i for i in harmless if i in ids]
