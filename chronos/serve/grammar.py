"""Replies that must have a shape: JSON of a schema, a call of a tool, by llguidance.

A grammar says before each token which ids may follow, through the mask of Work. What it cannot
enforce is refused when the request comes. Constrains what comes after the reasoning only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chronos.common.text.tokenizer import StreamDecoder
from chronos.serve.problem import Problem
from chronos.serve.tools import CLOSE, OPEN, THINK_END, Tool

if TYPE_CHECKING:
    from chronos.serve.served import Served

# Optional blanks between JSON's marks are a way to never end; one form of them is enough.
_JSON_FORM: Any = {"whitespace_flexible": False}

_MOST_CALLS = 8  # in one reply: a model that is unsure when to stop would go on for ever


class Grammar:
    """A `Guide` of one reply. thinking: it begins in its reasoning, which is free."""

    def __init__(self, served: Served, grammar: str, thinking: bool) -> None:
        from llguidance import LLMatcher

        self._matcher = LLMatcher(_tokens_of(served), grammar)
        self._vocab = served.vocab_size
        self._thoughts = StreamDecoder(served.tokenizer) if thinking else None
        self._tail = ""

    def mask(self) -> npt.NDArray[np.bool_] | None:
        if self._thoughts is not None:
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._vocab].astype(bool)

    def take(self, token: int) -> None:
        if self._thoughts is None:
            self._matcher.consume_token(token)
            return
        self._tail = (self._tail + self._thoughts.push(token))[-4 * len(THINK_END) :]
        if THINK_END in self._tail:
            self._thoughts = None


def of_schema(schema: Any, param: str = "response_format") -> str:
    """The grammar of JSON that a schema allows. Raises Problem for what cannot be enforced."""
    from llguidance import LLMatcher

    try:
        grammar: str = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_JSON_FORM)
    except ValueError as error:
        raise _refused(str(error), param) from None
    return _checked(grammar, param)


def of_calls(tools: Sequence[Tool], several: bool, param: str = "tool_choice") -> str:
    """The grammar of a call of one of these tools, or of one after another where several are
    allowed, in the form that `tools` reads."""
    from llguidance import LLMatcher

    rules = []
    for number, tool in enumerate(tools):
        schema = {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": tool.parameters},
            "required": ["name", "arguments"],
            "additionalProperties": False,
            "x-guidance": _JSON_FORM,
        }
        rules.append(f"call{number}: %json {json.dumps(schema)}")
    any_call = " | ".join(f"call{number}" for number in range(len(tools)))
    more = f' ("\\n" one){{0,{_MOST_CALLS - 1}}}' if several else ""
    one = f"one: {json.dumps(OPEN + chr(10))} ({any_call}) {json.dumps(chr(10) + CLOSE)}"
    grammar: str = LLMatcher.grammar_from_lark("\n".join([f"start: one{more}", one, *rules]))
    return _checked(grammar, param)


def _checked(grammar: str, param: str) -> str:
    from llguidance import LLMatcher

    if error := LLMatcher.validate_grammar(grammar):
        raise _refused(str(error), param)
    return grammar


def _refused(error: str, param: str) -> Problem:
    return Problem(
        400, f"the schema cannot be enforced: {error}", code="invalid_schema", param=param
    )


@lru_cache(maxsize=8)
def _tokens_of(served: Served) -> Any:
    from llguidance import LLTokenizer

    text = (served.folder / "tokenizer.json").read_text("utf-8")
    return LLTokenizer(text, n_vocab=served.vocab_size, eos_token=sorted(served.stop_ids))
