"""Counters for Prometheus, under vLLM's names where vLLM has one, after `chronos:`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from chronos.run.generation import GenerationResult
    from chronos.serve.worker import Job, Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Of one server. What the worker and the experts' feed count themselves is read when asked."""

    def __init__(self, worker: Worker) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ("model_name",)) -> Counter:
            return Counter(f"chronos:{name}", text, labels, registry=registry)

        def seconds(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(
                f"chronos:{name}_seconds", text, ("model_name",), buckets=buckets, registry=registry
            )

        self._prompt = counter("prompt_tokens", "Tokens of prompts that were answered.")
        self._generated = counter("generation_tokens", "Tokens that were generated.")
        self._success = counter(
            "request_success", "Replies that ended.", ("model_name", "finished_reason")
        )
        self._failure = counter("request_failure", "Replies that an error ended.")
        self._queries = counter("prefix_cache_queries", "Tokens of prompts looked for.")
        self._hits = counter("prefix_cache_hits", "Tokens of prompts that were kept.")
        self._rejected = counter("admission_rejections", "Requests not taken in.", ("reason",))
        self._ttft = seconds("time_to_first_token", "From the request to its first token.")
        self._gap = seconds("inter_token_latency", "Between two tokens of a reply.", _TOKEN_SECONDS)
        self._of_tokens: dict[tuple[str, bool], Histogram] = {}
        self._e2e = seconds("e2e_request_latency", "From the request to its end.")
        self._queue = seconds("request_queue_time", "In line.")
        self._prefill = seconds("request_prefill_time", "From its beginning to the first token.")
        self._decode = seconds("request_decode_time", "From the first token to the end.")
        registry.register(_Live(worker))

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def token(self, job: Job, seconds: float, first: bool) -> None:
        key = job.model, first
        histogram = self._of_tokens.get(key)
        if histogram is None:  # looking it up by its label takes longer than the rest
            histogram = (self._ttft if first else self._gap).labels(job.model)
            self._of_tokens[key] = histogram
        histogram.observe(seconds)

    def ended(self, job: Job, result: GenerationResult) -> None:
        now = time.monotonic()
        self._prompt.labels(job.model).inc(result.prompt_tokens)
        self._generated.labels(job.model).inc(len(result.tokens))
        self._queries.labels(job.model).inc(result.prompt_tokens)
        self._hits.labels(job.model).inc(job.cached)
        self._success.labels(job.model, result.finish_reason).inc()
        self._e2e.labels(job.model).observe(now - job.asked)
        self._queue.labels(job.model).observe(job.begun - job.asked)
        first = job.first or now
        self._prefill.labels(job.model).observe(first - job.begun)
        self._decode.labels(job.model).observe(now - first)

    def failed(self, job: Job) -> None:
        self._failure.labels(job.model).inc()

    def gone(self, job: Job) -> None:
        """Its client has gone, or another job of its request failed."""
        self._success.labels(job.model, "abort").inc()


class _Live:
    """What others count, read when Prometheus asks."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        worker = self._worker
        gauges: dict[str, tuple[float, str]] = {
            "num_requests_running": (worker.running, "Replies under way."),
            "num_requests_waiting": (worker.waiting, "Requests in line."),
            "prefix_cache_bytes": (worker.prefix_bytes, "Of kept beginnings of prompts."),
        }
        counters: dict[str, tuple[float, str]] = {
            "model_loads": (worker.loads, "Models opened since the start.")
        }
        if (stats := worker.stats()) is not None:
            gauges |= {
                "budget_bytes": (stats.capacity_bytes, "That experts may take."),
                "resident_bytes": (stats.live_bytes, "That experts take."),
            }
            counters |= {
                "expert_hits": (stats.hits, "Needs of an expert that was there."),
                "expert_misses": (stats.misses + stats.late, "Needs that waited for a read."),
                "expert_read_bytes": (stats.bytes_read, "Read of experts' files."),
                "expert_wait_seconds": (stats.stall_s, "Waiting for reads of experts."),
            }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"chronos:{name}", text, value=value)
        for name, (value, text) in counters.items():
            yield CounterMetricFamily(f"chronos:{name}", text, value=value)
