"""What router-only fine-tuning with a locality term gives a guest: SmolLM2 made into a Mixtral.

Only the gates train: next-token loss, -log of the mass that a token's router has on the picks of
the token before (`locality` of `chronos.common.training.losses`), and the anchor, the divergence
from the gates as they were, on the same states. Held-out loss, hits of a decayed-LFU cache of a
quarter of the experts and the experts used, before and after. Ceiling: 100 % hits at the loss
before. Its routers were drawn at random, so this is easier than a trained model is.

    python -m bench.runs.upcycle OUT --gguf WHEEL
    python -m bench.runs.guest_locality OUT/moe [--locality 0.3] [--anchor 0.1] [--steps 40]

Text: the standard library's sources, held-out files apart. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from chronos.common.data import split_documents, stdlib_documents
from chronos.common.traces.simulate import missed_keys, slots_for
from chronos.common.traces.trace import TraceRecorder
from chronos.common.training.losses import effective_experts, pick_shares

LENGTH, FROM = 256, 16


def pieces(tokenizer: Any, documents: Any, count: int) -> list[Any]:
    """The first LENGTH tokens of as many documents that have them, at even distances."""
    import torch

    found = []
    for document in list(documents)[:: max(1, len(documents) // (3 * count))]:
        ids = tokenizer(document.text[:4000], return_tensors="pt").input_ids[:, :LENGTH]
        if ids.shape[1] == LENGTH:
            found.append(ids)
    return [torch.cat(found[:count])[n : n + 1] for n in range(min(count, len(found)))]


def measured(model: Any, held_out: list[Any]) -> dict[str, Any]:
    import torch

    config = model.config
    recorder = TraceRecorder(config.num_local_experts, config.num_experts_per_tok, phase="prefill")
    losses, top_k = [], config.num_experts_per_tok
    with torch.no_grad():
        for ids in held_out:
            out = model(ids, labels=ids, output_router_logits=True)
            losses.append(float(_next_token(out, ids)))
            picks = [z.topk(top_k).indices for z in out.router_logits]
            recorder.new_sequence()
            recorder.append(torch.stack(picks, 1).numpy())
    trace = recorder.trace()
    counted_T = np.concatenate([np.arange(LENGTH) >= FROM for _ in held_out])
    missed = np.fromiter(map(len, missed_keys(trace, slots_for(trace, 0.25), "lfu")), np.int64)
    misses = missed.reshape(trace.num_tokens, trace.num_layers)[counted_T].sum(1).mean()
    ids_LBTK = np.moveaxis(trace.ids_TLK.astype(np.int64), 1, 0)[:, None]
    one_BT = np.zeros((1, trace.num_tokens), int)
    each_L = effective_experts(pick_shares(ids_LBTK, one_BT, trace.num_experts))
    return {
        "loss": float(np.mean(losses)),
        "hits_25": float(1 - misses / (trace.num_layers * trace.top_k)),
        "effective_experts": float(each_L.mean()),
        "effective_experts_worst_layer": float(each_L.min()),
    }


def _next_token(out: Any, ids: Any) -> Any:
    from torch.nn.functional import cross_entropy

    return cross_entropy(out.logits[0, :-1].float(), ids[0, 1:])


def train(model: Any, texts: list[Any], args: argparse.Namespace) -> list[dict[str, float]]:
    """The gates only, one text an update."""
    import torch

    gates = [layer.mlp.gate.weight for layer in model.model.layers]
    frozen = [gate.detach().clone() for gate in gates]
    states: list[Any] = []
    hooks = [
        layer.mlp.gate.register_forward_pre_hook(lambda _, given: states.append(given[0].detach()))
        for layer in model.model.layers
    ]
    model.requires_grad_(False)
    for gate in gates:
        gate.requires_grad_(True)
    optimizer, log = torch.optim.Adam(gates, lr=args.rate), []
    for number in range(args.steps):
        states.clear()
        begin = time.perf_counter()
        ids = texts[number % len(texts)]
        out = model(ids, output_router_logits=True)
        logp = [z.float().log_softmax(-1) for z in out.router_logits]
        picks = [p[:-1].topk(model.config.num_experts_per_tok).indices for p in logp]
        kept = [p[1:].exp().gather(-1, ids).sum(-1) for p, ids in zip(logp, picks, strict=True)]
        locality = torch.stack([-k.clamp(min=1e-9).log().mean() for k in kept]).mean()
        before = [(x.flatten(0, -2) @ w.T).float().log_softmax(-1)
                  for x, w in zip(states, frozen, strict=True)]  # fmt: skip
        anchor = torch.stack([(p.exp() * (p - q)).sum(-1).mean()
                              for p, q in zip(logp, before, strict=True)]).mean()  # fmt: skip
        loss = _next_token(out, ids)
        (loss + args.locality * locality + args.anchor * anchor).backward()
        optimizer.step()
        optimizer.zero_grad()
        log.append({"loss": float(loss), "locality": float(locality), "anchor": float(anchor)})
        print(
            f"{number + 1}: {log[-1]}, {time.perf_counter() - begin:.1f} s",
            file=sys.stderr,
            flush=True,
        )
    for hook in hooks:
        hook.remove()
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--locality", type=float, default=0.3)
    parser.add_argument("--anchor", type=float, default=0.1)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--held-out", type=int, default=12, help="texts of 256 tokens")
    args = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    parts = split_documents(stdlib_documents(), 0.05)
    texts = pieces(tokenizer, parts[0], max(args.steps, 1))
    held_out = pieces(tokenizer, parts[1], args.held_out)
    before = measured(model.eval(), held_out)
    print(json.dumps(before), file=sys.stderr, flush=True)
    log = train(model, texts, args)
    settings = {name: getattr(args, name) for name in ("locality", "anchor", "rate", "steps")}
    found = {
        "bench": "guest-locality",
        **settings,
        "held_out_tokens": len(held_out) * LENGTH,
        "before": before,
        "after": measured(model, held_out),
        "last_update": log[-1] if log else None,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
