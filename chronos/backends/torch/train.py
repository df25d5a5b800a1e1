"""One optimisation step of the torch backend: gradients, AdamW, and the state to resume.

NumPy batches in, plain floats out. Random numbers are seeded from (seed, step), so a resumed run
needs no generator state to continue bit for bit. What is minimised is in `losses.py`.
Not covered: mixed precision, several devices.

Shape legend: B batch, T tokens, L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from chronos.backends.protocol import Scores
from chronos.backends.torch.checkpoint import Named, from_bytes, to_bytes
from chronos.backends.torch.lora import Adapter
from chronos.backends.torch.losses import (
    Losses,
    at_labels,
    count_picks,
    label_log_probs,
    losses,
    tensors_of,
)
from chronos.backends.torch.model import Model
from chronos.common.data import Batch
from chronos.common.disk.header import TensorEntry
from chronos.common.errors import ShapeMismatch, UsageError
from chronos.common.training.objectives import Objective, Part, Terms, count, report
from chronos.common.training.recipe import OptimizerRecipe

_MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainStep:
    """Holds the optimizer of one model; `step` consumes the micro-batches of one update."""

    def __init__(self, model: Any, recipe: OptimizerRecipe, adapter: Adapter | None = None) -> None:
        """model: one that holds its experts, or a `Streamed` one. adapter: what is trained in place
        of the model's own parameters, where it has one."""
        self.model, self.recipe, self.adapter = model, recipe, adapter
        self._trained: dict[str, Tensor] = dict(_trained(model, adapter))
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, parameter in self._trained.items():
            plain = parameter.dim() < 2 or "embed_tokens" in name
            (others if plain else matrices).append(parameter)
        groups = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        betas = (recipe.beta1, recipe.beta2)
        self.optimizer = _adamw(groups, betas)
        self.updates = 0

    def step(
        self, batches: Sequence[Batch], objective: Objective, rate: float, number: int
    ) -> Terms:
        """One update over the micro-batches; skipped (`skipped` = 1) if not finite."""
        model = self._mode(True)
        counts = count(batches, objective, model.config.lookahead_steps)
        picks_LE = None
        if len(batches) > 1 and objective.weights.get("balance"):
            self._seed(number)  # twice, so that both passes draw the same masks
            picks_LE = torch.stack([count_picks(model, batch) for batch in batches]).sum(0)
        self._seed(number)
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        for batch in batches:
            found = losses(model, batch, objective, counts, picks_LE)
            found.loss.backward()
            parts.append(_part(found))
        terms = report(parts, counts, objective)
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained.values(), self.recipe.clip))
        finite = math.isfinite(terms["loss"]) and math.isfinite(norm)
        if finite:
            self._apply(rate)
        return terms | {"grad_norm": norm, "skipped": float(not finite)}

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], objective: Objective) -> Terms:
        """Terms of all batches together, without dropout, masks or gradients."""
        model = self._mode(False)
        counts = count(batches, objective, model.config.lookahead_steps)
        parts = [_part(losses(model, batch, objective, counts, None)) for batch in batches]
        return report(parts, counts, objective)

    def _mode(self, training: bool) -> Any:
        """The model, with or without dropout and masks."""
        if self.adapter is not None:
            self.adapter.train(training)
        return self.model.train() if training else self.model.eval()

    def _seed(self, number: int) -> None:
        torch.manual_seed(self.recipe.seed * 1_000_003 + number)

    def _apply(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for parameter in self._trained.values():
            if parameter.grad is None:  # an expert no token chose: its moments decay too
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.updates += 1

    def state(self) -> Iterator[Named]:
        """What is trained and the optimizer's moments, all in float32: all that a resume needs."""
        yield to_bytes("optimizer.step", torch.tensor(float(self.updates)), torch.float32)
        for name, parameter in self._trained.items():
            yield to_bytes(name, parameter, torch.float32)
            for moment in _MOMENTS:
                value = self.optimizer.state[parameter].get(moment)
                if value is not None:
                    yield to_bytes(f"{moment}.{name}", value, torch.float32)

    @torch.no_grad()
    def load_state(self, tensors: Iterable[tuple[TensorEntry, memoryview]]) -> None:
        """Take over what `state` wrote. Raises ShapeMismatch if the model is another one."""
        parameters = self._trained
        missing = set(parameters)
        for entry, data in tensors:
            value = from_bytes(data, entry.dtype, entry.shape)
            if entry.name == "optimizer.step":
                self.updates = int(value)
                continue
            moment, _, name = entry.name.partition(".")
            if moment not in _MOMENTS:
                moment, name = "", entry.name
            parameter = parameters.get(name)
            if parameter is None or value.shape != parameter.shape:
                raise ShapeMismatch(f"checkpoint tensor {entry.name} does not fit this model")
            if moment:
                self.optimizer.state[parameter][moment] = value.to(parameter.device, copy=True)
            else:
                parameter.copy_(value)
                missing.discard(name)
        if missing:
            raise ShapeMismatch(f"the checkpoint lacks {sorted(missing)[0]}")
        for parameter in parameters.values():
            if self.updates:  # on the parameter's device, where the fused update reads it
                step = torch.tensor(float(self.updates), device=parameter.device)
                self.optimizer.state[parameter]["step"] = step


def _trained(model: Any, adapter: Adapter | None) -> Iterable[tuple[str, Tensor]]:
    if adapter is not None:
        return adapter.parameters.items()
    if not (isinstance(model, Model) and model.resident):
        raise UsageError(
            "only a native model with all its experts in memory is trained as a whole",
            "",
            "train an adapter of it: --lora 16",
        )
    return model.named_parameters()


@torch.no_grad()
def score(model: Model, batch: Batch, temperature: float = 1.0) -> Scores:
    """What a model without dropout and masks says of a batch."""
    arrays = tensors_of(batch, model.device)
    out = model.eval()(arrays["ids"], segments_BT=arrays["segments"], want_logits=False)
    measure = partial(label_log_probs, temperature=temperature)
    (lp_BT,) = at_labels(model, out.hidden, arrays, measure)
    shape = (*batch.ids_BT.shape, len(out.routing), -1)
    ids, probs = (
        torch.stack(x, 1).view(shape).cpu().numpy()
        for x in ([r.ids_TK for r in out.routing], [r.probs_TE.float() for r in out.routing])
    )
    return Scores(lp_BT.cpu().numpy(), ids, probs)


def anchor(model: Model) -> None:
    """Keep a frozen copy of every gate, which losses compare the routers with from now on."""
    for block in model.model.layers:
        block.mlp.anchor = tuple(weight.detach().clone() for weight in block.mlp.gates())


def _adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused where this torch can: a CPU from 2.4 on only, and Intel Macs end at 2.2."""
    fused = torch.__version__ >= "2.4"  # a TorchVersion: compared as numbers
    return torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=1e-8, fused=fused)


def _part(found: Losses) -> Part:
    """On the host."""
    terms = {name: float(value.detach()) for name, value in found.terms.items()}
    return Part(terms, *(x.detach().cpu().numpy() for x in (found.picks_LE, found.probs_LE)))
