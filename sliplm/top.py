"""What `slip top` shows: the metrics of several edges and trusted sides, and how fast they grow."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any, NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

from sliplm.errors import LinkError

FETCH_SECONDS = 5.0
TEXT_ROUTES = ("/v1/chat/completions", "/v1/completions")


class Sample(NamedTuple):
    """One look at one address: every sample's value, summed over labels, and by each label's value as NAME{VALUE}."""

    when: float
    values: dict[str, float]


def address(url: str) -> str:
    """HOST:PORT, or a URL, as the URL of its metrics. Raises LinkError."""
    try:
        parsed = httpx.URL(url if "://" in url else f"http://{url}")
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise LinkError(f"{url!r} is not an address: write HOST:PORT or a URL.")
    # An edge prints its API's URL, which ends in /v1.
    return str(parsed.copy_with(path="/metrics") if parsed.path.rstrip("/") in ("", "/v1") else parsed)


def fetch(url: str, key: str | None = None) -> Sample:
    """Read the metrics at `url`. Raises LinkError."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(timeout=FETCH_SECONDS, trust_env=False, headers=headers) as client:
            response = client.get(url)
    except httpx.HTTPError as error:
        raise LinkError(f"no answer from {url} ({error or type(error).__name__}).") from None
    if response.status_code != 200:
        what = "needs its key: see --api-key" if response.status_code == 401 else f"answers {response.status_code}"
        raise LinkError(f"{url} {what}.")
    values: dict[str, float] = defaultdict(float)
    try:
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                values[sample.name] += sample.value
                for label in sample.labels.values():
                    values[f"{sample.name}{{{label}}}"] += sample.value
    except ValueError:
        values.clear()
    if not any(name.startswith(("slip_edge_", "slip_trusted_")) for name in values):
        raise LinkError(f"what answers at {url} is neither an edge nor a trusted side.")
    return Sample(time.monotonic(), dict(values))


def row(url: str, now: Sample, before: Sample | None = None) -> dict[str, Any]:
    """One line of the view. Rates and the latency are those since `before`; what a side does not have is None.

    The latency of an exchange is the trusted side's wait for the answer, or the edge's time of multiplying.
    """
    side = "trusted" if "slip_trusted_requests_in_progress" in now.values else "edge"

    def value(name: str) -> float | None:
        return now.values.get(f"slip_{side}_{name}")

    def grown(name: str) -> float | None:
        if before is None or (last := before.values.get(f"slip_{side}_{name}")) is None or value(name) is None:
            return None
        return max(0.0, (value(name) or 0.0) - last)  # less than before: it was started anew

    def rate(name: str) -> float | None:
        growth = grown(name)
        return None if growth is None or before is None else growth / max(now.when - before.when, 1e-9)

    def by_edge() -> dict[str, float]:
        """Rows a second of each edge that has computed any since; those of edges are theirs alone."""
        prefix = f"slip_{side}_edge_rows_total{{"
        names = [name[len(prefix) : -1] for name in now.values if name.startswith(prefix)]
        rates = {name: rate(f"edge_rows_total{{{name}}}") for name in sorted(names)}
        return {name: rows for name, rows in rates.items() if rows}

    def tokens_per_pass() -> float | None:
        """Of requests that decode: what was guessed rightly took no pass of its own."""
        tokens, accepted = grown("tokens_total{completion}"), grown("drafted_tokens_total{accepted}")
        return tokens / (tokens - accepted) if tokens and accepted is not None and tokens > accepted else None

    requests = value("requests_total")
    if side == "edge" and requests is not None:  # looks like this one are counted there, too
        requests = sum(value(f"requests_total{{{route}}}") or 0.0 for route in TEXT_ROUTES)
    seconds = grown("exchange_seconds_total" if side == "trusted" else "compute_seconds_total")
    exchanges = grown("exchanges_total")
    connected = value("edges_connected" if side == "trusted" else "connected")
    failures = value("verification_failures_total" if side == "trusted" else "errors_total{verification_failed}")
    return {
        "url": url,
        "side": side,
        "connected": None if connected is None else int(connected),
        "requests": requests,
        "requests_in_progress": value("requests_in_progress"),
        "completion_tokens": value("tokens_total{completion}"),
        "tokens_per_second": rate("tokens_total{completion}"),
        "tokens_per_pass": tokens_per_pass(),
        "exchanges": value("exchanges_total"),
        "exchanges_per_second": rate("exchanges_total"),
        "exchange_seconds": seconds / exchanges if seconds is not None and exchanges else None,
        "edge_rows_per_second": by_edge(),
        "exchanges_replaced": value("exchanges_replaced_total"),
        "pads_ready": value("pads_ready"),
        "pads_target": value("pads_target"),
        "pads_stored": value("pads_stored"),
        "pads_stored_bytes": value("pads_stored_bytes"),
        "pads_refused": value("pads_refused_total"),
        "helpers_connected": value("helpers_connected"),
        "helper_pads_per_second": rate("helper_images_total"),
        "helper_lies": value("helper_lies_total"),
        "verification_failures": failures,
        "error": None,
    }
