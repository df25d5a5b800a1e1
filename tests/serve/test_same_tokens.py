"""Greedy and seeded answers are those of `generate`, whatever the company, the order, the kept
beginnings and the budget; on every backend."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.text.sampling import PIECE, SamplingParams
from chronos.run.engine import load
from chronos.testing.tiny import CONFIG
from tests.support.serving import Running, serving

VOCAB, TOKENS = CONFIG.vocab_size, 6
SEEDED = {"temperature": 1.3, "top_k": 60, "top_p": 0.95, "seed": 11}
# Fifty, from one token to more than two pieces; three begin alike for a piece and more.
SHARED = [11 * i % VOCAB for i in range(PIECE + 40)]
PROMPTS: list[list[int]] = [
    *([(11 * i + 5 * j) % VOCAB for j in range(1 + i % 12)] for i in range(35)),
    *([7 + i, 3 * i % VOCAB, 41][: 1 + i % 3] for i in range(8)),
    *([(7 * i + j) % VOCAB for i in range(20 + 9 * j)] for j in range(4)),
    *([*SHARED, *range(at, at + 20)] for at in (30, 60)),
    [*SHARED, *(13 * i % VOCAB for i in range(PIECE))],
]


@pytest.fixture(scope="module")
def alone(backend: Any, folder: Path) -> list[list[list[int]]]:
    """Greedy and seeded answers of a resident model that has each prompt to itself."""
    with load(folder, backend=backend.name, budget="resident") as engine:
        engine.stop_ids = frozenset()
        return [
            [engine.generate(prompt, params, max_tokens=TOKENS).result.tokens for prompt in PROMPTS]
            for params in (SamplingParams(), SamplingParams(**SEEDED))  # type: ignore[arg-type]
        ]


@pytest.fixture(scope="module")
def server(backend: Any, folder: Path) -> Iterator[Running]:
    with serving(folder, backend=backend.name, prefix_bytes=1 << 24) as running:
        yield running


@pytest.mark.parametrize("budget", ["resident", "all", "50%", "25%"])
def test_many_at_a_time_at_every_budget(
    backend: Any, folder: Path, alone: list[list[list[int]]], budget: str
) -> None:
    """Two rounds in opposite order, the second with beginnings of prompts kept from the first; what
    is greedy in one is seeded in the other."""
    options: dict[str, Any] = {"prefix_bytes": 1 << 24, "queue": 64, "sequences": 4}
    with (
        serving(folder, backend=backend.name, load_options={"budget": budget}, **options) as server,
        ThreadPoolExecutor(6) as pool,
    ):
        for turn in (0, 1):
            seeded = [(at + turn) % 2 for at in range(len(PROMPTS))]
            asked = list(zip(PROMPTS, seeded, strict=True))[:: 1 - 2 * turn]
            answers = pool.map(
                lambda pair: server.text(pair[0], max_tokens=TOKENS, **(SEEDED if pair[1] else {})),
                asked,
            )
            found = list(answers)[:: 1 - 2 * turn]
            tokenizer = server.service.catalogue.first.tokenizer
            assert [answer["choices"][0]["text"] for answer in found] == [
                tokenizer.decode(alone[which][at]) for at, which in enumerate(seeded)
            ]
            assert {answer["usage"]["completion_tokens"] for answer in found} == {TOKENS}
            assert len(found) == 50
        cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in found]
        assert cached[-3:] == [PIECE, PIECE, 2 * PIECE] and set(cached[:-3]) == {0}


def test_a_warm_prompt_has_the_log_probabilities_of_a_cold_one(server: Running) -> None:
    prompt = [17 * i % VOCAB for i in range(2 * PIECE + 9)]
    cold, warm = (server.text(prompt, logprobs=3, temperature=0) for _ in range(2))
    assert cold["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] == 2 * PIECE
    assert cold["choices"] == warm["choices"]


@pytest.mark.parametrize("length", [2, 40, PIECE + 30])
def test_the_log_probabilities_of_a_prompt_are_the_models(
    backend: Any, server: Running, folder: Path, length: int
) -> None:
    """As `chronos eval` computes them, by one forward of the resident model."""
    prompt = [(5 * i + 3) % VOCAB for i in range(length)]
    model = backend.load(folder, device="cpu", resident=True)
    logits_TV = backend.forward(model, np.array([prompt])).logits_BTV[0]
    log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, dtype=np.float64))[:, None]
    answer = server.text([prompt, [1, 2]], max_tokens=1, echo=True, logprobs=2)
    told = answer["choices"][0]["logprobs"]
    assert {len(values) for values in told.values()} == {length + 1}
    own, best = told["token_logprobs"], told["top_logprobs"]
    assert own[0] is None and best[0] is None
    expected = log_p_TV[np.arange(length - 1), prompt[1:]]
    np.testing.assert_allclose(own[1:length], expected, atol=1e-4)
    highest = [max(each.values()) for each in best[1:]]
    np.testing.assert_allclose(highest, log_p_TV.max(-1), atol=1e-4)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    plain = server.text(prompt, max_tokens=1, logprobs=2)["choices"][0]["logprobs"]
    np.testing.assert_allclose(own[-1], plain["token_logprobs"][0], atol=1e-4)


def test_of_one_seed_each_reply_has_its_own_and_the_first_is_that_of_one(server: Running) -> None:
    [one] = server.chat(**SEEDED)["choices"]
    three = server.chat(n=3, **SEEDED)["choices"]
    assert three[0] == one
    assert len({choice["message"]["content"] for choice in three}) == 3
    assert server.chat(n=3, **SEEDED)["choices"] == three
