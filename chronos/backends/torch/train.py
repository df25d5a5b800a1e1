"""One optimisation step of the torch backend: losses, gradients, AdamW, and the state to resume.

NumPy batches in, plain floats out. Random numbers are seeded from (seed, step), so a resumed run
needs no generator state to continue bit for bit. The formulas are those of `common.losses`.
Not covered: mixed precision, several devices.

Shape legend: B batch, T tokens, V vocabulary, L layers, E experts, K top-k, J lookahead steps + 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chronos.backends.torch.checkpoint import Named, from_bytes, to_bytes
from chronos.backends.torch.model import Model, Output
from chronos.common.data import Batch
from chronos.common.disk.header import TensorEntry
from chronos.common.errors import ShapeMismatch
from chronos.common.model.config import LossWeights
from chronos.common.training.recipe import TrainRecipe

_MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainStep:
    """Holds the optimizer of one model; `step` consumes the micro-batches of one update."""

    def __init__(self, model: Model, recipe: TrainRecipe) -> None:
        self.model, self.recipe = model, recipe
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            plain = parameter.dim() < 2 or "embed_tokens" in name
            (others if plain else matrices).append(parameter)
        groups = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        betas = (recipe.beta1, recipe.beta2)
        self.optimizer = _adamw(groups, betas)
        self.updates = 0

    def step(self, batches: Sequence[Batch], learning_rate: float, step: int) -> dict[str, float]:
        """One update over the micro-batches; skipped (`skipped` = 1) if not finite."""
        model, recipe = self.model.train(), self.recipe
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        self.optimizer.zero_grad(set_to_none=True)
        picks_LE: Tensor | None = None
        totals: dict[str, float] = {}
        for batch in batches:
            terms, picks_LE = self._losses(batch, picks_LE)
            (terms["loss"] / len(batches)).backward()
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + float(value.detach()) / len(batches)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        totals["grad_norm"] = float(norm)
        totals["skipped"] = float(not (math.isfinite(totals["loss"]) and math.isfinite(norm)))
        if not totals["skipped"]:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            for parameter in model.parameters():
                if parameter.grad is None:  # an expert no token chose: its moments decay too
                    parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
            self.updates += 1
        assert picks_LE is not None
        return totals | _health(picks_LE)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Mean terms over the batches, without dropout, masks or gradients."""
        self.model.eval()
        picks_LE: Tensor | None = None
        totals: dict[str, float] = {}
        for batch in batches:
            terms, picks_LE = self._losses(batch, picks_LE)
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + float(value) / len(batches)
        assert picks_LE is not None
        return totals | _health(picks_LE)

    def _losses(self, batch: Batch, picks_LE: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        model, weights = self.model, self.model.config.loss_weights
        ids_BT, labels_BT, segments_BT = (
            torch.from_numpy(a).long().to(model.device)
            for a in (batch.ids_BT, batch.labels_BT, batch.segments_BT)
        )
        out = model(
            ids_BT,
            segments_BT=segments_BT,
            want_lookahead=model.lookahead is not None,
            lookahead_into_trunk=self.recipe.lookahead_into_trunk,
        )
        terms, picks_LE = routing_terms(out, segments_BT, weights, picks_LE)
        terms["ce"] = F.cross_entropy(
            out.logits.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=-100
        )
        mix = {name: getattr(weights, name) for name in terms if hasattr(weights, name)}
        terms["loss"] = terms["ce"] + sum(w * terms[name] for name, w in mix.items() if w)
        return terms, picks_LE

    def state(self) -> Iterator[Named]:
        """Weights and optimizer moments, all in float32: all that a resume needs."""
        yield to_bytes("optimizer.step", torch.tensor(float(self.updates)), torch.float32)
        for name, parameter in self.model.named_parameters():
            yield to_bytes(name, parameter, torch.float32)
            for moment in _MOMENTS:
                value = self.optimizer.state[parameter].get(moment)
                if value is not None:
                    yield to_bytes(f"{moment}.{name}", value, torch.float32)

    @torch.no_grad()
    def load_state(self, tensors: Iterable[tuple[TensorEntry, memoryview]]) -> None:
        """Take over what `state` wrote. Raises ShapeMismatch if the model is another one."""
        parameters = dict(self.model.named_parameters())
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


def _adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused where this torch can: a CPU from 2.4 on only, and Intel Macs end at 2.2."""
    try:
        return torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=1e-8, fused=True)
    except RuntimeError:
        return torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=1e-8)


def routing_terms(
    out: Output, segments_BT: Tensor, weights: LossWeights, picks_LE: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Balance, temporal, locality and lookahead terms of spec section 3, pads left out.

    picks_LE counts the picks of earlier micro-batches of the same update, so that the fractions f
    of the balance term (2101.03961, eq. 4) are those of the global batch; the sum is returned.
    """
    B, T = segments_BT.shape
    probs_LBTE = torch.stack([r.probs_TE for r in out.routing]).unflatten(1, (B, T))
    ids_LBTK = torch.stack([r.ids_TK for r in out.routing]).unflatten(1, (B, T))
    E, K = probs_LBTE.shape[-1], ids_LBTK.shape[-1]
    real_BT = segments_BT >= 0
    picked_LBTE = torch.zeros_like(probs_LBTE).scatter_(-1, ids_LBTK, 1.0)
    now_LE = (picked_LBTE * real_BT[..., None]).sum((1, 2))
    picks_LE = now_LE if picks_LE is None else picks_LE + now_LE
    share_LE = picks_LE / picks_LE.sum(-1, keepdim=True).clamp(min=1)
    mean_LE = probs_LBTE[:, real_BT].mean(1)
    terms = {"balance": E * (share_LE * mean_LE).sum()}
    both_BT = (segments_BT[:, 1:] == segments_BT[:, :-1]) & real_BT[:, 1:]
    now, before = probs_LBTE[:, :, 1:], probs_LBTE[:, :, :-1]
    terms["temporal"] = _mean((now - before).square().sum(-1), both_BT)
    if weights.locality:
        kept = now.gather(-1, ids_LBTK[:, :, :-1]).sum(-1)
        terms["locality"] = _mean(-kept.clamp(min=1e-9).log(), both_BT)
    entropy = -(probs_LBTE * probs_LBTE.clamp(min=1e-9).log()).sum(-1)
    terms["entropy"] = _mean(entropy, real_BT).detach()
    if out.lookahead is not None:
        terms |= _lookahead_terms(out.lookahead, probs_LBTE, ids_LBTK, segments_BT, K)
    return terms, picks_LE


def _lookahead_terms(
    logits_BTJLE: Tensor, probs_LBTE: Tensor, ids_LBTK: Tensor, segments_BT: Tensor, top_k: int
) -> dict[str, Tensor]:
    """Cross-entropy of Q against the detached routing j tokens later, the top-k hit term and the
    share of the routed experts among Q's top-k. The first layer is routed before Q exists."""
    logq = logits_BTJLE.float().log_softmax(-1)
    targets_BTLE, ids_BTLK = probs_LBTE.detach().permute(1, 2, 0, 3), ids_LBTK.permute(1, 2, 0, 3)
    real_BT, T = segments_BT >= 0, segments_BT.shape[1]
    ce, hit, recall = [], [], []
    for j in range(min(logq.shape[2], T)):
        valid_BT = (segments_BT[:, j:] == segments_BT[:, : T - j]) & real_BT[:, : T - j]
        q_NLE = logq[:, : T - j, j][valid_BT]
        p_NLE, ids_NLK = targets_BTLE[:, j:][valid_BT], ids_BTLK[:, j:][valid_BT]
        ce.append(-(p_NLE * q_NLE).sum(-1).flatten())
        mass = q_NLE.gather(-1, ids_NLK).exp().sum(-1)
        hit.append(-(mass.clamp(min=1e-9) / top_k).log().flatten())
        with torch.no_grad():
            guess = torch.zeros_like(p_NLE).scatter_(-1, q_NLE.topk(top_k).indices, 1.0)
            recall.append(guess.gather(-1, ids_NLK).mean())
    terms = {"lookahead": torch.cat(ce).mean(), "lookahead_hit": torch.cat(hit).mean()}
    return terms | {f"recall_{j}": value for j, value in enumerate(recall)}


def _mean(x_LBT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over layers and the unmasked tokens; 0 where no token is unmasked."""
    return (x_LBT * mask_BT).sum() / (mask_BT.sum() * len(x_LBT)).clamp(min=1)


def _health(picks_LE: Tensor) -> dict[str, float]:
    """Largest share of one expert and effective experts exp(H) of the picks, over layers."""
    share_LE = picks_LE / picks_LE.sum(-1, keepdim=True).clamp(min=1)
    effective_L = (-(share_LE * share_LE.clamp(min=1e-9).log()).sum(-1)).exp()
    return {
        "largest_share": float(share_LE.max()),
        "effective_experts": float(effective_L.mean()),
        "effective_experts_min": float(effective_L.min()),
    }
