"""What generation_config.json asks of a reply: read, filled in, refused, or said to be ignored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chronos.common.errors import ConfigError
from chronos.common.text.generation_config import ReplyDefaults, read_defaults
from chronos.common.text.sampling import Rules, SamplingParams


def defaults(folder: Path, **settings: object) -> ReplyDefaults:
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return read_defaults(folder)


def test_a_folder_without_one_asks_for_nothing(tmp_path: Path) -> None:
    assert not read_defaults(tmp_path).fill(SamplingParams()).adjusts


def test_the_callers_penalty_goes_before_the_models(tmp_path: Path) -> None:
    found = defaults(tmp_path, repetition_penalty=1.3)
    assert found.fill(SamplingParams()).repetition_penalty == 1.3
    assert found.fill(SamplingParams(repetition_penalty=1.0)).repetition_penalty == 1.0


def test_rules_come_with_the_tokens_that_end_a_reply(tmp_path: Path) -> None:
    found = defaults(
        tmp_path,
        eos_token_id=[7, 5],
        min_new_tokens=3,
        min_length=4,
        no_repeat_ngram_size=2,
        suppress_tokens=[1],
        begin_suppress_tokens=[2],
        bad_words_ids=[[5], [3, 5]],  # a word that is an end token is no bad word
    )
    assert found.rules == Rules((1,), (2,), ((3, 5),), 2, 4, 3, (5, 7))
    assert not found.ignored


def test_what_has_no_effect_is_named(tmp_path: Path) -> None:
    found = defaults(
        tmp_path, num_beams=4, guidance_scale=1.0, sequence_bias=[[[3], -1.0]], top_k=5
    )
    assert found.ignored == ("sequence_bias", "num_beams")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("repetition_penalty", "high"),
        ("repetition_penalty", 0),
        ("no_repeat_ngram_size", -1),
        ("min_length", 2.5),
        ("suppress_tokens", 3),
        ("begin_suppress_tokens", [-1]),
        ("bad_words_ids", [[]]),
        ("bad_words_ids", [3]),
    ],
)
def test_bad_values_are_named(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        defaults(tmp_path, **{key: value})
    assert caught.value.where.endswith("generation_config.json")
