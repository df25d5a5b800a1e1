"""torch's own optimizers over named parameters, and their state by the names of checkpoints.

Shape legend: A rows and B columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from chronos.common.errors import MissingBackendError
from chronos.common.training.optimizers import (
    MUON_MOMENTUM,
    Choice,
    choose,
    kept_shapes,
)
from chronos.common.training.recipe import OptimizerRecipe

# Adafactor's row [A, 1] and column [1, B]; a checkpoint has them as [A] and [B].
_ONES = {"row_var": -1, "col_var": -2}


class Optimizer:
    """What a recipe names, over what it trains. Raises MissingBackendError where torch lacks it."""

    def __init__(self, parameters: Mapping[str, Tensor], recipe: OptimizerRecipe) -> None:
        check(recipe)
        self._parameters, self.updates = dict(parameters), 0
        self._choices = {n: choose(recipe, n, p.dim()) for n, p in self._parameters.items()}
        groups: dict[str, dict[Choice, list[Tensor]]] = {}
        for name, choice in self._choices.items():
            members = groups.setdefault(choice.name, {}).setdefault(choice, [])
            members.append(self._parameters[name])
        self._parts = {
            name: _made(
                name,
                [{"params": p, "weight_decay": c.weight_decay} for c, p in members.items()],
                recipe,
            )
            for name, members in groups.items()
        }

    def update(self, rate: float) -> None:
        """Take the parameters' gradients, which are clipped already."""
        for parameter in self._parameters.values():
            if parameter.grad is None:  # an expert no token chose: its moments decay too
                parameter.grad = torch.zeros_like(parameter)
        for part in self._parts.values():
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
        self.updates += 1

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """(kind, parameter, values) of what is kept; nothing before the first update."""
        for name in self._parameters:
            for kind, value in self._kept(name).items():
                if kind != "step":
                    yield kind, name, value.squeeze(_ONES[kind]) if kind in _ONES else value

    def put(self, kind: str, name: str, value: Tensor) -> bool:
        """Take over one of them. False where it is not this optimizer's."""
        parameter = self._parameters.get(name)
        if parameter is None:
            return False
        shapes = kept_shapes(self._choices[name].name, tuple(parameter.shape))
        if shapes.get(kind) != tuple(value.shape):
            return False
        value = value.to(parameter.device, copy=True)
        self._kept(name)[kind] = value.unsqueeze(_ONES[kind]) if kind in _ONES else value
        return True

    def resume(self, updates: int) -> bool:
        """Go on after so many updates. False where something that was kept by then is missing."""
        self.updates = updates
        for name, parameter in self._parameters.items():
            choice, kept = self._choices[name].name, self._kept(name)
            if updates and kept_shapes(choice, tuple(parameter.shape)).keys() - kept.keys():
                return False
            if updates and choice != "muon":
                # A fused AdamW reads it on the parameter's device, Adafactor on the host.
                where = parameter.device if choice == "adamw" else "cpu"
                kept["step"] = torch.tensor(float(updates), device=where)
        return True

    def _kept(self, name: str) -> dict[str, Any]:
        state: dict[str, Any] = self._parts[self._choices[name].name].state[self._parameters[name]]
        return state


def check(recipe: OptimizerRecipe) -> None:
    """Raises MissingBackendError for an optimizer that this torch lacks: Adafactor came with 2.5,
    Muon with 2.9."""
    name = recipe.name
    if name != "adamw" and not hasattr(torch.optim, name.capitalize()):
        raise MissingBackendError(
            f"torch {torch.__version__} has no {name.capitalize()}",
            "optimizer.name",
            'pip install "torch>=2.9", or use name = "adamw"',
        )


def _made(
    name: str, groups: list[dict[str, Any]], recipe: OptimizerRecipe
) -> torch.optim.Optimizer:
    """The rate is set at each update."""
    if name == "muon":
        return torch.optim.Muon(
            groups, lr=1.0, momentum=MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw"
        )
    if name == "adafactor":
        return torch.optim.Adafactor(groups, lr=1.0)
    fused = torch.__version__ >= "2.4"  # a TorchVersion; on a CPU from there on only
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=1e-8, fused=fused)
