"""What a model would be and need, from its geometry alone: for whoever is choosing one.

Sizes in bytes, of weights as the config's dtype stores them and of experts as records of whole
pages. Nothing is built or read, and of no disk more is known than the rate that is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from chronos.common.budget import held
from chronos.common.disk.io import ALIGN
from chronos.common.model.config import ModelConfig
from chronos.common.model.weights import dense_tensors, expert_tensors
from chronos.common.training import memory
from chronos.common.training.recipe import OptimizerRecipe

SHARES = ("12.5%", "25%", "50%", "all")
# More experts than this are not listed one by one, which a plan of an update does.
_MOST_LISTED = 1 << 17


def design(
    config: ModelConfig,
    *,
    optimizer: OptimizerRecipe | None = None,
    rows: int = 1,
    seq_len: int = 1,
    budgets: Iterable[str] = SHARES,
    disk_rate: float | None = None,
) -> dict[str, Any]:
    """Parameters, bytes, what budgets hold and, with an optimizer, what an update takes.

    rows, seq_len: of a micro-batch. disk_rate: bytes a second that experts are read with; then each
    budget has `tokens_per_s_at_most`, None where nothing is read. That counts reads alone, at the
    share that misses if any expert were as likely as any other: routing that repeats itself misses
    less, computing takes time too. `flops_per_token` is two a parameter that a token uses. Raises
    UsageError for a budget that is none.
    """
    specs = dense_tensors(config)
    dense_bytes = sum(spec.nbytes for spec in specs)
    dense = dense_bytes // config.dtype_bytes
    expert_bytes = -(-sum(spec.nbytes for spec in expert_tensors(config)) // ALIGN) * ALIGN
    per_token = config.num_hidden_layers * config.num_experts_per_tok
    active = dense + per_token * config.expert_parameters
    found: dict[str, Any] = {
        "parameters": dense + config.num_routed_experts * config.expert_parameters,
        "active_parameters": active,
        "flops_per_token": 2 * active,
        "dense_bytes": dense_bytes,
        "expert_bytes": expert_bytes,
        "expert_bytes_total": config.num_routed_experts * expert_bytes,
        "expert_bytes_per_token": per_token * expert_bytes,
        "bytes": dense_bytes + config.num_routed_experts * expert_bytes,
        "disk_bytes_per_s": disk_rate,
    }
    found["budgets"] = [_budget(config, found, text, disk_rate) for text in budgets]
    if optimizer is not None and config.num_routed_experts <= _MOST_LISTED:
        found["update"] = {"rows": rows, "seq_len": seq_len} | memory.of_update(
            config,
            optimizer,
            rows,
            seq_len,
            rows * seq_len,
            lookahead=config.lookahead_steps > 0,
        )
    return found


def _budget(
    config: ModelConfig, found: dict[str, Any], text: str, disk_rate: float | None
) -> dict[str, Any]:
    """What a budget holds, and what it lets a token read."""
    room = held(
        text,
        record_bytes=found["expert_bytes"],
        total_bytes=found["expert_bytes_total"],
        layers=config.num_hidden_layers,
        experts=config.num_experts,
        least=config.least_slots,
    )
    missing = 1 - room["experts"] / config.num_routed_experts
    read = missing * found["expert_bytes_per_token"]
    speed = disk_rate / read if disk_rate is not None and read and room["enough"] else None
    return room | {"read_bytes_per_token": read, "tokens_per_s_at_most": speed}
