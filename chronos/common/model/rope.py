"""How a native model reaches positions beyond those it was trained on: YaRN (2309.00071).

Fast rotations of a pair of dimensions stay as they are, slow ones are divided by the factor that
the context grows by, and between the two the share falls evenly from pair to pair (eq. 19-23, the
bounds rounded as in the authors' code and in Transformers). All logits of attention are scaled, too
(eq. 21-22): by the temperature in the backends, since `mla` layers rotate a part of a head only.
A `sliding` layer sees the distances it was trained on, however long a text is, and stays as it is
unless its window is longer than the context of before. Not covered: other scalings.

Shape legend: R width of a rotation.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from chronos.common.errors import ConfigError
from chronos.common.model.config import ModelConfig, RopeScaling

Floats = npt.NDArray[np.float64]


def scaling_of(config: ModelConfig, kind: str) -> RopeScaling | None:
    """That of the layers with a kind of attention, "mla" or "sliding"."""
    scaling = config.rope_scaling
    if scaling is None or kind == "mla":
        return scaling
    beyond = config.sliding_window > scaling.original_max_position_embeddings
    return scaling if beyond else None


def stretch(config: ModelConfig, kind: str) -> Floats | None:
    """What the frequencies theta^(-2i/R) of a layer's rotation are multiplied with, [R/2]: 1 for
    fast ones, 1 / factor for slow ones. None where all stay."""
    scaling = scaling_of(config, kind)
    if scaling is None:
        return None
    width = config.rope_dim if kind == "mla" else config.head_dim

    def pair(rotations: float) -> float:
        """The pair that turns so often within the context of before."""
        turns = scaling.original_max_position_embeddings / (2 * math.pi * rotations)
        return width * math.log(turns) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair(scaling.beta_fast)), 0)
    high = min(math.ceil(pair(scaling.beta_slow)), width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    result: Floats = 1 - ramp + ramp / scaling.factor
    return result


def temperature(config: ModelConfig, kind: str) -> float:
    """What the logits of a layer's attention are multiplied with, beside 1 / sqrt(width)."""
    scaling = scaling_of(config, kind)
    if scaling is None:
        return 1.0
    return (scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0) ** 2


def lengthened(config: ModelConfig, tokens: int, trained: int = 0) -> ModelConfig:
    """The geometry with a context of so many tokens. trained: those it was trained for, 0: as many
    as it names. Raises ConfigError where that is not longer."""
    before = config.rope_scaling
    named = before.original_max_position_embeddings if before else config.max_position_embeddings
    trained = trained or named
    reached = trained if trained != named else config.max_position_embeddings
    if tokens <= reached:
        raise ConfigError(
            f"a context of {tokens} tokens is not longer than the {reached} that the model has",
            "model.max_position_embeddings",
            "raise it, or leave it out",
        )
    scaling = RopeScaling(tokens / trained, trained)
    return dataclasses.replace(config, max_position_embeddings=tokens, rope_scaling=scaling)
