"""Training a full-stack forecaster on a routing trace, on a CPU, in NumPy and in minutes.

Sequences are divided into train, validation and test by a fixed rule. A sample is a moment: a token
and the layer served last, both drawn at random; the answers asked for are uses at each layer's
turns to come. Adam with decoupled weight decay; the averaged parameters are what is validated, kept
when they are best, and returned. The same trace, options and seed give the same parameters on the
same machine with the same number of BLAS threads.
Not covered: what a forecaster is worth to a cache (`measure`).

Shape legend: T tokens, B batch, L layers, E experts, K top-k, D decays, O answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chronos.common.errors import DataError
from chronos.common.experts.foresight.forecast import (
    HORIZON,
    LATER,
    ForecastModel,
    History,
    renewals,
)
from chronos.common.experts.foresight.network import (
    ANSWERS,
    BLENDED,
    DECAYS,
    Floats,
    Geometry,
    Params,
    backward,
    blend_inputs,
    forward,
    history_input,
    initial,
    loss,
    sigmoid,
    slope,
)
from chronos.common.experts.foresight.params import Adam
from chronos.common.experts.foresight.predictor import DISCOUNT
from chronos.common.traces.trace import RoutingTrace
from chronos.common.training.schedule import learning_rate

Progress = Callable[[int, int], None]
_MAX_BYTES = 1 << 30  # of histories in memory; sequences beyond it are not trained on
_AT_THE_END = 0.15  # of the samples lie at the end of a token: the moment recall is judged at
_KNOWN_TOKENS = 1 << 16  # of training sequences that go into the side file
_LEAST = 4 * HORIZON  # tokens that a part needs to be of any use
_TURN = {3: 2, 8: 2, 5: 1}  # of every ten sequences: 2 for testing, 1 for validation


class Parts(NamedTuple):
    """One trace in three, by sequence."""

    train: RoutingTrace
    validation: RoutingTrace
    test: RoutingTrace


@dataclass(frozen=True)
class FitOptions:
    """How long and how hard. Sizes of the network are capped by what the trace's geometry needs."""

    epochs: int = 10
    batch: int = 64
    rate: float = 2e-3
    drop: float = 0.3
    weight_decay: float = 1e-4
    averaging: float = 0.995
    patience: int = 2
    hidden: int = 512
    rank: int = 32
    seed: int = 0


class Fitted(NamedTuple):
    """The forecaster, its validation loss after each epoch [nats per answer], and seconds taken."""

    model: ForecastModel
    losses: list[float]
    seconds: float


def split(trace: RoutingTrace) -> Parts:
    """Train, validation and test by sequence: 70, 10 and 20 %, whatever the seed.

    Sequences are ordered by domain (meta["per_sequence"], where a trace has it), then as recorded;
    of every ten, numbers 3 and 8 are for testing and 5 for validation. A trace of fewer than nine
    sequences is cut by tokens instead. Raises DataError where a part would be too short.
    """
    domains = {
        entry.get("seq"): str(entry.get("domain", ""))
        for entry in trace.meta.get("per_sequence", ())
        if isinstance(entry, dict)
    }
    order = sorted(dict.fromkeys(trace.seq_T.tolist()), key=lambda seq: domains.get(seq, ""))
    if len(order) >= 9:
        part = {seq: _TURN.get(place % 10, 0) for place, seq in enumerate(order)}
        part_T = np.array([part[seq] for seq in trace.seq_T.tolist()])
    else:
        bounds = np.array([0.7, 0.8]) * trace.num_tokens
        part_T = np.searchsorted(bounds, np.arange(trace.num_tokens), side="right")
    parts = Parts(*(trace.select(part_T == i) for i in range(3)))
    if (least := min(part.num_tokens for part in parts)) < _LEAST:
        raise DataError(
            f"a part of the trace would have {least} tokens; at least {_LEAST} are needed",
            "",
            "record more tokens",
        )
    return parts


def fit(
    train: RoutingTrace,
    validation: RoutingTrace,
    options: FitOptions = FitOptions(),
    *,
    fingerprint: str = "",
    progress: Progress = lambda done, total: None,
    seconds: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> Fitted:
    """Train on one part, stop by the other; and before an epoch that would end after `seconds` of
    the clock, were it as long as those before. One epoch is always trained."""
    begin = clock()
    samples, held_out = Samples(train), Samples(validation)
    geometry = geometry_for(train, options)
    rng = np.random.default_rng(options.seed)
    params = initial(geometry, options.seed)
    average = {name: value.copy() for name, value in params.items()}
    best, losses = average, [float("inf")]
    adam, per_epoch = Adam(params), max(1, len(samples) // options.batch)
    total = options.epochs * per_epoch
    for epoch in range(options.epochs):
        order = rng.permutation(len(samples))
        for at in range(per_epoch):
            step = epoch * per_epoch + at
            batch = samples.batch(order[at * options.batch : (at + 1) * options.batch], rng)
            kept = forward(params, *batch[:2], drop=options.drop, rng=rng)
            grads = backward(params, kept, slope(kept.logits_LBX, batch[2]))
            rate = learning_rate(
                step, peak=options.rate, floor=options.rate / 50, warmup=100, total=total
            )
            adam.step(params, grads, rate, options.weight_decay)
            _blend(average, params, min(options.averaging, (1 + step) / (10 + step)))
            progress(step + 1, total)
        losses.append(validation_loss(average, held_out))
        if losses[-1] == min(losses):
            best = {name: value.copy() for name, value in average.items()}
        elif len(losses) - 1 - int(np.argmin(losses)) >= options.patience:
            break
        if (clock() - begin) * (epoch + 2) / (epoch + 1) > seconds:
            break
    model = ForecastModel(geometry, best, fingerprint, known(train))
    best["blend"] = trust(model, validation)
    return Fitted(model, losses[1:], clock() - begin)


def known(train: RoutingTrace) -> NDArray[Any]:
    """The last tokens of the training sequences, for a forecaster's memory."""
    return train.ids_TLK[-_KNOWN_TOKENS:]


def trust(model: ForecastModel, validation: RoutingTrace, every: int = 4) -> Floats:
    """How far to trust the memory's votes: the `blend` that fits the validation stream best.

    Logistic regression of a few numbers by Newton's method, on every fourth token at all moments;
    not on the training sequences, which the network itself knows too well.
    """
    forecaster, samples = model.predictor(), Samples(validation)
    weights_O7 = initial(model.geometry, 0)["blend"].astype(np.float64)
    seen: list[tuple[Floats, Floats]] = []
    for token, ids_LK in enumerate(validation.ids_TLK[: len(samples)].tolist()):
        for layer, experts in enumerate(ids_LK):
            forecaster.observe(layer, experts)
            forecaster.reconsider()
            if token % every == 0 and layer in forecaster.renews_after and token > 0:
                logits_OLE, vote = forecaster.parts()
                if vote is not None:
                    targets = samples.at(np.array([token]), np.array([layer]))[2]
                    targets_OLE = targets.reshape(len(ids_LK), ANSWERS, -1).transpose(1, 0, 2)
                    seen.append((blend_inputs(logits_OLE, *vote), targets_OLE))
        forecaster.end_token()
    for answer in range(ANSWERS if seen else 0):
        x_NX = np.concatenate([x[answer].reshape(BLENDED, -1).T for x, _ in seen])
        y_N = np.concatenate([y[answer].ravel() for _, y in seen])
        weights_O7[answer] = _logistic(x_NX, y_N, weights_O7[answer])
    return weights_O7.astype(np.float32)


def _logistic(x_NX: Floats, y_N: Floats, start_X: NDArray[Any], steps: int = 12) -> NDArray[Any]:
    """Weights of a logistic regression, drawn to `start_X` by a ridge of a thousandth."""
    weights = start_X.copy()
    for _ in range(steps):
        likely_N = sigmoid(x_NX @ weights.astype(np.float32))
        slope_X = x_NX.T @ (likely_N - y_N) / len(y_N) + 1e-3 * (weights - start_X)
        curve = (x_NX * (likely_N * (1 - likely_N))[:, None]).T @ x_NX / len(y_N)
        weights -= np.linalg.solve(curve + 1e-3 * np.eye(len(weights)), slope_X)
    return weights


def geometry_for(trace: RoutingTrace, options: FitOptions) -> Geometry:
    """A network no wider than the answers it has to give."""
    layers, experts = trace.num_layers, trace.num_experts
    hidden = min(options.hidden, max(64, layers * experts // 2))
    return Geometry(layers, experts, trace.top_k, hidden, min(options.rank, experts))


class Samples:
    """The moments of a trace as batches for the network."""

    def __init__(self, trace: RoutingTrace) -> None:
        L, E = trace.num_layers, trace.num_experts
        tokens = min(trace.num_tokens, _MAX_BYTES // (2 * L * len(DECAYS) * E))
        self._ids_TLK = trace.ids_TLK[:tokens].astype(np.intp)
        self._experts = E
        history = History(L, E, trace.top_k)
        self._history_TLDE = np.empty((tokens, L, len(DECAYS), E), np.float16)
        for token, ids_LK in enumerate(self._ids_TLK):
            history.observe_all(ids_LK)
            self._history_TLDE[token] = history_input(history.share_LDE)

    def __len__(self) -> int:
        """Tokens that have one before and HORIZON after them."""
        return max(0, len(self._ids_TLK) - 1 - HORIZON)

    def batch(
        self, samples_B: NDArray[Any], rng: np.random.Generator
    ) -> tuple[Floats, NDArray[np.intp], Floats]:
        """(inputs [L, B, I, E], moments [B], targets [L, B, O E]) at random moments."""
        layers = self._ids_TLK.shape[1]
        moment_B = rng.choice(sorted(renewals(layers)), len(samples_B))
        moment_B[rng.random(len(samples_B)) < _AT_THE_END] = layers - 1
        return self.at(samples_B + 1, moment_B)

    def at(
        self, token_B: NDArray[Any], moment_B: NDArray[Any]
    ) -> tuple[Floats, NDArray[np.intp], Floats]:
        """As `batch`, at given tokens and moments."""
        layer_L1 = np.arange(self._ids_TLK.shape[1])[:, None]
        seen_LB = token_B - (layer_L1 > moment_B)  # deeper layers: the token before
        history_LBDE = self._history_TLDE[seen_LB, layer_L1].astype(np.float32)
        last_LBE = self._uses([(seen_LB, 1.0)])
        next_LBE = self._uses([(seen_LB + 1, 1.0)])
        weights = [DISCOUNT**j / LATER for j in range(HORIZON - 1)]
        later_LBE = self._uses([(seen_LB + 2 + j, weight) for j, weight in enumerate(weights)])
        inputs = np.concatenate([last_LBE[:, :, None], history_LBDE], 2)
        return inputs, moment_B.astype(np.intp), np.concatenate([next_LBE, later_LBE], 2)

    def _uses(self, turns: list[tuple[NDArray[Any], float]]) -> Floats:
        """[L, B, E]: uses at these turns [L, B], each weighted."""
        layers, count = turns[0][0].shape
        uses = np.zeros((layers, count, self._experts), np.float32)
        layer_L1, row_1B = np.arange(layers)[:, None], np.arange(count)[None]
        for token_LB, weight in turns:
            ids_LBK = self._ids_TLK[token_LB, layer_L1]
            uses[layer_L1[..., None], row_1B[..., None], ids_LBK] += np.float32(weight)
        return uses


def validation_loss(params: Params, samples: Samples, batch: int = 512) -> float:
    """Mean loss over every moment of a fixed draw; no dropout."""
    rng, total = np.random.default_rng(0), 0.0
    for start in range(0, len(samples), batch):
        chosen = np.arange(start, min(start + batch, len(samples)))
        inputs, moments, targets = samples.batch(chosen, rng)
        logits = forward(params, inputs, moments).logits_LBX
        total += loss(logits, targets) * len(chosen)
    return total / max(1, len(samples))


def _blend(average: Params, params: Params, keep: float) -> None:
    for name, value in average.items():
        value += np.float32(1.0 - keep) * (params[name] - value)
