"""How much each token before counts where routing follows the past (`routing_source = "history"`).

The streamed experts of a token are chosen by s_t = sum_{j<t} rho^(t-1-j) z_j / sum_{j<t}
rho^(t-1-j) over its own document, z being the gate's scores; a document's first token takes z
itself. With `history_norm = "unit"` the divisor is the root of the sum of the weights' squares: the
mean of ten scores varies a third as much as one of them, and its softmax is that much flatter. So
s_t is known when token t - 1 is over. As tables in float64, for backends to multiply with. Not
covered: the arithmetic, which is each backend's.

Shape legend: P positions, G values of rho, E experts, S streamed experts.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from chronos.common.model.config import ModelConfig
from chronos.common.model.guest import GuestConfig

Floats = npt.NDArray[np.float64]


def powers(config: ModelConfig, count: int) -> Floats:
    """rho^p for p = 0 .. count - 1. [G, P]"""
    result: Floats = np.array(config.decays)[:, None] ** np.arange(count)
    return result


def shares(config: ModelConfig, positions: npt.NDArray[np.integer]) -> Floats:
    """One over what the weighted sum of p tokens is divided by, for each p; 0 for none. [G, P]"""
    rho_G1, unit = np.array(config.decays)[:, None], config.history_norm == "unit"
    rho_G1 = rho_G1**2 if unit else rho_G1
    total_GP = (1 - rho_G1**positions) / (1 - rho_G1)
    total_GP = np.sqrt(total_GP) if unit else total_GP
    result: Floats = np.where(positions > 0, 1 / np.maximum(total_GP, 1), 0)
    return result


def parts(config: ModelConfig) -> list[slice]:
    """Which of a layer's streamed experts, counted from 0, follow each value of rho."""
    streamed, groups = config.num_experts - config.num_resident_experts, len(config.decays)
    edges = [streamed * group // groups for group in range(groups + 1)]
    return [slice(*edge) for edge in pairwise(edges)]


def tiers(config: ModelConfig | GuestConfig, layer: int) -> list[tuple[slice, int]]:
    """A layer's experts that are chosen beside each other, and how many of them a token uses."""
    every, top_k = config.num_experts, config.num_experts_per_tok
    if not isinstance(config, ModelConfig) or config.routing_of(layer) != "history":
        return [(slice(0, every), top_k)]
    resident, near = config.num_resident_experts, config.num_resident_experts_per_tok
    return [(slice(0, resident), near), (slice(resident, every), top_k - near)]


def per_expert(config: ModelConfig, value_G: Floats) -> Floats:
    """A value of each rho, for every streamed expert that follows it. [1, S]"""
    widths = [part.stop - part.start for part in parts(config)]
    result: Floats = np.repeat(value_G, widths)[None]
    return result


def balance_scale(config: ModelConfig | GuestConfig) -> Floats:
    """What each expert's share of the balance counts. [L, E], [1, E] where all count alike.

    The balance of a layer is E sum_e f_e p_e (`training/losses.py`), 1 where all experts are used
    alike. Of a layer with two tiers it is the sum of theirs, each with its own share of the picks
    and experts, that of the streamed ones times `streamed_balance`.
    """
    if not isinstance(config, ModelConfig):
        return np.ones((1, config.num_experts))
    scale_LE = np.ones((config.num_hidden_layers, config.num_experts))
    resident, near = config.num_resident_experts, config.num_resident_experts_per_tok
    share = near / config.num_experts_per_tok
    for layer, source in enumerate(config.routing_sources):
        if source == "history":
            streamed = config.num_experts - resident
            scale_LE[layer, :resident] = resident / share
            scale_LE[layer, resident:] = config.streamed_balance * streamed / (1 - share)
            scale_LE[layer] /= config.num_experts
    return scale_LE
