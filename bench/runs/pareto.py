"""Expert bytes read a token against their price in loss, of the arms of `bench.runs.known_ahead`.

Each point is an arm at a quarter of the experts, a mean over its seeds; loss by the twin's of the
same updates and width (the same seeds where there are). Ceiling: no byte read at the informed
twin's loss. Prints a table and draws a picture.

    python -m bench.runs.pareto bench/results/known-ahead.jsonl --png bench/results/known-ahead.png
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

SHARE = "0.25"
Group = tuple[int, int]  # width, updates


def points(lines: list[dict[str, Any]]) -> dict[Group, dict[str, dict[str, float]]]:
    """By group and arm: bytes read by those needed, loss by the twin's less one, and so on."""
    runs: dict[Group, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if "arm" in line:
            runs[line.get("width", 128), line["steps"]][line["arm"]].append(line)
    found: dict[Group, dict[str, dict[str, float]]] = {}
    for group, arms in sorted(runs.items()):
        twin = {line["seed"]: line["loss"] for line in arms.get("twin", [])}
        if not twin:
            continue
        found[group] = {}
        for arm, own in arms.items():
            pairs = [line["loss"] / twin.get(line["seed"], mean(twin.values())) for line in own]
            found[group][arm] = {
                "seeds": len(own),
                "loss": mean(line["loss"] for line in own),
                "price": mean(pairs) - 1,
                "bytes": mean(1 - line["caches"][SHARE]["hits"] for line in own),
                "bytes_per_token": mean(line["caches"][SHARE]["bytes_per_token"] for line in own),
                "announced": mean(line["announced"] or 0 for line in own),
                "streamed": mean(
                    line["tiers"].get("streamed", {}).get("effective", 0) for line in own
                ),
            }
    return found


def title(width: int, steps: int) -> str:
    return f"width {width}, " + (f"{steps} updates" if steps else "on a trained twin, unlearnt")


def best(arms: dict[str, dict[str, float]]) -> set[str]:
    """The arms that no other one beats in both."""
    return {
        name
        for name, own in arms.items()
        if not any(
            other["bytes"] < own["bytes"] and other["price"] < own["price"]
            for other in arms.values()
        )
    }


def table(found: dict[Group, dict[str, dict[str, float]]]) -> list[str]:
    lines = []
    for (width, steps), arms in found.items():
        front = best(arms)
        lines += [
            title(width, steps),
            "| arm | seeds | loss | by the twin's | bytes read of those needed | bytes a token"
            " | announced | effective of S |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, own in sorted(arms.items(), key=lambda item: item[1]["bytes"]):
            mark = f"**{name}**" if name in front else name
            lines.append(
                f"| {mark} | {own['seeds']:.0f} | {own['loss']:.3f} | {100 * own['price']:+.1f} %"
                f" | {100 * own['bytes']:.1f} % | {own['bytes_per_token']:.0f}"
                f" | {100 * own['announced']:.0f} % | {own['streamed']:.1f} |"
            )
    return lines


def draw(found: dict[Group, dict[str, dict[str, float]]], png: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-len(found) // 2)
    figure, panels = plt.subplots(
        rows, 2, figsize=(11, 4.4 * rows), squeeze=False, layout="constrained"
    )
    for axes in panels.flat[len(found) :]:
        axes.axis("off")
    for axes, ((width, steps), arms) in zip(panels.flat, found.items(), strict=False):
        front = sorted(best(arms), key=lambda name: arms[name]["bytes"])
        axes.plot(
            [100 * arms[name]["bytes"] for name in front],
            [100 * arms[name]["price"] for name in front],
            color="C0",
            linewidth=1,
            alpha=0.5,
        )
        for number, (name, own) in enumerate(sorted(arms.items(), key=lambda i: i[1]["bytes"])):
            x, y = 100 * own["bytes"], 100 * own["price"]
            known = own["announced"] > 0.99
            axes.plot(x, y, "o" if known else "s", color="C0" if known else "C7", markersize=5)
            offset = (4, -9 if number % 2 else 4)
            axes.annotate(name, (x, y), fontsize=7, textcoords="offset points", xytext=offset)
        axes.set_xscale("symlog", linthresh=10)
        axes.set_xlim(-0.5, 95)
        axes.set_xticks(ticks := [0, 5, 10, 20, 40, 80], labels=map(str, ticks))
        axes.axhline(0, color="C7", linewidth=0.6)
        axes.set_title(title(width, steps), fontsize=9)
        axes.set_xlabel("expert bytes read a token, % of those it needs", fontsize=8)
        axes.set_ylabel("loss by the twin's, %", fontsize=8)
        axes.tick_params(labelsize=8)
    figure.suptitle("A quarter of the experts in memory; round: known a token ahead", fontsize=10)
    figure.savefig(png, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lines", type=Path)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    found = points([json.loads(line) for line in args.lines.read_text("utf-8").splitlines()])
    print("\n".join(table(found)))
    if args.png:
        draw(found, args.png)


if __name__ == "__main__":
    main()
