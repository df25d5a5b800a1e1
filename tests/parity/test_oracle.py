"""Each backend against the NumPy oracle: whole models, routing, missing experts, sampling."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.experts.lease import HeldLease
from chronos.common.layout import open_layout, pack
from chronos.common.model.config import ModelConfig, RopeScaling
from chronos.common.text.sampling import SamplingParams
from chronos.common.text.sampling import draw as reference_draw
from chronos.testing import oracle
from chronos.testing.model_tests import CONFIG
from chronos.testing.store_rig import feed_over
from chronos.testing.tolerances import assert_close

HISTORY: dict[str, Any] = {
    "routing_source": "history",
    "num_resident_experts": 3,
    "num_resident_experts_per_tok": 1,
}
YARN = RopeScaling(4.0, 16)
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "latent attention only": {"hybrid_pattern": ("mla",)},
    "window attention only": {"hybrid_pattern": ("sliding",)},
    "one key-value head per head": {"num_key_value_heads": 4},
    "weights as they come": {"norm_topk_prob": False, "num_experts_per_tok": 3},
    "every expert": {"num_experts_per_tok": 8},
    "no shared expert": {"num_shared_experts": 0},
    "two shared experts": {"num_shared_experts": 2},
    "committed lookahead": {"routing_source": "lookahead"},
    "informed gates": {"routing_source": "informed"},
    "history": HISTORY,
    "two decays": HISTORY | {"history_decay": (0.5, 0.95), "num_experts_per_tok": 5},
    "unit norm": HISTORY | {"history_decay": (0.5, 0.95), "history_norm": "unit"},
    "a context that grew": {"rope_scaling": YARN, "max_position_embeddings": 64},
    "windows beyond it": {"rope_scaling": YARN, "max_position_embeddings": 64, "sliding_window": 20}
    | HISTORY,
    "each layer its own": HISTORY
    | {"routing_source": ("gate", "history", "lookahead", "informed")},
}
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 23)).astype(np.int32)
SEGMENTS = np.array([[0] * 11 + [1] * 12, [0] * 5 + [1] * 13 + [-1] * 5], np.int32)


def model_of(backend: Any, config: ModelConfig, folder: Path) -> tuple[Any, oracle.Weights]:
    """A model and its weights as the oracle reads them from the folder."""
    backend.save(backend.build(config, seed=2), folder)
    return backend.load(folder, device="cpu", resident=True), oracle.read_weights(folder)


def assert_same(found: Any, expected: oracle.OracleOutput, real_N: np.ndarray) -> None:
    """`real_N`: the tokens to compare; what padding gets is nobody's business."""
    assert_close(flat(found.logits_BTV)[real_N], flat(expected.logits_BTV)[real_N], "logits")
    for layer, (probs_BTE, ids_BTK, weights_BTK) in enumerate(
        zip(expected.probs_LBTE, expected.ids_LBTK, expected.weights_LBTK, strict=True)
    ):
        assert_close(found.probs_LNE[layer, real_N], flat(probs_BTE)[real_N], "probabilities")
        by_expert = spread(found.ids_LNK[layer], found.weights_LNK[layer], probs_BTE.shape[-1])
        wanted = spread(flat(ids_BTK), flat(weights_BTK), probs_BTE.shape[-1])
        assert_close(by_expert[real_N], wanted[real_N], "probabilities")
    if expected.lookahead_BTJLE is not None:
        ahead = flat(expected.lookahead_BTJLE)
        assert_close(flat(found.lookahead_BTJLE)[real_N], ahead[real_N], "logits")


def flat(x_BT: np.ndarray) -> np.ndarray:
    return x_BT.reshape(-1, *x_BT.shape[2:])


def spread(ids_NK: np.ndarray, weights_NK: np.ndarray, experts: int) -> np.ndarray:
    """Weights by expert [N, E]: which order the chosen ones come in does not matter."""
    weights_NE = np.zeros((len(ids_NK), experts))
    np.put_along_axis(weights_NE, ids_NK, weights_NK, -1)
    return weights_NE


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed documents"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_model(backend: Any, tmp_path: Path, variant: str, packed: bool) -> None:
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    model, weights = model_of(backend, config, tmp_path)
    segments = SEGMENTS if packed else np.zeros_like(SEGMENTS)
    found = backend.forward(model, IDS, segments_BT=SEGMENTS if packed else None)
    expected = oracle.forward(weights, config, IDS, segments_BT=segments)
    assert_same(found, expected, segments.reshape(-1) >= 0)


@pytest.mark.parametrize("variant", ["as it is", "windows beyond it"])
def test_one_token_at_a_time(backend: Any, tmp_path: Path, variant: str) -> None:
    """Decode: absorbed attention, the ring, and experts gathered for one token."""
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    model, weights = model_of(backend, config, tmp_path)
    expected = oracle.forward(weights, config, IDS[:1]).logits_BTV
    cache = model.new_cache()
    for t in range(IDS.shape[1]):
        found = backend.forward(model, IDS[:1, t : t + 1], cache=cache).logits_BTV
        assert_close(found[0, 0], expected[0, t], "logits", f"token {t}")


def test_bfloat16_weights(backend: Any, tmp_path: Path) -> None:
    """Rounded on disk, then widened: the arithmetic stays float32 on a CPU."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    model, weights = model_of(backend, config, tmp_path)
    found = backend.forward(model, IDS).logits_BTV
    assert_close(found, oracle.forward(weights, config, IDS).logits_BTV, "logits")


class WithGaps:
    """A step some of whose experts are never ready."""

    def __init__(self, store: Any, available_LE: np.ndarray) -> None:
        self.store, self.available_LE, self.weight = store, available_LE, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def acquire(self, layer: int, experts: Sequence[int]) -> HeldLease:
        found = self.store.acquire(layer, experts).all()
        here_E = self.available_LE[layer]
        return HeldLease([(e, weights if here_E[e] else None) for e, weights in found.items()])

    def record_fallback(self, weight: float) -> None:
        self.weight += weight


@pytest.mark.parametrize("length", [1, 23], ids=["one token", "many"])
def test_shared_experts_stand_in(backend: Any, tmp_path: Path, length: int) -> None:
    config = dataclasses.replace(CONFIG, num_shared_experts=2)
    _, weights = model_of(backend, config, tmp_path / "model")
    pack(tmp_path / "model", tmp_path / "packed")
    model = backend.load(tmp_path / "packed", device="cpu", resident=False)
    layout = open_layout(tmp_path / "packed")
    available = (
        np.random.default_rng(3).random((config.num_hidden_layers, config.num_experts)) > 0.4
    )
    ids = IDS[:1, :length]
    expected = oracle.forward(weights, config, ids, available_LE=available)
    with feed_over(backend, layout, layout.total_bytes, top_k=2) as feed:
        source = WithGaps(feed.step(), available)
        assert_same(backend.forward(model, ids, source=source), expected, np.ones(length, bool))
    gone = [
        weights_BTK[~available[layer][ids_BTK]].sum()
        for layer, (ids_BTK, weights_BTK) in enumerate(
            zip(expected.ids_LBTK, expected.weights_LBTK, strict=True)
        )
    ]
    assert source.weight == pytest.approx(sum(gone), rel=1e-5) and source.weight > 0


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.5, top_k=7),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=2.0, top_k=20, top_p=0.9, min_p=0.05),
        SamplingParams(temperature=1.0, min_p=0.1),
    ],
    ids=str,
)
def test_draws(backend: Any, params: SamplingParams) -> None:
    draw = importlib.import_module(f"{backend.__name__}.sampling").draw
    logits = np.random.default_rng(5).standard_normal(60).astype(np.float32) * 2
    for uniform in np.linspace(0, 0.999, 37):
        found = int(draw(as_array(backend, logits), params, float(uniform)))
        assert found == reference_draw(logits, params, float(uniform))


def as_array(backend: Any, values: np.ndarray) -> Any:
    if backend.name == "torch":
        return importlib.import_module("torch").from_numpy(values)
    return importlib.import_module("mlx.core").array(values)
