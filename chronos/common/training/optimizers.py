"""Which optimizer a parameter has, and what that keeps of it: the same for every backend.

AdamW (1711.05101) keeps two numbers of each weight. Muon (2502.16982) keeps one of each weight of
a hidden matrix; AdamW has the rest: vectors, the embedding, and what scores experts, the gates and
the LookaheadRouter. Adafactor (1804.04235) keeps a row and a column of each matrix. The arithmetic
is the frameworks' own.
"""

from __future__ import annotations

from typing import NamedTuple

from chronos.common.training.recipe import OptimizerRecipe

# What is kept of parameters, as checkpoints name it: `exp_avg.model.norm.weight`.
STATES = ("exp_avg", "exp_avg_sq", "momentum_buffer", "row_var", "col_var", "variance")
MUON_MOMENTUM = 0.95
# Times sqrt(columns), beside Muon's own sqrt(rows / columns) above 1: updates as large as AdamW's
# (2502.16982, eq. 4), so that both take one learning rate.
MUON_SCALE = 0.2


class Choice(NamedTuple):
    """The optimizer of a parameter and its weight decay."""

    name: str
    weight_decay: float


def choose(recipe: OptimizerRecipe, parameter: str, dims: int) -> Choice:
    """Of a parameter by its name and dimensions; a stack of matrices counts as a matrix."""
    plain = dims < 2 or "embed_tokens" in parameter
    decay = 0.0 if plain else recipe.weight_decay
    if recipe.name != "muon":
        return Choice(recipe.name, decay)
    head = parameter.endswith("gate.weight") or parameter.startswith("lookahead.")
    return Choice("adamw" if plain or head else "muon", decay)


def kept_shapes(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """What an optimizer keeps of a parameter of this shape, by kind."""
    if name == "muon":
        return {"momentum_buffer": shape}
    if name == "adamw":
        return {"exp_avg": shape, "exp_avg_sq": shape}
    if len(shape) < 2:
        return {"variance": shape}
    return {"row_var": shape[:-1], "col_var": (*shape[:-2], shape[-1])}
