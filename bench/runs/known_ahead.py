"""What routing that is known a token ahead costs and saves: arms trained alike, measured alike.

Every arm is the recipe `plain` (8 layers, width 128, rows of 256 tokens, 16 a step) with another
routing, without its LookaheadRouter, whose loss reaches no other weight. Held-out text is then run
through each: loss of all of it, and the routing of pieces of documents, from whose token 16 on
reads of a cache are counted (a pool of all layers, decayed LFU, carried over from piece to piece).
Ceiling: no expert read, 100 % hits. Gates and what came out: bench/log/known-ahead.md.

    python -m bench.runs.known_ahead --prepare --data bench/scratch/known-ahead/ids.npz
    python -m bench.runs.known_ahead --data FILE --arm twin --seed 0 --steps 600 --out R.jsonl
    python -m bench.runs.known_ahead --data FILE --runs twin:0,rho9:0,rho9:1 --jobs 12 --out R.jsonl
    python -m bench.runs.known_ahead --model demo      (one that is there, measured alike)

With --within a trial of a few steps comes first, and --steps is lowered, for all alike, to what
that many seconds of training hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.lib.routings import install
from chronos.common.data import Batch, PackedDataset
from chronos.common.data.packing import IGNORE
from chronos.common.model.config import ModelConfig
from chronos.common.traces.simulate import missed_keys, slots_for
from chronos.common.traces.trace import RoutingTrace, TraceRecorder
from chronos.common.training.losses import effective_experts, pick_shares
from chronos.common.training.objectives import NextToken
from chronos.common.training.recipe import Recipe, load_recipe
from chronos.common.training.schedule import learning_rate
from chronos.train.pretrain import PretrainRecipe

HISTORY: dict[str, Any] = {"routing_source": "history"}
NEAR3 = HISTORY | {
    "num_resident_experts": 5, "num_resident_experts_per_tok": 3, "streamed_balance": 5.0
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "twin": {},
    "informed": {"routing_source": "informed"},
    "rho7": HISTORY | {"history_decay": 0.7},
    "rho8": HISTORY | {"history_decay": 0.8},
    "rho9": HISTORY,
    "two": HISTORY | {"history_decay": (0.7, 0.95)},
    "balance5": HISTORY | {"streamed_balance": 5.0},
    "n6": HISTORY | {"num_resident_experts": 6},
    "near3": HISTORY | {"num_resident_experts": 5, "num_resident_experts_per_tok": 3},
    "near3-balance5": NEAR3,
    "slow-balance5": HISTORY | {"streamed_balance": 5.0, "history_decay": 0.95},
    "edges": {"routing_source": ("gate", *["history"] * 6, "gate")},
    "edges-informed": {"routing_source": ("informed", *["history"] * 6, "informed")},
    # As much arithmetic with two of the four chosen experts made shared ones.
    "shared": {"num_experts_per_tok": 2, "num_shared_experts": 3},
    "sticky": {"loss": {"locality": 0.1}},
    "lookahead": {"routing_source": "lookahead"},
    # What was tried to make near3-balance5 cost less (bench/lib/routings.py has each routing).
    "near3of6": NEAR3 | {"num_resident_experts": 6},
    "late": NEAR3 | {"late": {"streamed_balance": 1.0}},  # from half of the updates on
    # What bounds them: eight experts in all; streamed ones by the token before alone, not local.
    "informed8": {"routing_source": "informed", "num_experts": 8},
    "fast": NEAR3 | {"history_decay": 0.01},
    "selective": NEAR3 | {"routing": ("selective", {})},
    "weighted": NEAR3 | {"routing": ("weighted", {})},
    "scaled": NEAR3 | {"routing": ("scaled", {"by": 4.0})},
    "unit": NEAR3 | {"history_norm": "unit"},
    "unit-late": NEAR3 | {"history_norm": "unit", "late": {"streamed_balance": 1.0}},
    "unit-slow": NEAR3 | {"history_norm": "unit", "history_decay": 0.93},
    "two-back": NEAR3 | {"routing": ("two_back", {})},
    "bent": NEAR3 | {"routing": ("bent", {})},
    "pool": NEAR3 | {"routing": ("pool", {"size": 3})},
    "working-set": NEAR3
    | {"history_decay": 0.5, "routing": ("working_set", {"bonus": 4.0, "decay": 0.95})},
    # Published ones.
    "mask": {"routing": ("mask", {"size": 8})},
    "bias": {"routing": ("bias", {"size": 8, "by": 1.0})},
    "rolling": {"routing": ("rolling", {"size": 8})},
}
SHARES = (0.125, 0.25, 0.5)
FROM = 16  # tokens of a piece that are not counted


def prepare(path: Path) -> None:
    """Token ids of the standard library, both parts, by the shipped model's tokenizer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **encoded("demo"))


def encoded(model: str) -> dict[str, Any]:
    """Token ids of the standard library, both parts, by a model's tokenizer."""
    from chronos.common.data import encode_documents, split_documents, stdlib_documents
    from chronos.common.text.tokenizer import Tokenizer
    from chronos.run.models import resolve_model

    recipe = load_recipe("plain", PretrainRecipe)
    tokenizer = Tokenizer.load(resolve_model(model))
    arrays: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad_id}
    parts = split_documents(stdlib_documents(), recipe.data.validation_share)
    for name, documents in zip(("train", "valid"), parts, strict=True):
        ids = [
            np.append(ids, tokenizer.eos_id) for ids in encode_documents(tokenizer, documents).ids
        ]
        arrays[name] = np.concatenate(ids).astype(np.uint16)
        arrays[f"{name}_starts"] = np.cumsum([0, *map(len, ids)])[:-1]
        print(f"{name}: {len(ids)} documents, {len(arrays[name])} tokens", file=sys.stderr)
    return arrays


def run_model(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure a model folder, as arms are measured when they are trained."""
    import torch

    from chronos import backends
    from chronos.run.models import resolve_model

    torch.set_num_threads(args.threads)
    model: Any = backends.load("torch").load(resolve_model(name), resident=True)
    held_out = rows(encoded(name), "valid", load_recipe("plain", PretrainRecipe), 0)
    count = args.trace_tokens // held_out.seq_len * 2  # rows begin and end within documents
    batches = [batch for _, batch in zip(range(0, count, 16), held_out.sweep(16), strict=False)]
    pieces = list(pieces_of(batches, args.trace_tokens))
    return {"bench": "known-ahead", "model": name} | measured(
        model, model.config, pieces, args.decoded
    )


def rows(arrays: Any, name: str, recipe: Recipe[PretrainRecipe], seed: int) -> PackedDataset:
    tokens_N = arrays[name].astype(np.int32)
    return PackedDataset(
        tokens_N,
        np.ones(len(tokens_N), bool),
        arrays[f"{name}_starts"].astype(np.int64),
        seq_len=recipe.stage.seq_len,
        pad_id=int(arrays["pad_id"]),
        seed=seed,
    )


def narrowed(config: ModelConfig, width: int) -> ModelConfig:
    """The same geometry with another hidden size; experts and heads go with it."""
    heads = config.num_attention_heads * width // config.hidden_size
    return dataclasses.replace(
        config,
        hidden_size=width,
        moe_intermediate_size=config.moe_intermediate_size * width // config.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=heads * config.num_key_value_heads // config.num_attention_heads,
    )


def small_documents(arrays: Any, name: str, most: float = 0.1) -> dict[str, Any]:
    """A split without its documents of more than a share of its tokens: of the held-out part
    that leaves Python, as the training text is, and takes one file of prose."""
    starts = arrays[f"{name}_starts"]
    parts = np.split(arrays[name], starts[1:])
    kept = [part for part in parts if len(part) <= most * len(arrays[name])]
    found = {name: np.concatenate(kept), "pad_id": arrays["pad_id"]}
    return found | {f"{name}_starts": np.cumsum([0, *map(len, kept)])[:-1]}


def run_arm(args: argparse.Namespace) -> dict[str, Any]:
    """Train one arm and measure it."""
    import torch

    from chronos import backends

    torch.set_num_threads(args.threads)
    recipe, changes = load_recipe("plain", PretrainRecipe), dict(ARMS[args.arm])
    routing, late = changes.pop("routing", None), changes.pop("late", {})
    losses = dataclasses.replace(recipe.model.loss_weights, **changes.pop("loss", {}))
    arrays = np.load(args.data)
    config = dataclasses.replace(
        recipe.model, vocab_size=int(arrays["vocab_size"]), loss_weights=losses, **changes
    )
    config = narrowed(config, args.width or config.hidden_size)
    backend = backends.load("torch")
    if args.start:
        model: Any = backend.load(args.start, resident=True, device=args.device)
    else:
        model = backend.build(config, seed=args.seed, device=args.device)
    if "lookahead" not in config.routing_sources:
        model.lookahead = None
    if routing:
        install(model, config, *routing)
    optimizer = dataclasses.replace(recipe.optimizer, seed=args.seed)
    step, objective = backend.train_step(model, optimizer), NextToken(losses)
    training = rows(arrays, "train", recipe, args.seed)
    times, fresh = [], []
    for number in range(args.steps):
        begin = time.perf_counter()
        if late and number == args.steps // 2:
            model.config = dataclasses.replace(config, **late)
        rate = learning_rate(
            number,
            peak=optimizer.learning_rate,
            floor=optimizer.min_learning_rate,
            warmup=min(optimizer.warmup_steps, args.steps // 6),
            total=args.steps,
        )
        batch = training.batch(number, recipe.stage.batch_size)
        terms = step.step([batch], objective, rate, number)
        fresh.append(terms["ce"])
        times.append(time.perf_counter() - begin)
        if (number + 1) % 100 == 0:
            print(f"{args.arm}:{args.seed} step {number + 1}, ce {terms['ce']:.3f}, "
                  f"{np.median(times):.3f} s a step", file=sys.stderr, flush=True)  # fmt: skip
    held_out = rows(arrays, "valid", recipe, 0)
    count = min(len(held_out), args.eval_tokens // recipe.stage.seq_len)
    batches = [batch for _, batch in zip(range(0, count, 16), held_out.sweep(16), strict=False)]
    terms = step.evaluate(batches, objective)
    code = rows(small_documents(arrays, "valid"), "valid", recipe, 0)
    code_batches = [batch for _, batch in zip(range(0, count, 16), code.sweep(16), strict=False)]
    code_terms = step.evaluate(code_batches, objective)
    if args.keep and not routing:
        backend.save(model, args.keep / f"{args.arm}-{args.seed}")
    pieces = list(pieces_of(batches, args.trace_tokens))
    return {
        "bench": "known-ahead",
        "arm": args.arm,
        "seed": args.seed,
        "steps": args.steps,
        **({"start": args.start.name} if args.start else {}),
        "tokens": args.steps * recipe.stage.batch_size * recipe.stage.seq_len,
        "device": str(model.device),
        "train_s": sum(times),
        "step_s": float(np.median(times)) if times else None,
        "width": config.hidden_size,
        "loss": terms["ce"],
        "loss_code": code_terms["ce"],
        "loss_training": float(np.mean(fresh[-(args.steps // 4) :])) if fresh else None,
        "eval_tokens": sum(batch.tokens for batch in batches),
        **measured(model.to("cpu"), config, pieces, args.decoded),
    }


def pieces_of(batches: list[Batch], most: int) -> Iterator[np.ndarray]:
    """Ids of parts of documents, of more than FROM tokens, up to `most` in all."""
    for batch in batches:
        for ids_T, labels_T, segments_T in zip(
            batch.ids_BT, batch.labels_BT, batch.segments_BT, strict=True
        ):
            for number in range(segments_T.max() + 1):
                piece = ids_T[segments_T == number]
                if len(piece) <= FROM or (labels_T[segments_T == number] == IGNORE).all():
                    continue
                if (most := most - len(piece)) < 0:
                    return
                yield piece


def measured(
    model: Any, config: ModelConfig, pieces: list[np.ndarray], decoded: int
) -> dict[str, Any]:
    """What the routing of the pieces comes to."""
    import torch

    model.eval()
    recorder = TraceRecorder(config.num_experts, config.num_experts_per_tok, phase="prefill")
    with torch.no_grad():
        for piece in pieces:
            recorder.new_sequence()
            routing = model(torch.from_numpy(piece).long()[None], want_logits=False).routing
            recorder.append(torch.stack([r.ids_TK for r in routing], 1).numpy())
        tried = hasattr(model.model.layers[0].mlp, "routing")
        announced = (causal if tried else ahead)(model, config, pieces, decoded)
    trace = recorder.trace()
    counted_T = np.concatenate([np.arange(len(piece)) >= FROM for piece in pieces])
    caches = {f"{share:g}": cached(trace, counted_T, share, config) for share in SHARES}
    return {"trace_tokens": trace.num_tokens, "caches": caches} | announced | tiers(trace, config)


def cached(
    trace: RoutingTrace, counted_T: np.ndarray, share: float, config: ModelConfig
) -> dict[str, float]:
    """A decayed-LFU cache of a share of all experts, over the tokens that count."""
    needs = trace.num_layers * trace.top_k
    slots = slots_for(trace, share)
    found = np.fromiter(map(len, missed_keys(trace, slots, "lfu")), np.int64)
    misses = found.reshape(trace.num_tokens, trace.num_layers)[counted_T].sum(1).mean()
    return {
        "hits": 1 - misses / needs,
        "reads_per_token": misses,
        "bytes_per_token": misses * config.expert_parameters * config.dtype_bytes,
    }


def tiers(trace: RoutingTrace, config: ModelConfig) -> dict[str, Any]:
    """exp(entropy) of the picks of each tier of a layer, a mean over the layers that have it."""
    ids_LBTK = np.moveaxis(trace.ids_TLK.astype(np.int64), 1, 0)[:, None]
    share_LE = pick_shares(ids_LBTK, np.zeros((1, trace.num_tokens), int), config.num_experts)
    resident, found = config.num_resident_experts, {}
    for name, source, columns in (
        ("all", "", slice(0, None)),
        ("resident", "history", slice(0, resident)),
        ("streamed", "history", slice(resident, None)),
    ):
        layers = [x for x, is_ in enumerate(config.routing_sources) if source in ("", is_)]
        if layers:
            part_LE = share_LE[layers, columns]
            each_L = effective_experts(part_LE / part_LE.sum(-1, keepdims=True))
            found[name] = {
                "experts": part_LE.shape[1],
                "effective": float(each_L.mean()),
                "effective_min": float(each_L.min()),
            }
    return {"tiers": found}


def ahead(
    model: Any, config: ModelConfig, pieces: list[np.ndarray], decoded: int
) -> dict[str, Any]:
    """Token by token: needs that were announced when the token before was over, of the needs of
    streamed experts, and resident or announced ones of all."""
    import torch

    streamed = announced = known = needs = 0
    for piece in pieces:
        cache = model.new_cache()
        for token in piece[:decoded].tolist():
            told = {}
            if cache.position:
                told = {k: set(v[0].tolist()) for k, v in model.upcoming(cache).items()}
            routing = model(torch.tensor([[token]]), cache=cache, want_logits=False).routing
            if cache.position == 1:
                continue
            for layer, chosen in enumerate(routing):
                ids = chosen.ids_TK[0].tolist()
                tiered = config.routing_of(layer) == "history"
                far = {x for x in ids if not tiered or x >= config.num_resident_experts}
                hit = len(far & told.get(layer, set()))
                streamed, announced = streamed + len(far), announced + hit
                known, needs = known + hit + len(ids) - len(far), needs + len(ids)
        decoded -= len(piece)
        if decoded <= 0:
            break
    return {"announced": announced / streamed, "known_ahead": known / needs}


def causal(
    model: Any, config: ModelConfig, pieces: list[np.ndarray], decoded: int
) -> dict[str, Any]:
    """For routings that do not run token by token: the share of streamed needs that stay the same
    when their token is another."""
    import torch

    if "history" not in config.routing_sources:
        return {"announced": 0.0}
    same = needs = 0
    for number in range(decoded):
        piece = pieces[number % len(pieces)]
        at = number * 7 % (len(piece) - 1) + 1
        other = piece.copy()
        other[at] = (other[at] + 1 + number) % config.vocab_size
        both = [
            model(torch.from_numpy(ids[: at + 1]).long()[None], want_logits=False).routing
            for ids in (piece, other)
        ]
        for one, two in zip(*both, strict=True):
            sets = [{x for x in r.ids_TK[at].tolist() if x >= config.num_resident_experts}
                    for r in (one, two)]  # fmt: skip
            same, needs = same + len(sets[0] & sets[1]), needs + len(sets[0])
    return {"announced": same / needs}


def run_all(args: argparse.Namespace) -> int:
    """Every run, `jobs` processes at a time; a line each as it ends. Returns how many failed."""
    waiting = args.runs.split(",")
    if args.within:
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder) / "trial.jsonl"
            quick = {"steps": 30, "eval_tokens": 4096, "trace_tokens": 4096, "decoded": 32}
            extra = {"within": 0, "out": lines, "keep": None}
            run_all(argparse.Namespace(**vars(args) | quick | extra))
            slowest = max(json.loads(line)["step_s"] for line in lines.read_text().splitlines())
        args.steps = min(args.steps, max(10, int(args.within / slowest) // 10 * 10))
        print(f"trial: {slowest:.3f} s a step, {args.steps} steps", file=sys.stderr, flush=True)
    handed = ("data", "steps", "width", "device", "threads", "eval_tokens", "trace_tokens",
              "decoded", "keep", "out")  # fmt: skip
    given = [(name, value) for name in handed if (value := getattr(args, name)) is not None]
    flags = [part for name, value in given for part in (f"--{name.replace('_', '-')}", str(value))]
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed = 0
    while waiting or running:
        while waiting and len(running) < args.jobs:
            arm, _, seed = (run := waiting.pop(0)).partition(":")
            command = [sys.executable, "-m", "bench.runs.known_ahead", "--arm", arm]
            running[run] = subprocess.Popen([*command, "--seed", seed or "0", *flags])
        time.sleep(0.2)
        for run in [run for run, process in running.items() if process.poll() is not None]:
            if running.pop(run).returncode:
                failed += 1
                print(f"{run}: failed", file=sys.stderr)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", help="measure this model instead of training arms")
    parser.add_argument("--prepare", action="store_true", help="write the data file, and end")
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", default=",".join(ARMS), help="ARM:SEED, several with commas")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, help="another hidden size; experts go with it")
    parser.add_argument("--within", type=float, default=0, help="seconds of training, at most")
    parser.add_argument("--device", help="left out: cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eval-tokens", type=int, default=1 << 18)
    parser.add_argument("--trace-tokens", type=int, default=1 << 14)
    parser.add_argument("--decoded", type=int, default=512, help="tokens run one by one")
    parser.add_argument("--start", type=Path, help="begin with a model that --keep wrote; with"
                        " --steps 0 an arm's routing is put on it unlearnt")  # fmt: skip
    parser.add_argument("--keep", type=Path, help="a folder for the trained models")
    parser.add_argument("--out", type=Path, help="lines are added to this file")
    args = parser.parse_args()
    if args.model:
        print(json.dumps(run_model(args.model, args)))
    elif not args.data:
        parser.error("give --data or --model")
    elif args.prepare:
        prepare(args.data)
    elif not args.arm:
        sys.exit(run_all(args))
    else:
        line = json.dumps(run_arm(args)) + "\n"
        if not args.out:
            print(line, end="")
        else:
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(line)  # one write: several processes add to the file


if __name__ == "__main__":
    main()
