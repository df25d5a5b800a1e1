"""What pages say, in the reader's language: one JSON file a language in `assets/words`.

To add a language, copy en.json, translate its values and keep what stands in braces. Names of
settings, files and commands are the same everywhere and not in it.
"""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "words"
ENGLISH = "en"


class Words:
    """Texts by language and key."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.texts: dict[str, dict[str, str]] = {
            path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))
        }

    def languages(self) -> list[tuple[str, str]]:
        """(the language's own name, its tag), English first."""
        tags = sorted(self.texts, key=lambda tag: (tag != ENGLISH, tag))
        return [(self.texts[tag]["language"], tag) for tag in tags]

    def say(self, language: str, key: str, **values: object) -> str:
        """The text of a key; English where the language is not there."""
        text = self.texts.get(language, self.texts[ENGLISH])[key]
        return text.format(**values) if values else text

    def preferred(self, accepted: str) -> str:
        """The language for an Accept-Language header."""
        for part in accepted.split(","):
            tag = part.split(";")[0].strip().lower()
            if tag.startswith("zh"):
                traditional = any(word in tag for word in ("hant", "tw", "hk", "mo"))
                return "zh-Hant" if traditional else "zh-Hans"
            base = tag.split("-")[0]
            if base in self.texts:
                return base
        return ENGLISH
