"""Updates of adapters on a streamed guest, at several budgets: memory, seconds, reads, bytes.

Each budget runs in a process of its own with cold caches: a few updates of LoRA on attention, by
the backend's own training step, on random rows. Printed are the process' peak of resident memory
beside what it may be, 1.15 x (libraries + dense part + budget + activations), where libraries are
what the process holds before it opens the model and activations what autograd saves in one update
(torch); reads and seconds an update; and the least an update could take: its bytes at the disk's
rate, or the products of its routed experts at the rate of one such product, whichever is longer.
The adapters of all budgets must have the same bytes.

Without MODEL the guest of bench.runs.guest is made (4.9 GB). --parts: micro-batches of an update,
which go through the model together, layer by layer. --cap runs each budget once more in a memory
cgroup of what it may be, page cache included (Linux as root): a process that needs more is killed.

    python -m bench.runs.finetune [MODEL] [--budgets 100% 25%] [--tokens 256] [--parts 1] [--cap]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.lib import capped
from bench.runs import guest
from chronos.common.budget import parse_budget
from chronos.common.data import Batch
from chronos.common.disk.io import drop_page_cache, measure_read_rate
from chronos.common.layout import open_layout

_SLACK = 1.15


def update(args: argparse.Namespace) -> dict[str, Any]:
    """One process: a model within a budget, an adapter, some updates."""
    from chronos import backends
    from chronos.common.model.config import LossWeights
    from chronos.common.model.guest import read_config
    from chronos.common.training.lora import LoraRecipe
    from chronos.common.training.objectives import NextToken
    from chronos.common.training.recipe import OptimizerRecipe
    from chronos.train.adapters import open_frozen

    backend = backends.load(args.backend)
    if args.backend == "torch":
        import torch
        import transformers  # noqa: F401

        torch.set_num_threads(args.threads)
    here = psutil.Process()
    libraries = here.memory_info().rss
    config = read_config(args.model)
    recipe = LoraRecipe(rank=16)
    frozen = open_frozen(args.model, config, backend, None, recipe, args.budget)
    assert frozen.feed is not None
    adapter = backend.attach(frozen.model, recipe)
    step = backend.train_step(frozen.model, OptimizerRecipe(), adapter)
    objective = NextToken(LossWeights(**dict.fromkeys(vars(LossWeights()), 0.0)))
    seconds, reads = [], []
    for number in range(args.updates):
        before, start = frozen.feed.stats(), time.perf_counter()
        parts = [_batch(number + 1000 * i, args, config.vocab_size) for i in range(args.parts)]
        terms = step.step(parts, objective, 1e-3, number)
        seconds.append(time.perf_counter() - start)
        reads.append(frozen.feed.stats().minus(before).bytes_read)
        assert not terms["skipped"]
    peak = _peak()
    stats = frozen.feed.stats()
    saved = _saved(frozen.model, args, config.vocab_size) if args.backend == "torch" else None
    bytes_of = b"".join(bytes(data) for _, _, _, data in adapter.tensors())
    frozen.close()
    return {
        "budget": args.budget,
        "seconds": seconds,
        "bytes_read": reads,
        "stall_s": stats.stall_s,
        "peak_expert_bytes": stats.peak_expert_bytes,
        "libraries_bytes": libraries,
        "peak_rss_bytes": peak,
        "activation_bytes": saved,
        "adapter": hashlib.blake2b(bytes_of, digest_size=8).hexdigest(),
        "loss": terms["loss"],
    }


def _batch(number: int, args: argparse.Namespace, vocabulary: int) -> Batch:
    """One micro-batch."""
    random = np.random.default_rng(number)
    shape = (max(1, args.tokens // args.parts // args.length), args.length)
    ids = random.integers(0, vocabulary, shape).astype(np.int32)
    return Batch(ids, np.roll(ids, -1, 1), np.zeros_like(ids))


def _peak() -> int:
    """Of this process' resident memory. Linux."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


class _Held:
    """A tensor that autograd keeps, as long as it does."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


def _saved(model: Any, args: argparse.Namespace, vocabulary: int) -> int:
    """Bytes that autograd keeps of one micro-batch's forward pass, parameters left out."""
    import torch

    known = {p.untyped_storage().data_ptr() for p in model.core.parameters()}
    alive: weakref.WeakSet[_Held] = weakref.WeakSet()

    def keep(tensor: Any) -> _Held:
        held = _Held(tensor)
        alive.add(held)
        return held

    batch = _batch(0, args, vocabulary)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held.tensor):
        out = model(torch.from_numpy(batch.ids_BT).long(), want_logits=False)
        loss = torch.nn.functional.log_softmax(model.head(out.hidden).float(), -1).sum()
    # What a layer computes of its experts is freed with it, and is not among these.
    storages = [held.tensor.untyped_storage() for held in alive]
    found = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in known}
    assert loss.requires_grad
    return sum(found.values())


def ceiling(args: argparse.Namespace, reads: int) -> dict[str, float]:
    """Seconds that an update takes at least: its bytes, its multiplications."""
    layout = open_layout(args.model)
    rate = measure_read_rate(layout.files[0])
    routed = 2 * layout.record_nbytes // 2 * args.top_k * len(layout.moe_layers)
    flops = 3 * routed * args.tokens  # forward, again, and back through each frozen weight
    return {"read_rate": rate, "bytes_s": reads / rate, "flops": float(flops)}


def product_rate(args: argparse.Namespace) -> float:
    """Operations per second of products like an expert's, bfloat16, measured now."""
    import torch

    torch.set_num_threads(args.threads)
    record = open_layout(args.model).record_nbytes
    width = int((record / 2 / 3) ** 0.5)
    rows = max(1, args.tokens * args.top_k // open_layout(args.model).num_experts)
    x, w = torch.randn(rows, width).bfloat16(), torch.randn(width, width).bfloat16()
    best = 0.0
    for _ in range(20):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = max(best, 2 * rows * width * width / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--work", type=Path, default=Path("bench/scratch/guest"))
    parser.add_argument("--budgets", nargs="+", default=["100%", "25%"])
    parser.add_argument("--budget", help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cap", action="store_true")
    args = parser.parse_args()
    if args.budget:
        print(json.dumps(update(args)))
        return
    if args.model is None:
        source, args.model = args.work / "model", args.work / "packed"
        if not (source / "model.safetensors.index.json").exists():
            guest.write_random(source)
        if not args.model.exists():
            guest.pack(source, args.model)
    from chronos.common.model.guest import read_config

    args.top_k = read_config(args.model).num_experts_per_tok
    layout = open_layout(args.model)
    dense = (args.model / "model.safetensors").stat().st_size
    print(f"experts {layout.total_bytes / 1e6:.0f} MB, dense part {dense / 1e6:.0f} MB")
    found = [_one(args, budget, dense, layout.total_bytes) for budget in args.budgets]
    same = len({each["adapter"] for each in found}) == 1
    speed = min(found[0]["seconds"][1:]) / min(found[-1]["seconds"][1:])
    floor = ceiling(args, found[-1]["bytes_read"][-1])
    floor["flops_s"] = floor["flops"] / product_rate(args)
    print(f"adapters {'equal' if same else 'DIFFER'} at {', '.join(args.budgets)}")
    print(
        f"speed at {args.budgets[-1]} over {args.budgets[0]}: {speed:.2f}; an update takes at least"
        f" {max(floor['bytes_s'], floor['flops_s']):.1f} s (reads {floor['bytes_s']:.1f} s at"
        f" {floor['read_rate'] / 1e9:.2f} GB/s, experts' products {floor['flops_s']:.1f} s)"
    )
    report = {"bench": "finetune", "runs": found, "adapters_equal": same, "ceiling": floor}
    print(json.dumps(report | {"speed": speed, "args": _plain(args)}))


def _one(args: argparse.Namespace, budget: str, dense: int, experts: int) -> dict[str, Any]:
    words = ["-m", "bench.runs.finetune", str(args.model), "--budget", budget]
    for name in ("backend", "tokens", "length", "updates", "parts", "threads"):
        words += [f"--{name}", str(getattr(args, name))]
    drop_page_cache()
    room = parse_budget(budget, experts)
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    parts = found["libraries_bytes"] + dense + room + (found["activation_bytes"] or 0)
    found |= {"dense_bytes": dense, "budget_bytes": room, "may_be_bytes": int(_SLACK * parts)}
    if args.cap:
        drop_page_cache()
        report = capped.run_python(words, found["may_be_bytes"])
        assert report["rc"] == 0, report
        again = json.loads(report.pop("last_line"))
        found["cap"] = report | {"same_adapter": again["adapter"] == found["adapter"]}
        print(
            f"{budget}, under a cap of that: exit 0, peak with page cache"
            f" {report['peak_bytes'] / 1e6:.0f} MB, {report['cap_hits']} times at the cap"
        )
    print(
        f"{budget}: peak {found['peak_rss_bytes'] / 1e6:.0f} MB of"
        f" {found['may_be_bytes'] / 1e6:.0f} MB (libraries {found['libraries_bytes'] / 1e6:.0f},"
        f" dense {dense / 1e6:.0f}, budget {room / 1e6:.0f}, activations"
        f" {(found['activation_bytes'] or 0) / 1e6:.0f}, + 15 %);"
        f" {min(found['seconds'][1:]):.1f} s an update,"
        f" {found['bytes_read'][-1] / 1e6:.0f} MB read"
    )
    return found


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) for name, value in vars(args).items()}


if __name__ == "__main__":
    main()
