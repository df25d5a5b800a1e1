"""The intent classifier learns what a prompt says of a reply, is kept strictly, judged by hits."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from chronos.common.disk.tensors import write_tensors
from chronos.common.errors import CorruptFileError, DataError
from chronos.common.experts.foresight.intent import INTENT, IntentModel, shares
from chronos.common.experts.foresight.predictor import DecayedUse
from chronos.common.traces import intent
from chronos.common.traces.intent import (
    compare_preloads,
    fit_intent,
    train_if_it_wins,
)
from chronos.common.traces.trace import RoutingTrace, TraceRecorder

LAYERS, EXPERTS, TOP_K, TURN = 2, 12, 2, 16


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    """Sequences of a kind: the first half uses two experts, the second half two others, which the
    kind decides. What a prompt itself uses says nothing to a cache, its kind everything."""
    rng, recorder = np.random.default_rng(1), TraceRecorder(EXPERTS, TOP_K)
    for _ in range(30):
        kind = int(rng.integers(3))
        recorder.new_sequence()
        for token in range(2 * TURN):
            first = 2 * kind + (6 if token >= TURN else 0)
            recorder.append(np.tile(rng.permutation([first, first + 1]), (LAYERS, 1)))
    return recorder.trace()


@pytest.fixture(scope="module")
def model(trace: RoutingTrace) -> IntentModel:
    patch = pytest.MonkeyPatch()
    patch.setattr(intent, "_STEPS", 200)
    patch.setattr(intent, "_RATE", 3e-2)
    fitted = fit_intent(trace, seed=1)
    patch.undo()
    return fitted


def test_it_learns_what_follows_a_prompt_and_not_what_is_in_it(
    trace: RoutingTrace, model: IntentModel
) -> None:
    found = compare_preloads(
        trace,
        TOP_K * LAYERS,
        {"intent": model.use, "own": lambda prompt: shares(prompt, EXPERTS)},
        prompt_tokens=TURN,
    )
    assert found["own"] == [0.0, 0.0, 0.0]
    assert min(found["intent"]) > 0.9


def test_it_is_kept_only_where_it_wins(
    trace: RoutingTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These prompts say nothing of their own; repeating ones say all there is."""
    monkeypatch.setattr(intent, "_STEPS", 200)
    monkeypatch.setattr(intent, "_RATE", 3e-2)
    make = partial(DecayedUse, LAYERS, EXPERTS)
    slots = TOP_K * LAYERS
    kept, hits = train_if_it_wins(trace, trace, slots, make)
    assert kept is not None and hits["intent"] > hits["predictor"]
    rng, recorder = np.random.default_rng(2), TraceRecorder(EXPERTS, TOP_K)
    for number in range(24):
        recorder.new_sequence()
        pair = rng.choice(EXPERTS, TOP_K, replace=False)
        for _ in range(4 * TURN):
            recorder.append(np.tile(pair, (LAYERS, 1)))
        if number == 15:
            seen = recorder.trace()
    unseen = recorder.trace().part(seen.num_tokens, recorder.trace().num_tokens)
    kept, hits = train_if_it_wins(seen, unseen, slots, make)
    assert kept is None and hits["predictor"] == 1.0
    assert train_if_it_wins(trace.part(0, 8), trace, slots, make) == (None, {})


def test_its_answers_are_chances_per_expert(trace: RoutingTrace, model: IntentModel) -> None:
    use_LE = model.use(trace.ids_TLK[:TURN])
    assert use_LE.shape == model.shape == (LAYERS, EXPERTS)
    assert (0 <= use_LE).all() and (use_LE <= 1).all()


def test_gradients_are_those_of_the_loss(trace: RoutingTrace) -> None:
    rng = np.random.default_rng(0)
    count = LAYERS * EXPERTS
    params = {
        "bias": rng.normal(size=(LAYERS, EXPERTS)),
        "own": rng.normal(size=(LAYERS, EXPERTS)),
        "enter": rng.normal(size=(count, 3)),
        "leave": rng.normal(size=(3, count)),
    }
    x, y = rng.normal(size=(5, count)), rng.random((5, count))

    def loss() -> float:
        z = x @ params["enter"] @ params["leave"] + x * params["own"].ravel()
        z = z + params["bias"].ravel()
        return float((np.logaddexp(0, z) - y * z).sum() / len(x))

    grads = intent._gradients(params, x, y)  # type: ignore[arg-type]
    for name, value in params.items():
        at = tuple(int(rng.integers(size)) for size in value.shape)
        value[at] += 1e-4
        above = loss()
        value[at] -= 2e-4
        below = loss()
        value[at] += 1e-4
        assert grads[name][at] == pytest.approx((above - below) / 2e-4, rel=1e-2, abs=1e-5)


def test_the_side_file_comes_back_and_is_read_strictly(model: IntentModel, tmp_path: Path) -> None:
    path = tmp_path / INTENT
    model.save(path)
    again = IntentModel.load(path)
    assert all(np.array_equal(again.params[name], value) for name, value in model.params.items())
    about = {"format": "chronos-intent", "version": "1"}

    def write(params: dict[str, np.ndarray], metadata: dict[str, str] = about) -> None:
        tensors = [(n, "F32", v.shape, np.ascontiguousarray(v).data) for n, v in params.items()]
        write_tensors(path, tensors, metadata)

    write(model.params, {"format": "chronos-forecast", "version": "1"})
    with pytest.raises(CorruptFileError, match="not an intent"):
        IntentModel.load(path)
    write({name: value for name, value in model.params.items() if name != "own"})
    with pytest.raises(CorruptFileError, match="other tensors"):
        IntentModel.load(path)
    write(model.params | {"leave": model.params["leave"][:, 1:]})
    with pytest.raises(CorruptFileError, match="do not fit"):
        IntentModel.load(path)
    write(model.params | {"own": np.full_like(model.params["own"], np.nan)})
    with pytest.raises(CorruptFileError, match="NaN"):
        IntentModel.load(path)


def test_traces_too_short_are_refused(trace: RoutingTrace) -> None:
    with pytest.raises(DataError, match="longer than"):
        fit_intent(trace.part(0, 10))
    with pytest.raises(DataError, match="long enough"):
        compare_preloads(trace.part(0, 20), 4, {"own": lambda prompt: shares(prompt, EXPERTS)})
