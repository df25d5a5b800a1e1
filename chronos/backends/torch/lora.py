"""Low-rank adapters of the torch backend: on a resident or a streamed model, native or a guest.

`attach` freezes a model and puts adapters beside its weights, in float32. Linear layers of the
dense part are wrapped, also where their weight is read instead of called; a guest's gate that is no
linear layer gets a parametrization; routed and shared experts have adapters that their codec asks
for, before the activation. Experts stay where they are. What is adapted, and how adapters start and
are named, is in `common.training.lora`.

Shape legend: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from chronos.backends.torch.checkpoint import Named, from_bytes, to_bytes
from chronos.backends.torch.codecs import PARAMETERS
from chronos.backends.torch.model import Block
from chronos.backends.torch.moe import MoE
from chronos.backends.torch.products import Linear, PackedLinear
from chronos.backends.torch.streamed import Streamed
from chronos.common.disk.header import TensorEntry
from chronos.common.errors import ShapeMismatch, UsageError
from chronos.common.model.weights import Key
from chronos.common.training.lora import (
    EXPERTS,
    GATE,
    LoraRecipe,
    chosen,
    group_of,
    initial,
    peft_name,
)

_MATRICES = ("gate_up_proj", "up_proj", "down_proj")  # of an expert


class LowRank(nn.Module):
    """scale * B A x, in float32."""

    def __init__(
        self, path: str, shape: tuple[int, int], rank: int, recipe: LoraRecipe, seed: int
    ) -> None:
        """shape: outputs and inputs. path: the adapted matrix'."""
        super().__init__()
        self.path, self.scale, self.dropout = path, recipe.scale, recipe.dropout
        self.off = False
        outputs, inputs = shape
        self.lora_A = nn.Parameter(torch.from_numpy(initial(seed, path, rank, inputs)))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        if self.off:
            return self.lora_B.new_zeros(*x.shape[:-1], len(self.lora_B))
        x = F.dropout(x.float(), self.dropout, self.training)
        return F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale

    def delta(self) -> Tensor:
        """What it adds to the matrix. [O, I]"""
        return self.scale * self.lora_B @ self.lora_A


class LoraLinear(nn.Module):
    """A linear layer with its adapter."""

    def __init__(self, base: nn.Linear, low_rank: LowRank, dora: bool) -> None:
        super().__init__()
        self.base, self.low_rank = base, low_rank
        self.in_features, self.out_features = base.in_features, base.out_features
        self.magnitude: nn.Parameter | None = None
        if dora:
            self.magnitude = nn.Parameter(base.weight.detach().float().norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        if self.low_rank.off:
            out: Tensor = self.base(x)
            return out
        y, added = self.base(x), self.low_rank(x)
        if self.magnitude is None:
            return y + added.to(y.dtype)
        bias = self.base.bias
        plain = y.float() if bias is None else y.float() - bias.float()
        # The length counts as a constant in the backward pass (2402.09353, 4.3).
        with torch.no_grad():
            length_O = (self.base.weight.float() + self.low_rank.delta()).norm(dim=1)
        scaled = (plain + added) * (self.magnitude / length_O)
        return (scaled if bias is None else scaled + bias.float()).to(y.dtype)

    @property
    def weight(self) -> Tensor:
        """The merged matrix [O, I], for who multiplies with it by himself, in the layer's dtype."""
        own = self.base.weight
        if self.low_rank.off:
            return own
        whole = own.float() + self.low_rank.delta()
        if self.magnitude is not None:
            whole = whole * (self.magnitude / whole.detach().norm(dim=1))[:, None]
        return whole.to(own.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


class LoraWeight(nn.Module):
    """A matrix [O, I] with its adapter, where a module is no linear layer."""

    def __init__(self, low_rank: LowRank) -> None:
        super().__init__()
        self.low_rank = low_rank

    def forward(self, weight_OI: Tensor) -> Tensor:
        if self.low_rank.off:
            return weight_OI
        return (weight_OI.float() + self.low_rank.delta()).to(weight_OI.dtype)


class LoraExpert(nn.Module):
    """The adapters of an expert's matrices, by name, as its codec takes them."""

    def __init__(self, matrices: dict[str, LowRank]) -> None:
        super().__init__()
        self.matrices = nn.ModuleDict(matrices)

    def forward(self, name: str, x: Tensor) -> Tensor:
        return self.matrices[name](x)

    def arrays(self) -> list[nn.Parameter]:
        """A and B of each matrix."""
        return list(self.parameters())


class Adapter:
    """The parameters beside a model's frozen weights, by their names in peft's files."""

    def __init__(self, recipe: LoraRecipe, modules: Iterable[nn.Module]) -> None:
        self.recipe = recipe
        self._parts: list[LowRank] = []
        self._named: dict[str, nn.Parameter] = {}
        for module in modules:
            for part in (m for m in module.modules() if isinstance(m, LowRank)):
                self._parts.append(part)
                self._named[peft_name(part.path, "lora_A")] = part.lora_A
                self._named[peft_name(part.path, "lora_B")] = part.lora_B
            if isinstance(module, LoraLinear) and module.magnitude is not None:
                self._named[peft_name(module.low_rank.path, "magnitude")] = module.magnitude

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return self._named

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
            yield to_bytes(name, parameter, torch.float32)

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[TensorEntry, memoryview]]) -> None:
        """Take over what an adapter's file holds. Raises ShapeMismatch if it is another one's."""
        missing = dict(self.parameters)
        for entry, data in tensors:
            parameter = missing.pop(entry.name, None)
            if parameter is None or entry.shape != tuple(parameter.shape):
                raise ShapeMismatch(f"adapter tensor {entry.name} does not fit this model")
            parameter.copy_(from_bytes(data, entry.dtype, entry.shape))
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
    core: nn.Module = getattr(model, "core", model)
    blocks = {p: m for p, m in core.named_modules() if isinstance(m, MoE)}
    linear = {p: m for p, m in core.named_modules() if _adaptable(p, m) and not _within(p, blocks)}
    shared = {
        f"{path}.shared_experts.{index}": (block, index)
        for path, block in blocks.items()
        for index in range(len(block.shared_experts))
    }
    if any(isinstance(module, LowRank) for module in core.modules()):
        raise UsageError("the model has an adapter already", "", "open it anew for another one")
    found = chosen([*linear, *shared], recipe.targets)
    routed = _routed(core, blocks, experts) if EXPERTS in recipe.targets else {}
    if EXPERTS in recipe.targets and not routed:
        raise UsageError(
            "lora.targets: no routed expert was chosen often enough for an adapter",
            "",
            "lower lora.min_picks",
        )
    core.requires_grad_(False)
    for module in core.modules():
        if isinstance(module, Block):
            module.dropout, module.mlp.mask_prob = nn.Dropout(0.0), 0.0
    made: list[nn.Module] = []
    for path in found:
        if path in shared:
            block, index = shared[path]
            shapes = _shapes(block.shared_experts[index])
            made.append(_expert(path, shapes, recipe.rank, recipe, seed))
            block.shared_lora[str(index)] = made[-1]
        else:
            made.append(_wrapped(core, path, linear[path], recipe, seed))
    rank = recipe.rank_of_expert(model.config.num_experts_per_tok)
    for path, (holder, number, shapes) in routed.items():
        made.append(_expert(path, shapes, rank, recipe, seed))
        if "lora" not in holder._modules:
            holder.lora = nn.ModuleDict()
        holder.lora[str(number)] = made[-1]
    for module in made:
        module.to(model.device)
    model.steps = model.step = None  # recorded without adapters
    return Adapter(recipe, made)


def _adaptable(path: str, module: nn.Module) -> bool:
    """A linear layer; or a router of Transformers, which is a matrix and called otherwise."""
    weight = module._parameters.get("weight")
    gate = group_of(path) == GATE and weight is not None and weight.dim() == 2
    return _is_linear(module) or gate


def _is_linear(module: nn.Module) -> bool:
    """Whether a module maps rows to rows, as nothing that only derives from a linear layer does."""
    return type(module) in (nn.Linear, Linear, PackedLinear)


def _within(path: str, blocks: dict[str, MoE]) -> bool:
    """Whether a module is an expert's of a native model."""
    return any(
        path.startswith((f"{block}.experts.", f"{block}.shared_experts.")) for block in blocks
    )


def _wrapped(core: nn.Module, path: str, module: Any, recipe: LoraRecipe, seed: int) -> nn.Module:
    """Put a module's adapter into the model."""
    low_rank = LowRank(path, tuple(module.weight.shape), recipe.rank, recipe, seed)
    if not _is_linear(module):
        parametrize.register_parametrization(module, "weight", LoraWeight(low_rank))
        return low_rank
    made = LoraLinear(module, low_rank, recipe.dora)
    parent, _, name = path.rpartition(".")
    setattr(core.get_submodule(parent), name, made)
    return made


def _expert(
    path: str, shapes: dict[str, tuple[int, int]], rank: int, recipe: LoraRecipe, seed: int
) -> LoraExpert:
    recipe = replace(recipe, dropout=0.0)  # a backward pass computes a streamed expert again
    return LoraExpert(
        {
            name: LowRank(f"{path}.{name}", shape, rank, recipe, seed)
            for name, shape in shapes.items()
        }
    )


def _shapes(expert: Any) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the matrices of a native expert."""
    return {name: tuple(getattr(expert, name).weight.shape) for name in _MATRICES[::2]}


def _routed(
    core: nn.Module, blocks: dict[str, MoE], experts: Collection[Key]
) -> dict[str, tuple[Any, int, dict[str, tuple[int, int]]]]:
    """Of each expert that gets an adapter, by its path: the module that has its layer's adapters,
    its number, and the shapes of its matrices."""
    layers: dict[int, tuple[str, Any, dict[str, tuple[int, int]]]] = {}
    for path, block in blocks.items():
        D, F_ = block.gate.in_features, block.expert_width
        shapes = {"gate_up_proj": (2 * F_, D), "down_proj": (D, F_)}
        layers[block.layer] = (f"{path}.experts", block, shapes)
    for path, module in core.named_modules():
        own = getattr(module, "chronos", None)
        if own is not None:
            layers[own.layer] = (path, module, {})
    found = {}
    for layer, number in sorted(experts):
        path, holder, shapes = layers[layer]
        shapes = shapes or _guest_shapes(path, holder)
        codec = holder.codec if isinstance(holder, MoE) else holder.chronos.codec
        if not getattr(codec, "adapts", False):
            raise UsageError(
                f"the experts of layer {layer} are encoded for running only",
                "",
                "leave `experts` out of lora.targets, or adapt the model they were made of",
            )
        found[f"{path}.{number}"] = (holder, number, shapes)
    return found


def _guest_shapes(path: str, module: Any) -> dict[str, tuple[int, int]]:
    shapes = getattr(module, "chronos_shapes", None)
    if shapes is None or any(name in module._parameters for name in PARAMETERS):
        raise UsageError(
            "routed experts of this model can be adapted only where they are streamed",
            path,
            "pack the model and give it a budget below 'resident'",
        )
    matrices = {n: s for n, s in shapes.items() if n in _MATRICES}
    return {n: (s[1], s[0]) if module.is_transposed else (s[0], s[1]) for n, s in matrices.items()}
