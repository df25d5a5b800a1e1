"""Answers sampled from the model that is being trained."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chronos.backends.protocol import Backend
from chronos.common.data import Batch, Example, join
from chronos.common.errors import ChronosError
from chronos.common.text.sampling import SamplingParams
from chronos.run.engine import Engine
from chronos.train.start import Start


@dataclass(frozen=True)
class Answer:
    """A sampled answer: its ids, the token that ended it last, or `truncated`; and its text."""

    ids: list[int]
    text: str
    truncated: bool


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
        )
        answers = []
        for result in results:
            if result.finish_reason == "error":
                raise ChronosError(
                    f"sampling failed: {result.error}", "", "lower the learning rate and resume"
                )
            end = [] if result.end_token is None else [result.end_token]
            text = self._tokenizer.decode(result.tokens)
            answers.append(Answer([*result.tokens, *end], text, not end))
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


def content(prompt: Any, text: str) -> Any:
    """An answer in the form of its prompt: text, or a chat's message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
