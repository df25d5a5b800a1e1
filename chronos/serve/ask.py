"""What every door asks of a model: how to draw, when to stop, in which shape; and the jobs of it.

The doors (`openai`, `responses`, `anthropic`) are three spellings of this one request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from chronos.common.errors import MissingBackendError
from chronos.common.text.sampling import SamplingParams
from chronos.run.generation import Step
from chronos.serve import chat as chats
from chronos.serve.answer import Answer
from chronos.serve.fields import Field
from chronos.serve.metrics import Metrics
from chronos.serve.problem import Problem
from chronos.serve.served import Catalogue, Served
from chronos.serve.tools import MARKS, Part, ReplyText, Tool
from chronos.serve.worker import Worker

_log = logging.getLogger("chronos")
MOST_STOPS, MOST_LIKELY = 16, 20
_DRAW = ("temperature", "top_p", "top_k", "min_p", "seed")
_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
# A bias of 100 is OpenAI's word for always, -100 for never; this decides between any two logits.
_ALWAYS = 1e9

# How to draw, in all doors that take it; ranges are those of SamplingParams.
SAMPLING = (
    Field("temperature", ("number",), 0, 100),
    Field("top_p", ("number",), 0, 1),
    Field("top_k", ("integer",), -1, 1 << 31),
    Field("min_p", ("number",), 0, 1),
    Field("seed", ("integer",), -(1 << 63), (1 << 63) - 1),
    Field("presence_penalty", ("number",), -2, 2),
    Field("frequency_penalty", ("number",), -2, 2),
    Field("repetition_penalty", ("number",), 0, 100),
    Field("logit_bias", ("object",)),
)


@dataclass
class Service:
    """What requests are answered with."""

    catalogue: Catalogue
    worker: Worker
    metrics: Metrics

    def __post_init__(self) -> None:
        self._said: set[str] = set()

    def say_once(self, text: str) -> None:
        """Of what is asked for and left out: a line in the log, once."""
        if text not in self._said and len(self._said) < 100:
            self._said.add(text)
            _log.warning("%s", text)


@dataclass
class Ask:
    """likely: log-probabilities beside each token's own. grammar: what the reply must be, after its
    thoughts. count: replies to each prompt. score: log-probabilities of the prompt as well."""

    served: Served
    sampling: SamplingParams
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    count: int = 1
    likely: int | None = None
    score: bool = False
    bias: npt.NDArray[np.float32] | None = None
    grammar: str | None = None
    tools: Sequence[Tool] = ()
    thinking: bool = False
    prompts: list[list[int]] = field(default_factory=list)

    async def render(self, chat: chats.Chat) -> None:
        """Set the prompt to a conversation's."""
        tokenizer = self.served.tokenizer
        prompt = await asyncio.to_thread(chats.render, tokenizer, chat)
        self.prompts = [prompt]
        self.tools = chat.tools
        self.thinking = chats.opens_thoughts(tokenizer, prompt)

    async def begin(self, service: Service, streamed: bool | None) -> Answer:
        """Put its jobs in line. Raises Problem."""
        rooms = [self.served.room(prompt, self.max_tokens) for prompt in self.prompts]
        answer = Answer(service.worker, service.metrics, bool(streamed))
        for prompt, room in zip(self.prompts, rooms, strict=True):
            for number in range(self.count):
                answer.add(
                    model=self.served.name,
                    prompt=prompt,
                    sampling=_numbered(self.sampling, number),
                    max_tokens=room,
                    stop=self.stop,
                    guide=await self._guide(),
                    bias=self.bias,
                    likely=self.likely,
                    score=self.score,
                )
        answer.submit()
        return answer

    def texts(self, answer: Answer) -> list[ChatText]:
        """One for each job."""
        return [ChatText(self) for _ in answer.jobs]

    async def whole(self, answer: Answer) -> tuple[ChatText, list[Part]]:
        """The text of an answer's only job once it has ended, and what it said: its reasoning, then
        its content, each in one part and only if there is some."""
        [text] = self.texts(answer)
        parts: list[Part] = []
        async for _, step in answer:
            if step is not None:
                parts += text.take(step)
        parts += text.end()
        said = {
            kind: "".join(part.text for part in parts if part.kind == kind)
            for kind in ("reasoning", "content")
        }
        return text, [Part(kind, words) for kind, words in said.items() if words]

    async def _guide(self) -> Any:
        if self.grammar is None:
            return None
        from chronos.serve.grammar import Grammar

        return await asyncio.to_thread(Grammar, self.served, self.grammar, self.thinking)


class ChatText(ReplyText):
    """A reply's text in a chat, fed with steps. thoughts: tokens of its reasoning."""

    def __init__(self, ask: Ask) -> None:
        tokenizer = ask.served.tokenizer
        super().__init__(ask.tools, ask.thinking, tokenizer.leading_space)
        hidden = tokenizer.control_ids
        self._marks = {hidden[mark]: mark for mark in MARKS if mark in hidden}
        self.thoughts = 0

    def take(self, step: Step) -> list[Any]:
        """The parts that are final with a step."""
        mark = "" if step.token is None else self._marks.get(step.token, "")
        parts = self.push(mark + step.text)
        self.thoughts += self._state == "reasoning" and step.token is not None
        return parts

    def reason(self, reason: str) -> str:
        """OpenAI's word for why it ended: calls count only of a reply that was not cut."""
        if reason in ("length", "context"):
            return "length"
        return "tool_calls" if self.calls else "stop"


def sampling_of(values: Mapping[str, Any], served: Served) -> SamplingParams:
    """Of a request's fields; what it leaves out is as the model's folder says. Raises Problem."""
    given = {name: values[name] for name in (*_DRAW, *_PENALTIES) if name in values}
    if given.get("top_k") == -1:  # vLLM's word for off
        given["top_k"] = 0
    if "seed" in given:
        given["seed"] %= 1 << 64
    for name in ("top_p", "repetition_penalty"):
        if given.get(name) == 0:
            raise Problem(400, f"{name} must be above 0", code="invalid_value", param=name)
    return SamplingParams(**(dict(served.sampling) | given))


def stops_of(given: Any) -> list[str]:
    """Raises Problem."""
    stops = [given] if isinstance(given, str) else list(given or ())
    stops = [stop for stop in stops if stop != ""] if isinstance(given, str) else stops
    if len(stops) > MOST_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise Problem(
            400,
            f"stop must be a text or up to {MOST_STOPS} texts, none of them empty",
            code="invalid_value",
            param="stop",
        )
    return stops


def bias_of(given: Mapping[str, Any] | None, vocab_size: int) -> npt.NDArray[np.float32] | None:
    """[V]. Raises Problem."""
    if not given:
        return None
    bias_V = np.zeros(vocab_size, np.float32)
    for key, value in given.items():
        known = key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not number or not -100 <= value <= 100:
            raise Problem(
                400,
                f"logit_bias must give token ids below {vocab_size} numbers from -100 to 100",
                code="invalid_value",
                param="logit_bias",
            )
        bias_V[int(key)] = value if abs(value) < 100 else value / abs(value) * _ALWAYS
    return bias_V


def grammar_of_schema(schema: Any, param: str) -> str:
    """Raises Problem for what cannot be enforced, and where the library is not installed."""
    try:
        from chronos.serve.grammar import of_schema

        return of_schema(schema, param)
    except ImportError:
        raise _no_grammar() from None


def grammar_of_choice(choice: str | None, tools: Sequence[Tool], several: bool) -> str | None:
    """choice: required, the name of a tool, or anything that forces none."""
    if choice in (None, "", "auto", "none"):
        return None
    allowed = [tool for tool in tools if choice in ("required", tool.name)]
    if not allowed:
        raise Problem(
            400,
            f"tool_choice asks for {str(choice)[:60]!r}, which is not in tools",
            code="invalid_value",
            param="tool_choice",
        )
    try:
        from chronos.serve.grammar import of_calls

        return of_calls(allowed, several and choice == "required")
    except ImportError:
        raise _no_grammar() from None


def _no_grammar() -> MissingBackendError:
    return MissingBackendError(
        "schemas and forced calls need llguidance", "", "pip install 'chronos-moe[serve]'"
    )


def _numbered(sampling: SamplingParams, number: int) -> SamplingParams:
    """Of the replies to one prompt each has a seed of its own, the first the one asked for."""
    if sampling.seed is None or not number:
        return sampling
    from dataclasses import replace

    return replace(sampling, seed=(sampling.seed + number) % (1 << 64))
