"""What the server counts, in Prometheus' text format. Each app has a registry of its own."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters of requests and tokens, gauges read from the engine when asked, histograms of times."""

    def __init__(self, engine: Any) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "fewbit_requests", "HTTP requests by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "fewbit_request_seconds",
            "Time from a request's head to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter("fewbit_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.cached_tokens = Counter(
            "fewbit_cached_prompt_tokens", "Those of them that were in the cache already", registry=self.registry
        )
        self.generated_tokens = Counter("fewbit_generated_tokens", "Tokens generated", registry=self.registry)
        self.first_token = Histogram(
            "fewbit_time_to_first_token_seconds",
            "Time from a request's submission to its first token, waiting included",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.token = Histogram(
            "fewbit_time_per_token_seconds",
            "Time per token after the first",
            buckets=_TOKEN_SECONDS,
            registry=self.registry,
        )
        for key, meaning in (("running", "being decoded"), ("waiting", "waiting for a slot")):
            gauge = Gauge(f"fewbit_{key}", f"Sequences {meaning}", registry=self.registry)
            gauge.set_function(lambda key=key: engine.stats()[key])  # type: ignore[misc]

    def text(self) -> bytes:
        return generate_latest(self.registry)


class TokenClock:
    """Times the tokens of one choice."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._last = time.perf_counter()
        self._started = False

    def tokens(self, count: int) -> None:
        """`count` tokens have just come."""
        if not count:
            return
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        self._metrics.generated_tokens.inc(count)
        if not self._started:
            self._started = True
            self._metrics.first_token.observe(elapsed)
            return
        for _ in range(count):
            self._metrics.token.observe(elapsed / count)
