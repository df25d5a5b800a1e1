"""Names of models come from the command line, whatever a client calls them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from chronos.common.errors import UsageError
from chronos.serve.fields import Field
from chronos.serve.problem import Problem
from chronos.serve.served import ANY, Catalogue, Served


@pytest.fixture(scope="module")
def models(folder: Path) -> list[Served]:
    return [Served.open(str(folder), "one"), Served.open(str(folder), "two", 64)]


def test_by_name_by_alias_and_by_none(models: list[Served]) -> None:
    catalogue = Catalogue(models, ["other"])
    assert [catalogue.find(name) for name in ("one", "other", None)] == [models[0]] * 3
    assert catalogue.find("two") is models[1]
    with pytest.raises(Problem, match="there is: one, two"):
        catalogue.find("three")
    assert Catalogue(models, [ANY]).find("three") is models[0]
    assert Catalogue(models, [ANY]).find("two") is models[1]
    with pytest.raises(UsageError, match="same name"):
        Catalogue([models[0], models[0]])


def test_the_room_for_a_reply(models: list[Served]) -> None:
    _, short = models
    assert short.room([1] * 60, None) == short.room([1] * 60, 32_000) == 5
    assert short.room([1] * 64, 7) == 1 and short.room([1], 7) == 7
    for prompt, code in (([1] * 65, "context_length_exceeded"), ([], "invalid_value")):
        with pytest.raises(Problem) as caught:
            short.room(prompt, 1)
        assert caught.value.code == code
    for token in (-1, short.vocab_size):
        with pytest.raises(Problem, match="token ids"):
            short.room([1, token], 1)


def test_how_a_folder_would_have_replies_drawn(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    config = tmp_path / "m" / "generation_config.json"
    config.write_text('{"temperature": 0.5}')
    assert Served.open(str(tmp_path / "m")).sampling == {}
    config.write_text('{"do_sample": true, "top_p": 0.9}')
    assert Served.open(str(tmp_path / "m")).sampling == {"top_p": 0.9, "temperature": 1.0}


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        (Field("max_tokens", ("integer",), 0, 2**53), -1, "an integer from 0 to 9007199254740992"),
        (Field("messages", ("array",), 1), "x", "an array of length at least 1"),
        (Field("stop", ("array", "string"), 1, 4), [], "an array or a string of length 1 to 4"),
        (Field("top_p", ("number",), high=1.0), 1.5, "a number of at most 1"),
        (Field("echo", ("boolean",)), 1, "a boolean"),
        (Field("role", ("string",), choices=("user", "tool")), "x", "one of user, tool"),
    ],
)  # fmt: skip
def test_a_wrong_field_says_what_it_must_be(field: Field, value: object, wanted: str) -> None:
    with pytest.raises(Problem) as caught:
        field.check(value)
    assert str(caught.value).startswith(f"{field.name} must be {wanted}, not ")
