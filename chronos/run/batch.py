"""Sequences answered side by side on one session: each has its own rules, numbers and result.

`add` and `cancel` between two calls of `step`, which is one pass of the model. A sequence's tokens
are those it would have alone. Knows no framework. Not covered: which prefixes of prompts are worth
keeping.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from chronos.common.text.sampling import AGAIN, SamplingParams, Work
from chronos.run.generation import GenerationResult, Likely, Step, Text
from chronos.run.meter import Meter
from chronos.run.scheduler import Scheduler

if TYPE_CHECKING:
    from chronos.backends.protocol import Session
    from chronos.common.experts.feed import Feed
    from chronos.common.text.tokenizer import Tokenizer

_NO_TOKEN = (
    "the logits after {} tokens hold a NaN or an infinity, or rules and mask allow no token;"
    " no token was taken from them"
)


class Guide(Protocol):
    """What may follow in one reply, token by token: a grammar."""

    def mask(self) -> npt.NDArray[np.bool_] | None:
        """bool [V], which tokens may be drawn next; None for all."""

    def take(self, token: int) -> None:
        """That one was drawn."""


@dataclass
class _Reply:
    """One reply in the making. likely: how many log-probabilities beside the token's own. scored:
    those of the prompt so far, None where nobody asked."""

    prompt: Sequence[int]
    max_tokens: int
    text: Text
    meter: Meter
    end_token: int | None = None
    guide: Guide | None = None
    bias: npt.NDArray[np.float32] | None = None
    likely: int | None = None
    scored: list[Likely] | None = None
    routing: bool = False
    tokens: list[int] = field(default_factory=list)


class Batch:
    """`results` has those that ended: what they came to, or the error that ended them."""

    def __init__(
        self,
        session: Session,
        feed: Feed | None,
        *,
        context: int,
        tokenizer: Tokenizer | None = None,
        stop_ids: frozenset[int] = frozenset(),
        slots: int = 1,
        layers: int = 0,
        facts: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """context: tokens of a prompt and its reply. slots: sequences under way at a time; others
        wait. layers: with streamed experts. facts: what else to write into a result's stats."""
        self.results: dict[int, GenerationResult | Exception] = {}
        self._session, self._feed, self._context = session, feed, context
        self._tokenizer, self._stop_ids, self._facts = tokenizer, stop_ids, facts
        self._scheduler = Scheduler(slots, layers=layers)
        self._replies: dict[int, _Reply] = {}

    def add(
        self,
        seq: int,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        record: bool = False,
        start: int = 0,
        guide: Guide | None = None,
        bias: npt.NDArray[np.float32] | None = None,
        likely: int | None = None,
        score: bool = False,
        routing: bool = False,
    ) -> None:
        """seq: a number that the session does not know, or with `start` tokens of the prompt (whole
        pieces of it). record: keep what the limit is computed from, for a sequence that is alone.
        guide, bias: as Work's mask and bias. likely: so many log-probabilities in each step.
        score: and of the prompt's tokens, in the result. routing: the experts of all tokens, there
        too; not with record."""
        meter = Meter(self._session, self._feed, seq, record=record)
        text = Text(self._tokenizer, stop)
        scored: list[Likely] | None = [] if score else None
        self._replies[seq] = _Reply(
            prompt, max_tokens, text, meter, guide=guide, bias=bias, likely=likely, scored=scored,
            routing=routing,
        )  # fmt: skip
        self._scheduler.add(seq, prompt, sampling, start)

    def step(self) -> list[tuple[int, Step]]:
        """One pass; the tokens it made, by sequence. Nothing to do where all have ended."""
        work = [self._shaped(each) for each in self._scheduler.next()]
        if not work:
            return []
        record = len(work) == 1 and self._replies[work[0].seq].meter.records(work[0])
        record = record or any(self._replies[each.seq].routing for each in work)
        begin = time.perf_counter()
        outs = self._session.run(work, record=record)
        seconds = time.perf_counter() - begin
        steps = []
        for each, out in zip(work, outs, strict=True):
            self._replies[each.seq].meter.note(each, seconds, whole=out != AGAIN)
            if isinstance(out, Exception):
                self._leave(each.seq, out)
                continue
            self._scheduler.took(each, out)
            if out == AGAIN:
                continue
            self._score(each)
            if out is not None:
                steps += [(each.seq, step) for step in self._take(each.seq, out)]
        return steps

    def _shaped(self, work: Work) -> Work:
        """With what its reply allows and prefers, where a token is drawn."""
        reply = self._replies[work.seq]
        if reply.scored is not None and work.prompt:
            work = replace(work, every=True)
        if not work.last or (reply.guide is None and reply.bias is None):
            return work
        mask = None if reply.guide is None else reply.guide.mask()
        return replace(work, mask=mask, bias=reply.bias)

    def _score(self, work: Work) -> None:
        """What a piece of a prompt made of the tokens behind its own."""
        reply = self._replies[work.seq]
        if reply.scored is None or not work.every:
            return
        end = self._session.position(work.seq) + 1
        follow = reply.prompt[end - len(work.tokens) : end]
        logits_TV = self._session.every_logits(work.seq)
        for logits_V, token in zip(logits_TV, follow, strict=False):  # none follows the last
            reply.scored.append(likeliest(logits_V, token, reply.likely or 0))

    def cancel(self, seq: int) -> list[tuple[int, Step]]:
        """End a sequence, if it has not ended; what was held back of its text."""
        if seq not in self._replies:
            return []
        return [(seq, step) for step in self._end(seq, "cancelled")]

    def close(self) -> None:
        """Drop the sequences that have not ended."""
        for seq in list(self._replies):
            self._leave(seq, None)

    def _take(self, seq: int, token: int) -> list[Step]:
        reply = self._replies[seq]
        if token < 0:
            return self._end(seq, "error")
        likely: Likely = ()
        if reply.likely is not None:
            likely = likeliest(self._session.logits(seq), token, reply.likely)
        if token in self._stop_ids:
            reply.end_token = token
            told = [Step(None, "", likely)] if likely else []
            return [*told, *self._end(seq, "stop")]
        reply.tokens.append(token)
        if reply.guide is not None:
            reply.guide.take(token)
        piece = reply.text.push(token)
        reason = ""
        if reply.text.stopped:
            reason = "stop"
        elif len(reply.tokens) == reply.max_tokens:
            reason = "length"
        elif self._session.position(seq) >= self._context:
            reason = "context"
        if not reason:
            return [Step(token, piece, likely)]
        step = Step(token, piece + reply.text.flush(), likely)
        return [step, *self._end(seq, reason)]

    def _end(self, seq: int, reason: str) -> list[Step]:
        reply = self._replies[seq]
        tail = reply.text.flush()
        error = _NO_TOKEN.format(self._session.position(seq)) if reason == "error" else ""
        reply.meter.end()
        stats = reply.meter.stats() | self._facts()
        text, meter = reply.text, reply.meter if reply.meter.record else None
        told = (reason, stats, error, reply.end_token, text.stopped_by, reply.scored or (), meter)
        routing_TLK = None
        if reply.routing:
            routing_TLK = np.concatenate([ids_TLK for ids_TLK, _ in self._session.routing(seq)])
        made = GenerationResult(len(reply.prompt), reply.tokens, text.shown, *told, routing_TLK)
        self._leave(seq, made)
        return [Step(None, tail)] if tail else []

    def _leave(self, seq: int, result: GenerationResult | Exception | None) -> None:
        self._scheduler.drop(seq)
        self._session.drop(seq)
        del self._replies[seq]
        if result is not None:
            self.results[seq] = result


def likeliest(logits_V: npt.NDArray[np.float32], token: int, count: int) -> Likely:
    """(id, log-probability in nats) of a token, then of the `count` likeliest, by the logits as the
    model gave them."""
    log_p_V = logits_V - logits_V.max()
    log_p_V = log_p_V - np.log(np.exp(log_p_V).sum(dtype=np.float64))
    best = np.argpartition(-log_p_V, min(count, len(log_p_V) - 1))[:count]
    best = best[np.lexsort((best, -log_p_V[best]))]  # equal ones by id
    return tuple((int(i), float(log_p_V[i])) for i in (token, *best))
