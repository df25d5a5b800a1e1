"""Numbers of one generation as lines, table cells and JSON, the same wherever they are shown.

What is printed of hits, reads and waiting is of the decoded tokens, those after the prompt. JSON
has these under decode_<name>, and prompt and reply together under <name>.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import chronos
from chronos.backends.probe import peak_memory
from chronos.cli import output
from chronos.common.tuning import machine_load

if TYPE_CHECKING:
    from chronos.run.engine import Engine, GenerationResult

LIMIT = (
    "100 % is what perfect foresight would reach with that memory and this disk: each expert kept "
    "or read in time, computing as fast as in this run."
)
LEGEND = (
    "All of the tokens after the prompt. hits: needs of an expert that found it in memory. stall: "
    f"time spent waiting for reads. of limit: {LIMIT}"
)


def hit_rate(stats: dict[str, Any]) -> float | None:
    """Share of the decoded tokens' needs whose expert was in memory; None where nothing was
    streamed."""
    routed = stats["decode_routed"]
    return float(stats["decode_hits"] / routed) if routed else None


def per_token(stats: dict[str, Any], name: str) -> float:
    """A decode counter per decoded token; the prompt is left out."""
    return float(stats.get(f"decode_{name}", 0)) / max(1, int(stats["decode_tokens"]))


def with_limit(
    engine: Engine, result: GenerationResult, resident_token_s: float | None = None
) -> tuple[GenerationResult, int]:
    """The result with the limit among its numbers, where experts were streamed; and the process's
    peak memory before that, since the memory's rate is measured in 64 MB."""
    peak = peak_memory()
    if engine.feed is None:
        return result, peak
    known = {"limit": engine.limit(result, resident_token_s)}
    return dataclasses.replace(result, stats=result.stats | known), peak


def limit_share(stats: dict[str, Any]) -> float | None:
    """The share of the limit that was reached; None where nothing was streamed, and where some
    needs were answered without their expert."""
    share: float | None = (stats.get("limit") or {}).get("eta_limit")
    return share


def limit_cell(share: float | None) -> str:
    """The share of the limit as people see it. A run of few tokens can seem faster than the limit,
    where the disk gives more than it gave when its rate was measured: then it is at the limit, and
    JSON has the number."""
    return output.percent(None if share is None else min(1.0, share))


def lines(engine: Engine, result: GenerationResult, peak: int) -> list[str]:
    """MLX-LM's three lines and one on the experts, for stderr. peak: bytes of memory."""
    stats = result.stats
    prompt, made = (
        output.count(number, "token") for number in (result.prompt_tokens, len(result.tokens))
    )
    # The first token is the prompt's: where no other came, there is no speed.
    speed = f", {stats['decode_tps']:.1f} tokens/s" if stats["decode_tokens"] else ""
    return [
        f"prompt: {prompt}, {stats['prefill_tps']:.1f} tokens/s",
        f"generation: {made}{speed}{_ended(engine, result)}",
        f"peak memory: {output.size(peak)}",
        f"experts: {_experts(engine, stats)}",
        *busy(engine.threads),
    ]


def busy(threads: int | None = None) -> list[str]:
    """A line where other programs wanted the cores too, which speeds suffer from. threads: that
    products took here, where that is known."""
    load = machine_load()
    if load is None or not load.busy:
        return []
    advice = "" if threads == 1 else "; --threads 1 is steadiest then"
    return [
        f"the machine was busy: {load.average:.1f} threads wanted its {load.cores} cores, so this "
        f"is slower than it can be{advice}"
    ]


def _ended(engine: Engine, result: GenerationResult) -> str:
    if result.finish_reason != "context":
        return ""
    return f"; ended by the context of {engine.context} tokens, --context N allows more"


def _experts(engine: Engine, stats: dict[str, Any]) -> str:
    total = engine.expert_bytes_total
    if engine.feed is None or engine.budget_bytes >= total:
        return f"all {output.size(total)} in memory{_loading(stats)}"
    parts = [
        f"budget {output.size(engine.budget_bytes)} of {output.size(total)}; "
        f"after the prompt {output.percent(hit_rate(stats))} hits",
        f"read {per_token(stats, 'bytes_read') / 1e6:.3f} MB/token",
        f"stall {1e3 * per_token(stats, 'stall_s'):.2f} ms/token",
    ]
    if (share := limit_share(stats)) is not None:
        parts.append(f"{limit_cell(share)} of the limit")
    if stats["decode_fallbacks"]:
        missed = output.percent(stats["decode_fallbacks"] / stats["decode_routed"])
        parts.append(f"{missed} of expert uses replaced by the shared expert")
    return ", ".join(parts)


def _loading(stats: dict[str, Any]) -> str:
    """What is left of loading them all, which goes on while the first answer is made."""
    if not stats["bytes_loaded"]:
        return ""
    loaded, waited = output.size(stats["bytes_loaded"]), 1e3 * stats["stall_s"]
    return f", {loaded} of them loaded meanwhile: {waited:.1f} ms waited"


def to_json(
    engine: Engine, result: GenerationResult, peak: int, asked: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The object of `generate --json`. peak: bytes of memory. asked: the model and how it was to
    run."""
    data = {
        "chronos": chronos.__version__,
        **(asked or {}),
        "prompt_tokens": result.prompt_tokens,
        "tokens": result.tokens,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "backend": engine.backend,
        "device": engine.device,
        "threads": engine.threads,
        "load": load.average if (load := machine_load()) else None,
        "budget_bytes": engine.budget_bytes,
        # None where nothing was to be chosen: every expert was in memory
        "predictor_used": engine.feed.predictor if engine.feed else None,
        "expert_bytes_total": engine.expert_bytes_total,
        "peak_memory_bytes": peak,
        "stats": result.stats,
        # since the model was opened, of every layer with experts; empty where none are streamed
        "layers": engine.feed.layer_stats() if engine.feed else [],
    }
    return data | {"error": result.error} if result.error else data
