"""What a server measures, for Prometheus: under vLLM's names where vLLM has them."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gptfast.serve.generation import Generation, Update

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """Counters and times of all generations, for one registry. One choice is one request here."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ("model_name", *labels), registry=self.registry)

        def seconds(name: str, text: str) -> Histogram:
            names = ("model_name",)
            made = Histogram(name, text, names, registry=self.registry, buckets=SECONDS)
            return made.labels(model)

        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens.").labels(model)
        self._new = counter("vllm:generation_tokens", "New tokens.").labels(model)
        self._queries = counter("vllm:prefix_cache_queries", "Prompt tokens looked up.")
        self._hits = counter("vllm:prefix_cache_hits", "Prompt tokens that were computed before.")
        self._success = counter("vllm:request_success", "Requests that ended.", "finished_reason")
        self.requests = counter("gptfast:requests", "Requests that were taken.").labels(model)
        self.refused = counter("gptfast:requests_refused", "Requests refused with 429.")
        self.refused = self.refused.labels(model)
        self._broken_off = counter("gptfast:requests_cancelled", "Requests that were broken off.")
        self._failed = counter("gptfast:requests_failed", "Requests that the engine failed.")
        self._first = seconds("vllm:time_to_first_token_seconds", "From arrival to first token.")
        self._between = seconds("vllm:inter_token_latency_seconds", "Between two updates.")
        self._whole = seconds("vllm:e2e_request_latency_seconds", "From arrival to the end.")
        for reason in ("stop", "length"):
            self._success.labels(model, reason)
        for one in (self._queries, self._hits, self._broken_off, self._failed):
            one.labels(model)

    def watch(
        self,
        *,
        running: Callable[[], float],
        waiting: Callable[[], float],
        cache_usage: Callable[[], float],
    ) -> None:
        """Show what these return as gauges."""
        for name, text, value in (
            ("vllm:num_requests_running", "Requests that are computed.", running),
            ("vllm:num_requests_waiting", "Requests in the queue.", waiting),
            ("vllm:kv_cache_usage_perc", "Share of the KV cache in use.", cache_usage),
        ):
            gauge = Gauge(name, text, ("model_name",), registry=self.registry)
            gauge.labels(self._model).set_function(value)

    def told(self, one: Generation, update: Update, last: float | None) -> float | None:
        """Count an update. last: when the one before came; return when this one came."""
        now = time.monotonic()
        if update.tokens:
            (self._between.observe(now - last) if last else self._first.observe(now - one.created))
            last = now
        if update.finish is None:
            return last
        self._prompt.inc(one.n_prompt)
        self._new.inc(one.n_new)
        self._queries.labels(self._model).inc(one.n_prompt)
        self._hits.labels(self._model).inc(one.n_cached)
        if update.finish == "cancelled":
            self._broken_off.labels(self._model).inc()
        elif update.finish == "failed":
            self._failed.labels(self._model).inc()
        else:
            self._success.labels(self._model, update.finish).inc()
            self._whole.observe(now - one.created)
        return last

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text form."""
        return generate_latest(self.registry)
