"""From tokens to the text of an answer: stop strings that name control tokens, how it begins."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from chronos.common.text.tokenizer import Tokenizer
from chronos.run.generation import Generation, GenerationResult, Step, Text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["one two three"] * 3, 270)


def shown(tokenizer: Tokenizer, stop: list[str], parts: list[str]) -> tuple[str, bool]:
    """parts: control tokens by their name, and text."""
    text = Text(tokenizer, stop)
    for part in parts:
        known = tokenizer.control_ids
        for token in [known[part]] if part in known else tokenizer.encode(part):
            text.push(token)
            if text.stopped:
                return text.shown, True
    text.flush()
    return text.shown, False


@pytest.mark.parametrize(
    ("stop", "parts", "text", "stopped"),
    [
        (["<|end|>"], ["one", "<|end|>", "two"], "one", True),
        (["<|end|>\n"], ["one", "<|end|>", " two", "<|end|>", "\n"], "one two", True),
        (["e<|end|>"], ["two", "<|end|>", "one", "<|end|>"], "twoon", True),
        (["<|user|><|end|>"], ["<|user|>", "a", "<|user|>", "<|end|>"], "a", True),
        # The model may also spell it, and tokens that no stop string names say nothing.
        (["<|end|>"], ["one", "<|user|>", "<|en", "d|>"], "one", True),
        (["<|end|>"], ["one", "<|user|>", "<|en"], "one<|en", False),
        ([], ["one", "<|end|>", "two"], "onetwo", False),
    ],
)
def test_a_stop_string_may_name_control_tokens(
    tokenizer: Tokenizer, stop: list[str], parts: list[str], text: str, stopped: bool
) -> None:
    assert shown(tokenizer, stop, parts) == (text, stopped)


def steps(*texts: str) -> Generator[Step, None, GenerationResult]:
    for number, text in enumerate(texts):
        yield Step(number, text)
    return GenerationResult(1, list(range(len(texts))), "".join(texts), "stop", {})


@pytest.mark.parametrize(
    ("texts", "answer"),
    [(["", " ", "a", " b"], "a b"), ([" a"], "a"), (["  a"], " a"), (["a", " b"], "a b"), ([], "")],
)
def test_an_answer_begins_without_the_space_of_its_first_piece(
    texts: list[str], answer: str
) -> None:
    plain, dropping = Generation(steps(*texts)), Generation(steps(*texts))
    dropping.drop_leading_space()
    assert "".join(step.text for step in dropping) == dropping.result.text == answer
    assert "".join(step.text for step in plain) == plain.result.text == "".join(texts)
