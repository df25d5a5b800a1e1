"""MLX's own optimizers over named parameters, and their state by the names of checkpoints.

Where experts are stacked, each is a matrix of its own, as it is on disk. The update is compiled,
since it is the same every step.

Shape legend: E experts, A rows and B columns of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx import optimizers

from chronos.backends.mlx.checkpoint import Place, named, overwrite, tensor_at
from chronos.backends.mlx.codecs import memory
from chronos.common.errors import MissingBackendError, UsageError
from chronos.common.training.optimizers import MUON_MOMENTUM, MUON_SCALE, Choice, choose
from chronos.common.training.recipe import OptimizerRecipe

_Flat = dict[str, mx.array]  # by path in the model
_State = dict[str, Any]  # of one of MLX's optimizers: step, rate, and by path what it keeps
# MLX's names of what is kept, and those of checkpoints.
_KINDS = {
    "adamw": {"m": "exp_avg", "v": "exp_avg_sq"},
    "muon": {"v": "momentum_buffer"},
    "adafactor": {
        "exp_avg_sq_row": "row_var",
        "exp_avg_sq_col": "col_var",
        "exp_avg_sq": "variance",
    },
}


class Optimizer:
    """What a recipe names, over what it trains. Raises MissingBackendError where MLX lacks it."""

    def __init__(self, parameters: Mapping[str, mx.array], recipe: OptimizerRecipe) -> None:
        check(recipe)
        self.updates = 0
        choices = {path: choose(recipe, path, p.ndim) for path, p in parameters.items()}
        self._parts, self._states = list[tuple[str, Any, list[str]]](), list[_State]()
        for choice in dict.fromkeys(choices.values()):
            paths = [path for path, own in choices.items() if own == choice]
            optimizer = _made(choice, recipe)
            optimizer.init({path: parameters[path] for path in paths})
            self._parts.append((choice.name, optimizer, paths))
            self._states.append(optimizer.state)
        self._compiled = mx.compile(self._updated)
        self._found: set[tuple[str, str]] = set()

    def update(self, weights: _Flat, gradients: _Flat, scale: float, rate: float) -> _Flat:
        """New weights. scale: what gradients are multiplied with, so that they are clipped."""
        self.updates += 1
        # As torch's Adafactor caps it (1804.04235, algorithm 5).
        capped = min(rate, 1 / math.sqrt(self.updates))
        rates = [capped if name == "adafactor" else rate for name, *_ in self._parts]
        weights, self._states = self._compiled(
            weights, gradients, self._states, mx.array(scale), mx.array(rates)
        )
        mx.eval(weights, self._states)
        return weights

    def state(self) -> Iterator[tuple[str, str, mx.array]]:
        """(kind, parameter, values) of what is kept; nothing before the first update."""
        if self.updates:
            for (kind, name), place in self._places().items():
                yield kind, name, tensor_at(place)

    def put(self, kind: str, name: str, value: mx.array) -> bool:
        """Take over one of them. False where it is not this optimizer's."""
        place = self._places().get((kind, name))
        if place is None or tensor_at(place).shape != value.shape:
            return False
        overwrite(place, memory(mx.contiguous(value)), "F32")
        self._found.add((kind, name))
        return True

    def resume(self, updates: int) -> bool:
        """Go on after so many updates. False where something that was kept by then is missing."""
        missing = self._places().keys() - self._found
        self.updates, self._found = updates, set()
        for state in self._states:
            state["step"] = mx.array(updates, mx.uint64)
        return not (updates and missing)

    def _places(self) -> dict[tuple[str, str], Place]:
        """Where each tensor that is kept lies, by its kind and its parameter's name on disk."""
        found: dict[tuple[str, str], Place] = {}
        for (part, _, paths), state in zip(self._parts, self._states, strict=True):
            for own, kind in _KINDS[part].items():
                flat = {path: state[path][own] for path in paths if own in state[path]}
                found |= {(kind, name): place for name, place in named(flat)}
        return found

    def _updated(
        self,
        weights: _Flat,
        gradients: _Flat,
        states: list[_State],
        scale: mx.array,
        rates: mx.array,
    ) -> tuple[_Flat, list[_State]]:
        weights, new = dict(weights), []
        for i, (_, optimizer, paths) in enumerate(self._parts):
            optimizer.state = states[i]
            optimizer.learning_rate = rates[i]
            own = {path: gradients[path] * scale for path in paths}
            weights |= optimizer.apply_gradients(own, {path: weights[path] for path in paths})
            new.append(optimizer.state)
        return weights, new


def check(recipe: OptimizerRecipe) -> None:
    """Raises MissingBackendError for an optimizer that this MLX lacks, UsageError for products in
    another dtype than float32."""
    if recipe.compute_dtype != "float32":
        raise UsageError(
            "the MLX backend trains in float32",
            "optimizer.compute_dtype",
            'use compute_dtype = "float32", or --backend torch',
        )
    name = recipe.name
    if name != "adamw" and not hasattr(optimizers, name.capitalize()):
        raise MissingBackendError(
            f"MLX {version('mlx')} has no {name.capitalize()}",
            "optimizer.name",
            'pip install -U mlx, or use name = "adamw"',
        )


def _made(choice: Choice, recipe: OptimizerRecipe) -> Any:
    """The rate is set at each update."""
    if choice.name == "adamw":
        return optimizers.AdamW(
            1.0, [recipe.beta1, recipe.beta2], 1e-8, choice.weight_decay, bias_correction=True
        )
    return _optional()[choice.name](choice.weight_decay)


def _optional() -> dict[str, Callable[[float], Any]]:
    """Those that not every MLX has, with decay as torch's have it: by the rate alone."""
    found: dict[str, Callable[[float], Any]] = {}
    if hasattr(optimizers, "Muon"):

        class Muon(optimizers.Muon):
            def __init__(self, decay: float) -> None:
                super().__init__(1.0, MUON_MOMENTUM, 0.0)
                self.decay = decay

            def apply_single(
                self, gradient: mx.array, parameter: mx.array, state: _State
            ) -> mx.array:
                if gradient.ndim > 2:
                    return _each(self.apply_single, gradient, parameter, state)
                move = super().apply_single(gradient, mx.zeros_like(parameter), state)
                kept = parameter * (1 - self.learning_rate * self.decay)
                return kept + MUON_SCALE * math.sqrt(gradient.shape[1]) * move

        found["muon"] = Muon
    if hasattr(optimizers, "Adafactor"):

        class Adafactor(optimizers.Adafactor):
            def __init__(self, decay: float) -> None:
                super().__init__(1.0, relative_step=False)
                self.decay = decay

            def apply_single(
                self, gradient: mx.array, parameter: mx.array, state: _State
            ) -> mx.array:
                if gradient.ndim > 2:
                    return _each(self.apply_single, gradient, parameter, state)
                kept = parameter * (1 - self.learning_rate * self.decay)
                return super().apply_single(gradient, kept, state)

        found["adafactor"] = Adafactor
    return found


def _each(
    apply: Callable[..., mx.array], gradient: mx.array, parameter: mx.array, state: _State
) -> mx.array:
    """An update of each matrix of a stack [E, A, B] by itself."""

    def one(gradient_AB: mx.array, parameter_AB: mx.array, kept: _State) -> tuple[mx.array, _State]:
        kept = dict(kept)
        return apply(gradient_AB, parameter_AB, kept), kept

    new, kept = mx.vmap(one)(gradient, parameter, dict(state))
    state.update(kept)
    return new
