"""Streamed = resident on the torch backend where a product is split over threads."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import chronos
from chronos.common.text.sampling import SamplingParams


def test_streamed_and_resident_write_the_same_on_two_threads(two_threads: None) -> None:
    written = []
    for budget in ("resident", "25%"):
        with chronos.load("demo", backend="torch", device="cpu", budget=budget) as engine:
            prompt = engine.tokenizer.encode("def read_lines(path):\n")
            sampling = SamplingParams(temperature=0.8, seed=3)
            generation = engine.generate(prompt, max_tokens=8, sampling=sampling)
            written.append([step.token for step in generation])
    assert len(written[0]) > 1
    assert written[0] == written[1]
