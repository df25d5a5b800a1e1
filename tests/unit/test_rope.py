"""YaRN against Transformers' own numbers, what it refuses, and a context that grows."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from chronos.common.errors import ConfigError
from chronos.common.model.config import ModelConfig, RopeScaling
from chronos.common.model.rope import lengthened, scaling_of, stretch, temperature
from chronos.testing import oracle

WIDTHS = [(16, 10_000.0), (32, 10_000.0), (64, 1e6), (2, 500.0), (8, 100.0)]
SCALINGS = [
    RopeScaling(4.0, 256),
    RopeScaling(32.0, 4096, beta_fast=16.0, beta_slow=2.0),
    RopeScaling(1.0, 64),
    RopeScaling(8.0, 16, attention_factor=1.5),
]


def config(width: int, theta: float, scaling: RopeScaling | None, **more: Any) -> ModelConfig:
    return ModelConfig(
        rope_dim=width, rope_theta=theta, max_position_embeddings=16, rope_scaling=scaling, **more
    )


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("width", "theta"), WIDTHS)
def test_it_is_transformers_and_the_oracles(width: int, theta: float, scaling: RopeScaling) -> None:
    pytest.importorskip("torch")  # its tables are tensors
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    c = config(width, theta, scaling)
    found = stretch(c, "mla")
    assert found is not None
    own = theta ** (-np.arange(width // 2) * 2 / width)
    settings = transformers.LlamaConfig(
        head_dim=width,
        max_position_embeddings=int(scaling.factor * scaling.original_max_position_embeddings),
        rope_parameters=c.to_json()["rope_parameters"],
    )
    expected, factor = rope_utils._compute_yarn_parameters(settings, device="cpu")
    np.testing.assert_allclose(own * found, expected.double().numpy(), rtol=2e-6)
    assert temperature(c, "mla") == pytest.approx(factor**2)
    spelled = [oracle.yarn(i, width, theta, scaling) for i in range(width // 2)]
    np.testing.assert_allclose(own * found, spelled, rtol=1e-12)


def test_fast_pairs_stay_and_slow_ones_are_divided() -> None:
    found = stretch(config(64, 10_000.0, RopeScaling(8.0, 4096)), "mla")
    assert found is not None
    assert found[0] == 1.0 and found[-1] == pytest.approx(1 / 8) and (np.diff(found) <= 0).all()


def test_windows_that_training_knew_stay() -> None:
    scaled = config(16, 10_000.0, RopeScaling(4.0, 256), sliding_window=256)
    assert scaling_of(scaled, "sliding") is None and stretch(scaled, "sliding") is None
    assert temperature(scaled, "sliding") == 1.0 < temperature(scaled, "mla")
    wider = dataclasses.replace(scaled, sliding_window=257)
    assert scaling_of(wider, "sliding") == wider.rope_scaling
    plain = dataclasses.replace(scaled, rope_scaling=None)
    assert stretch(plain, "mla") is None and temperature(plain, "mla") == 1.0


def test_a_config_goes_through_both_spellings() -> None:
    for scaling in SCALINGS:
        c = config(16, 10_000.0, scaling)
        data = c.to_json()
        assert data["rope_scaling"].items() <= data["rope_parameters"].items()
        assert data["rope_parameters"]["rope_type"] == "yarn"
        assert ModelConfig.from_json(data) == c
        for key in ("rope_scaling", "rope_parameters"):
            assert ModelConfig.from_json({k: v for k, v in data.items() if k != key}) == c
    plain = config(16, 10_000.0, None).to_json()
    assert "rope_scaling" not in plain and plain["rope_parameters"]["rope_type"] == "default"
    assert ModelConfig.from_json(plain | {"rope_scaling": None}).rope_scaling is None


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "llama3", "factor": 8.0}, "'llama3' is not supported"),
        ({"rope_type": "yarn", "factor": 8.0}, "lacks original_max"),
        ({"type": "yarn", "factor": 0.5, "original_max_position_embeddings": 4}, "at least 1"),
        ({"type": "yarn", "factor": "4", "original_max_position_embeddings": 4}, "numbers"),
        ({"type": "yarn", "factor": 4, "original_max_position_embeddings": 4.5}, "whole"),
        ({"type": "yarn", "factor": 4, "original_max_position_embeddings": 4,
          "mscale": 0.7}, "has mscale"),
        ({"type": "yarn", "factor": 4, "original_max_position_embeddings": 4,
          "beta_slow": 40}, "beta_fast"),
        ({"type": "yarn", "factor": 2, "original_max_position_embeddings": 4}, "reaches factor"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(scaling: dict[str, Any], words: str) -> None:
    data = config(16, 10_000.0, None).to_json() | {"rope_scaling": scaling}
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_json(data)


def test_two_spellings_that_differ_are_refused() -> None:
    data = config(16, 10_000.0, SCALINGS[0]).to_json()
    data["rope_scaling"] = data["rope_scaling"] | {"factor": 8.0}
    with pytest.raises(ConfigError, match="in one spelling"):
        ModelConfig.from_json(data)


def test_a_context_that_grows() -> None:
    plain = ModelConfig(max_position_embeddings=4096)
    longer = lengthened(plain, 16_384)
    assert longer.rope_scaling == RopeScaling(4.0, 4096)
    assert longer.max_position_embeddings == 16_384
    again = lengthened(longer, 32_768)  # by what it was trained for, not by what it reaches
    assert again.rope_scaling == RopeScaling(8.0, 4096)
    trained = lengthened(plain, 1024, 256)
    assert trained.rope_scaling == RopeScaling(4.0, 256)
    for tokens, config_, own in ((4096, plain, 0), (16_384, longer, 0), (256, plain, 256)):
        with pytest.raises(ConfigError, match="is not longer"):
            lengthened(config_, tokens, own)
