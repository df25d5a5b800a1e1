"""Peak memory around a guest checkpoint of 4.9 GB: packing it, then generating, both capped.

A random Qwen3-MoE of 16 layers x 64 experts of 4.7 MB is written once. Promises: packing peaks
under 1 GB; generating at a quarter of the experts peaks under dense + budget + 1 GB. The caps are
set to exactly that, page cache included, so a process that needs more is killed; caches are cold.
How fast packing is: bench.pack. Linux as root.

    python -m bench.guest [--work bench/scratch/guest] [--budget 25%] [--tokens 64]
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench import capped, checkpoint
from chronos.common.budget import parse_budget
from chronos.common.fileio import drop_page_cache
from chronos.common.layout import open_layout
from chronos.common.tensorfile import write_tensors

_GEOMETRY = {"layers": 16, "experts": 64, "top_k": 4, "hidden": 1024, "expert_hidden": 768}
_GB = 1_000_000_000

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
        write_tensors(folder / name, tensors(shapes, pool), {"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tensors(
    shapes: Shapes, pool: np.ndarray[Any, Any]
) -> list[tuple[str, str, tuple[int, ...], memoryview]]:
    ones, made = np.full(1 << 16, 0x3F80, np.uint16), []
    for number, (name, shape) in enumerate(shapes.items()):
        count = int(np.prod(shape))
        start = 4099 * number % (len(pool) - count)
        data = ones[:count] if name.endswith("norm.weight") else pool[start : start + count]
        made.append((name, "BF16", shape, data.view(np.uint8).data))
    return made


def pack(source: Path, packed: Path) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    shutil.rmtree(packed, ignore_errors=True)
    drop_page_cache()
    command = ["-m", "chronos", "pack", str(source), "-o", str(packed), "-q"]
    report = capped.run_python(command, _GB)
    print(
        f"pack: {size / 1e6:.0f} MB, peak {report['peak_bytes'] / 1e6:.0f} MB of a cap of "
        f"{_GB / 1e6:.0f} MB, exit {report['rc']}"
    )
    return report | {"bytes": size}


def generate(packed: Path, budget: str, tokens: int) -> dict[str, Any]:
    """`chronos generate` under a cap of dense + budget + 1 GB, cold."""
    total = open_layout(packed).total_bytes
    experts = parse_budget(budget, total)
    dense = (packed / "model.safetensors").stat().st_size
    command = ["-m", "chronos", "generate", str(packed), "-p", "def main():", "--budget", budget]
    command += ["-n", str(tokens), "--temp", "1", "--seed", "1", "--json"]
    drop_page_cache()
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


if __name__ == "__main__":
    main()
