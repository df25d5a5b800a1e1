"""Chronos beside other runtimes: one checkpoint, one prompt list, memory caps, cold caches.

Each runtime runs in an environment of its own (made by --install), each run in a fresh process in
a memory cgroup that counts its page cache too, with caches dropped before it. Caps are shares of
the checkpoint's size; "none" is the resident comparison. A runtime is told to keep as many weights
as the cap leaves beside its own process. Files are read ahead by 128 KiB, Linux's default: with the
8 MiB that a cloud's machine may have, memory-mapped experts thrash. Ceiling of a streamed run:
bytes read per token / the disk's rate. Linux as root.
`python -m bench.runs.make_moe bench/scratch/peers` makes the checkpoint.

    python -m bench.runs.peers [--work bench/scratch/peers] --install
    python -m bench.runs.peers [--peers chronos,llamacpp,...] [--caps none,75,55,40] [--seconds 20]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.lib import capped
from chronos.common.data.documents import split_documents, stdlib_documents
from chronos.common.disk.io import drop_page_cache
from chronos.common.text.tokenizer import Tokenizer

_NO_CAP = 1 << 50
_PROMPTS, _PROMPT = 4, 64
READ_AHEAD_KIB = 128
_LOADING_S = 60.0  # and the token under way at the end of a run
_TORCH = "torch==2.13.0"
_SCRIPT = str(Path(__file__).resolve().parents[1] / "lib" / "peer_runs.py")


@dataclass(frozen=True)
class Peer:
    """install: one `pip install` each. prepare: makes what the runtime reads, once, uncapped; done
    where `makes` exists. process_bytes: what of a cap is left to all that is not weights; None: the
    runtime takes no limit."""

    run: str
    model: str
    install: tuple[str, ...] = ()
    prepare: str = ""
    makes: str = ""
    process_bytes: int | None = None
    resident: bool = False  # runs without a cap too


# Process sizes: the least (in steps of 50 MB) with which the runtime got through every cap.
PEERS = {
    "chronos": Peer(
        "chronos",
        "packed",
        prepare="{python} -m chronos pack model -o packed",
        makes="packed",
        process_bytes=390_000_000,
        resident=True,
    ),
    "transformers": Peer("transformers", "model", resident=True),
    "llamacpp": Peer("llamacpp", "model.gguf", ("xllamacpp==2026.10.11549",), resident=True),
    "neurostream": Peer(
        "neurostream",
        "model.gguf",
        (f"{_TORCH} neurostream==0.2.1",),
        process_bytes=450_000_000,
    ),
    "accelerate": Peer(
        "transformers",
        "model",
        (f"{_TORCH} transformers==5.23.0 accelerate==1.15.0",),
        process_bytes=600_000_000,
    ),
    "airllm": Peer(
        "airllm",
        "model",
        (f"{_TORCH} transformers==4.57.6 accelerate", "airllm==4.0.0"),
        # Its first load writes a shard per layer.
        prepare="{python} {script} airllm --model model --prompts prompts.json --tokens 1"
        " --memory 0 --seconds 1 --scratch scratch",
        makes="scratch/airllm-shards",
        process_bytes=0,
    ),
    "nunspark": Peer(
        "nunspark",
        "nunspark-packed",
        ("mlx[cpu] nunspark==0.13.0",),
        prepare="{bin}/nunspark pack model nunspark-packed",
        makes="nunspark-packed",
        process_bytes=450_000_000,
    ),
    "mlxvlm": Peer(
        "mlxvlm",
        "mlxvlm-packed",
        ("mlx[cpu] mlx-vlm==0.7.10",),
        prepare="{python} -m mlx_vlm.moe_offload --build model --out mlxvlm-packed",
        makes="mlxvlm-packed",
        process_bytes=450_000_000,
    ),
    "ftllm": Peer(
        "ftllm",
        "model",
        # Its own list asks for CUDA and much else that a run on the CPU does not import.
        ("--no-deps ftllm==1.9.0", "numpy jinja2 requests pillow imageio tqdm psutil"),
        process_bytes=450_000_000,
    ),
}


def python_of(work: Path, name: str) -> str:
    """Chronos and Transformers run where this runs; the others in WORK/venv-NAME."""
    return str(work / f"venv-{name}" / "bin" / "python") if PEERS[name].install else sys.executable


def install(work: Path, name: str) -> None:
    if not PEERS[name].install or Path(python_of(work, name)).exists():
        return
    print(f"installing {name} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(work / f"venv-{name}")], check=True)
    for arguments in PEERS[name].install:
        command = [python_of(work, name), "-m", "pip", "install", "-q", *arguments.split()]
        subprocess.run(command, check=True)


def prepare(work: Path, name: str) -> None:
    peer = PEERS[name]
    if peer.prepare and not (work / peer.makes).exists():
        python = python_of(work, name)
        command = peer.prepare.format(python=python, bin=Path(python).parent, script=_SCRIPT)
        subprocess.run(command.split(), cwd=work, check=True)


def write_prompts(work: Path) -> Path:
    """Token ids from the middles of held-out files."""
    _, held_out = split_documents(stdlib_documents())
    texts = [document.text for document in held_out if len(document.text) > 4000]
    encode = Tokenizer.load(work / "model").encode
    middles = [encode(text[len(text) // 2 :][:_PROMPT]) for text in texts[:_PROMPTS]]
    path = work / "prompts.json"
    path.write_text(json.dumps(middles))
    return path


@contextmanager
def read_ahead(folder: Path, kib: int) -> Iterator[None]:
    """How far the kernel reads ahead on a folder's disk, meanwhile."""
    device = folder.stat().st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    before = setting.read_text()
    setting.write_text(str(kib))
    try:
        yield
    finally:
        setting.write_text(before)


def measure(work: Path, name: str, cap: str, tokens: int, seconds: float) -> dict[str, Any]:
    """One row. A runtime that fails gives a row that says so."""
    peer = PEERS[name]
    size = sum(file.stat().st_size for file in (work / "model").glob("*.safetensors"))
    limit = _NO_CAP if cap == "none" else size * int(cap) // 100
    memory = 0 if cap == "none" else max(64_000_000, limit - (peer.process_bytes or 0))
    command = [python_of(work, name), _SCRIPT, peer.run, "--model", peer.model]
    command += ["--prompts", "prompts.json", "--memory", str(memory), "--tokens", str(tokens)]
    command += ["--seconds", str(seconds), "--scratch", "scratch"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())}
    errors = work / f"stderr-{name}-{cap}.txt"
    cold, load = drop_page_cache(), os.getloadavg()[0]
    with errors.open("w") as stderr:
        report, lines = capped.run_lines(
            command, limit, seconds + _LOADING_S, cwd=work, env=environment, stderr=stderr
        )
    row = {"bench": "peers", "peer": name, "cap": cap, "memory_bytes": memory, "cold": cold}
    row |= {"load_average": load, "read_ahead_kib": READ_AHEAD_KIB} | report
    runs = [json.loads(line) for line in lines]
    return row | (summary(runs) or {"failed": why(row, runs, errors)})


def why(row: dict[str, Any], runs: list[dict[str, Any]], errors: Path) -> str:
    if runs or row["timed_out"]:
        return "out of time before a second token"
    if row["rc"] == -9:
        return "killed: more memory than the cap"
    return [*errors.read_text().strip().splitlines(), "no word"][-1][:200]


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    tokens, decode_s = sum(run["tokens"] for run in runs), sum(run["decode_s"] for run in runs)
    if not tokens:
        return {}
    return {
        "decode_tps": tokens / decode_s,
        "tokens": tokens,
        "prompts": len(runs),
        "load_s": runs[0]["load_s"],
        "ttft_s": [run["ttft_s"] for run in runs],
        "bytes_read": sum(run["read"] for run in runs),
    }


def show(rows: list[dict[str, Any]]) -> None:
    head = ["runtime", "cap", "decode tok/s", "tokens", "first answer s", "load s"]
    print("\n| " + " | ".join([*head, "peak MB", "cap hits"]) + " |\n" + "|---" * 8 + "|")
    for row in rows:
        name = f"| {row['peer']} | {row['cap']}{'' if row['cap'] == 'none' else ' %'} |"
        peak = f"{row['peak_bytes'] / 1e6:.0f} | {row['cap_hits']} |"
        if "failed" in row:
            print(f"{name} failed (exit {row['rc']}): {row['failed'][:80]} | | | | {peak}")
        else:
            name += "" if row["rc"] == 0 else f" (then exit {row['rc']})"
            first = f"{row['ttft_s'][0]:.2f} | {row['load_s']:.1f}"
            print(f"{name} {row['decode_tps']:.2f} | {row['tokens']} | {first} | {peak}")


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows of a runtime and cap replace those of earlier runs."""
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    new = {(row["peer"], row["cap"]) for row in rows}
    kept = [row for row in old if (row["peer"], row["cap"]) not in new] + rows
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))


def at_cap(
    work: Path, names: list[str], cap: str, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    for name in names:
        if PEERS[name].resident if cap == "none" else name != "transformers":
            row = measure(work, name, cap, args.tokens, args.seconds)
            print(json.dumps(row), flush=True)
            shutil.rmtree(work / "scratch" / "offload", ignore_errors=True)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("bench/scratch/peers"))
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--caps", default="none,75,55,40")
    parser.add_argument("--tokens", type=int, default=33, help="per prompt")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a run, once it has loaded")
    parser.add_argument("--install", action="store_true", help="make the environments and stop")
    parser.add_argument("--out", type=Path, default=Path("bench/results/peers.jsonl"))
    args = parser.parse_args()
    names, work = args.peers.split(","), args.work.resolve()
    write_prompts(work)
    for name in names:
        if args.install:
            install(work, name)
        else:
            prepare(work, name)
    if args.install:
        return
    begin = time.monotonic()
    with read_ahead(work, READ_AHEAD_KIB):
        rows = [row for cap in args.caps.split(",") for row in at_cap(work, names, cap, args)]
    show(rows)
    save(args.out, rows)
    print(f"{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
