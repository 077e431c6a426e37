"""`slip trusted` as its operator runs it: real processes, signals, kill -9, metrics, logs, PostgreSQL."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from link_fakes import usage
from processes import eventually, slip, start_edge, start_trusted
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from sliplm.cli import app
from sliplm.edge.client import model, stream
from sliplm.errors import LinkError, SlipError

pytestmark = pytest.mark.slow

LONG = {"max_tokens": 100, "temperature": 0}


def start(run: Any, bundle: Path, identity: Path, *options: str | Path) -> tuple[Any, dict[str, Any], str]:
    """A trusted side, what it said when it was ready, and the API of its edge."""
    trusted = run("trusted", bundle / "trusted", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", *options)
    ready = trusted.ready()
    return trusted, ready, start_edge(run, bundle, ready["listening"], identity).ready()["api"]


def metrics(url: str) -> dict[str, float]:
    """The samples, summed over labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", trust_env=False).text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def begin(api: str, **options: Any) -> Any:
    """A long answer whose first text has come."""
    answer = stream(api, "Hello", {**LONG, **options}, raw=True)
    next(answer)
    return answer


def test_metrics_health_and_logs(run: Any, bundle: Path, tmp_path: Path) -> None:
    trusted, ready, api = start(run, bundle, tmp_path / "one.identity", "--log-format", "json")
    last = list(stream(api, "Say nothing of Xanadu", {"max_tokens": 5, "temperature": 0}, raw=True))[-1]
    url = ready["metrics"]
    for path, status in (("/healthz", 200), ("/readyz", 200), ("/nowhere", 404)):
        assert httpx.get(url + path, trust_env=False).status_code == status

    def wanted(seen: dict[str, float]) -> None:
        assert seen["slip_trusted_requests_total"] == 1 and seen["slip_trusted_edges_connected"] == 1
        assert seen["slip_trusted_tokens_total"] == last.prompt_tokens + last.completion_tokens == 26
        assert seen["slip_trusted_exchanges_total"] == 5 * 9  # one prefill and four steps, nine groups
        assert seen["slip_trusted_exchange_seconds_total"] > 0 < seen["slip_trusted_stage_seconds_total"]
        assert seen["slip_trusted_verification_failures_total"] == seen["slip_trusted_requests_waiting"] == 0
        assert 0 <= seen["slip_trusted_pads_ready"] <= seen["slip_trusted_pads_target"] == 64

    eventually(lambda: wanted(metrics(url)))
    answer = begin(api)  # tokens are counted while they come, not when all have come
    eventually(lambda: live(metrics(url)))
    answer.close()
    eventually(lambda: idle(metrics(url)))
    assert trusted.stop() == 0
    lines = [json.loads(line) for line in trusted.log.splitlines()]
    done = next(line for line in lines if line.get("outcome"))
    assert (done["device"], done["outcome"], done["completion_tokens"]) == ("one", "length", 5)
    assert re.fullmatch("[0-9a-f]{32}", done["request"]) and done["time"].endswith("Z")
    assert "Xanadu" not in trusted.log and usage(bundle / "trusted" / "authority")[0] == (21, 5, "length")


def live(seen: dict[str, float]) -> None:
    assert seen["slip_trusted_tokens_total"] > 26 and seen["slip_trusted_requests_in_progress"] == 1


def idle(seen: dict[str, float]) -> None:
    assert seen["slip_trusted_requests_in_progress"] == 0


@pytest.mark.parametrize("form", ["{0}", "{0}/", "{0}/v1", "{0}/v1/", "{1}"])
def test_the_api_s_address_may_be_written_in_any_usual_way(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(200, json={"data": [{"id": "m"}]})

    client = httpx.Client(transport=httpx.MockTransport(answer))
    monkeypatch.setattr("sliplm.edge.client._client", lambda *_: client)
    assert model(form.format("http://here:8411", "here:8411")) == "m"
    assert asked == ["http://here:8411/v1/models"]


def test_sigterm_lets_a_request_finish_and_a_second_one_does_not(
    run: Any,
    bundle: Path,
    tmp_path: Path,
) -> None:
    trusted, ready, api = start(run, bundle, tmp_path / "one.identity")
    answer = begin(api)
    trusted.process.send_signal(signal.SIGTERM)
    eventually(lambda: unready(ready["metrics"]))
    assert list(answer)[-1].finish_reason == "length"
    assert trusted.process.wait(60) == 0 and usage(bundle / "trusted" / "authority")[-1][1:] == (100, "length")

    trusted, ready, api = start(run, bundle, tmp_path / "one.identity", "--drain", "600")
    answer = begin(api)
    trusted.process.send_signal(signal.SIGTERM)
    eventually(lambda: unready(ready["metrics"]))
    trusted.process.send_signal(signal.SIGTERM)
    try:
        list(answer)
        finished = True
    except LinkError:
        finished = False
    assert trusted.process.wait(60) == 0 and "Traceback" not in trusted.log
    assert usage(bundle / "trusted" / "authority")[-1][2] == ("length" if finished else "interrupted")


def unready(url: str) -> None:
    with contextlib.suppress(httpx.HTTPError):  # it has ended already
        assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 503


def test_a_killed_server_leaves_one_record(run: Any, bundle: Path, tmp_path: Path) -> None:
    trusted, _, api = start(run, bundle, tmp_path / "one.identity")
    answer = begin(api)
    trusted.stop(signal.SIGKILL)
    with pytest.raises(LinkError):
        list(answer)
    ((_, _, outcome),) = usage(bundle / "trusted" / "authority")
    assert outcome is None
    start_trusted(run, bundle)
    eventually(lambda: closed(bundle))


def closed(bundle: Path) -> None:
    ((prompt, completion, outcome),) = usage(bundle / "trusted" / "authority")
    assert outcome == "interrupted" and completion <= 100 and prompt in (0, 5)


def test_revocation_from_the_command_line(run: Any, bundle: Path, tmp_path: Path) -> None:
    _, ready, api = start(run, bundle, tmp_path / "one.identity")
    answer = begin(api)
    assert slip("device", "revoke", "one", "-b", bundle / "trusted").returncode == 0
    try:
        list(answer)  # what came before the command took effect
    except LinkError as error:
        assert "revoked" in str(error)
    with pytest.raises(LinkError):
        list(stream(api, "Hello", LONG, raw=True))
    eventually(lambda: gone(ready["metrics"]))


def gone(url: str) -> None:
    assert metrics(url)["slip_trusted_devices_connected"] == 0


def test_a_registry_in_postgresql(run: Any, bundle: Path, tmp_path: Path, postgres: str) -> None:
    url = f"{postgres}/postgres"
    added = slip("device", "add", "two", "-b", bundle / "trusted", "-o", tmp_path / "two.identity", "--registry", url)
    assert added.returncode == 0, added.stderr
    trusted, _, api = start(run, bundle, tmp_path / "two.identity", "--registry", url)
    assert list(stream(api, "Hello", {**LONG, "max_tokens": 3}, raw=True))[-1].completion_tokens == 3
    assert trusted.stop() == 0
    shown = json.loads(slip("device", "show", "two", "-b", bundle / "trusted", "--registry", url, "--json").stdout)
    assert shown["usage"]["total"] == {"requests": 1, "prompt_tokens": 5, "completion_tokens": 3}
    assert usage(bundle / "trusted" / "authority") == []


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--rules", "nowhere:nothing", "cannot be loaded"),
        ("--system-prompt", "/nowhere/prompt", "cannot be read"),
        ("--metrics", "nonsense", "HOST:PORT"),
        ("--registry", "nonsense", "not a URL"),
    ],
)
def test_what_cannot_be_used_gets_one_sentence(bundle: Path, option: str, value: str, says: str) -> None:
    done = CliRunner().invoke(app, ["trusted", str(bundle / "trusted"), "--listen", "127.0.0.1:0", option, value])
    assert isinstance(done.exception, SlipError) and says in str(done.exception)
