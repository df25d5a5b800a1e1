"""What an update takes of memory, from the geometry alone: for plans, before anything is allocated.

Weights, gradients and what optimizers keep are in float32 and counted exactly. Activations are the
numbers that the backward pass needs of the forward one, counted of the torch backend on a CPU;
elsewhere, where all experts of a layer are one product, trained ones keep about what frozen ones
do. Masks and ids of less than 1 % are left out.

Shape legend: B rows, T tokens of a row, D hidden, V vocabulary, L layers, E experts, K top-k, F
expert hidden, S shared experts, H heads, G key-value heads, d head_dim, r rope_dim, z latent, U
lookahead hidden, J lookahead steps + 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from chronos.common.model.config import ModelConfig
from chronos.common.model.guest import GuestConfig
from chronos.common.model.weights import dense_tensors, lookahead_tensors, routed_tensors
from chronos.common.training.optimizers import choose, kept_shapes
from chronos.common.training.recipe import OptimizerRecipe

FLOAT = 4  # bytes
# Logits are made for labels only, and for so many bytes of them at a time: in float32 they are what
# takes most memory (16 rows of 1,024 tokens and 32,000 words: 2.1 GB). More than one tile is made
# again in the backward pass.
TILE_BYTES = 256 << 20
ACTIVATIONS = {
    "layer": "6 D + routed + 4 S F + 5 E + (5 + 4 J) K + T + attention",
    "routed, trained": "2 K F + K F / 8",  # rows are filled up, by a sixteenth in the mean
    "routed, frozen": "2 K D + 4 K F",
    "mla": "H (5 d + 4 r + 1) + 3 z + r",
    "sliding": "H (6 d + 2) + G (2 d + 1)",
    "beside the layers": "5 D + 2 U + 3 J L E",
}


def weights(
    config: ModelConfig, recipe: OptimizerRecipe, *, lookahead: bool = True
) -> dict[str, int]:
    """Bytes of parameters, their gradients, and what the recipe's optimizer keeps of them."""
    tensors = dense_tensors(config) + routed_tensors(config)
    if lookahead:
        tensors += lookahead_tensors(config)
    return trained({tensor.name: tensor.shape for tensor in tensors}, recipe)


def trained(shapes: Mapping[str, tuple[int, ...]], recipe: OptimizerRecipe) -> dict[str, int]:
    """The same of parameters by name."""
    parameters = FLOAT * sum(map(math.prod, shapes.values()))
    kept = sum(
        math.prod(part)
        for name, shape in shapes.items()
        for part in kept_shapes(choose(recipe, name, len(shape)).name, shape).values()
    )
    return {"parameters": parameters, "gradients": parameters, "optimizer": FLOAT * kept}


def activations(
    config: ModelConfig, rows: int, seq_len: int, *, again: bool = False, given: bool = False
) -> int:
    """Bytes the backward pass of a micro-batch needs, logits left out: `ACTIVATIONS`. again: layers
    are computed again, so each leaves its input and its routing, and one has all of it. given: the
    model is frozen, and each leaves what its experts gave too."""
    c, L = config, config.num_hidden_layers
    D, H, G, d = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    r, z, E, K = c.rope_dim, c.kv_latent_dim, c.num_experts, c.num_experts_per_tok
    S, F, J = c.num_shared_experts, c.moe_intermediate_size, c.lookahead_steps + 1
    attention = {
        "mla": H * (5 * d + 4 * r + 1) + 3 * z + r,
        "sliding": H * (6 * d + 2) + G * (2 * d + 1),
    }
    routed = 2 * K * D + 4 * K * F if given else 2 * K * F + K * F // 8
    layer = 6 * D + routed + 4 * S * F + 5 * E + (5 + 4 * J) * K + seq_len
    beside = 5 * D + 2 * c.lookahead_hidden_size + 3 * J * L * E
    layers = [layer + attention[c.attention_kind(i)] for i in range(L)]
    left = D + 3 * E + (5 + 4 * J) * K + (K * D if given else 0)
    numbers = (L * left + max(layers) if again else sum(layers)) + beside
    return FLOAT * rows * seq_len * numbers


def logits(config: ModelConfig | GuestConfig, labels: int) -> int:
    """Bytes of the logits of so many labels, and of their softmax beside them: of one tile where
    they are more."""
    row = FLOAT * config.vocab_size
    return 2 * row * min(labels, max(1, TILE_BYTES // row))


def of_update(
    config: ModelConfig | GuestConfig,
    recipe: OptimizerRecipe,
    rows: int,
    seq_len: int,
    labels: int,
    *,
    lookahead: bool = True,
    held: Mapping[str, int] | None = None,
    together: int = 1,
) -> dict[str, int]:
    """A plan in bytes: each part, and their `total`.

    held: parts of a model with adapters that are there before an update; None: the model is trained
    whole. together: micro-batches that go through the model layer by layer. Of a model of another
    library activations are not counted.
    """
    whole = held is None
    if held is None:
        assert isinstance(config, ModelConfig)
        held = weights(config, recipe, lookahead=lookahead)
    parts = dict(held)
    if isinstance(config, ModelConfig):
        again = recipe.gradient_checkpointing or together > 1
        parts["activations"] = activations(
            config, rows * together, seq_len, again=again, given=not whole
        )
    parts["logits"] = logits(config, labels)
    return parts | {"total": sum(parts.values())}
