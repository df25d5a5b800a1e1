"""ModelTests: what every backend's model must satisfy. Subclass it with a `backend` fixture.

Geometry is tiny, yet both kinds of attention, more tokens than the window and more than the stated
maximum of positions are exercised. Tolerances live in `TOLERANCE`, float32.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.errors import ChronosError, ShapeMismatch
from chronos.common.model.config import ModelConfig
from chronos.common.model.weights import (
    count_parameters,
    dense_tensors,
    lookahead_tensors,
    routed_tensors,
)

# Largest difference of float32 logits of magnitude 1 between two orders of summation.
TOLERANCE = 2e-5
CONFIG = ModelConfig(
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=61,
    max_position_embeddings=40,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    kv_latent_dim=12,
    rope_dim=6,
    rope_theta=10000.0,
    sliding_window=7,
    lookahead_steps=2,
    lookahead_hidden_size=16,
    initializer_range=0.25,
)


def tokens(count: int, seed: int = 0, batch: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, CONFIG.vocab_size, (batch, count)).astype(np.int32)


def close(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * max(1.0, float(np.abs(b).max())))


class ModelTests:
    """`backend`: the backend module."""

    @pytest.fixture
    def model(self, backend: Any) -> Any:
        return backend.build(CONFIG, seed=3)

    def logits(self, backend: Any, model: Any, ids_BT: np.ndarray, **options: Any) -> np.ndarray:
        logits_BTV: np.ndarray = backend.forward(model, ids_BT, **options).logits_BTV
        return logits_BTV

    def test_parameters_are_those_of_the_config(self, backend: Any, model: Any) -> None:
        found = {t[0]: tuple(t[2]) for t in backend.tensors(model)}
        specs = dense_tensors(CONFIG) + routed_tensors(CONFIG) + lookahead_tensors(CONFIG)
        assert found == {spec.name: spec.shape for spec in specs}
        main = [name for name in found if not name.startswith("lookahead.")]
        assert sum(int(np.prod(found[name])) for name in main) == count_parameters(CONFIG)

    def test_same_seed_same_model(self, backend: Any, model: Any) -> None:
        ids = tokens(9)
        twin, other = backend.build(CONFIG, seed=3), backend.build(CONFIG, seed=4)
        first = self.logits(backend, model, ids)
        assert np.array_equal(first, self.logits(backend, twin, ids))
        assert not np.array_equal(first, self.logits(backend, other, ids))

    @pytest.mark.parametrize("length", [5, 33])
    @pytest.mark.parametrize("place", [1, 2, 4, -1])
    def test_a_token_changes_nothing_before_it(
        self, backend: Any, model: Any, length: int, place: int
    ) -> None:
        ids = tokens(length)
        changed = ids.copy()
        changed[0, place] = (changed[0, place] + 1) % CONFIG.vocab_size
        before, after = self.logits(backend, model, ids), self.logits(backend, model, changed)
        at = place % length
        close(after[0, :at], before[0, :at])
        assert np.abs(after[0, at] - before[0, at]).max() > 1e-2

    def test_causal_behind_padding_and_beside_other_rows(self, backend: Any, model: Any) -> None:
        ids, segments = tokens(24, batch=2), np.zeros((2, 24), np.int32)
        segments[0, 15:] = -1
        whole = self.logits(backend, model, ids, segments_BT=segments)
        noise = ids.copy()
        noise[0, 15:] = 1
        noise[1, 20] += 1
        noise[1] %= CONFIG.vocab_size
        again = self.logits(backend, model, noise, segments_BT=segments)
        close(again[0, :15], whole[0, :15])
        close(again[1, :20], whole[1, :20])
        close(whole[0, :15], self.logits(backend, model, ids[:1, :15])[0])

    def test_packed_documents_do_not_see_each_other(self, backend: Any, model: Any) -> None:
        ids = tokens(30)
        segments = np.array([[0] * 11 + [1] * 12 + [2] * 7], np.int32)
        packed = self.logits(backend, model, ids, segments_BT=segments)[0]
        for start, end in ((0, 11), (11, 23), (23, 30)):
            close(packed[start:end], self.logits(backend, model, ids[:, start:end])[0])

    @pytest.mark.parametrize("source", ["gate", "informed", "lookahead", "history"])
    def test_a_packed_document_moves_nothing_of_the_next(self, backend: Any, source: str) -> None:
        """Whatever its tokens are, those behind choose the same experts. An expert's product is of
        all its rows, so how many the first document sends it may show in a last bit."""
        config = dataclasses.replace(CONFIG, routing_source=source, num_resident_experts_per_tok=1)
        model, ids = backend.build(config, seed=3), tokens(30)
        segments = np.array([[0] * 11 + [1] * 12 + [2] * 7], np.int32)
        other = ids.copy()
        other[0, :11] = tokens(11, seed=9)
        first, second = (backend.forward(model, x, segments_BT=segments) for x in (ids, other))
        assert not np.array_equal(first.logits_BTV[:, :11], second.logits_BTV[:, :11])
        assert np.array_equal(first.ids_LNK[:, 11:], second.ids_LNK[:, 11:])
        for name in ("logits_BTV", "weights_LNK", "probs_LNE"):
            close(*(getattr(seen, name)[:, 11:] for seen in (first, second)))

    @pytest.mark.parametrize(
        "chunks", [[60], [1] * 60, [6, 1, 7, 8, 38], [59, 1], [1, 59], [7] * 8 + [4]]
    )
    def test_any_chunking_gives_the_same_logits(
        self, backend: Any, model: Any, chunks: list[int]
    ) -> None:
        """Beyond the window of 7 and the 40 stated positions."""
        ids = tokens(60)
        cache, parts, start = model.new_cache(), [], 0
        for count in chunks:
            part = ids[:, start : start + count]
            parts.append(self.logits(backend, model, part, cache=cache))
            start += count
        assert cache.position == 60
        close(np.concatenate(parts, axis=1), self.logits(backend, model, ids))

    def test_window_forgets(self, backend: Any) -> None:
        """With window layers only, a token reaches (W - 1) positions a layer and no further."""
        config = dataclasses.replace(CONFIG, hybrid_pattern=("sliding",), num_hidden_layers=2)
        model = backend.build(config, seed=1)
        ids = tokens(30)
        changed = ids.copy()
        changed[0, 4] = (changed[0, 4] + 1) % CONFIG.vocab_size
        before, after = self.logits(backend, model, ids), self.logits(backend, model, changed)
        reach = 4 + 2 * (config.sliding_window - 1)
        assert np.abs(after[0, reach] - before[0, reach]).max() > 0
        close(after[0, reach + 1 :], before[0, reach + 1 :])

    def test_routing_is_a_distribution_and_its_top_k(self, backend: Any, model: Any) -> None:
        seen = backend.forward(model, tokens(12))
        np.testing.assert_allclose(seen.probs_LNE.sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(seen.weights_LNK.sum(-1), 1, atol=1e-5)
        K = CONFIG.num_experts_per_tok
        best = np.sort(seen.probs_LNE, -1)[..., ::-1][..., :K]
        chosen = np.take_along_axis(seen.probs_LNE, seen.ids_LNK.astype(np.int64), -1)
        np.testing.assert_allclose(np.sort(chosen, -1)[..., ::-1], best, atol=1e-7)

    def test_lookahead_has_every_step_layer_and_expert(self, backend: Any, model: Any) -> None:
        seen = backend.forward(model, tokens(5, batch=2))
        assert seen.lookahead_BTJLE.shape == (2, 5, 3, CONFIG.num_hidden_layers, CONFIG.num_experts)

    def test_committed_lookahead_is_the_routing(self, backend: Any) -> None:
        config = dataclasses.replace(CONFIG, routing_source="lookahead")
        seen = backend.forward(backend.build(config, seed=0), tokens(6))
        logits = seen.lookahead_BTJLE[0, :, 0]  # [T, L, E]
        expected = np.exp(logits - logits.max(-1, keepdims=True))
        expected /= expected.sum(-1, keepdims=True)
        np.testing.assert_allclose(seen.probs_LNE[1:], expected.swapaxes(0, 1)[1:], atol=1e-5)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_save_and_load(self, backend: Any, tmp_path: Path, dtype: str) -> None:
        model = backend.build(dataclasses.replace(CONFIG, dtype=dtype), seed=3)
        backend.save(model, tmp_path)
        loaded = backend.load(tmp_path, device=None, resident=True)
        ids = tokens(20)
        again, first = self.logits(backend, loaded, ids), self.logits(backend, model, ids)
        if dtype == "float32":
            assert np.array_equal(again, first)
        else:  # the folder holds the weights rounded to 8 bits of mantissa
            assert 0 < np.abs(again - first).max() < 0.1 * np.abs(first).max()
        backend.save(loaded, tmp_path / "again")
        assert (tmp_path / "again/model.safetensors").read_bytes() == (
            tmp_path / "model.safetensors"
        ).read_bytes()

    def test_a_folder_of_another_geometry_is_refused(self, backend: Any, tmp_path: Path) -> None:
        backend.save(backend.build(CONFIG, seed=0), tmp_path)
        path = tmp_path / "config.json"
        path.write_text(path.read_text().replace('"vocab_size": 61', '"vocab_size": 62'))
        with pytest.raises(ShapeMismatch, match="embed_tokens"):
            backend.load(tmp_path, device="cpu", resident=True)

    def test_a_missing_folder_is_an_error_of_ours(self, backend: Any, tmp_path: Path) -> None:
        with pytest.raises(ChronosError, match=r"config\.json"):
            backend.load(tmp_path / "none", device="cpu", resident=True)
