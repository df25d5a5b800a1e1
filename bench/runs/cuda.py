"""An NVIDIA GPU with its experts in host memory: the link's rate, what hides behind the computing.

    python -m bench.runs.cuda T.npz --forecast FILE --work DIR [--expert-size 3MB] [--budget 25%]
                         [--trace-out FILE]

Ceilings first: one large copy from page-locked memory is the link's rate, a resident run the time
of a token. Then recorded routing (test sequences) on a generated model of its geometry, every
record in host memory, without and with prefetch, each under torch's profiler for some tokens: how
much of the copying ran beside kernels, how fast copies were, and how often the host waited for the
device; a PNG beside each profile shows two tokens. Nothing is read from disk in the counted tokens.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from chronos.common.budget import parse_size
from chronos.common.disk.io import measure_read_rate
from chronos.common.text.sampling import SamplingParams
from chronos.common.traces.fit import split
from chronos.common.traces.trace import RoutingTrace
from chronos.measure import recorded
from chronos.run import engine
from chronos.run.sequence import OneSequence

GREEDY = SamplingParams()
LAUNCHES = "resident, without graphs"
RUNS = {
    "prefetch off": {"prefetch": "off", "predictor": "lfu"},
    "auto": {"predictor": "auto"},
    "forecast": {"predictor": "forecast"},
}
_TURN, _PROFILED = 10, 6
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
Interval = tuple[float, float]


def link_rate(nbytes: int = 1 << 30) -> float:
    """Bytes per second of one large copy from page-locked memory; the best of three."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    best = 0.0
    for _ in range(4):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, nbytes / (time.perf_counter() - begin))
    return best


def decode(sequence: OneSequence, tokens: int) -> list[float]:
    seconds = []
    for _ in range(tokens):
        begin = time.perf_counter()
        sequence.decode(0, GREEDY)  # ends with the token's id on the host
        seconds.append(time.perf_counter() - begin)
    return seconds


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def shared(ours: list[Interval], theirs: list[Interval]) -> float:
    """Length of the intersection of two merged lists."""
    total, i, j = 0.0, 0, 0
    while i < len(ours) and j < len(theirs):
        total += max(0.0, min(ours[i][1], theirs[j][1]) - max(ours[i][0], theirs[j][0]))
        if ours[i][1] < theirs[j][1]:
            i += 1
        else:
            j += 1
    return total


def profiled(sequence: OneSequence, out: Path) -> dict[str, Any]:
    """Per token: kernels, copies to the device beside them, waits of the host."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        decode(sequence, _PROFILED)
    found.export_chrome_trace(str(out))
    events = [e for e in json.loads(out.read_text())["traceEvents"] if e.get("ph") == "X"]
    spans: dict[str, list[Interval]] = {"kernel": [], "to device": [], "to host": []}
    copied = 0
    for event in events:
        span = (event["ts"], event["ts"] + event["dur"])
        if event.get("cat") == "kernel":
            spans["kernel"].append(span)
        elif event.get("cat") == "gpu_memcpy" and "HtoD" in event["name"]:
            if event["args"]["bytes"] >= 1 << 16:  # records, not ids
                spans["to device"].append(span)
                copied += event["args"]["bytes"]
        elif event.get("cat") == "gpu_memcpy" and "DtoH" in event["name"]:
            spans["to host"].append(span)
    kernels, copies = merged(spans["kernel"]), merged(spans["to device"])
    draw(out.with_suffix(".png"), {"kernels": kernels, "copies to the device": copies})
    waits = [e["dur"] for e in events if e["name"] in _WAITS]
    copying_us = length(copies)
    return {
        "kernels_ms": length(kernels) / _PROFILED / 1e3,
        "copying_ms": copying_us / _PROFILED / 1e3,
        "copying_beside_kernels": shared(copies, kernels) / copying_us if copying_us else None,
        "copies": len(spans["to device"]) / _PROFILED,
        "bytes_per_s_while_copying": copied / copying_us * 1e6 if copying_us else None,
        "copies_to_host": len(spans["to host"]) / _PROFILED,
        "host_waits": len(waits) / _PROFILED,
        "host_waits_ms": sum(waits) / _PROFILED / 1e3,
    }


def draw(path: Path, lanes: dict[str, list[Interval]], tokens: int = 2) -> None:
    """The first tokens of a profile: when kernels ran and when records were copied."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    spans = [span for lane in lanes.values() for span in lane]
    begin = min(span[0] for span in spans)
    end = begin + (max(span[1] for span in spans) - begin) * tokens / _PROFILED
    figure, axes = pyplot.subplots(figsize=(12, 2), layout="constrained")
    for place, (name, lane) in enumerate(lanes.items()):
        shown = [((a - begin) / 1e3, (b - a) / 1e3) for a, b in lane if a < end]
        axes.broken_barh(shown, (place + 0.1, 0.8), color=f"C{place}", label=name)
    axes.set(xlabel="ms", yticks=[p + 0.5 for p in range(len(lanes))], yticklabels=list(lanes))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def summary(opened: engine.Engine, before: Any, seconds: list[float]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "ms": 1e3 * float(np.mean(seconds)),
        "p50_ms": 1e3 * float(np.median(seconds)),
        "p95_ms": 1e3 * float(np.percentile(seconds, 95)),
    }
    if opened.feed is not None:
        stats = opened.feed.stats().minus(before)
        found |= {
            "mb_copied": stats.bytes_copied / len(seconds) / 1e6,
            "mb_read": stats.bytes_read / len(seconds) / 1e6,
            "hits": stats.hits / stats.routed,
            "late": stats.late / stats.routed,
            "ahead": stats.prefetch_recall,
            "right": stats.prefetch_precision,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--forecast", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--expert-size", default="3MB")
    parser.add_argument("--budgets", default="50%,25%")
    parser.add_argument("--warmup", type=int, default=120)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--trace-out", type=Path, default=Path("cuda-trace.json"))
    args = parser.parse_args()
    trace = RoutingTrace.load(args.trace)
    config = recorded.config_for(trace, parse_size(args.expert_size, "an expert size"))
    recorded.make_model(args.work, config)
    recorded.use_forecaster(args.work, args.forecast)
    test = split(trace).test
    file = next(args.work.glob("experts/*.ctsr"))
    record = config.expert_parameters * config.dtype_bytes
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "record_bytes": record,
        "link_bytes_per_s": link_rate(),
        "disk_bytes_per_s": {n: measure_read_rate(file, record, n) for n in (1, 4, 16)},
    }
    with ExitStack() as stack:
        opened = {"resident": stack.enter_context(engine.load(args.work, budget="resident"))}
        opened[LAUNCHES] = stack.enter_context(engine.load(args.work, budget="resident"))
        opened[LAUNCHES].session.steps = None
        for budget in args.budgets.split(","):
            for run, options in RUNS.items():
                opened[f"{budget}, {run}"] = stack.enter_context(
                    engine.load(args.work, budget=budget, warm="all", **options)
                )
        sequences = {
            name: OneSequence(each.session, route_override=recorded.RecordedRouting(test))
            for name, each in opened.items()
        }
        for sequence in sequences.values():
            sequence.prefill([0], GREEDY)
            decode(sequence, args.warmup)
        before = {name: e.feed and e.feed.stats() for name, e in opened.items()}
        seconds: dict[str, list[float]] = {name: [] for name in opened}
        for _ in range(0, args.tokens, _TURN):
            for name, sequence in sequences.items():
                seconds[name] += decode(sequence, _TURN)
        runs = {name: summary(e, before[name], seconds[name]) for name, e in opened.items()}
        for name, each in opened.items():
            runs[name]["x_resident"] = runs[name]["ms"] / runs["resident"]["ms"]
            if each.feed is not None:
                report["copy_bytes_per_s"] = each.feed.copy_rate()
            out = args.trace_out.with_suffix(f".{re.sub('[^a-z0-9]+', '-', name)}.json")
            runs[name]["profile"] = profiled(sequences[name], out)
            print(name, json.dumps(runs[name]), flush=True)
        report["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(report | {"runs": runs}))


if __name__ == "__main__":
    main()
