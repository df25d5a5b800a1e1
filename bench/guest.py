"""Memory and speed around a guest checkpoint of several GB: pack, then generate, both capped.

A random Qwen3-MoE of 16 layers x 64 experts of 4.7 MB is written in ranges once. Promises: packing
peaks under 1 GB and runs at no less than half of the disk's copy rate; generating at a quarter of
the experts peaks under dense + budget + 1 GB. The caps are set to exactly that, page cache
included, so a process that needs more is killed. Linux as root.

    python -m bench.guest [--work bench/scratch/guest] [--budget 25%] [--tokens 64]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench import capped, checkpoint
from bench.startup import drop_caches
from chronos.common.budget import parse_budget
from chronos.common.layout import open_layout

_GEOMETRY = {"layers": 16, "experts": 64, "top_k": 4, "hidden": 1024, "expert_hidden": 768}
_GB = 1_000_000_000
_ONE = (0x3F80).to_bytes(2, "little")  # in bfloat16

Shapes = dict[str, tuple[int, ...]]


def shards(layers: int, experts: int, hidden: int, expert_hidden: int) -> Iterator[Shapes]:
    """Names and shapes of a Qwen3-MoE checkpoint: one shard of what is around, one a layer."""
    table = (checkpoint.VOCABULARY, hidden)
    yield {
        "model.embed_tokens.weight": table,
        "model.norm.weight": (hidden,),
        "lm_head.weight": table,
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes: Shapes = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_norm.weight": (64,),
            "self_attn.k_norm.weight": (64,),
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.k_proj.weight": (hidden // 2, hidden),
            "self_attn.v_proj.weight": (hidden // 2, hidden),
            "self_attn.o_proj.weight": (hidden, hidden),
            "mlp.gate.weight": (experts, hidden),
        }
        for expert in range(experts):
            for part in ("gate", "up"):
                shapes[f"mlp.experts.{expert}.{part}_proj.weight"] = (expert_hidden, hidden)
            shapes[f"mlp.experts.{expert}.down_proj.weight"] = (hidden, expert_hidden)
        yield {prefix + name: shape for name, shape in shapes.items()}


def write_random(folder: Path) -> None:
    """bfloat16: ones in the norms, else pieces of one pool of normals of 0.02."""
    folder.mkdir(parents=True, exist_ok=True)
    config = checkpoint.config(**_GEOMETRY)
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    checkpoint.save_sides(folder)
    normals = np.random.default_rng(0).normal(0, 0.02, 4 << 20).astype(np.float32)
    pool = (normals.view(np.uint32) >> 16).astype(np.uint16)
    sizes = {name: size for name, size in _GEOMETRY.items() if name != "top_k"}
    where: dict[str, str] = {}
    for number, shapes in enumerate(shards(**sizes)):
        name = f"model-{number:05}.safetensors"
        where |= dict.fromkeys(shapes, name)
        _write_shard(folder / name, shapes, pool)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_shard(path: Path, shapes: Shapes, pool: np.ndarray[Any, Any]) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, (name, shape) in enumerate(shapes.items()):
            count = int(np.prod(shape))
            start = 4099 * number % (len(pool) - count)
            one = name.endswith("norm.weight")
            file.write(_ONE * count if one else pool[start : start + count].tobytes())


def copy_rate(source: Path, target: Path) -> float:
    """Bytes per second of a plain copy of one shard, cold and synced: what packing is held to."""
    drop_caches(True)
    begin = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())
    rate = source.stat().st_size / (time.perf_counter() - begin)
    target.unlink()
    return rate


def pack(source: Path, packed: Path) -> dict[str, Any]:
    """The whole command under a cap of 1 GB, cold."""
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    rate = copy_rate(next(iter(sorted(source.glob("*.safetensors"))[1:])), source.parent / "copied")
    shutil.rmtree(packed, ignore_errors=True)
    drop_caches(True)
    begin = time.perf_counter()
    command = ["-m", "chronos", "pack", str(source), "-o", str(packed), "-q"]
    report = capped.run_python(command, _GB)
    os.sync()
    seconds = time.perf_counter() - begin
    print(
        f"pack: {size / 1e6:.0f} MB in {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s; copying "
        f"{rate / 1e6:.0f} MB/s; peak {report['peak_bytes'] / 1e6:.0f} MB of a cap of 1000 MB, "
        f"exit {report['rc']}"
    )
    return report | {"bytes": size, "seconds": seconds, "copy_bytes_per_s": rate}


def generate(packed: Path, budget: str, tokens: int) -> dict[str, Any]:
    """`chronos generate` under a cap of dense + budget + 1 GB, cold."""
    total = open_layout(packed).total_bytes
    experts = parse_budget(budget, total)
    dense = (packed / "model.safetensors").stat().st_size
    command = ["-m", "chronos", "generate", str(packed), "-p", "def main():", "--budget", budget]
    command += ["-n", str(tokens), "--temp", "1", "--seed", "1", "--json"]
    drop_caches(True)
    report = capped.run_python(command, dense + experts + _GB)
    print(
        f"generate: experts {total / 1e6:.0f} MB, budget {experts / 1e6:.0f} MB, dense "
        f"{dense / 1e6:.0f} MB: peak {report['peak_bytes'] / 1e6:.0f} MB of a cap of "
        f"{report['limit_bytes'] / 1e6:.0f} MB, exit {report['rc']}"
    )
    said = report.pop("last_line")
    answer = json.loads(said) if said.startswith("{") else {"said": said}
    return report | {"dense_bytes": dense, "budget_bytes": experts, "answer": answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("bench/scratch/guest"))
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    source, packed = args.work / "model", args.work / "packed"
    if not (source / "model.safetensors.index.json").exists():
        write_random(source)
    report: dict[str, Any] = {"bench": "guest", "pack": pack(source, packed)}
    report["generate"] = generate(packed, args.budget, args.tokens)
    print(json.dumps(report))
