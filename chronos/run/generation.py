"""What a generation yields: steps with text that is final, and a result at the end.

Knows tokens and text, no model. Text is final when no later token can change it: characters are
whole, and nothing that may begin a stop string is shown before it is known not to.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from chronos.common.errors import UsageError
from chronos.common.text.stop import StopText
from chronos.common.text.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from chronos.run.meter import Meter

Likely = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Step:
    """One token and the text that is final with it.

    `text` is empty while a character or a possible stop string is incomplete. `token` is None in a
    closing step that only releases text held back. The texts of all steps join to the result's.
    likely: (id, log-probability in nats) of the token, then of the likeliest ones, where asked for;
    a token that ends the reply has a step with these alone.
    """

    token: int | None
    text: str
    likely: Likely = ()


@dataclass(frozen=True)
class GenerationResult:
    """What a generation came to.

    `tokens` leaves out the token that ends a reply; `text` ends before a stop string. finish_reason
    is stop, length, context, cancelled or error, and `error` says why in the last case. `end_token`
    is the token that ended the reply, if one did, `stopped_by` the stop string, "" where none did.
    scored: of each token of the prompt behind the first, where asked for, as `Step.likely`.
    routing_TLK: the experts that each token used in each layer, the prompt's too, where asked for;
    the last token that was drawn used none.
    """

    prompt_tokens: int
    tokens: list[int]
    text: str
    finish_reason: str
    stats: dict[str, Any]
    error: str = ""
    end_token: int | None = None
    stopped_by: str = ""
    scored: Sequence[Likely] = ()
    meter: Meter | None = field(default=None, repr=False, compare=False)  # for `Engine.limit`
    routing_TLK: npt.NDArray[np.int64] | None = field(default=None, repr=False, compare=False)


class Generation(Iterator[Step]):
    """Steps as they are made; `result` afterwards (asked for earlier, it runs to the end). One
    thread's at a time: the one that asked for the last step."""

    def __init__(self, steps: Generator[Step, None, GenerationResult | None]) -> None:
        self._steps, self._thread = steps, threading.current_thread()
        self._result: GenerationResult | None = None
        self._dropped, self._at_start = "", True

    def drop_leading_space(self) -> None:
        """Leave out a space that the text begins with: a SentencePiece model's first piece carries
        one, which belongs to a text that is continued and not to an answer in a chat."""
        self._dropped = " "

    @property
    def held_elsewhere(self) -> bool:
        """Whether it has not ended and is another thread's, which is alive."""
        other = self._thread is not threading.current_thread() and self._thread.is_alive()
        return other and inspect.getgeneratorstate(self._steps) != inspect.GEN_CLOSED

    def __next__(self) -> Step:
        self._check_idle()
        self._thread = threading.current_thread()
        try:
            step = next(self._steps)
        except StopIteration as end:
            if end.value:
                self._result = replace(end.value, text=end.value.text.removeprefix(self._dropped))
            raise StopIteration from None
        if self._at_start and step.text:
            self._at_start = False
            step = replace(step, text=step.text.removeprefix(self._dropped))
        return step

    @property
    def result(self) -> GenerationResult:
        """Raises what the generation raises, UsageError if it was closed before its end."""
        for _ in self:
            pass
        if self._result is None:
            raise UsageError("the generation was closed before its end")
        return self._result

    def close(self) -> None:
        """End it where it is. Safe to call twice."""
        self._check_idle()
        self._steps.close()

    def _check_idle(self) -> None:
        if inspect.getgeneratorstate(self._steps) == inspect.GEN_RUNNING:
            raise UsageError(
                "another thread is making a step of this generation",
                "",
                "let that thread end it: set the event that was given as `cancel`",
            )


class Text:
    """Tokens to text that is final: whole characters, no stop string and no beginning of one.

    A stop string may name control tokens. They have no text of their own, so a token and its name
    in the stop strings both become a lone surrogate, which no text has, and which is never shown.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]) -> None:
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._known = tokenizer.vocab_size if tokenizer else 0  # a model may have spare ids above
        control = tokenizer.control_ids if tokenizer and stop else {}
        named = sorted((name for name in control if any(name in s for s in stop)), key=len)
        marks = {name: chr(0xD800 + at) for at, name in enumerate(reversed(named))}
        self._marks = {control[name]: mark for name, mark in marks.items()}
        self._given = {_marked(text, marks): text for text in stop} | {text: text for text in stop}
        self._stop = StopText(self._given)
        self._pieces: list[str] = []

    @property
    def stopped(self) -> bool:
        return self._stop.found

    @property
    def stopped_by(self) -> str:
        """The stop string that was found, as it was given; "" before."""
        return self._given.get(self._stop.which, "")

    @property
    def shown(self) -> str:
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        if self._decoder is None or token >= self._known:
            return ""
        piece = self._decoder.push(token) + self._marks.get(token, "")
        return self._show(self._stop.push(piece))

    def flush(self) -> str:
        """What was held back, once no more tokens come; nothing after a stop string."""
        if self._decoder is None or self.stopped:
            return ""
        return self._show(self._stop.push(self._decoder.flush()) + self._stop.flush())

    def _show(self, piece: str) -> str:
        for mark in self._marks.values():
            piece = piece.replace(mark, "")
        self._pieces.append(piece)
        return piece


def _marked(text: str, marks: dict[str, str]) -> str:
    for name, mark in marks.items():
        text = text.replace(name, mark)
    return text
