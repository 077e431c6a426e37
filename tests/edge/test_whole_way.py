"""The whole way: an HTTP client, the edge, a trusted side; and clients that hang up."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from edge_api import CHAT, HELLO, PLAIN, error_of, events, listening, local
from link_fakes import FakeEngine, WrongMatrix, enrol, make_engine, running, serving, wait_until, working
from prometheus_client.parser import text_string_to_metric_families

from sliplm.edge.api import create_app
from sliplm.edge.worker import EdgeWorker
from sliplm.errors import BusyError, LimitError
from sliplm.protocol.messages import Chunk, GenerateRequest


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def url(tmp_path, engine):
    home = tmp_path / "authority"
    identity = enrol(home)
    with serving(home, engine, worker_wait=0.2) as server, working(server, identity) as worker:
        app = create_app(worker.generate, lambda: worker.model_name, worker.connected.is_set, work=worker.counters)
        with listening(app) as url:
            yield url


def test_the_whole_way(url):
    with httpx.Client(base_url=url, timeout=20) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "fake-model"
        assert client.get("/healthz").status_code == 200
        answer = client.post(PLAIN, json={"prompt": "x", "max_tokens": 2}).json()
        assert answer["choices"][0]["text"] == "word0 word1 "
        assert events(client.post(CHAT, json=HELLO | {"max_tokens": 2, "stream": True}))[-1] == "[DONE]"


def test_metrics_count_and_tell_nothing(url):
    secret = {"prompt": "a secret prompt", "max_tokens": 3}
    for body, status in ((secret, 200), (secret | {"stream": True}, 200), (secret | {"secret": 1}, 400)):
        assert httpx.post(url + PLAIN, json=body, timeout=20).status_code == status
    httpx.get(url + "/v1/models/secret")
    httpx.get(url + "/secret")
    text = httpx.get(url + "/metrics").text
    assert "secret" not in text
    found = {
        s.name + "".join(f"{{{v}}}" for v in s.labels.values()): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    assert found["slip_edge_requests_total{/v1/completions}{200}"] == 2
    assert found["slip_edge_requests_total{/v1/completions}{400}"] == 1
    assert found["slip_edge_requests_total{other}{404}"] == 2
    assert found["slip_edge_errors_total{unknown_parameter}"] == 1
    assert found["slip_edge_tokens_total{completion}"] == 6
    assert found["slip_edge_request_seconds_count"] == found["slip_edge_first_token_seconds_count"] == 2
    assert found["slip_edge_connected"] == found["slip_edge_connections_total"] == 1
    assert 2 * found["slip_edge_exchanges_total"] == found["slip_edge_exchange_rows_total"] == 12
    assert found["slip_edge_received_bytes_total"] > 0 < found["slip_edge_sent_bytes_total"]
    assert found["slip_edge_compute_seconds_total"] > 0


@pytest.mark.parametrize("error", [LimitError("this device has used up its tokens", 7), BusyError("too many", 7)])
def test_limits_say_when_to_come_back(url, engine, monkeypatch, error):
    def limited(request: GenerateRequest, link) -> Iterator[Chunk]:
        raise error

    monkeypatch.setattr(engine, "generate", limited)
    for stream in (False, True):
        response = httpx.post(url + CHAT, json=HELLO | {"stream": stream}, timeout=20)
        shown = error_of(response, 429)
        assert shown["code"] == "rate_limit_exceeded" and str(error) in shown["message"]
        assert response.headers["retry-after"] == "7"


def test_requests_run_side_by_side(url, engine):
    engine.delay = 0.01
    answers: list[int] = []

    def one(stream: bool) -> None:
        body = HELLO | {"max_tokens": 20, "stream": stream}
        answers.append(httpx.post(url + CHAT, json=body, timeout=30).status_code)

    threads = [threading.Thread(target=one, args=(i % 2 == 0,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert answers == [200] * 10


def test_a_device_asks_no_more_at_once_than_the_trusted_side_allows(url, engine, monkeypatch):
    engine.delay = 0.02
    running_now, most, lock, generate = [0], [0], threading.Lock(), engine.generate

    def counting(request: GenerateRequest, link) -> Iterator[Chunk]:
        with lock:
            running_now[0] += 1
            most[0] = max(most[0], running_now[0])
        try:
            yield from generate(request, link)
        finally:
            with lock:
                running_now[0] -= 1

    monkeypatch.setattr(engine, "generate", counting)
    answers: list[int] = []

    def one(stream: bool) -> None:
        answers.append(httpx.post(url + CHAT, json=HELLO | {"max_tokens": 5, "stream": stream}, timeout=60).status_code)

    threads = [threading.Thread(target=one, args=(i % 2 == 0,)) for i in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [200] * 30 and 1 < most[0] <= 8


def test_hanging_up_in_a_stream_cancels(url, engine):
    engine.delay = 0.01
    body = HELLO | {"max_tokens": 100_000, "stream": True}
    with httpx.stream("POST", url + CHAT, json=body, timeout=20) as response:
        next(response.iter_lines())
    assert engine.cancelled.wait(10)


def test_hanging_up_before_the_answer_cancels(url, engine, caplog):
    engine.delay = 0.01
    caplog.set_level("INFO", logger="sliplm")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url + CHAT, json=HELLO | {"max_tokens": 100_000}, timeout=httpx.Timeout(10, read=3.0))
    assert engine.cancelled.wait(10)
    wait_until(lambda: "cancelled its request" in caplog.text)
    assert "Exception" not in caplog.text


def test_hanging_up_while_connecting_closes_what_comes_of_it():
    release, closed = threading.Event(), threading.Event()

    class Late(Iterator[Chunk]):
        def __next__(self) -> Chunk:
            raise StopIteration

        def close(self) -> None:
            closed.set()

    def slow(_: GenerateRequest) -> Iterator[Chunk]:
        release.wait(10)
        return Late()

    with listening(create_app(slow)) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + CHAT, json=HELLO, timeout=httpx.Timeout(10, read=0.2))
        time.sleep(0.2)
        release.set()
        assert closed.wait(10)


@pytest.mark.parametrize("stream", [False, True])
def test_a_cheating_edge_gets_no_text(tmp_path, stream):
    home = tmp_path / "authority"
    identity = enrol(home)
    with serving(home) as server:
        worker = EdgeWorker(make_engine(WrongMatrix), server.address, identity)
        client = local(create_app(worker.generate))
        with running(worker.run, worker.stop) as raised:
            assert worker.connected.wait(10)
            error = error_of(client.post(PLAIN, json={"prompt": "x", "stream": stream}), 502)
            assert error["code"] == "verification_failed"
            wait_until(lambda: raised)  # the trusted side suspends the device
        error = error_of(client.post(PLAIN, json={"prompt": "x", "stream": stream}), 403)
        assert error["code"] == "refused" and "suspended" in error["message"]
