"""Metrics for Prometheus, under vLLM's names where it has them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from corematching.serving.engine import Engine
from corematching.serving.observer import Observer
from corematching.serving.usage import Usage

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
LABEL = "model_name"


class Metrics(Observer):
    """Counts what an engine tells, in a registry of its own.

    Parameters
    ----------
    model : str
        The model's name, a label of every metric.
    """

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self.model = model
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens read.")
        self._answer_tokens = self._counter("vllm:generation_tokens", "Answer tokens made.")
        self._image = self._counter("corematching:image_tokens", "Image tokens of prompts.")
        self._kept = self._counter("corematching:kept_image_tokens", "Image tokens kept.")
        self._asked = self._counter("vllm:mm_cache_queries", "Prompts with pictures.")
        self._found = self._counter("vllm:mm_cache_hits", "Those whose features were kept.")
        self._ends = Counter(
            "vllm:request_success",
            "Requests that ended, by reason: stop, length, abort or error.",
            [LABEL, "finished_reason"],
            registry=self.registry,
        )
        self._first = self._histogram("vllm:time_to_first_token_seconds", "TTFT.", SECONDS)
        self._next = self._histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of an answer.", TOKEN_SECONDS
        )
        self._whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "From the request to its end.", SECONDS
        )
        self._queue = self._histogram(
            "vllm:request_queue_time_seconds", "From the request to its prompt.", SECONDS
        )
        self._prefill = self._histogram(
            "vllm:request_prefill_time_seconds", "Reading the prompt.", SECONDS
        )
        self._running = self._gauge("vllm:num_requests_running", "Answers that decode.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait.")
        self._usage = self._gauge("vllm:kv_cache_usage_perc", "Reserved KV memory, 1 is all.")
        self._bytes = self._gauge("corematching:kv_bytes", "Reserved KV memory, bytes.")

    def on_pictures(self, found: bool) -> None:
        """Count a prompt with pictures."""
        self._asked.inc()
        self._found.inc(int(found))

    def on_prompt(self, usage: Usage, waited: float, seconds: float) -> None:
        """Count a prompt."""
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._image.inc(usage.image_tokens)
        self._kept.inc(usage.kept_image_tokens)
        self._queue.observe(max(waited, 0.0))
        self._prefill.observe(seconds)

    def on_token(self, seconds: float, first: bool) -> None:
        """Count a token."""
        self._answer_tokens.inc()
        (self._first if first else self._next).observe(seconds)

    def on_end(self, usage: Usage, seconds: float, reason: str) -> None:
        """Count a request that has ended."""
        self._ends.labels(self.model, reason).inc()
        self._whole.observe(seconds)

    def show(self, engine: Engine) -> bytes:
        """All metrics as text."""
        self._running.set(engine.running)
        self._waiting.set(engine.waiting)
        self._bytes.set(engine.kv_bytes)
        self._usage.set(engine.kv_bytes / engine.kv_memory)
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, [LABEL], registry=self.registry).labels(self.model)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, [LABEL], registry=self.registry).labels(self.model)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        made = Histogram(name, text, [LABEL], buckets=bounds, registry=self.registry)
        return made.labels(self.model)
