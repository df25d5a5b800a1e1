"""Low-rank adapters of the MLX backend: on a resident or a streamed model, native or a guest.

`attach` freezes a model and puts adapters beside its weights, in float32. Linear layers of the
dense part are wrapped, quantised ones too, also where their weight is read instead of called;
routed and shared experts have adapters that their codec asks for, before the activation. Experts
stay where they are. What is adapted, and how adapters start and are named, is in
`common.training.lora`.

Shape legend: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx import nn

from chronos.backends.mlx.checkpoint import Named, from_bytes, to_bytes
from chronos.backends.mlx.model import Block
from chronos.backends.mlx.moe import MoE
from chronos.backends.mlx.streamed import Streamed
from chronos.common.disk.header import TensorEntry
from chronos.common.errors import ShapeMismatch, UsageError
from chronos.common.model.weights import Key
from chronos.common.training.lora import EXPERTS, LoraRecipe, chosen, initial, peft_name

_Linear = nn.Linear | nn.QuantizedLinear
_Shapes = dict[str, tuple[int, int]]


class LowRank(nn.Module):
    """scale * B A x, in float32."""

    def __init__(
        self, path: str, shape: tuple[int, int], rank: int, recipe: LoraRecipe, seed: int
    ) -> None:
        """shape: outputs and inputs. path: the adapted matrix'."""
        super().__init__()
        self.path, self.scale, self.dropout = path, recipe.scale, nn.Dropout(recipe.dropout)
        self.off = False
        outputs, inputs = shape
        self.lora_A = mx.array(initial(seed, path, rank, inputs))
        self.lora_B = mx.zeros((outputs, rank))

    def __call__(self, x: mx.array) -> mx.array:
        if self.off:
            return mx.zeros((*x.shape[:-1], len(self.lora_B)))
        x = self.dropout(x.astype(mx.float32))
        return _product(x, self.lora_A, self.lora_B, self.scale)

    def delta(self) -> mx.array:
        """What it adds to the matrix. [O, I]"""
        return self.scale * self.lora_B @ self.lora_A


class LoraLinear(nn.Module):
    """A linear layer with its adapter."""

    def __init__(self, base: Any, low_rank: LowRank, dora: bool) -> None:
        super().__init__()
        self.base, self.low_rank = base, low_rank
        if dora:
            self.magnitude = mx.linalg.norm(_matrix(base), axis=1)

    def __call__(self, x: mx.array) -> mx.array:
        if self.low_rank.off:
            out: mx.array = self.base(x)
            return out
        y, added = self.base(x), self.low_rank(x)
        if "magnitude" not in self:
            return y + added.astype(y.dtype)
        bias = self.base.get("bias")
        plain = y.astype(mx.float32) if bias is None else (y - bias).astype(mx.float32)
        # The length counts as a constant in the backward pass (2402.09353, 4.3).
        length_O = mx.stop_gradient(_length(_matrix(self.base) + self.low_rank.delta()))
        scaled = (plain + added) * (self.magnitude / length_O)
        return (scaled if bias is None else scaled + bias).astype(y.dtype)

    @property
    def weight(self) -> mx.array:
        """The merged matrix [O, I], for who multiplies with it by himself, in the layer's dtype."""
        whole = _matrix(self.base)
        if not self.low_rank.off:
            whole = self._adapted(whole)
        quantised = isinstance(self.base, nn.QuantizedLinear)
        return whole.astype(self.base.scales.dtype if quantised else self.base.weight.dtype)

    def _adapted(self, own_OI: mx.array) -> mx.array:
        whole = own_OI + self.low_rank.delta()
        if "magnitude" in self:
            whole = whole * (self.magnitude / mx.stop_gradient(_length(whole)))[:, None]
        return whole


class LoraExpert(nn.Module):
    """The adapters of an expert's matrices, by name, as its codec takes them."""

    def __init__(self, matrices: dict[str, LowRank]) -> None:
        super().__init__()
        self.matrices = matrices

    def __call__(self, name: str, x: mx.array) -> mx.array:
        return self.matrices[name](x)

    def arrays(self) -> list[mx.array]:
        """A and B of each matrix."""
        return [a for part in self.matrices.values() for a in (part.lora_A, part.lora_B)]

    def of(self, arrays: Sequence[mx.array]) -> Any:
        """The same of other arrays, in the order of `arrays`."""
        pairs = zip(arrays[::2], arrays[1::2], strict=True)
        given = dict(zip(self.matrices, pairs, strict=True))

        def added(name: str, x: mx.array) -> mx.array:
            return _product(x.astype(mx.float32), *given[name], self.matrices[name].scale)

        return added


class Adapter:
    """The parameters beside a model's frozen weights, by their names in peft's files."""

    def __init__(self, recipe: LoraRecipe, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """modules: adapters with their paths in the model."""
        self.recipe = recipe
        self._parts: list[LowRank] = []
        self.names: dict[str, str] = {}  # by path in the model
        self._at: dict[str, tuple[nn.Module, str]] = {}
        for path, module in modules:
            for inner, part in module.named_modules():
                if isinstance(part, LowRank):
                    self._parts.append(part)
                    for key in ("lora_A", "lora_B"):
                        self._note(f"{path}.{inner}".rstrip("."), part, key, part.path)
            if isinstance(module, LoraLinear) and "magnitude" in module:
                self._note(path, module, "magnitude", module.low_rank.path)

    def _note(self, path: str, module: nn.Module, key: str, adapted: str) -> None:
        self.names[f"{path}.{key}"] = name = peft_name(adapted, key)
        self._at[name] = (module, key)

    @property
    def parameters(self) -> dict[str, mx.array]:
        return {name: module[key] for name, (module, key) in self._at.items()}

    def train(self, mode: bool) -> None:
        """Whether adapters drop a share of their input."""
        for part in self._parts:
            part.train(mode)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model as it is without them."""
        for part in self._parts:
            part.off = True
        try:
            yield
        finally:
            for part in self._parts:
                part.off = False

    def tensors(self) -> Iterator[Named]:
        """(name, dtype, shape, bytes) of every parameter, in float32."""
        for name, parameter in self.parameters.items():
            yield to_bytes(name, parameter, mx.float32)

    def load(self, tensors: Iterable[tuple[TensorEntry, memoryview]]) -> None:
        """Take over what an adapter's file holds. Raises ShapeMismatch if it is another one's."""
        missing = self.parameters
        for entry, data in tensors:
            parameter = missing.pop(entry.name, None)
            if parameter is None or entry.shape != tuple(parameter.shape):
                raise ShapeMismatch(f"adapter tensor {entry.name} does not fit this model")
            module, key = self._at[entry.name]
            module[key] = from_bytes(data, entry.dtype, entry.shape).astype(mx.float32)
        if missing:
            raise ShapeMismatch(f"the adapter lacks {next(iter(missing))}")


def attach(
    model: Any, recipe: LoraRecipe, *, seed: int = 0, experts: Collection[Key] = ()
) -> Adapter:
    """Freeze a model and put adapters beside what the recipe names. Its answers stay the same: B
    is 0. Dropout of the model itself and masks of experts are off from now on.

    experts: the routed experts that get an adapter, where EXPERTS are a target. Raises UsageError
    for a target that names nothing, for what cannot be adapted and for a model that has an adapter,
    before anything is allocated.
    """
    if isinstance(model, Streamed):
        model = model.bare
    prefix = "core." if "core" in model else ""
    core: nn.Module = model["core"] if prefix else model
    modules = dict(sorted(core.named_modules()))
    blocks = {p: m for p, m in modules.items() if isinstance(m, MoE)}
    linear = {p: m for p, m in modules.items() if isinstance(m, _Linear)}
    shared = {
        f"{path}.shared_experts.{index}": (block, index)
        for path, block in blocks.items()
        for index in range(block.num_shared)
    }
    if any(isinstance(module, LowRank) for module in modules.values()):
        raise UsageError("the model has an adapter already", "", "open it anew for another one")
    found = chosen([*linear, *shared], recipe.targets)
    routed = _routed(modules, experts) if EXPERTS in recipe.targets else {}
    if EXPERTS in recipe.targets and not routed:
        raise UsageError(
            "lora.targets: no routed expert was chosen often enough for an adapter",
            "",
            "lower lora.min_picks",
        )
    model.freeze()
    for module in modules.values():
        if isinstance(module, Block):
            module.dropout, module.mlp.mask_prob = nn.Dropout(0.0), 0.0
    made: list[tuple[str, nn.Module]] = []

    def put(at: str, module: nn.Module) -> nn.Module:
        made.append((prefix + at, module))
        return module

    for path in found:
        if path in shared:
            block, index = shared[path]
            D, F = block.gate.weight.shape[1], block.expert_width
            adapter = _expert(path, _native(D, F), recipe.rank, recipe, seed)
            at = path.replace(".shared_experts.", ".shared_lora.e")
            block.shared_lora[f"e{index}"] = put(at, adapter)
        else:
            base = linear[path]
            low_rank = LowRank(path, _shape(base), recipe.rank, recipe, seed)
            _replace(core, path, put(path, LoraLinear(base, low_rank, recipe.dora)))
    rank = recipe.rank_of_expert(model.config.num_experts_per_tok)
    for at, (path, key, shapes, holder) in routed.items():
        holder.lora[key] = put(at, _expert(path, shapes, rank, recipe, seed))
    for _, module in made:
        for part in module.modules():
            part.unfreeze(recurse=False, keys=["lora_A", "lora_B", "magnitude"], strict=False)
    return Adapter(recipe, made)


def _product(x: mx.array, a_RI: mx.array, b_OR: mx.array, scale: float) -> mx.array:
    return (x @ a_RI.T) @ b_OR.T * scale


def _matrix(layer: Any) -> mx.array:
    """The weight [O, I] of a linear layer in float32."""
    if isinstance(layer, nn.QuantizedLinear):
        return mx.dequantize(
            layer.weight,
            layer.scales,
            layer.get("biases"),
            group_size=layer.group_size,
            bits=layer.bits,
            mode=layer.mode,
        ).astype(mx.float32)
    return layer.weight.astype(mx.float32)


def _shape(layer: Any) -> tuple[int, int]:
    rows, columns = layer.weight.shape
    return rows, columns * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else columns


def _length(matrix_OI: mx.array) -> mx.array:
    return mx.linalg.norm(matrix_OI, axis=1)


def _replace(core: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    at: Any = core
    for part in parents:
        at = at[int(part)] if isinstance(at, list) else at[part]
    if isinstance(at, list):
        at[int(name)] = module
    else:
        at[name] = module


def _expert(path: str, shapes: _Shapes, rank: int, recipe: LoraRecipe, seed: int) -> LoraExpert:
    recipe = replace(recipe, dropout=0.0)  # a backward pass computes a streamed expert again
    return LoraExpert(
        {
            name: LowRank(f"{path}.{name}", shape, rank, recipe, seed)
            for name, shape in shapes.items()
        }
    )


def _native(D: int, F: int) -> _Shapes:
    """Outputs and inputs of the matrices of a native expert."""
    return {"gate_up_proj": (2 * F, D), "down_proj": (D, F)}


def _routed(
    modules: dict[str, nn.Module], experts: Collection[Key]
) -> dict[str, tuple[str, str, _Shapes, Any]]:
    """Of each expert that gets an adapter, by that one's path in the model: its own path, its
    key, the shapes of its matrices, and the module that has its layer's adapters."""
    layers: dict[int, tuple[str, str, _Shapes, Any]] = {}
    for path, module in modules.items():
        if isinstance(module, MoE):
            shapes = _native(module.gate.weight.shape[1], module.expert_width)
            layers[module.layer] = (path, f"{path}.experts", shapes, module)
        elif hasattr(module, "shapes") and "lora" in module:
            layers[module.layer] = (path, f"{_parent(path)}.experts", module.shapes, module)
    found = {}
    for layer, number in sorted(experts):
        if layer not in layers:
            raise UsageError(
                "routed experts of this model can be adapted only where they are streamed",
                f"layer {layer}",
                "pack the model and give it a budget below 'resident'",
            )
        at, path, shapes, holder = layers[layer]
        if not getattr(holder.codec, "adapts", False):
            raise UsageError(
                f"the experts of layer {layer} are encoded for running only",
                "",
                "leave `experts` out of lora.targets, or adapt the model they were made of",
            )
        found[f"{at}.lora.e{number}"] = (f"{path}.{number}", f"e{number}", shapes, holder)
    return found


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
