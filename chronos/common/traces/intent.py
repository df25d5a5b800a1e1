"""Training an intent classifier on a trace, and what a preload by it is worth.

`compare_preloads` sets it beside what is free: popularity, the prompt's own routing, a primed
predictor. The answer depends on the model (bench/log/intent.md), so `train_if_it_wins` keeps one
only where it wins.

Shape legend: B samples, L layers, E experts, R rank, N = L * E.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chronos.common.errors import DataError
from chronos.common.experts.foresight.intent import IntentModel, features, logits, shares
from chronos.common.experts.foresight.network import Floats, sigmoid
from chronos.common.experts.foresight.params import Adam
from chronos.common.experts.foresight.predictor import Predictor
from chronos.common.traces.trace import RoutingTrace

REPLY = 16  # tokens of a reply that training looks at
_JUDGED = 4  # tokens of a reply over which a preload is judged
_SHORTEST = 16  # tokens of a prompt that has anything to say
_RANK, _STEPS, _BATCH, _RATE, _DECAY = 16, 1000, 64, 3e-3, 1e-3
# A way to rank experts before a reply: prompt [T, L, K] to scores [L, E].
Ranking = Callable[[NDArray[Any]], NDArray[Any]]


def fit_intent(train: RoutingTrace, seed: int = 0) -> IntentModel:
    """Train on sequences cut in two at random. Some ten seconds. Raises DataError for none."""
    sequences = [ids for ids in sequences_of(train) if len(ids) > _SHORTEST]
    if not sequences:
        raise DataError(f"no sequence of the trace is longer than {_SHORTEST} tokens")
    rng, shape = np.random.default_rng(seed), (train.num_layers, train.num_experts)
    count = shape[0] * shape[1]
    params: dict[str, Floats] = {
        "bias": np.zeros(shape, np.float32),
        "own": np.zeros(shape, np.float32),
        "enter": (rng.standard_normal((count, _RANK)) * count**-0.5).astype(np.float32),
        "leave": np.zeros((_RANK, count), np.float32),
    }
    adam = Adam(params)
    for step in range(_STEPS):
        x_BN, y_BN = _batch(sequences, shape[1], rng)
        adam.step(params, _gradients(params, x_BN, y_BN), _RATE * (1 - step / _STEPS), _DECAY)
    return IntentModel(params)


def sequences_of(trace: RoutingTrace) -> list[NDArray[Any]]:
    """ids_TLK of each sequence, in order."""
    starts = np.flatnonzero(np.diff(trace.seq_T)) + 1
    return np.split(trace.ids_TLK.astype(np.intp), starts)


def _batch(
    sequences: Sequence[NDArray[Any]], experts: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Prompts [B, N] and the share of the reply's first tokens that use each expert [B, N]."""
    x, y = [], []
    for number in rng.integers(0, len(sequences), _BATCH):
        ids_TLK = sequences[number]
        cut = int(rng.integers(_SHORTEST, len(ids_TLK)))
        x.append(features(ids_TLK[:cut], experts))
        y.append(shares(ids_TLK[cut : cut + REPLY], experts))
    return np.stack(x), np.stack(y)


def _gradients(params: Mapping[str, Floats], x_BN: Floats, y_BN: Floats) -> dict[str, Floats]:
    """Of the binary cross-entropy, summed over experts, mean over samples."""
    low_BR = x_BN @ params["enter"]
    error_BN = (sigmoid(logits(params, x_BN)) - y_BN) / np.float32(len(x_BN))
    shape = params["bias"].shape
    return {
        "bias": error_BN.sum(0).reshape(shape),
        "own": (error_BN * x_BN).sum(0).reshape(shape),
        "enter": x_BN.T @ (error_BN @ params["leave"].T),
        "leave": low_BR.T @ error_BN,
    }


def train_if_it_wins(
    train: RoutingTrace, validation: RoutingTrace, slots: int, predictor: Callable[[], Predictor]
) -> tuple[IntentModel | None, dict[str, float]]:
    """A classifier that beats a predictor primed with the prompt, or None; and the hit rates of
    both over the first tokens of validation sequences (none, where these are too short)."""

    try:
        model = fit_intent(train)
        rankings: dict[str, Ranking] = {
            "intent": model.use,
            "predictor": partial(primed, predictor),
        }
        rates = compare_preloads(validation, slots, rankings, first=(_JUDGED,))
    except DataError:
        return None, {}
    hits = {name: rate for name, (rate,) in rates.items()}
    return (model if hits["intent"] > hits["predictor"] else None), hits


def primed(predictor: Callable[[], Predictor], prompt_TLK: NDArray[Any]) -> NDArray[Any]:
    """How a fresh predictor ranks experts after a prompt."""
    fresh = predictor()
    fresh.prime(prompt_TLK)
    return fresh.scores()


def compare_preloads(
    test: RoutingTrace,
    slots: int,
    rankings: Mapping[str, Ranking],
    *,
    prompt_tokens: int = 64,
    first: Sequence[int] = (1, 4, 16),
) -> dict[str, list[float]]:
    """Hit rates of the reply's first tokens (up to each of `first`) with a cache that holds the
    `slots` best of a ranking, untouched since: the mean over sequences, each cut after
    `prompt_tokens` tokens or in the middle, if that comes sooner."""
    found: dict[str, list[list[float]]] = {name: [] for name in rankings}
    for ids_TLK in sequences_of(test):
        cut = min(prompt_tokens, len(ids_TLK) // 2)
        if cut < _SHORTEST or len(ids_TLK) < cut + max(first):
            continue
        keys_TLK = ids_TLK[cut:] + np.arange(test.num_layers)[:, None] * test.num_experts
        for name, ranking in rankings.items():
            held_N = np.zeros(test.num_layers * test.num_experts, bool)
            held_N[np.argsort(-ranking(ids_TLK[:cut]).ravel(), kind="stable")[:slots]] = True
            hits_T = held_N[keys_TLK].mean((1, 2))
            found[name].append([float(hits_T[:count].mean()) for count in first])
    if not all(found.values()):
        raise DataError("no sequence of the trace is long enough for a prompt and a reply")
    return {name: np.mean(rows, 0).tolist() for name, rows in found.items()}
