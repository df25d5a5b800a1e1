r"""The checkpoint of the comparison with other runtimes: a Qwen3-MoE whose routing was trained.

Random weights route uniformly, which flatters no cache and resembles no model. So a small model
learns the Python standard library byte by byte with narrow experts, which is what one core can do
in half an hour; then every expert is widened with near-silent units to the size that is wanted
(function kept but for small noise, as in Net2Net, arXiv 1511.05641). Routing stays as learnt; the
text is poor. Written: bfloat16 shards with both spellings of the config, tokenizer, F16 GGUF.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 \
        python -m bench.runs.make_moe bench/scratch/peers [--minutes 30]

Those settings halve the time of a step: memory goes back to the system otherwise, and each tensor
pays its page faults again. Ctrl-C ends the training early and writes what there is; a state left
by an earlier run is continued, and --minutes 0 only writes it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from bench.lib import checkpoint
from chronos.common.data.documents import split_documents, stdlib_documents

_LAYERS, _EXPERTS, _TOP_K, _HIDDEN, _NARROW, _WIDE = 8, 64, 4, 512, 96, 768
_ROWS, _CONTEXT, _PEAK_RATE, _BALANCE = 4, 256, 1.5e-3, 0.05
_SAVE_EVERY_S = 180.0

Ids = np.ndarray[Any, np.dtype[np.uint16]]


def config(expert_hidden: int) -> Qwen3MoeConfig:
    return checkpoint.config(
        layers=_LAYERS,
        experts=_EXPERTS,
        top_k=_TOP_K,
        hidden=_HIDDEN,
        expert_hidden=expert_hidden,
    )


def balance_and_use(logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Switch's balance loss of one layer (arXiv 2101.03961, eq. 4), and the effective experts."""
    probabilities_TE = logits_TE.float().softmax(-1)
    counts_E = torch.bincount(logits_TE.topk(_TOP_K).indices.flatten(), minlength=_EXPERTS)
    share_E = counts_E / counts_E.sum()
    loss = _EXPERTS * (share_E * probabilities_TE.mean(0)).sum()
    return loss, (-(share_E * share_E.clamp_min(1e-9).log()).sum()).exp()


def optimizer(model: Qwen3MoeForCausalLM) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def batch(text: Ids, rng: np.random.Generator) -> torch.Tensor:
    starts = rng.integers(0, len(text) - _CONTEXT - 1, _ROWS)
    return torch.from_numpy(np.stack([text[s : s + _CONTEXT + 1] for s in starts]).astype(np.int64))


def train(model: Qwen3MoeForCausalLM, text: Ids, seconds: float, state: Path) -> None:
    """Steps until the time is over; the learning rate follows the clock."""
    rng, update = np.random.default_rng(0), optimizer(model)
    begin = saved = time.monotonic()
    step = 0
    while (done := (time.monotonic() - begin) / seconds) < 1.0:
        rate = _PEAK_RATE * min(1.0, (step + 1) / 20) * (0.05 + 0.95 * math.cos(done * math.pi / 2))
        for group in update.param_groups:
            group["lr"] = rate
        ids = batch(text, rng)
        out = model(ids[:, :-1], output_router_logits=True, use_cache=False)
        loss = functional.cross_entropy(out.logits.flatten(0, 1), ids[:, 1:].flatten())
        layers = [balance_and_use(logits) for logits in out.router_logits]
        balance = torch.stack([layer[0] for layer in layers])
        # Strong at first, or a few experts win; then weaker, or all end up used alike.
        (loss + _BALANCE * (1.0 if done < 0.4 else 0.1) * balance.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update.step()
        update.zero_grad()
        if step % 10 == 0:
            line: dict[str, Any] = {"step": step, "seconds": round(time.monotonic() - begin)}
            line |= {"loss": round(loss.item(), 3), "balance": round(balance.mean().item(), 3)}
            line["effective_experts"] = [round(float(layer[1]), 1) for layer in layers]
            print(json.dumps(line), flush=True)
        if time.monotonic() - saved > _SAVE_EVERY_S:
            torch.save(model.state_dict(), state)
            saved = time.monotonic()
        step += 1


def widen(narrow: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts of _NARROW units become experts of _WIDE: the learnt units and near-silent ones."""
    wide = dict(narrow)
    for name, tensor in narrow.items():
        if name.endswith("gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            fresh = (_EXPERTS, _WIDE - _NARROW, _HIDDEN)
            grown = [torch.cat([part, 0.02 * torch.randn(fresh)], dim=1) for part in (gate, up)]
            wide[name] = torch.cat(grown, dim=1)
        elif name.endswith("down_proj"):
            fresh = (_EXPERTS, _HIDDEN, _WIDE - _NARROW)
            wide[name] = torch.cat([tensor, 0.002 * torch.randn(fresh)], dim=2)
    return wide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--experts", default="grouped_mm", help="Transformers' implementation")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    state = args.work / "narrow.pt"
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM._from_config(config(_NARROW), experts_implementation=args.experts)
    if state.exists():
        model.load_state_dict(torch.load(state))
    documents, _ = split_documents(stdlib_documents())
    text = checkpoint.encode("\n".join(document.text for document in documents))
    try:
        if args.minutes:
            train(model, text, args.minutes * 60, state)
    except KeyboardInterrupt:
        print("interrupted: writing what there is")
    torch.save(model.state_dict(), state)
    with torch.device("meta"):
        wide = Qwen3MoeForCausalLM(config(_WIDE))
    weights = {name: tensor.bfloat16() for name, tensor in widen(model.state_dict()).items()}
    wide.load_state_dict(weights, assign=True)
    wide.save_pretrained(args.work / "model", max_shard_size="500MB")
    checkpoint.save_sides(args.work / "model")
    checkpoint.write_gguf(args.work / "model", args.work / "model.gguf")


if __name__ == "__main__":
    main()
