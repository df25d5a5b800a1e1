"""Rewards that ship, named in a recipe as `chronos.train.rewards:NAME`.

A reward is a function of prompts, completions, completion_ids and the rows' other columns, all
lists of one length (TRL's convention, which takes **columns for those it does not use). It returns
a number for each completion; None leaves one out. A completion is text, or where the prompt is a
chat a list of one message.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_FENCE = re.compile(r"```(?:\w+)?\n(.*?)```", re.S)


def text_of(completion: Any) -> str:
    """The text of a completion in either form."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion)


def parses_as_python(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 where a completion is Python that parses and does something, else 0. Code between fences
    counts alone."""
    return [float(_is_code(text_of(completion))) for completion in completions]


def matches(completions: Sequence[Any], pattern: Sequence[str], **columns: Any) -> list[float]:
    """1 where the row's regular expression, column `pattern`, is found in a completion."""
    pairs = zip(completions, pattern, strict=True)
    return [float(re.search(p, text_of(c)) is not None) for c, p in pairs]


def length(
    completion_ids: Sequence[Sequence[int]], target: Sequence[int], **columns: Any
) -> list[float]:
    """1 at the row's number of tokens, column `target`, down to 0 at none and at twice as many."""
    pairs = zip(completion_ids, target, strict=True)
    return [max(0.0, 1 - abs(len(ids) - t) / max(t, 1)) for ids, t in pairs]


def right_answer(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float]:
    """1 where a completion's answer is the row's, column `answer`: what is in the last \\boxed{},
    or the last number, or the whole text; as numbers where both are."""
    return [
        float(_same(_answer(text_of(c), str(a)), str(a)))
        for c, a in zip(completions, answer, strict=True)
    ]


def _is_code(text: str) -> bool:
    if fenced := _FENCE.findall(text):
        text = "\n".join(fenced)
    try:
        tree = ast.parse(text.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(not isinstance(node, ast.Expr) for node in tree.body)


def _answer(text: str, wanted: str) -> str:
    if boxed := _BOXED.findall(text):
        return str(boxed[-1])
    if _NUMBER.fullmatch(wanted.strip()) and (numbers := _NUMBER.findall(text)):
        return str(numbers[-1])
    return text


def _same(found: str, wanted: str) -> bool:
    found, wanted = found.strip().casefold(), wanted.strip().casefold()
    try:
        return float(found.replace(",", "")) == float(wanted.replace(",", ""))
    except ValueError:
        return found == wanted
