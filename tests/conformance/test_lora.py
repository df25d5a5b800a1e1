"""Adapters of a model bigger than its memory, on every backend: native models and guests.

Budgets: all experts, half, a quarter, and what one token needs in a layer. The bytes of an adapter
after some updates must not depend on it.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.data import IGNORE, Batch
from chronos.common.errors import ShapeMismatch, UsageError
from chronos.common.experts.feed import Feed, FeedOptions, open_feed
from chronos.common.experts.passes import UpAndDown
from chronos.common.layout import open_layout
from chronos.common.text.sampling import SamplingParams
from chronos.common.training.lora import LoraRecipe, read_adapter, write_adapter
from chronos.common.training.objectives import NO_ROUTING, NextToken, PolicyGradient
from chronos.common.training.recipe import OptimizerRecipe
from chronos.run.engine import Engine
from chronos.testing.tiny import tiny_packed
from chronos.train import rollouts
from chronos.train.rollouts import Answer
from tests.support.guests import tiny_guest

BUDGETS = (1.0, 0.5, 0.25, 0.0)
OPTIMIZER = OptimizerRecipe(learning_rate=1e-2, min_learning_rate=1e-3)
ALL = LoraRecipe(rank=4, targets=("attention", "shared", "experts", "gate"))
DENSE = LoraRecipe(rank=4, targets=("attention",))
EXPERTS = [(layer, expert) for layer in (0, 1) for expert in (0, 2, 5)]
OBJECTIVE = NextToken()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            home = tmp_path_factory.mktemp(kind) / "packed"
            made[kind] = (
                tiny_packed(home, num_shared_experts=1) if kind == "native" else tiny_guest(home)
            )
        return made[kind]

    return make


def batches(number: int) -> list[Batch]:
    """Two micro-batches, one document a row."""
    random = np.random.default_rng(number)
    found = []
    for rows, length in ((2, 12), (1, 9)):
        ids = random.integers(3, 290, (rows, length)).astype(np.int32)
        labels = np.roll(ids, -1, 1)
        labels[:, -3:] = IGNORE
        segments = np.zeros_like(ids)
        segments[:, -2:] = -1
        found.append(Batch(ids, labels, segments))
    return found


@contextmanager
def opened(backend: Any, folder: Path, share: float) -> Iterator[tuple[Any, Feed]]:
    layout = open_layout(folder)
    capacity = max(int(layout.total_bytes * share), 2 * layout.record_nbytes)
    order = UpAndDown(layout.moe_layers, (layout.num_layers, layout.num_experts))
    options = FeedOptions(top_k=2)
    with open_feed(backend.open_arena, layout, capacity, options, policy=order) as feed:
        yield backend.streamed(backend.load(folder, resident=False), feed), feed


def trained(
    backend: Any,
    model: Any,
    recipe: LoraRecipe = ALL,
    updates: int = 3,
    optimizer: OptimizerRecipe = OPTIMIZER,
) -> tuple[Any, dict[str, bytes], list[dict[str, float]]]:
    if not model.config.num_shared_experts:
        recipe = dataclasses.replace(recipe, targets=tuple({*recipe.targets} - {"shared"}))
    adapter = backend.attach(model, recipe, experts=EXPERTS)
    step = backend.train_step(model, optimizer, adapter)
    terms = [step.step(batches(0), OBJECTIVE, 1e-2, number) for number in range(updates)]
    return adapter, values(adapter), terms


def values(adapter: Any) -> dict[str, bytes]:
    return {name: bytes(data) for name, _, _, data in adapter.tensors()}


@pytest.mark.parametrize("kind", ["native", "guest"])
def test_an_adapters_bytes_are_the_same_at_every_budget(
    backend: Any, kind: str, folder: Callable[[str], Path]
) -> None:
    found = []
    for share in BUDGETS:
        with opened(backend, folder(kind), share) as (model, feed):
            _, adapter, terms = trained(backend, model)
            assert feed.stats().peak_expert_bytes <= feed.stats().capacity_bytes
            assert not any(t["skipped"] for t in terms)
        found.append(adapter)
    assert terms[-1]["loss"] < terms[0]["loss"]
    for each in found:
        assert each == found[0]


@pytest.mark.parametrize("kind", ["native", "guest"])
def test_layers_that_are_computed_again_give_the_same_bits(
    backend: Any, kind: str, folder: Callable[[str], Path]
) -> None:
    """And read nothing more: what a layer's experts gave is kept."""
    found = []
    for share, again in ((0.0, False), (0.0, True), (1.0, True)):
        with opened(backend, folder(kind), share) as (model, feed):
            optimizer = dataclasses.replace(OPTIMIZER, gradient_checkpointing=again)
            _, adapter, terms = trained(backend, model, ALL, optimizer=optimizer)
            assert model.bare.gradient_checkpointing == again
            found.append((adapter, terms))
            if not again:
                reads = feed.stats().bytes_read
            elif not share:
                assert feed.stats().bytes_read == reads
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("kind", ["native", "guest"])
def test_micro_batches_go_through_the_model_layer_by_layer(
    backend: Any, kind: str, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each expert is read once up and once down an update, less what the budget holds at each turn,
    whatever the number of micro-batches; and the adapter is that of one after the other."""
    data, updates = [*batches(0), *batches(1)], 2
    objective = OBJECTIVE if kind == "native" else NextToken(NO_ROUTING)
    recipe = dataclasses.replace(ALL, dora=True)
    if kind == "guest":
        recipe = dataclasses.replace(recipe, targets=("attention", "experts", "gate"))

    def run(share: float) -> tuple[dict[str, bytes], list[Any], list[int], int]:
        with opened(backend, folder(kind), share) as (model, feed):
            adapter = backend.attach(model, recipe, experts=EXPERTS)
            step, terms, reads = backend.train_step(model, OPTIMIZER, adapter), [], []
            for number in range(updates):
                before = feed.stats()
                terms.append(step.step(data, objective, 1e-2, number))
                spent = feed.stats().minus(before).bytes_read
                reads.append(spent // feed.layout.record_nbytes)
            assert feed.stats().peak_expert_bytes <= feed.stats().capacity_bytes
            return values(adapter), terms, reads, feed.slots

    every = len(open_layout(folder(kind)).records)
    found = [run(share) for share in BUDGETS]
    for adapter, terms, reads, slots in found:
        assert (adapter, terms) == found[0][:2]
        assert reads == [2 * every - slots, 2 * every - 2 * slots]
    room = importlib.import_module(f"{backend.__name__}.train")
    monkeypatch.setattr(room.TrainStep, "_climbs", lambda *_: False)
    adapter, terms, reads, _ = run(0.0)
    assert (adapter, terms) == found[0][:2]
    assert reads[0] > 4 * every  # the control


def test_experts_of_sampling_are_replayed(backend: Any, folder: Callable[[str], Path]) -> None:
    """What a streamed model used for its answers comes through their padding, is what its training
    pass chooses by itself, and is replayed alike at every budget."""
    found = []
    for share in (1.0, 0.0):
        with opened(backend, folder("native"), share) as (model, feed):
            engine = Engine(backend.session(model.bare, feed), model.config)
            prompts = [[5, 9, 12], [7, 3, 8, 11, 4]]
            results = engine.generate_many(
                prompts, SamplingParams(temperature=1.0, seed=1), max_tokens=6, routing=True
            )
            answers = [Answer(r.tokens, "", True, r.routing_TLK) for r in results]
            batch = rollouts.rows(prompts, answers, pad_id=0)
            ids_BTLK = rollouts.picks(answers, batch)
            real_BT = batch.segments_BT >= 0
            assert not real_BT.all()
            own = backend.score(model, batch).ids_BTLK
            np.testing.assert_array_equal(ids_BTLK[real_BT], own[real_BT])
            named = batch.with_extra(
                {"picks": ids_BTLK[:, ::-1].copy(), "advantages": np.array([1.0, -1.0], np.float32)}
            )
            adapter = backend.attach(model, ALL, experts=EXPERTS)
            step = backend.train_step(model, OPTIMIZER, adapter)
            for number in range(2):
                step.step([named, named], PolicyGradient(), 1e-2, number)
            found.append(values(adapter))
    assert found[0] == found[1]


def test_adapters_that_drop_inputs_go_one_after_the_other(
    backend: Any, folder: Callable[[str], Path]
) -> None:
    """Masks follow from the micro-batch's number, whatever is computed before it."""
    recipe, found = dataclasses.replace(ALL, dropout=0.1), []
    for share in (1.0, 0.0):
        with opened(backend, folder("native"), share) as (model, _):
            found.append(trained(backend, model, recipe, updates=2)[1:])
    assert found[0] == found[1]


def test_a_model_that_holds_its_experts_computes_layers_again_too(
    backend: Any, folder: Callable[[str], Path]
) -> None:
    found = []
    for again in (False, True):
        model = backend.load(folder("native"), resident=True)
        optimizer = dataclasses.replace(OPTIMIZER, gradient_checkpointing=again)
        found.append(trained(backend, model, optimizer=optimizer)[1:])
    assert found[0] == found[1]


def test_products_in_bfloat16_give_the_same_bits_at_every_budget(
    backend: Any, folder: Callable[[str], Path]
) -> None:
    """The backward pass makes those of the forward one: adapters are near the resident model's,
    whose products autograd has kept, and not float32's."""
    if backend.name != "torch":
        pytest.skip("MLX trains in float32; tests/conformance/test_train.py")
    half, found = dataclasses.replace(OPTIMIZER, compute_dtype="bfloat16"), []
    for share, optimizer in ((1.0, half), (0.0, half), (0.0, OPTIMIZER)):
        with opened(backend, folder("native"), share) as (model, _):
            found.append(trained(backend, model, optimizer=optimizer)[1:])
    assert found[0] == found[1] and found[1][0] != found[2][0]
    model = backend.load(folder("native"), resident=True)
    _, _, terms = trained(backend, model, optimizer=half)
    apart = [[abs(a["loss"] - b["loss"]) for a, b in zip(one, terms, strict=True)]
             for one in (found[0][1], found[2][1])]  # fmt: skip
    assert apart[0][-1] < 0.5 * apart[1][-1]


def test_it_is_the_adapter_of_the_model_that_holds_its_experts(
    backend: Any, folder: Callable[[str], Path]
) -> None:
    resident = backend.load(folder("native"), resident=True)
    _, expected, _ = trained(backend, resident)
    with opened(backend, folder("native"), 0.0) as (model, _):
        _, found, _ = trained(backend, model)
    assert found.keys() == expected.keys()
    for name, data in found.items():
        one, other = (np.frombuffer(x, np.float32) for x in (data, expected[name]))
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("kind", ["native", "guest"])
def test_every_named_target_moves(backend: Any, kind: str, folder: Callable[[str], Path]) -> None:
    recipe = dataclasses.replace(ALL, dora=True)
    if kind == "guest":
        recipe = dataclasses.replace(recipe, targets=("attention", "experts", "gate"))
    with opened(backend, folder(kind), 0.25) as (model, _):
        adapter = backend.attach(model, recipe, experts=EXPERTS)
        before = values(adapter)
        step = backend.train_step(model, OPTIMIZER, adapter)
        for number in range(2):  # A moves once B is not 0
            step.step(batches(0), OBJECTIVE, 1e-2, number)
        still = [name for name, data in values(adapter).items() if data == before[name]]
    assert not still
    groups = {"self_attn", ".experts.", "gate"} | (
        {"shared_experts"} if kind == "native" else set()
    )
    assert all(any(group in name for name in before) for group in groups)
    assert any("magnitude" in name for name in before)
    ranks = {name: len(data) for name, data in before.items() if "lora_A" in name}
    assert len({e for e in ranks if ".experts." in e}) == 2 * len(EXPERTS)


@pytest.mark.parametrize("kind", ["native", "guest"])
def test_a_new_adapter_changes_no_answer(
    backend: Any, kind: str, folder: Callable[[str], Path]
) -> None:
    ids = batches(0)[0].ids_BT
    with opened(backend, folder(kind), 0.5) as (model, feed):
        before = backend.forward(model.bare, ids, source=feed.step()).logits_BTV
        backend.attach(
            model, dataclasses.replace(ALL, targets=("attention", "experts")), experts=EXPERTS
        )
        after = backend.forward(model.bare, ids, source=feed.step()).logits_BTV
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("kind", ["native", "guest"])
def test_a_trained_model_is_its_own_reference(
    backend: Any, kind: str, folder: Callable[[str], Path]
) -> None:
    """With the adapter off it says what it said before it had one."""
    recipe = dataclasses.replace(ALL, dora=True)
    batch = batches(1)[0]
    with opened(backend, folder(kind), 0.5) as (model, _):
        before = backend.score(model, batch)
        adapter, _, _ = trained(backend, model, recipe, updates=2)
        with adapter.off():
            off = backend.score(model, batch)
        on = backend.score(model, batch)
    np.testing.assert_array_equal(off.log_probs_BT, before.log_probs_BT)
    np.testing.assert_array_equal(off.ids_BTLK, before.ids_BTLK)
    assert np.abs(on.log_probs_BT - before.log_probs_BT).max() > 1e-3


def test_a_target_that_names_nothing_is_refused(
    backend: Any, folder: Callable[[str], Path]
) -> None:
    with opened(backend, folder("native"), 0.5) as (model, _):
        for target in ("q_projection", "experts"):
            with pytest.raises(UsageError, match="lora.targets"):
                backend.attach(model, LoraRecipe(targets=("attention", target)))
        with pytest.raises(UsageError, match="adapter"):
            backend.train_step(model, OPTIMIZER)
        backend.attach(model, DENSE)
        with pytest.raises(UsageError, match="already"):
            backend.attach(model, DENSE)


@pytest.mark.parametrize("kind", ["native", "guest"])
def test_a_file_brings_an_adapter_back(
    backend: Any, kind: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with opened(backend, folder(kind), 0.5) as (model, _):
        recipe = dataclasses.replace(ALL, targets=ALL.targets[:1] + ALL.targets[2:])
        adapter, saved, _ = trained(backend, model, recipe)
        write_adapter(tmp_path / "a", recipe, adapter.tensors(), base="m", fingerprint="one")
        expected = backend.train_step(model, OPTIMIZER, adapter).evaluate(batches(1), OBJECTIVE)
    file = read_adapter(tmp_path / "a")
    file.check_model("one")
    with pytest.raises(UsageError, match="another model"):
        file.check_model("two")
    assert file.experts == frozenset(EXPERTS)
    with opened(backend, folder(kind), 0.25) as (model, _):
        again = backend.attach(model, file.recipe, seed=9, experts=file.experts)
        again.load(file.tensors())
        assert values(again) == saved
        assert (
            backend.train_step(model, OPTIMIZER, again).evaluate(batches(1), OBJECTIVE) == expected
        )
    with opened(backend, folder(kind), 0.25) as (model, _):
        other = backend.attach(
            model, dataclasses.replace(file.recipe, rank=2), experts=file.experts
        )
        with pytest.raises(ShapeMismatch, match="does not fit"):
            other.load(file.tensors())
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["r"] == 4


def test_a_resumed_adapter_goes_on_with_the_same_bits(
    backend: Any, folder: Callable[[str], Path]
) -> None:
    def entries(step: Any) -> list[Any]:
        from chronos.common.disk.header import TensorEntry

        return [
            (TensorEntry(name, dtype, shape, 0, len(data)), memoryview(bytearray(data)))
            for name, dtype, shape, data in step.state()
        ]

    recipe = dataclasses.replace(ALL, dropout=0.1)
    with opened(backend, folder("native"), 0.25) as (model, _):
        adapter = backend.attach(model, recipe, experts=EXPERTS)
        step = backend.train_step(model, OPTIMIZER, adapter)
        step.step(batches(0), OBJECTIVE, 1e-2, 0)
        state = entries(step)
        step.step(batches(1), OBJECTIVE, 1e-2, 1)
        expected = values(adapter)
    with opened(backend, folder("native"), 0.5) as (model, _):
        adapter = backend.attach(model, recipe, experts=EXPERTS)
        step = backend.train_step(model, OPTIMIZER, adapter)
        step.load_state(iter(state))
        step.step(batches(1), OBJECTIVE, 1e-2, 1)
        assert values(adapter) == expected


def test_what_is_read_is_the_least(backend: Any, folder: Callable[[str], Path]) -> None:
    """With room for a layer and a half, each expert is read at most twice a batch, and what lies at
    the turn once."""
    layout = open_layout(folder("native"))
    with opened(backend, folder("native"), 0.5) as (model, feed):
        adapter = backend.attach(model, DENSE)
        step = backend.train_step(model, OPTIMIZER, adapter)
        many = [
            Batch(*(np.tile(a, (20, 1)) for a in (b.ids_BT, b.labels_BT, b.segments_BT)))
            for b in batches(0)[:1]
        ]
        before = feed.stats()
        step.step(many, OBJECTIVE, 1e-2, 0)
        stats = feed.stats().minus(before)
    reads = stats.bytes_read // layout.record_nbytes
    assert 0 < reads < stats.routed <= 2 * len(layout.records)
