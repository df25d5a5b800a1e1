"""Sampling parameters and the filter every backend must agree with."""

from __future__ import annotations

import math

import numpy as np
import pytest

from chronos.common.errors import ChronosError, UsageError
from chronos.common.text.sampling import (
    Rules,
    SamplingParams,
    adjust_logits,
    draw,
    filter_logits,
    probabilities,
)

LOGITS = np.log([0.1, 0.4, 0.2, 0.2, 0.1])


def kept(**params) -> list[int]:
    return np.flatnonzero(np.isfinite(filter_logits(LOGITS, SamplingParams(**params)))).tolist()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [1]),
        ({"temperature": 1.0}, [0, 1, 2, 3, 4]),
        ({"temperature": 1.0, "top_k": 2}, [1, 2]),  # equal logits: the lower id
        ({"temperature": 1.0, "top_k": 99}, [0, 1, 2, 3, 4]),
        ({"temperature": 1.0, "top_p": 0.39}, [1]),
        ({"temperature": 1.0, "top_p": 0.41}, [1, 2]),
        ({"temperature": 1.0, "top_p": 0.61}, [1, 2, 3]),
        ({"temperature": 1.0, "min_p": 0.45}, [1, 2, 3]),
        ({"temperature": 1.0, "min_p": 1.0}, [1]),
        # top-p counts the mass of what top-k left: 0.4 of 0.6.
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, [1]),
        # A low temperature sharpens before the mass is counted.
        ({"temperature": 0.1, "top_p": 0.9}, [1]),
    ],
)
def test_filter(params, expected) -> None:
    assert kept(**params) == expected


def test_probabilities_are_renormalised() -> None:
    p = probabilities(LOGITS, SamplingParams(temperature=1.0, top_k=3))
    np.testing.assert_allclose(p, [0, 0.5, 0.25, 0.25, 0])


def test_draw_inverts_the_distribution() -> None:
    params = SamplingParams(temperature=1.0)
    counts = np.bincount([draw(LOGITS, params, u) for u in np.arange(0.005, 1, 0.01)])
    assert counts.tolist() == [10, 40, 20, 20, 10]
    assert draw(LOGITS, params, 0.0) == 0
    assert draw(LOGITS, params, np.nextafter(1.0, 0.0)) == 4
    assert draw(LOGITS, SamplingParams(), 0.99) == 1


def test_draw_never_takes_a_filtered_token() -> None:
    params = SamplingParams(temperature=1.0, top_k=1)
    assert {draw(LOGITS, params, u) for u in (0.0, 0.5, np.nextafter(1.0, 0.0))} == {1}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_are_never_sampled(bad: float) -> None:
    with pytest.raises(ChronosError, match="not finite"):
        draw([0.0, bad], SamplingParams(), 0.5)
    with pytest.raises(ChronosError, match="not finite"):
        draw([-math.inf, -math.inf], SamplingParams(), 0.5)


def test_masked_logits_are_allowed() -> None:
    assert draw([-math.inf, 0.0], SamplingParams(temperature=1.0), 0.0) == 1


def adjusted(ids: list[int], prompt: int, **params) -> list[float]:
    return adjust_logits([2.0, -2.0, 4.0, 0.0], ids, prompt, SamplingParams(**params)).tolist()


def test_penalties_by_the_ids_so_far() -> None:
    # Repetition: once for every id of prompt and answer; a negative logit is made more so.
    assert adjusted([0, 0, 1], 2, repetition_penalty=2.0) == [1.0, -4.0, 4.0, 0.0]
    # Presence and frequency: of the answer only, the one once and the other for every time.
    assert adjusted([0, 2, 3, 2], 1, presence_penalty=0.5) == [2.0, -2.0, 3.5, -0.5]
    assert adjusted([0, 2, 3, 2], 1, frequency_penalty=0.5) == [2.0, -2.0, 3.0, -0.5]
    # An id that has no logit (a spare row of the embedding) is passed over.
    assert adjusted([9, 0], 0, repetition_penalty=2.0, presence_penalty=1.0)[0] == 0.0


def ruled_out(ids: list[int], prompt: int, **rules) -> list[int]:
    values = adjusted(ids, prompt, rules=Rules(**rules))
    return [token for token, value in enumerate(values) if value == -math.inf]


def test_rules_by_the_ids_so_far() -> None:
    assert ruled_out([1], 1, suppress=(3, 99)) == [3]
    assert ruled_out([1], 1, begin_suppress=(0,)) == [0]
    assert ruled_out([1, 1], 1, begin_suppress=(0,)) == []
    assert ruled_out([1, 2], 0, bad_words=((2, 3), (1, 1), (0,), (0, 1, 2, 2))) == [0, 3]
    assert ruled_out([1, 2, 3, 1, 2], 3, no_repeat_ngram=3) == [3]
    assert ruled_out([1, 2], 1, no_repeat_ngram=3) == []
    assert ruled_out([1, 2], 1, no_repeat_ngram=1) == [1, 2]
    assert ruled_out([1, 2], 1, min_length=3, end=(2,)) == [2]
    assert ruled_out([1, 2], 1, min_length=2, end=(2,)) == []
    assert ruled_out([1, 2], 1, min_new_tokens=2, end=(2,)) == [2]
    assert ruled_out([1, 2, 2], 1, min_new_tokens=2, end=(2,)) == []


def test_nothing_is_adjusted_by_default() -> None:
    assert not SamplingParams().adjusts
    assert not SamplingParams(repetition_penalty=1.0).adjusts
    assert SamplingParams(repetition_penalty=1.1).adjusts
    assert SamplingParams(rules=Rules(suppress=(1,))).adjusts


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 0.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
    ],
)
def test_bad_values_are_named(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        SamplingParams(**{name: value})


def test_numpy_numbers_are_numbers() -> None:
    assert SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3)).top_k == 3
