"""Peak memory around a guest checkpoint of 4.9 GB: packing it, then generating, both capped.

A random Qwen3-MoE of 16 layers x 64 experts of 4.7 MB is written once. Promises: packing peaks
under 1 GB; generating at a quarter of the experts peaks under dense + budget + 1 GB. The caps are
set to exactly that, page cache included, so a process that needs more is killed; caches are cold.
How fast packing is: bench.runs.pack. Linux as root.

    python -m bench.runs.guest [--work bench/scratch/guest] [--budget 25%] [--tokens 64]
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.lib import capped, checkpoint
from bench.lib.shards import Shape, random_tensors, write_shards
from chronos.common.budget import parse_budget
from chronos.common.disk.io import drop_page_cache
from chronos.common.layout import open_layout

_GEOMETRY = {"layers": 16, "experts": 64, "top_k": 4, "hidden": 1024, "expert_hidden": 768}
_GB = 1_000_000_000


def shapes(
    layers: int, experts: int, hidden: int, expert_hidden: int
) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of a Qwen3-MoE checkpoint."""
    table = (checkpoint.VOCABULARY, hidden)
    yield from (("model.embed_tokens.weight", table), ("lm_head.weight", table))
    yield "model.norm.weight", (hidden,)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{name}.weight", (hidden,)
        yield from ((f"{at}self_attn.{name}_norm.weight", (64,)) for name in "qk")
        yield from ((f"{at}self_attn.{name}_proj.weight", (hidden, hidden)) for name in "qo")
        yield from ((f"{at}self_attn.{name}_proj.weight", (hidden // 2, hidden)) for name in "kv")
        yield f"{at}mlp.gate.weight", (experts, hidden)
        for expert in range(experts):
            one = f"{at}mlp.experts.{expert}."
            for part in ("gate", "up"):
                yield f"{one}{part}_proj.weight", (expert_hidden, hidden)
            yield f"{one}down_proj.weight", (hidden, expert_hidden)


def write_random(folder: Path) -> None:
    config = checkpoint.config(**_GEOMETRY)
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    checkpoint.save_sides(folder)
    sizes = {name: size for name, size in _GEOMETRY.items() if name != "top_k"}
    write_shards(folder, random_tensors(shapes(**sizes)), "bfloat16")


def pack(source: Path, packed: Path) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    shutil.rmtree(packed, ignore_errors=True)
    drop_page_cache()
    command = ["-m", "chronos", "pack", str(source), "-o", str(packed)]
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
