"""What the trusted side measures, in Prometheus' format: no prompt, no text, no device that made a request.

Requests update counters when tokens come and when they end. Levels, and the exchanges that the engine counts, are read
when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from sliplm.errors import RECEIVED

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

OUTCOMES = dict.fromkeys(["stop", "length", "tool_calls", "cancelled", *(kind.outcome for kind in RECEIVED.values())])

Levels = float | Mapping[str, float]


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        self.requests = Counter("slip_trusted_requests", "Requests that ended", ["outcome"], registry=own)
        self.tokens = Counter("slip_trusted_tokens", "Tokens read and written", ["kind"], registry=own)
        self.drafted = Counter(
            "slip_trusted_drafted_tokens", "Tokens guessed before the model said them", ["outcome"], registry=own
        )
        self.in_progress = Gauge("slip_trusted_requests_in_progress", "Requests waiting or running", registry=own)
        self.seconds = Histogram(
            "slip_trusted_request_seconds", "From request to last token", buckets=SECONDS, registry=own
        )
        self.wait = Histogram(
            "slip_trusted_wait_seconds",
            "From request to its slot, and to its first token",
            ["until"],
            buckets=SECONDS,
            registry=own,
        )
        self.verification_failures = Counter(
            "slip_trusted_verification_failures", "Answers of edges that failed their check", registry=own
        )
        for outcome in OUTCOMES:  # a series that is not there cannot be told from one that is zero
            self.requests.labels(outcome)
        for kind in ("prompt", "completion"):
            self.tokens.labels(kind)
        for outcome in ("accepted", "rejected"):
            self.drafted.labels(outcome)
        self._sampled: list[tuple[str, str, str, Callable[[], Levels]]] = []
        own.register(self)  # type: ignore[arg-type]

    def count(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count tokens as they come."""
        self.tokens.labels("prompt").inc(prompt_tokens)
        self.tokens.labels("completion").inc(completion_tokens)

    def count_drafts(self, accepted: int, rejected: int) -> None:
        """Count guesses as they turn out."""
        self.drafted.labels("accepted").inc(accepted)
        self.drafted.labels("rejected").inc(rejected)

    def request(self, outcome: str, seconds: float) -> None:
        """Count a request that ended."""
        self.requests.labels(outcome).inc()
        self.seconds.observe(seconds)

    def sample(self, kind: str, name: str, what: str, value: Callable[[], Levels]) -> None:
        """Read `value` at every scrape, as a "gauge" or a "counter"; a label `kind` tells several values apart."""
        self._sampled.append((kind, name, what, value))

    def collect(self) -> Iterable[Metric]:
        for kind, name, what, value in self._sampled:
            family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
            values = value()
            if isinstance(values, Mapping):
                labelled = family(name, what, labels=["kind"])
                for label, each in values.items():
                    labelled.add_metric([label], float(each))
                yield labelled
            else:
                yield family(name, what, value=float(values))

    def text(self) -> bytes:
        """In the text format that Prometheus reads."""
        return generate_latest(self._registry)
