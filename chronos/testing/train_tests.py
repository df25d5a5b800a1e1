"""TrainTests: what each backend's training step must satisfy. Subclass with a `backend` fixture.

The terms are compared with the NumPy formulas of `common.training.losses` in the parity tests; here
it is their effects that count: what they move, what they leave alone, and that a run can be
continued.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.data import Batch
from chronos.common.disk.tensors import read_tensors, write_tensors
from chronos.common.errors import ShapeMismatch, UsageError
from chronos.common.model.config import LossWeights, ModelConfig
from chronos.common.training.objectives import NextToken
from chronos.common.training.optimizers import STATES, choose, kept_shapes
from chronos.common.training.recipe import OPTIMIZERS, OptimizerRecipe
from chronos.testing.model_tests import CONFIG

SPLITS = ((4, 4), (2, 2, 2, 2), (1,) * 8, (5, 2, 1), (7, 1))
RECIPE = OptimizerRecipe(learning_rate=1e-2, min_learning_rate=1e-3, seed=5)
TINY = dataclasses.replace(CONFIG, num_hidden_layers=2, initializer_range=0.1)


def batch(seed: int = 0, pads: int = 0, pad_token: int = 0) -> Batch:
    """Two rows of two documents each, the second row ending in `pads` padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, TINY.vocab_size, (2, 16)).astype(np.int32)
    segments = np.repeat([[0] * 9 + [1] * 7], 2, axis=0).astype(np.int32)
    labels = np.roll(ids, -1, axis=1)
    labels[:, [8, 15]] = -100
    if pads:
        ids[1, -pads:], segments[1, -pads:], labels[1, -pads - 1 :] = pad_token, -1, -100
    return Batch(ids, labels.astype(np.int32), segments)


def uneven(count: int) -> Batch:
    """Rows of two documents, from almost all to almost no labels; every other one ends in pads."""
    rng = np.random.default_rng(7)
    ids = rng.integers(0, TINY.vocab_size, (count, 16)).astype(np.int32)
    segments = np.repeat([[0] * 9 + [1] * 7], count, axis=0).astype(np.int32)
    segments[1::2, 11:] = -1
    labels = np.where(segments >= 0, np.roll(ids, -1, axis=1), -100)
    labels[:, [8, 15]] = labels[1::2, 10] = -100
    labels[count // 2 :, 3:] = labels[-1, 1:] = -100
    return Batch(ids, labels.astype(np.int32), segments)


def rows(batch: Batch, first: int, last: int) -> Batch:
    """Some rows of a batch, of its other arrays too."""
    taken = slice(first, last)
    extra = {name: array[taken] for name, array in batch.extra.items()}
    return Batch(batch.ids_BT[taken], batch.labels_BT[taken], batch.segments_BT[taken], extra)


def difference(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Norm of the difference of two gradients over the norm of the wanted one."""
    apart = sum(np.square(found[n].astype(np.float64) - g).sum() for n, g in wanted.items())
    return math.sqrt(apart / sum(np.square(g.astype(np.float64)).sum() for g in wanted.values()))


def with_losses(**weights: float) -> ModelConfig:
    zero = LossWeights(balance=0, temporal=0, locality=0, lookahead=0, lookahead_hit=0)
    return dataclasses.replace(TINY, loss_weights=dataclasses.replace(zero, **weights))


def objective(step: Any) -> NextToken:
    """The next token, with the weights of the model's config."""
    return NextToken(step.model.config.loss_weights)


class TrainTests:
    """`backend`: the backend module."""

    def start(self, backend: Any, config: ModelConfig = TINY, **changes: Any) -> Any:
        model = backend.build(config, seed=7)
        return backend.train_step(model, dataclasses.replace(RECIPE, **changes))

    def weights(self, step: Any) -> dict[str, np.ndarray]:
        """Weights only, as float32 arrays."""
        return {
            name: np.frombuffer(bytes(data), np.float32).reshape(shape)
            for name, _, shape, data in step.state()
            if name.partition(".")[0] not in (*STATES, "optimizer")
        }

    def gradients(self, step: Any) -> dict[str, np.ndarray]:
        """Clipped gradients of the first update, times 1 - beta1: its first moments. Weights would
        not do: Adam divides a gradient near its epsilon by itself, rounding errors included."""
        return {
            name: np.frombuffer(bytes(data), np.float32).reshape(shape)
            for name, _, shape, data in step.state()
            if name.startswith("exp_avg.")
        }

    def gradients_of(self, backend: Any, config: ModelConfig, *data: Batch, **changes: Any) -> Any:
        step = self.start(backend, config, **changes)
        return step.step(list(data), objective(step), 1e-2, 0), self.gradients(step)

    def after_one(
        self, backend: Any, config: ModelConfig, data: Batch, trunk: bool = False, **changes: Any
    ) -> Any:
        """trunk: lookahead_into_trunk."""
        step = self.start(backend, config, **changes)
        wanted = dataclasses.replace(objective(step), lookahead_into_trunk=trunk)
        terms = step.step([data], wanted, 1e-2, 0)
        return terms, self.weights(step)

    def test_learns(self, backend: Any) -> None:
        step, data = self.start(backend), batch()
        losses = [step.step([data], objective(step), 1e-2, i)["ce"] for i in range(12)]
        assert losses[0] == pytest.approx(math.log(TINY.vocab_size), rel=0.15)
        assert losses[-1] < 0.6 * losses[0]

    def test_says_how_the_router_is(self, backend: Any) -> None:
        step = self.start(backend)
        terms = step.step([batch()], objective(step), 1e-3, 0)
        assert 0 < terms["router/entropy"] <= math.log(TINY.num_experts) + 1e-5
        assert 1 / TINY.num_experts <= terms["router/largest_share"] <= 1 / TINY.num_experts_per_tok
        assert (
            1
            <= terms["router/effective_experts_min"]
            <= terms["router/effective_experts"]
            <= TINY.num_experts
        )

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_continuing_is_the_same_run(self, backend: Any, tmp_path: Path, name: str) -> None:
        """Dropout and simulated misses included: random numbers follow the step number."""
        config = dataclasses.replace(TINY, dropout=0.1, fallback_mask_prob=0.1)
        straight = self.start(backend, config, name=name)
        for i in range(4):
            straight.step([batch(i)], objective(straight), 1e-2, i)
        stopped = self.start(backend, config, name=name)
        for i in range(2):
            stopped.step([batch(i)], objective(stopped), 1e-2, i)
        write_tensors(tmp_path / "state.safetensors", stopped.state(), {})
        resumed = self.start(backend, config, name=name)
        resumed.load_state(read_tensors(tmp_path / "state.safetensors"))
        for i in range(2, 4):
            resumed.step([batch(i)], objective(resumed), 1e-2, i)
        expected, found = self.weights(straight), self.weights(resumed)
        assert found.keys() == expected.keys()
        for name in expected:
            assert np.array_equal(found[name], expected[name]), name

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_what_an_optimizer_keeps(self, backend: Any, name: str) -> None:
        """The same tensors on every backend, each of the shape that a plan of memory counts."""
        step = self.start(backend, name=name)
        assert {n.partition(".")[0] for n, *_ in step.state()}.isdisjoint(STATES)
        step.step([batch()], objective(step), 1e-2, 0)
        found = {n: shape for n, _, shape, _ in step.state() if n.partition(".")[0] in STATES}
        expected = {}
        for parameter, value in self.weights(step).items():
            chosen = choose(step.recipe, parameter, value.ndim).name
            for kind, shape in kept_shapes(chosen, value.shape).items():
                expected[f"{kind}.{parameter}"] = shape
        assert found == expected

    def test_state_of_another_optimizer_is_refused(self, backend: Any, tmp_path: Path) -> None:
        step = self.start(backend, name="muon")
        step.step([batch()], objective(step), 1e-2, 0)
        write_tensors(tmp_path / "state.safetensors", step.state(), {})
        with pytest.raises(ShapeMismatch, match="momentum_buffer"):
            self.start(backend).load_state(read_tensors(tmp_path / "state.safetensors"))
        kept = [t for t in step.state() if not t[0].startswith("momentum_buffer.model.layers.1")]
        write_tensors(tmp_path / "less.safetensors", kept, {})
        with pytest.raises(ShapeMismatch, match="lacks what the optimizer keeps"):
            self.start(backend, name="muon").load_state(read_tensors(tmp_path / "less.safetensors"))

    @pytest.mark.parametrize("source", ["gate", "lookahead", "history"])
    @pytest.mark.parametrize("noise", [0.0, 0.2])
    def test_computing_layers_again_gives_the_same_gradients(
        self, backend: Any, source: str, noise: float
    ) -> None:
        """To the bit, dropout and simulated misses included, over two micro-batches and updates.
        Routing that is committed ahead may sum the gradients of the first layer otherwise."""
        config = dataclasses.replace(
            with_losses(balance=0.1, temporal=0.1, lookahead=0.5),
            dropout=noise,
            fallback_mask_prob=noise,
            routing_source=source,
            num_resident_experts=1,
            num_resident_experts_per_tok=1,
        )
        found = []
        for twice in (False, True):
            step = self.start(backend, config, gradient_checkpointing=twice)
            terms = [
                step.step([batch(i), batch(i + 1, pads=5)], objective(step), 1e-2, i)
                for i in range(1 if source == "lookahead" else 2)
            ]
            found.append((terms, self.gradients(step), self.weights(step)))
        (terms, kept, weights), (terms_again, again, weights_again) = found
        assert difference(again, kept) < 1e-6
        if source != "lookahead":
            assert terms_again == terms
            for name, value in (kept | weights).items():
                assert np.array_equal((again | weights_again)[name], value), name

    def test_pads_have_no_influence(self, backend: Any) -> None:
        config = with_losses(
            balance=0.1, temporal=0.1, locality=0.1, lookahead=0.5, lookahead_hit=0.1
        )
        one, first = self.gradients_of(backend, config, batch(pads=5, pad_token=0))
        two, second = self.gradients_of(backend, config, batch(pads=5, pad_token=33))
        for name in (
            "loss",
            "ce",
            "balance",
            "temporal",
            "lookahead",
            "router/entropy",
            "router/largest_share",
        ):
            assert one[name] == pytest.approx(two[name], abs=1e-6), name
        assert max(np.abs(gradient).max() for gradient in first.values()) > 1e-3
        for name in first:
            np.testing.assert_allclose(first[name], second[name], atol=1e-6, err_msg=name)

    @pytest.mark.parametrize("term", ["balance", "temporal", "locality"])
    def test_a_term_moves_the_router(self, backend: Any, term: str) -> None:
        _, without = self.after_one(backend, with_losses(), batch())
        _, within = self.after_one(backend, with_losses(**{term: 1.0}), batch())
        gate = "model.layers.0.mlp.gate.weight"
        assert np.abs(without[gate] - within[gate]).max() > 1e-4

    @pytest.mark.parametrize("term", ["lookahead", "lookahead_hit"])
    def test_lookahead_trains_the_predictor_alone(self, backend: Any, term: str) -> None:
        """Clipping is off: it would couple the two through the norm."""
        _, without = self.after_one(backend, with_losses(), batch(), clip=1e9)
        _, within = self.after_one(backend, with_losses(**{term: 1.0}), batch(), clip=1e9)
        predictor = {name for name in without if name.startswith("lookahead.")}
        assert predictor
        assert any(not np.array_equal(without[name], within[name]) for name in predictor)
        for name in without.keys() - predictor:
            assert np.array_equal(without[name], within[name]), name

    def test_lookahead_into_the_trunk_spares_the_routers_as_targets(self, backend: Any) -> None:
        """Into the trunk, block 0 moves; a router after it is a target only and does not."""
        config = with_losses(lookahead=1.0)
        _, without = self.after_one(backend, with_losses(), batch(), clip=1e9)
        _, within = self.after_one(backend, config, batch(), trunk=True, clip=1e9)
        moved = {n for n in without if not np.array_equal(without[n], within[n])}
        assert "model.layers.0.self_attn.q_proj.weight" in moved
        assert "model.layers.1.mlp.gate.weight" not in moved

    def test_simulated_misses_train_the_shared_expert_in(self, backend: Any) -> None:
        masked = dataclasses.replace(with_losses(), fallback_mask_prob=0.9)
        _, without = self.after_one(backend, with_losses(), batch())
        _, within = self.after_one(backend, masked, batch())
        name = "model.layers.0.mlp.experts.0.down_proj.weight"
        assert not np.array_equal(without[name], within[name])

    @pytest.mark.parametrize("balance", [0.5, 0.0])
    @pytest.mark.parametrize("split", SPLITS, ids=str)
    def test_any_split_of_a_batch_is_the_batch(
        self, backend: Any, split: Sequence[int], balance: float
    ) -> None:
        """Rows of very different numbers of labels and tokens: gradient and terms are those of the
        joined batch, whose means are over labels, tokens and pairs, not over micro-batches."""
        config = with_losses(
            balance=balance, temporal=0.2, locality=0.1, lookahead=0.5, lookahead_hit=0.2
        )
        joined = uneven(sum(split))
        parts = [
            rows(joined, end - n, end) for n, end in zip(split, accumulate(split), strict=True)
        ]
        terms, wanted = self.gradients_of(backend, config, joined, clip=1e9)
        found_terms, found = self.gradients_of(backend, config, *parts, clip=1e9)
        for name, value in terms.items():
            assert found_terms[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
        assert difference(found, wanted) < 1e-6
        for name in wanted:  # alone, sums that cancel leave some tensors fewer digits
            assert difference({name: found[name]}, {name: wanted[name]}) < 5e-6, name

    def test_batches_are_evaluated_together(self, backend: Any) -> None:
        joined = uneven(8)
        step = self.start(backend, with_losses(balance=0.5, lookahead=0.5))
        whole = step.evaluate([joined], objective(step))
        parts = step.evaluate([rows(joined, 0, 1), rows(joined, 1, 8)], objective(step))
        assert parts == pytest.approx(whole, rel=1e-6)

    def test_scores_are_the_labels_log_probabilities(self, backend: Any) -> None:
        """Without dropout, though the step has trained with it."""
        data = batch(3, pads=5)
        step = self.start(backend, dataclasses.replace(TINY, dropout=0.5))
        step.step([data], objective(step), 1e-3, 0)
        found = backend.score(step.model, data).log_probs_BT
        out = backend.forward(step.model, data.ids_BT, segments_BT=data.segments_BT)
        logits = np.asarray(out.logits_BTV, np.float64)
        log_mass = np.log(np.exp(logits).sum(-1))
        right = np.take_along_axis(logits, np.maximum(data.labels_BT, 0)[..., None], -1)[..., 0]
        assert found.dtype == np.float32
        expected = np.where(data.labels_BT >= 0, right - log_mass, 0)
        np.testing.assert_allclose(found, expected, atol=1e-5)

    def test_an_objective_that_is_not_known(self, backend: Any) -> None:
        class Unknown(NextToken):
            name = "something else"

        with pytest.raises(UsageError, match="something else"):
            self.start(backend).step([batch()], Unknown(), 1e-2, 0)

    def test_a_batch_without_what_the_objective_needs(self, backend: Any) -> None:
        class Weighted(NextToken):
            fields = frozenset({"advantages"})

        with pytest.raises(UsageError, match="advantages"):
            self.start(backend).step([batch()], Weighted(), 1e-2, 0)

    def test_an_update_that_is_not_finite_is_skipped(self, backend: Any, tmp_path: Path) -> None:
        step = self.start(backend)
        path = tmp_path / "state.safetensors"

        def poisoned() -> Any:
            for name, dtype, shape, data in step.state():
                bad = np.frombuffer(bytes(data), np.float32).copy()
                if name == "model.norm.weight":
                    bad[:] = np.nan
                yield name, dtype, shape, memoryview(bad).cast("B")

        write_tensors(path, poisoned(), {})
        step.load_state(read_tensors(path))
        before = self.weights(step)
        assert step.step([batch()], objective(step), 1e-2, 0)["skipped"] == 1.0
        after = self.weights(step)
        for name in before:
            assert np.array_equal(before[name], after[name], equal_nan=True), name

    def test_tied_weights_stay_tied(self, backend: Any, tmp_path: Path) -> None:
        step = self.start(backend)
        step.step([batch()], objective(step), 1e-2, 0)
        names = [name for name in self.weights(step) if "embed" in name or "lm_head" in name]
        assert names == ["model.embed_tokens.weight"]
        backend.save(step.model, tmp_path)
        loaded = backend.load(tmp_path, device=None, resident=True)
        ids = batch().ids_BT
        assert np.array_equal(
            backend.forward(loaded, ids).logits_BTV, backend.forward(step.model, ids).logits_BTV
        )

    def test_evaluation_changes_nothing(self, backend: Any) -> None:
        step = self.start(backend)
        before = self.weights(step)
        first = step.evaluate([batch(1), batch(2)], objective(step))
        assert first == step.evaluate([batch(1), batch(2)], objective(step))
        after = self.weights(step)
        assert all(np.array_equal(before[name], after[name]) for name in before)

    def test_state_of_another_model_is_refused(self, backend: Any, tmp_path: Path) -> None:
        other = self.start(backend, dataclasses.replace(TINY, hidden_size=16))
        write_tensors(tmp_path / "other.safetensors", other.state(), {})
        with pytest.raises(ShapeMismatch):
            self.start(backend).load_state(read_tensors(tmp_path / "other.safetensors"))
