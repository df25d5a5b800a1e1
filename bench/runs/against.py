"""This tree against another checkout of Chronos: decode speed and peak memory, in pairs.

Ceiling: nothing; what is asked is that nothing became slower. Each run is a process of its own that
imports one of the two trees (PYTHONPATH); the two take turns, the first of a pair changes, and the
median of the pairs' ratios counts. The folder is packed by each tree, since formats differ.

    git worktree add --detach OTHER COMMIT
    python -m bench.runs.against OTHER [--model demo] [--budgets all,25%] [--rounds 7] [--threads 1]
    python -m bench.runs.against OTHER --train 30      (updates of the demo's recipe, by the CLI)

--model: `demo`, or an unpacked checkpoint. Prints a line a budget and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

_HERE = Path(__file__).resolve().parents[2]
_PACK = "import sys; from chronos.common.layout import pack; pack(sys.argv[1], sys.argv[2])"
# Runs in both trees: only what the public face had in both.
_DECODE = """
import json, resource, sys
import chronos
model, budget, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
with chronos.load(model, backend="torch", budget=budget, own_process=True) as engine:
    prompt = list(range(5, 60))
    engine.generate(prompt, max_tokens=24).result
    done = engine.generate(prompt, max_tokens=count).result
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([done.stats["decode_tps"], peak, done.tokens]))
"""
# The recipe is each tree's own: names of fields may have changed, the work may not.
_TRAIN = """
import json, re, resource, statistics, subprocess, sys, tempfile
from pathlib import Path
import chronos
tree, updates = Path(chronos.__file__).parent, sys.argv[1]
recipe = next(tree.parent.glob("**/recipes/demo.toml")).read_text()
for key, value in (("steps", updates), ("log_every", "5"), ("eval_every", updates)):
    recipe = re.sub(rf"(?m)^{key} *=.*$", f"{key} = {value}", recipe)
with tempfile.TemporaryDirectory() as folder:
    file, out = Path(folder) / "r.toml", Path(folder) / "run"
    file.write_text(recipe)
    command = [sys.executable, "-m", "chronos", "train", "pretrain", "-c", file, "-o", out, "-q"]
    subprocess.run([*command, "--backend", "torch"], check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
speeds = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line][1:]
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
losses = [line["loss"] for line in lines if "loss" in line]
print(json.dumps([statistics.median(speeds), peak, losses]))
"""


def run(tree: Path, code: str, words: list[str], threads: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment, cwd=tempfile.gettempdir(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{tree}: {done.stderr[-800:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("other", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--budgets", default="all,25%")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", default="1")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument(
        "--train", type=int, help="updates of the demo's recipe, instead of decoding"
    )
    args = parser.parse_args()
    trees = {"here": _HERE, "other": args.other.resolve()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = dict.fromkeys(trees, args.model)
        if args.train is None and args.model != "demo":
            for name, tree in trees.items():
                models[name] = str(Path(folder) / name)
                run(tree, _PACK, [str(Path(args.model).resolve()), models[name]], "1")
        for budget in ["train"] if args.train else args.budgets.split(","):
            found: dict[str, list[list[float]]] = {name: [] for name in trees}
            made = set()
            for number in range(args.rounds):
                for name in sorted(trees, reverse=bool(number % 2)):
                    if args.train:
                        code, words = _TRAIN, [str(args.train)]
                    else:
                        code, words = _DECODE, [models[name], budget, str(args.tokens)]
                    speed, peak, output = json.loads(run(trees[name], code, words, args.threads))
                    found[name].append([speed, peak])
                    made.add(tuple(output))
            pairs = list(zip(found["here"], found["other"], strict=True))
            ratios = sorted(mine[0] / theirs[0] for mine, theirs in pairs)
            row = {
                "model": Path(args.model).name,
                "budget": budget,
                "threads": int(args.threads),
                "speed_by_other": round(statistics.median(ratios), 3),
                "least_and_most": [round(ratios[0], 3), round(ratios[-1], 3)],
                "tokens_per_s": round(statistics.median(mine[0] for mine, _ in pairs), 1),
                "peak_memory_by_other": round(
                    statistics.median(mine[1] / theirs[1] for mine, theirs in pairs), 3
                ),
                "same_losses" if args.train else "same_tokens": len(made) == 1,
            }
            rows.append(row)
            print(budget, {key: row[key] for key in list(row)[3:]})
    print(json.dumps({"bench": "against", "rows": rows}))


if __name__ == "__main__":
    main()
