"""Every language says all there is to say, with the same places for values."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest

from chronos.ui.words import ENGLISH, FOLDER, Words

WORDS = Words()
SOURCES = sorted((Path(__file__).parents[2] / "chronos" / "ui").rglob("*.py"))


def places(text: str) -> list[str]:
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name is not None)


@pytest.mark.parametrize("language", sorted(WORDS.texts))
def test_a_language_is_complete(language: str) -> None:
    english, texts = WORDS.texts[ENGLISH], WORDS.texts[language]
    assert list(texts) == list(english)  # in the same order, so that two files can be compared
    for key, text in texts.items():
        assert text.strip() and places(text) == places(english[key]), key


def test_the_shipped_languages() -> None:
    assert set(WORDS.texts) == {"en", "zh-Hans", "zh-Hant", "ja"}
    assert WORDS.languages()[0] == ("English", "en")
    same = [k for k, t in WORDS.texts[ENGLISH].items() if t == WORDS.texts["ja"][k]]
    assert same == []  # all of it is translated


def test_keys_in_pages_are_there_and_all_are_used() -> None:
    text = "".join(path.read_text("utf-8") for path in SOURCES)
    named = set(re.findall(r'"@([a-z_.]+)"', text)) | set(
        re.findall(r"""say\(\s*language, ["']([a-z_.]+)["']""", text)
    )
    assert named <= set(WORDS.texts[ENGLISH])
    ends = set(re.findall(r'"([a-z_]+)"', text))  # of keys that are put together
    unused = {
        key
        for key in set(WORDS.texts[ENGLISH]) - named
        if key.rpartition(".")[2] not in ends and key != "language"
    }
    assert unused == set()


def test_values_have_their_places() -> None:
    assert WORDS.say("en", "config.saved", path="x.toml") == "Saved as x.toml"
    assert WORDS.say("ja", "config.saved", path="x.toml") == "x.toml に保存しました"
    assert WORDS.say("xx", "tab.chat") == "Chat"
    with pytest.raises(KeyError):
        WORDS.say("en", "tab.nothing")


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        ("", "en"),
        ("de-DE,de;q=0.9,ja;q=0.5", "ja"),
        ("ja", "ja"),
        ("zh-TW,zh;q=0.9", "zh-Hant"),
        ("zh-Hant-HK", "zh-Hant"),
        ("zh-CN,en;q=0.8", "zh-Hans"),
        ("zh", "zh-Hans"),
        ("en-GB,ja", "en"),
        (";;,,-", "en"),
    ],
)
def test_a_browser_is_understood(accepted: str, language: str) -> None:
    assert WORDS.preferred(accepted) == language


def test_the_files_are_in_the_package() -> None:
    assert FOLDER.parent.name == "assets"
