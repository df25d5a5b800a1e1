"""Tokenizers of model folders against Transformers' AutoTokenizer: ids, names, prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from chronos.common.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="the reference")

MARKED = {"special": True, "normalized": False}
FOLDERS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "no config": ({}, {}),
    "no end": ({"eos_token": None}, {}),
    "pad only": ({"eos_token": "<|endoftext|>", "pad_token": "[PAD]"}, {}),
    "an ordinary token is named": ({"eos_token": "#", "pad_token": "<|endoftext|>"}, {}),
    "numbered": (
        {"eos_token": "<|im_end|>", "added_tokens_decoder": {
            "301": {"content": "<|im_end|>", **MARKED}, "300": {"content": "<|im_start|>"}}},
        {},
    ),
    "numbered with a gap": (
        {"eos_token": "<|im_end|>", "added_tokens_decoder": {
            "900": {"content": "<|im_end|>", **MARKED}, "7": {"content": "<b>", **MARKED}}},
        {},
    ),
    "added_tokens.json": (
        {"eos_token": "<|im_end|>"},
        {"added_tokens.json": {"<|im_start|>": 300, "<|im_end|>": 301}},
    ),
    "special_tokens_map.json": (
        {}, {"special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"},
             "bos_token": "<|endoftext|>", "pad_token": "<|pad|>"}},
    ),
    "more special tokens": (
        {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<a>", "<b>"]}, {},
    ),
    "tokens with names of their own": (
        {"eos_token": "<|endoftext|>", "image_token": "<img>",
         "extra_special_tokens": {"audio_token": "<audio>"}}, {},
    ),
    "bos": ({"bos_token": "<|endoftext|>", "add_bos_token": True}, {}),
    "no bos": ({"bos_token": "<|endoftext|>", "add_bos_token": False}, {}),
    "bos undecided": ({"bos_token": "<|endoftext|>", "add_bos_token": None}, {}),
}  # fmt: skip


def write(folder: Path, name: str, *, begins: bool) -> None:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    core.train_from_iterator(["the end of the text is the end of it all"] * 3, trainer)
    if begins:
        core.post_processor = processors.TemplateProcessing(
            "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    core.save(str(folder / "tokenizer.json"))
    config, files = FOLDERS[name]
    if name != "no config":
        files = files | {
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"} | config
        }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize("begins", [False, True], ids=["plain", "with a beginning"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_read_as_transformers_reads_it(tmp_path: Path, name: str, begins: bool) -> None:
    write(tmp_path, name, begins=begins)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    library = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert ours.vocab_size == len(library)
    assert ours.stop_ids == {library.eos_token_id} - {None}
    if library.pad_token_id is not None:
        assert ours.pad_id == library.pad_token_id
    for text in ("the end", "", " the<|im_start|>"):
        assert ours.encode_prompt(text) == library(text)["input_ids"]
    names = "{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ audio_token }}|{{ pad_token }}"
    chat = [{"role": "user", "content": "the end"}]
    library.chat_template = names + "{{ messages[0].content }}"
    (tmp_path / "chat_template.jinja").write_text(library.chat_template)
    again = Tokenizer.load(tmp_path)
    assert again.apply_chat(chat) == library.apply_chat_template(chat)["input_ids"]
