"""Answers sampled from the model that is being trained."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chronos.backends.protocol import Backend
from chronos.common.data import Batch, Example, join
from chronos.common.errors import ChronosError
from chronos.common.text.sampling import SamplingParams
from chronos.run.engine import Engine
from chronos.train.start import Start


@dataclass(frozen=True)
class Answer:
    """A sampled answer: its ids, the token that ended it last, or `truncated`; its text; and where
    asked for the experts of its prompt's tokens and its own, but for the last of these."""

    ids: list[int]
    text: str
    truncated: bool
    routing_TLK: npt.NDArray[np.int64] | None = None


class Sampler:
    """Samples from a model as it is at the time, several sequences at once."""

    def __init__(self, backend: Backend, found: Start, sequences: int) -> None:
        self._sequences, self._tokenizer = sequences, found.tokenizer
        self._engine = Engine(
            found.session(backend),
            found.config,
            tokenizer=found.tokenizer,
            backend=backend.name,
            device=str(found.model.device),
        )

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
        top_k: int = 0,
        top_p: float = 1.0,
        routing: bool = False,
    ) -> list[Answer]:
        """An answer a prompt; the same weights and seeds give the same answers."""
        sampling = [
            SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
            for seed in seeds
        ]
        results = self._engine.generate_many(
            [list(prompt) for prompt in prompts],
            sampling,
            max_tokens=max_tokens,
            max_sequences=self._sequences,
            routing=routing,
        )
        answers = []
        for result in results:
            if result.finish_reason == "error":
                raise ChronosError(
                    f"sampling failed: {result.error}", "", "lower the learning rate and resume"
                )
            end = [] if result.end_token is None else [result.end_token]
            text = self._tokenizer.decode(result.tokens)
            ids = [*result.tokens, *end]
            answers.append(Answer(ids, text, not end, result.routing_TLK))
        return answers


def seed_of(*numbers: int) -> int:
    """A seed of 64 bits that follows from these numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def rows(prompts: Sequence[Sequence[int]], answers: Sequence[Answer], pad_id: int) -> Batch:
    """A row for each answer behind its prompt, the answer's tokens trained."""
    examples = [
        [
            Example(
                np.array([*prompt, *answer.ids], np.int32),
                np.arange(len(prompt) + len(answer.ids)) >= len(prompt),
            )
        ]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return join(examples, pad_id)


def picks(answers: Sequence[Answer], batch: Batch) -> npt.NDArray[np.int32]:
    """The experts that sampling used, by the rows of `rows` [B, T, L, K]; padding, which nothing is
    computed of, has those of its row's first token."""
    found = []
    for answer in answers:
        assert answer.routing_TLK is not None
        missing = batch.ids_BT.shape[1] - len(answer.routing_TLK)
        rest = np.repeat(answer.routing_TLK[:1], missing, axis=0)
        found.append(np.concatenate((answer.routing_TLK, rest)))
    return np.stack(found).astype(np.int32)


def content(prompt: Any, text: str) -> Any:
    """An answer in the form of its prompt: text, or a chat's message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
