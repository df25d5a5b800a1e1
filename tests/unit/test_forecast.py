"""The forecaster: its gradients, its training, its file, and what it is worth to a cache."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.disk.header import read_header
from chronos.common.errors import CorruptFileError, DataError, ShapeMismatch
from chronos.common.experts.foresight.forecast import DECAYS, Forecaster, ForecastModel, History
from chronos.common.experts.foresight.network import (
    INPUTS,
    Geometry,
    backward,
    forward,
    history_input,
    initial,
    loss,
    slope,
)
from chronos.common.experts.foresight.policy import PredictorPolicy
from chronos.common.traces.fit import FitOptions, Fitted, Samples, fit, split
from chronos.common.traces.measure import measure, predictors
from chronos.common.traces.simulate import simulate_policy, slots_for
from chronos.common.traces.trace import RoutingTrace
from chronos.common.training.recall import guesses, recall_at

L, E, K = 3, 8, 2
QUICK = FitOptions(epochs=12, batch=64, hidden=64, rank=8, rate=1e-2, drop=0.0)


def trace_of(ids_TLK: np.ndarray, per_sequence: int = 80) -> RoutingTrace:
    seq_T = np.arange(len(ids_TLK), dtype=np.int32) // per_sequence
    meta = {"model": "", "phase": "", "num_experts": E, "top_k": ids_TLK.shape[2]}
    return RoutingTrace(ids_TLK.astype(np.uint8), None, seq_T, meta)


def random_trace(tokens: int, seed: int = 0) -> RoutingTrace:
    draws = np.random.default_rng(seed).random((tokens, L, E))
    return trace_of(np.argsort(draws, -1)[..., :K])


def learnable_trace(tokens: int, seed: int = 0) -> RoutingTrace:
    """Every token's experts are the last token's, moved one up: no cache sees a reuse coming."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, E, (1, L, 1))
    jumps = np.where(rng.random((tokens, 1, 1)) < 0.02, rng.integers(0, E, (tokens, 1, 1)), 1)
    first = (start + np.cumsum(jumps, 0)) % E
    return trace_of(np.concatenate([first, (first + 3) % E], -1))


def random_params(geometry: Geometry, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: value + 0.3 * rng.standard_normal(value.shape).astype(np.float32)
        for name, value in initial(geometry, seed).items()
    }


@pytest.fixture(scope="module")
def learnt() -> Fitted:
    parts = split(learnable_trace(2400))
    return fit(parts.train, parts.validation, QUICK)


TRAINED = [name for name in Geometry(L, E, K, 5, 3).shapes if name != "blend"]


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_the_finite_differences_of_the_loss(name: str) -> None:
    geometry, rng = Geometry(L, E, K, 5, 3), np.random.default_rng(1)
    params = {n: v.astype(np.float64) for n, v in random_params(geometry, 2).items()}
    inputs, moments = rng.random((L, 4, INPUTS, E)), rng.integers(0, L, 4)
    targets = rng.random((L, 4, 2 * E))

    def value() -> float:
        # The same draw of dropout each time.
        kept = forward(params, inputs, moments, drop=0.3, rng=np.random.default_rng(3))
        return loss(kept.logits_LBX, targets)

    kept = forward(params, inputs, moments, drop=0.3, rng=np.random.default_rng(3))
    grads = backward(params, kept, slope(kept.logits_LBX, targets))
    assert sorted(grads) == sorted(TRAINED)
    tensor, step = params[name], 1e-5
    for at in rng.integers(0, tensor.size, 12):
        flat, before = tensor.ravel(), tensor.ravel()[at]
        flat[at] = before + step
        above = value()
        flat[at] = before - step
        below = value()
        flat[at] = before
        assert grads[name].ravel()[at] == pytest.approx((above - below) / (2 * step), abs=1e-7)


def test_samples_are_what_a_predictor_sees_and_what_comes_after() -> None:
    trace = random_trace(40)
    samples, history = Samples(trace), History(L, E, K)
    token, moment = 12, 1
    for ids_LK in trace.ids_TLK[:token]:
        history.observe_all(ids_LK)
    for layer in range(moment + 1):
        history.observe(layer, trace.ids_TLK[token, layer].tolist())
    inputs, _, targets = samples.at(np.array([token]), np.array([moment]))
    assert np.array_equal(inputs[:, 0, 0], history.last_LE)
    assert np.allclose(inputs[:, 0, 1:], history_input(history.share_LDE), atol=2e-3)
    for layer in range(L):
        turn = token + 1 if layer <= moment else token
        expected = np.zeros((2, E))
        expected[0, trace.ids_TLK[turn, layer]] = 1.0
        for ahead in range(7):
            expected[1, trace.ids_TLK[turn + 1 + ahead, layer]] += 0.8**ahead * 0.2 / (1 - 0.8**7)
        assert np.allclose(targets[layer, 0].reshape(2, E), expected, atol=1e-6)


def test_history_in_one_go_is_history_step_by_step() -> None:
    ids_TLK = random_trace(30).ids_TLK
    steps, primed = History(L, E, K), History(L, E, K)
    for ids_LK in ids_TLK.tolist():
        for layer, experts in enumerate(ids_LK):
            steps.observe(layer, experts)
    primed.prime(ids_TLK[:10])
    primed.prime(ids_TLK[10:])
    assert np.allclose(steps.share_LDE, primed.share_LDE, atol=1e-6)
    assert np.array_equal(steps.last_LE, primed.last_LE)


@pytest.mark.parametrize("moments", [1, 2, L])
def test_a_forecaster_answers_as_the_network_at_the_moments_it_renews(moments: int) -> None:
    geometry = Geometry(L, E, K, 16, 4)
    model = ForecastModel(geometry, random_params(geometry, 0))
    forecaster, history = Forecaster(model, moments), History(L, E, K)
    renews = {round((i + 1) * L / moments) - 1 for i in range(moments)}
    for ids_LK in random_trace(6).ids_TLK.tolist():
        for layer, experts in enumerate(ids_LK):
            forecaster.observe(layer, experts)
            forecaster.reconsider()
            history.observe(layer, experts)
            inputs = np.concatenate([history.last_LE[:, None], history_input(history.share_LDE)], 1)
            kept = forward(model.params, inputs[:, None], np.array([layer]))
            answers = 1.0 / (1.0 + np.exp(-kept.logits_LBX[:, 0].reshape(L, 2, E)))
            if layer in renews:
                assert np.allclose(forecaster.next_uses(), answers[:, 0], atol=1e-5)
        forecaster.end_token()


def test_a_forecast_is_renewed_when_there_is_time_and_not_before() -> None:
    geometry = Geometry(L, E, K, 16, 4)
    model = ForecastModel(geometry, random_params(geometry, 0))
    forecaster, other = Forecaster(model, L), Forecaster(model, L)
    chance = forecaster.next_uses().copy()
    forecaster.observe(0, [1, 2])
    assert np.array_equal(forecaster.next_uses()[1:], chance[1:])
    forecaster.reconsider()
    assert not np.allclose(forecaster.next_uses()[1:], chance[1:])
    forecaster.observe(1, [3, 4])
    forecaster.end_token()  # at the latest
    for layer, experts in ((0, [1, 2]), (1, [3, 4])):
        other.observe(layer, experts)
        other.reconsider()
    other.end_token()
    assert np.array_equal(forecaster.scores(), other.scores())


def test_a_layer_that_was_served_since_the_forecast_counts_its_later_uses_only() -> None:
    geometry = Geometry(L, E, K, 16, 4)
    forecaster = Forecaster(ForecastModel(geometry, random_params(geometry, 0)), moments=1)
    forecaster.prime(random_trace(10).ids_TLK)
    before, chance = forecaster.scores().copy(), forecaster.next_uses().copy()
    forecaster.observe(0, [1, 2])
    after = forecaster.scores()
    later = (before[0] - chance[0]) / 0.7  # as seen from the turn after, two layers away
    assert np.allclose(after[0], later * 0.7 ** (2 / 3))
    assert np.allclose(after[1:], before[1:] * 0.7 ** (-1 / 3))  # theirs is nearer


def test_priming_with_a_prompt_is_decoding_it() -> None:
    geometry = Geometry(L, E, K, 16, 4)
    model = ForecastModel(geometry, random_params(geometry, 0))
    ids_TLK = random_trace(20).ids_TLK
    primed, stepped = model.predictor(), model.predictor()
    primed.prime(ids_TLK)
    for ids_LK in ids_TLK.tolist():
        for layer, experts in enumerate(ids_LK):
            stepped.observe(layer, experts)
        stepped.end_token()
    assert np.allclose(primed.scores(), stepped.scores(), atol=1e-5)
    assert np.allclose(primed.next_uses(), stepped.next_uses(), atol=1e-5)


def test_sequences_are_divided_by_a_fixed_rule_within_domains() -> None:
    trace = random_trace(40 * 20)
    labels = [{"seq": seq, "domain": "ab"[seq % 2]} for seq in range(10)]
    parts = split(RoutingTrace(trace.ids_TLK, None, trace.seq_T, trace.meta))
    found = [sorted(set(part.seq_T.tolist())) for part in parts]
    assert found == [[0, 1, 2, 4, 6, 7, 9], [5], [3, 8]]
    meta = trace.meta | {"per_sequence": labels}
    parts = split(RoutingTrace(trace.ids_TLK, None, trace.seq_T, meta))
    assert sorted(set(parts.test.seq_T.tolist())) == [6, 7]  # 4th of a's, 9th in all
    assert sum(part.num_tokens for part in parts) == trace.num_tokens


def test_few_sequences_are_divided_by_tokens_and_too_few_tokens_refused() -> None:
    parts = split(random_trace(400, 0).part(0, 320))
    assert [part.num_tokens for part in parts] == [224, 32, 64]
    with pytest.raises(DataError, match="at least 32 are needed"):
        split(random_trace(200))


def test_the_same_seed_gives_the_same_parameters_and_another_does_not() -> None:
    parts, short = split(learnable_trace(800)), FitOptions(epochs=1, batch=64, hidden=16, rank=4)
    one, two = (fit(parts.train, parts.validation, short) for _ in range(2))
    other = fit(parts.train, parts.validation, FitOptions(1, 64, hidden=16, rank=4, seed=1))
    for name, value in one.model.params.items():
        assert np.array_equal(value, two.model.params[name])
    assert one.losses == two.losses
    assert one.losses != other.losses


def test_a_pattern_that_caches_cannot_see_is_learnt_and_used(learnt: Fitted) -> None:
    test = split(learnable_trace(2400)).test
    ((caches, found),) = measure(test, [slots_for(test, 0.5)], learnt.model, warmup=0.1)
    eta = found["forecast"].eta_policy
    assert eta is not None and eta > 0.6
    assert found["forecast"].recall.at_k is not None and found["forecast"].recall.at_k > 0.9
    assert found["forecast"].run.misses < min(run.misses for run in caches.runs[:2])


def test_votes_of_the_memory_are_trusted_where_they_are_right() -> None:
    """Passages come back after other tokens: their routing is noise to a network, not a memory."""
    passages = random_trace(4 * 40).ids_TLK.reshape(4, 40, L, K)
    order = np.random.default_rng(1).integers(0, 4, 60)
    parts = split(trace_of(passages[order].reshape(-1, L, K)))
    model = fit(parts.train, parts.validation, FitOptions(1, 64, hidden=16, rank=4)).model
    untrusting = dict(model.params, blend=initial(model.geometry, 0)["blend"])
    with_votes, without = (
        measure(parts.test, [12], m)[0][1]["forecast"].recall.at_k
        for m in (model, ForecastModel(model.geometry, untrusting))
    )
    assert with_votes is not None and without is not None
    assert with_votes > without + 0.2


def test_noise_is_not_learnt() -> None:
    parts = split(random_trace(2400))
    model = fit(parts.train, parts.validation, QUICK).model
    # In one pool even noise has an order: the layer that comes next comes before the others.
    ((_, found),) = measure(parts.test, [E // 2], model, pooled=False, warmup=0.1)
    eta = found["forecast"].eta_policy
    assert eta is not None and eta < 0.05
    assert found["forecast"].recall.at_k == pytest.approx(K / E, abs=0.05)


def test_training_stops_when_validation_no_longer_improves() -> None:
    parts = split(random_trace(1600))
    options = FitOptions(epochs=40, batch=32, hidden=64, rank=8, rate=1e-2, patience=2)
    fitted = fit(parts.train, parts.validation, options)
    assert len(fitted.losses) < 40
    assert int(np.argmin(fitted.losses)) == len(fitted.losses) - 3


def test_counts_add_up_to_the_routed_needs(learnt: Fitted) -> None:
    test = split(learnable_trace(2400)).test
    sizes = [slots_for(test, share) for share in (0.25, 0.5)]
    needs = (test.num_tokens - int(0.1 * test.num_tokens)) * L * K
    for slots, (caches, found) in zip(
        sizes, measure(test, sizes, learnt.model, warmup=0.1), strict=True
    ):
        for run in [*caches.runs, *(m.run for m in found.values())]:
            assert run.requests == run.hits + run.misses == needs
            assert run.slots == slots
        assert set(found) == set(predictors(test, learnt.model))
        policy = PredictorPolicy(learnt.model.predictor())
        assert simulate_policy(test, slots, policy, warmup=0.1).misses == (
            found["forecast"].run.misses
        )


def test_equal_slots_in_every_layer_can_be_measured_too(learnt: Fitted) -> None:
    test = split(learnable_trace(2400)).test
    ((caches, found),) = measure(test, [4], learnt.model, pooled=False)
    assert found["forecast"].run.slots == 4 and not found["forecast"].run.pooled
    assert found["forecast"].run.misses >= caches.runs[-1].misses


def test_a_file_gives_back_the_same_forecaster(tmp_path: Path, learnt: Fitted) -> None:
    path = tmp_path / "forecast.safetensors"
    ForecastModel(learnt.model.geometry, learnt.model.params, "abc").save(path)
    loaded = ForecastModel.load(path)
    assert loaded.geometry == learnt.model.geometry and loaded.fingerprint == "abc"
    for name, value in learnt.model.params.items():
        assert np.array_equal(loaded.params[name], value)


def test_a_forecaster_of_another_model_is_refused(learnt: Fitted) -> None:
    model = ForecastModel(learnt.model.geometry, learnt.model.params, "abc")
    model.check_fits(L, E, K, "abc")
    model.check_fits(L, E, K)
    with pytest.raises(ShapeMismatch, match="3 layers x 8 experts, top-2, cannot serve 3 x 16"):
        model.check_fits(L, 16, K)
    with pytest.raises(ShapeMismatch, match="other weights"):
        model.check_fits(L, E, K, "abd")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "pt"}, "is not a forecaster"),
        ({"version": "2"}, "has version '2'"),
        ({"layers": "-1"}, "malformed geometry"),
        ({"hidden": "x"}, "malformed geometry"),
        ({"top_k": "9"}, "impossible geometry"),
        ({"layers": "4"}, "other tensors"),
        ({"rank": "5"}, "other tensors"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(
    tmp_path: Path, learnt: Fitted, changes: dict[str, str], message: str
) -> None:
    path = tmp_path / "forecast.safetensors"
    learnt.model.save(path)
    _rewrite(path, changes)
    with pytest.raises(CorruptFileError, match=message):
        ForecastModel.load(path)


@pytest.mark.parametrize("experts", [E, 300])
def test_what_it_was_trained_on_comes_along(tmp_path: Path, experts: int) -> None:
    geometry = Geometry(L, experts, K, hidden=8, rank=2)
    known_TLK = random_trace(50).ids_TLK.astype(np.min_scalar_type(experts - 1))
    model = ForecastModel(geometry, initial(geometry, 0), known_TLK=known_TLK)
    model.save(tmp_path / "forecast.safetensors")
    again = ForecastModel.load(tmp_path / "forecast.safetensors")
    assert again.known_TLK is not None and np.array_equal(again.known_TLK, known_TLK)
    assert again.params.keys() == model.params.keys()
    known_TLK[3, 1] = experts
    if experts < 256:
        model.save(tmp_path / "forecast.safetensors")
        with pytest.raises(CorruptFileError, match="remembers experts"):
            ForecastModel.load(tmp_path / "forecast.safetensors")


def test_a_file_cut_short_or_with_a_nan_is_refused(tmp_path: Path, learnt: Fitted) -> None:
    path = tmp_path / "forecast.safetensors"
    learnt.model.save(path)
    whole = path.read_bytes()
    first = next(e for e in read_header(path).entries.values() if e.dtype == "F32")
    path.write_bytes(whole[:-1])
    with pytest.raises(CorruptFileError):
        ForecastModel.load(path)
    nan = struct.pack("<f", float("nan"))
    path.write_bytes(whole[: first.offset] + nan + whole[first.offset + 4 :])
    with pytest.raises(CorruptFileError, match="NaN"):
        ForecastModel.load(path)


def _rewrite(path: Path, changes: dict[str, str]) -> None:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    header["__metadata__"] |= changes
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    path.write_bytes(raw[:8] + text.ljust(length) + raw[8 + length :])


def test_recall_is_the_share_of_needs_among_the_guesses() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (5, L, E)).astype(float)  # ties too
    needed = np.argsort(rng.random((5, L, E)), -1)[..., :K]
    for count in (K, K + 3, E):
        found = recall_at(scores, needed, count)
        for row in np.ndindex(5, L):
            best = sorted(range(E), key=lambda e: (-scores[row][e], e))[:count]
            assert guesses(scores, count)[row].tolist() == best
            assert found[row] == len(set(best) & set(needed[row].tolist())) / K
    assert np.all(recall_at(scores, needed, E) == 1.0)


def test_decays_are_those_the_file_format_promises() -> None:
    assert DECAYS == (0.5, 0.8, 0.95, 0.99)


@pytest.mark.parametrize("seconds,epochs", [(0.0, 1), (25.0, 2), (1e9, 4)])
def test_no_epoch_begins_that_would_end_too_late(seconds: float, epochs: int) -> None:
    """Each epoch takes ten seconds of this clock."""
    now = iter([0.0, *(10.0 * (1 + call) for call in range(99))])
    parts = split(learnable_trace(800))
    options = FitOptions(4, 64, hidden=16, rank=4, patience=99)
    fitted = fit(parts.train, parts.validation, options, seconds=seconds, clock=lambda: next(now))
    assert len(fitted.losses) == epochs
