"""One optimisation step of the torch backend: gradients, and the state to resume.

NumPy batches in, plain floats out. Random numbers are seeded from (seed, step, micro-batch), so a
resumed run needs no generator state to continue bit for bit. What is minimised is in `losses.py`.
Not covered: a model in parts on several devices.

Shape legend: B batch, T tokens, L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
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
    picks_of,
    replay_of,
    states,
    tensors_of,
)
from chronos.backends.torch.model import Model
from chronos.backends.torch.optimizers import Optimizer
from chronos.backends.torch.parallel import Processes
from chronos.backends.torch.streamed import Climb, Streamed
from chronos.common.data import Batch
from chronos.common.disk.header import TensorEntry
from chronos.common.errors import ShapeMismatch, UsageError
from chronos.common.training.objectives import (
    Counts,
    Objective,
    Part,
    Terms,
    count,
    flattened,
    own_share,
    report,
    restored,
)
from chronos.common.training.optimizers import STATES
from chronos.common.training.recipe import OptimizerRecipe
from chronos.common.training.schedule import mask_seed

_ROUTING = ("balance", "temporal", "locality", "anchor")  # terms of the layers' own probabilities


class TrainStep:
    """Holds the optimizer of one model; `step` consumes the micro-batches of one update."""

    def __init__(self, model: Any, recipe: OptimizerRecipe, adapter: Adapter | None = None) -> None:
        """model: one that holds its experts, or a `Streamed` one. adapter: what is trained in place
        of the model's own parameters, where it has one."""
        self.model, self.recipe, self.adapter = model, recipe, adapter
        self._trained: dict[str, Tensor] = dict(_trained(model, adapter))
        bare = model.bare if isinstance(model, Streamed) else model
        bare.gradient_checkpointing = recipe.gradient_checkpointing
        # Weights, sums and losses stay in float32; products are in bfloat16 where that is wanted.
        self._precision: Callable[[], AbstractContextManager[Any]] = nullcontext
        if recipe.compute_dtype == "bfloat16":
            self._precision = partial(torch.autocast, model.device.type, dtype=torch.bfloat16)
        self._processes = Processes()
        self.optimizer = Optimizer(self._trained, recipe)

    def step(
        self, batches: Sequence[Batch], objective: Objective, rate: float, number: int
    ) -> Terms:
        """One update over the micro-batches, of which several processes have a share each; skipped
        (`skipped` = 1) if not finite."""
        model, processes = self._mode(True), self._processes
        own = own_share(batches, processes.rank, processes.count)
        counts = count(batches, objective, model.config.lookahead_steps)
        for parameter in self._trained.values():
            parameter.grad = None
        balanced = len(batches) > 1 and bool(objective.weights.get("balance"))
        if len(own) > 1 and self._climbs(objective):
            parts = self._climb([batch for _, batch in own], objective, counts, balanced)
        else:
            picks_LE = None
            if balanced:
                (picks_LE,) = processes.total([self._picks(own, number)])
            parts = []
            for part, batch in own:
                self._seed(number, part)
                with self._precision():
                    found = losses(model, batch, objective, counts, picks_LE)
                found.loss.backward()
                parts.append(_part(found))
        if processes.count > 1:
            parts = [self._join(parts)]
        terms = report(parts, counts, objective)
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained.values(), self.recipe.clip))
        finite = math.isfinite(terms["loss"]) and math.isfinite(norm)
        if finite:
            self.optimizer.update(rate)
        return terms | {"grad_norm": norm, "skipped": float(not finite)}

    def _climbs(self, objective: Objective) -> bool:
        """Whether micro-batches go through the model layer by layer. Masks are drawn in another
        order then, and a guest's layers give no routing to be trained; what has either goes through
        it with one after the other."""
        if not isinstance(self.model, Streamed) or self.adapter is None:
            return False
        shown = isinstance(self.model.bare, Model)
        trains = any(objective.weights.get(name) for name in _ROUTING)
        return not self.adapter.recipe.dropout and (shown or not trains)

    def _climb(
        self, batches: Sequence[Batch], objective: Objective, counts: Counts, balanced: bool
    ) -> list[Part]:
        """The gradients of an update whose experts are read once up and once down. balanced:
        whether the picks of all its micro-batches are asked for."""
        model, climb = self.model, Climb(self.model, len(batches))
        with self._precision():
            outs = climb.up([partial(states, model, batch, objective) for batch in batches])
        picks_LE = None
        if balanced:
            segments = [torch.from_numpy(batch.segments_BT).to(model.device) for batch in batches]
            own_LE = sum(map(picks_of, outs, segments), torch.zeros((), device=model.device))
            (picks_LE,) = self._processes.total([own_LE])
        parts = []
        for batch, out in zip(batches, outs, strict=True):
            with self._precision():
                found = losses(model, batch, objective, counts, picks_LE, out)
            found.loss.backward()
            parts.append(_part(found))
        climb.down(self._precision)
        return parts

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], objective: Objective) -> Terms:
        """Terms of all batches together, without dropout, masks or gradients."""
        model = self._mode(False)
        counts = count(batches, objective, model.config.lookahead_steps)
        with self._precision():
            parts = [_part(losses(model, batch, objective, counts, None)) for batch in batches]
        return report(parts, counts, objective)

    def _mode(self, training: bool) -> Any:
        """The model, with or without dropout and masks."""
        if self.adapter is not None:
            self.adapter.train(training)
        return self.model.train() if training else self.model.eval()

    def _join(self, parts: Sequence[Part]) -> Part:
        """The gradients and the parts of all processes, summed."""
        parameters = list(self._trained.values())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter, gradient in zip(parameters, self._processes.total(gradients), strict=True):
            parameter.grad = gradient
        vector = torch.from_numpy(flattened(parts)).to(self.model.device)
        return restored(self._processes.total([vector])[0].cpu().numpy(), parts[0])

    def _picks(self, own: Sequence[tuple[int, Batch]], number: int) -> torch.Tensor:
        """Those of all batches, one after the other."""
        total_LE = torch.zeros((), device=self.model.device)
        for part, batch in own:
            self._seed(number, part)
            with self._precision():
                total_LE = total_LE + count_picks(self.model, batch)
        return total_LE

    def _seed(self, number: int, part: int) -> None:
        """So that a micro-batch draws the same masks whatever was computed before it."""
        torch.manual_seed(mask_seed(self.recipe.seed, number, part))

    def state(self) -> Iterator[Named]:
        """What is trained and what the optimizer keeps, in float32: all that a resume needs."""
        updates = torch.tensor(float(self.optimizer.updates))
        yield to_bytes("optimizer.step", updates, torch.float32)
        for name, parameter in self._trained.items():
            yield to_bytes(name, parameter, torch.float32)
        for kind, name, value in self.optimizer.state():
            yield to_bytes(f"{kind}.{name}", value, torch.float32)

    @torch.no_grad()
    def load_state(self, tensors: Iterable[tuple[TensorEntry, memoryview]]) -> None:
        """Take over what `state` wrote. Raises ShapeMismatch if the model or the optimizer is
        another one."""
        parameters = self._trained
        missing, updates = set(parameters), 0
        for entry, data in tensors:
            value = from_bytes(data, entry.dtype, entry.shape)
            if entry.name == "optimizer.step":
                updates = int(value)
                continue
            kind, _, name = entry.name.partition(".")
            if kind in STATES:
                fits = self.optimizer.put(kind, name, value)
            else:
                parameter = parameters.get(entry.name)
                fits = parameter is not None and value.shape == parameter.shape
                missing.discard(entry.name)
                if parameter is not None and fits:
                    parameter.copy_(value)
            if not fits:
                raise ShapeMismatch(f"checkpoint tensor {entry.name} does not fit this model")
        if missing:
            raise ShapeMismatch(f"the checkpoint lacks {sorted(missing)[0]}")
        if not self.optimizer.resume(updates):
            raise ShapeMismatch("the checkpoint lacks what the optimizer keeps")


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
def score(model: Model, batch: Batch, temperature: float = 1.0, *, replay: bool = False) -> Scores:
    """What a model without dropout and masks says of a batch. replay: with the experts that the
    batch names."""
    arrays = tensors_of(batch, model.device)
    out = model.eval()(
        arrays["ids"],
        segments_BT=arrays["segments"],
        replay=replay_of(arrays) if replay else None,
        want_logits=False,
    )
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


def _part(found: Losses) -> Part:
    """On the host."""
    terms = {name: float(value.detach()) for name, value in found.terms.items()}
    return Part(terms, *(x.detach().cpu().numpy() for x in (found.picks_LE, found.probs_LE)))
