"""Numbers of one generation as lines, table cells and JSON, the same wherever they are shown."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from chronos.cli import output

if TYPE_CHECKING:
    from chronos.run.engine import Engine, GenerationResult

LEGEND = (
    "hits: needs of an expert that found it in memory. stall: time spent waiting for reads. of "
    "limit: 100 % is the speed nothing on this machine could beat with that memory: perfect "
    "foresight, every read hidden behind computing."
)


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def hit_rate(stats: dict[str, Any]) -> float | None:
    """Share of the routed needs whose expert was in memory; None where nothing was streamed."""
    return float(stats["hits"] / stats["routed"]) if stats.get("routed") else None


def per_token(stats: dict[str, Any], name: str) -> float:
    """A decode counter per decoded token; the prompt is left out."""
    return float(stats.get(f"decode_{name}", 0)) / max(1, int(stats["decode_tokens"]))


def with_limit(
    engine: Engine, result: GenerationResult, resident_token_s: float | None = None
) -> GenerationResult:
    """The result with the limit among its numbers, where experts were streamed."""
    if engine.feed is None:
        return result
    limit = engine.limit(result, resident_token_s)
    return dataclasses.replace(result, stats=result.stats | {"limit": limit})


def limit_share(stats: dict[str, Any]) -> float | None:
    share: float | None = (stats.get("limit") or {}).get("eta_limit")
    return share


def lines(engine: Engine, result: GenerationResult) -> list[str]:
    """MLX-LM's three lines and one on the experts, for stderr."""
    stats, made = result.stats, len(result.tokens)
    return [
        f"prompt: {result.prompt_tokens} tokens, {stats['prefill_tps']:.1f} tokens/s",
        f"generation: {made} tokens, {stats['decode_tps']:.1f} tokens/s",
        f"peak memory: {output.size(peak_memory())}",
        f"experts: {_experts(engine, stats)}",
    ]


def _experts(engine: Engine, stats: dict[str, Any]) -> str:
    total = engine.expert_bytes_total
    if engine.feed is None:
        return f"all {output.size(total)} in memory"
    parts = [
        f"budget {output.size(engine.budget_bytes)} of {output.size(total)}",
        f"{output.percent(hit_rate(stats))} hits",
        f"read {per_token(stats, 'bytes_read') / 1e6:.3f} MB/token",
        f"stall {1e3 * per_token(stats, 'stall_s'):.2f} ms/token",
    ]
    if (share := limit_share(stats)) is not None:
        parts.append(f"{output.percent(share)} of the limit")
    if stats.get("fallbacks"):
        missed = output.percent(stats["fallbacks"] / stats["routed"])
        parts.append(f"{missed} of expert uses replaced by the shared expert")
    return ", ".join(parts)


def to_json(engine: Engine, result: GenerationResult) -> dict[str, Any]:
    """The object of `generate --json`."""
    data = {
        "prompt_tokens": result.prompt_tokens,
        "tokens": result.tokens,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "backend": engine.backend,
        "device": engine.device,
        "budget_bytes": engine.budget_bytes,
        "expert_bytes_total": engine.expert_bytes_total,
        "peak_memory_bytes": peak_memory(),
        "stats": result.stats,
    }
    return data | {"error": result.error} if result.error else data
