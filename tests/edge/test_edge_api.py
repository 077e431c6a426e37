"""The edge's OpenAI-compatible API: formats, errors, and clients that hang up."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
import uvicorn
from link_fakes import FakeEngine, WrongMatrix, enrol, make_engine, running, serving, wait_until, working
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from sliplm.edge.api import create_app, generations
from sliplm.edge.worker import EdgeWorker
from sliplm.errors import (
    BundleError,
    BusyError,
    HandshakeError,
    IdentityError,
    InternalError,
    LimitError,
    LinkError,
    ProtocolError,
    RequestError,
    TooLongError,
    VerificationError,
    VersionError,
)
from sliplm.protocol.messages import Chunk, GenerateRequest, Message, TokenLogprob

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
F = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


class Backend:
    """Yields "Hel", "lo", "" and remembers what was asked; fails with `error` before chunk number `after`."""

    def __init__(self, error: Exception | None = None, after: int = 0) -> None:
        self.asked: list[GenerateRequest] = []
        self.error, self.after = error, after

    def __call__(self, request: GenerateRequest) -> Iterator[Chunk]:
        self.asked.append(request)
        for i, chunk in enumerate([Chunk("Hel"), Chunk("lo"), Chunk("", "stop", 3, 2)]):
            if self.error and i == self.after:
                raise self.error
            yield chunk


def local(app, **options) -> TestClient:
    return TestClient(app, base_url="http://localhost", **options)


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
def client(backend) -> TestClient:
    return local(create_app(backend, lambda: "m"))


def events(response) -> list:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.strip().split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def error_of(response, status: int) -> dict:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return body["error"]


def test_models(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "m" and model["object"] == "model"


def test_alive_and_ready():
    up = [True]
    client = local(create_app(Backend(), connected=lambda: up[0]))
    for path in ("/healthz", "/readyz"):
        assert client.get(path).json() == {"status": "ok", "connected": True}
    up[0] = False
    assert client.get("/readyz").status_code == 503
    alive = client.get("/healthz")  # restarting this edge would not bring the trusted side back
    assert alive.status_code == 200 and alive.json()["connected"] is False


def test_chat(client, backend):
    answer = client.post(CHAT, json=HELLO | {"model": "m", "max_completion_tokens": 9}).json()
    assert answer["object"] == "chat.completion" and answer["model"] == "m" and answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert (
        choice["message"] == {"role": "assistant", "content": "Hello", "refusal": None}
        and choice["finish_reason"] == "stop"
    )
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert backend.asked == [GenerateRequest(messages=[Message("user", "hello")], max_tokens=9, temperature=None)]


def test_completion(client, backend):
    body = {
        "prompt": "x",
        "max_tokens": 5,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 4,
        "seed": 7,
        "stop": ".",
    }
    answer = client.post(PLAIN, json=body).json()
    assert answer["object"] == "text_completion" and answer["choices"][0]["text"] == "Hello"
    wanted = GenerateRequest(prompt="x", max_tokens=5, top_p=0.5, top_k=4, seed=7, stop=["."])
    assert backend.asked == [wanted]


def test_chat_stream(client):
    *chunks, done = events(client.post(CHAT, json=HELLO | {"stream": True}))
    assert done == "[DONE]" and {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == 1 and all("usage" not in c for c in chunks)
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas == [{"role": "assistant", "content": "Hel"}, {"content": "lo"}, {"content": ""}]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, "stop"]


def test_completion_stream_with_usage(client):
    body = {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = events(client.post(PLAIN, json=body))
    assert done == "[DONE]" and "".join(c["choices"][0]["text"] for c in chunks) == "Hello"
    assert usage["choices"] == [] and usage["usage"]["total_tokens"] == 5


def test_what_usual_clients_send(client, backend):
    defaults = {
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "user": "me",
        "stop": None,
        "seed": None,
        "metadata": {"a": "b"},
        "safety_identifier": "me",
        "prompt_cache_key": "k",
        "store": False,
        "service_tier": "auto",
        "response_format": {"type": "text"},
        "tool_choice": "none",
        "modalities": ["text"],
        "logit_bias": {},
        "stream_options": None,
    }
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    empty = {"refusal": None, "annotations": [], "tool_calls": None, "function_call": None, "audio": None}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "assistant", "content": "", **empty},
        {"role": "user", "content": parts},
    ]
    assert client.post(CHAT, json=defaults | {"messages": messages, "logprobs": False}).status_code == 200
    assert backend.asked[0].messages == [
        Message("system", "be brief"),
        Message("assistant", ""),
        Message("user", "ab"),
    ]


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "no content"),
        (CHAT, HELLO | {"tool_choice": "required"}, "no tools"),
        (CHAT, HELLO | {"temperature": -1e-8}, "temperature"),
        (CHAT, HELLO | {"top_p": -0.5}, "top_p"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "robot"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        (CHAT, HELLO | {"tools": [{"type": "function"}]}, "tools[0].function"),
        (CHAT, HELLO | {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (CHAT, HELLO | {"tools": [F, F]}, "same name"),
        (CHAT, HELLO | {"tools": [F] * 129}, "'tools'"),
        (CHAT, HELLO | {"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        (CHAT, HELLO | {"tools": [F], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "no tool 'g'"),
        (CHAT, HELLO | {"functions": [{"name": "f"}]}, "'tools'"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "tool_call_id"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "only an assistant"),
        (CHAT, HELLO | {"response_format": {"type": "xml"}}, "response_format"),
        (CHAT, HELLO | {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (CHAT, HELLO | {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema.schema"),
        (PLAIN, {"prompt": "x", "tools": [F]}, "tools"),
        (CHAT, HELLO | {"modalities": ["text", "audio"]}, "modalities"),
        (CHAT, HELLO | {"logit_bias": {"50256": -100}}, "logit_bias"),
        (CHAT, HELLO | {"reasoning_effort": "high"}, "reasoning_effort"),
        (CHAT, HELLO | {"store": True}, "stored"),
        (CHAT, HELLO | {"service_tier": "priority"}, "service_tier"),
        (CHAT, HELLO | {"wibble": 1}, "Unknown parameter: 'wibble'"),
        (CHAT, HELLO | {"n": 0}, "'n'"),
        (CHAT, HELLO | {"n": 17}, "'n'"),
        (CHAT, HELLO | {"n": "2"}, "'n'"),
        (CHAT, HELLO | {"logprobs": 3}, "logprobs"),
        (CHAT, HELLO | {"top_logprobs": 3}, "needs 'logprobs'"),
        (CHAT, HELLO | {"logprobs": True, "top_logprobs": 21}, "logprobs"),
        (CHAT, HELLO | {"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        (CHAT, HELLO | {"max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT, HELLO | {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, HELLO | {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        (CHAT, HELLO | {"frequency_penalty": -2.5}, "frequency_penalty"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "tool"),
        (CHAT, HELLO | {"max_tokens": 0}, "max_tokens"),
        (CHAT, HELLO | {"max_tokens": "many"}, "max_tokens"),
        (CHAT, HELLO | {"temperature": 3}, "temperature"),
        (CHAT, HELLO | {"seed": -1}, "seed"),
        (CHAT, HELLO | {"stop": ["x"] * 17}, "stop"),
        (CHAT, HELLO | {"stop": ""}, "stop"),
        (CHAT, HELLO | {"presence_penalty": 3}, "presence_penalty"),
        (CHAT, HELLO | {"stream": "yes"}, "stream"),
        (PLAIN, {}, "prompt"),
        (PLAIN, {"prompt": []}, "answers"),
        (PLAIN, {"prompt": [1, 2, 3]}, "prompt"),
        (PLAIN, {"prompt": ["a"] * 9, "n": 2}, "answers"),
        (PLAIN, {"prompt": "x", "best_of": 2}, "best_of"),
        (PLAIN, {"prompt": "x", "suffix": "y"}, "suffix"),
        (PLAIN, {"prompt": "x", "logprobs": True}, "logprobs"),
        (PLAIN, {"prompt": "x", "messages": []}, "messages"),
        (PLAIN, {"prompt": "x", "echo": True}, "echo"),
        (PLAIN, {"prompt": "\ud800"}, "valid"),
        (PLAIN, [], "object"),
    ],
)
def test_bad_requests_are_named(client, backend, path, body, says):
    error = error_of(client.post(path, content=json.dumps(body), headers={"content-type": "application/json"}), 400)
    assert says in error["message"] and error["type"] == "invalid_request_error"
    of_the_whole = body == [] or says in ("valid", "same name") or "greedy" in says
    assert error["code"] and (error["param"] is None) == of_the_whole
    assert not backend.asked


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b'{"prompt": "\xff"}'])
def test_bodies_that_are_no_json(client, data):
    error_of(client.post(PLAIN, content=data, headers={"content-type": "application/json"}), 400)


def test_other_refusals(client):
    assert error_of(client.post(PLAIN, json={"prompt": "x", "model": "gpt"}), 404)["code"] == "model_not_found"
    error_of(client.post(PLAIN, content=b'{"prompt": "x"}', headers={"content-type": "text/plain"}), 415)
    error_of(client.post(PLAIN, json={"prompt": "x" * (1 << 20)}), 413)
    assert client.get("/v1/models/m").json()["id"] == "m"
    assert error_of(client.get("/v1/models/gpt"), 404)["code"] == "model_not_found"
    error_of(client.get("/nowhere"), 404)
    error_of(client.get(CHAT), 405)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestError("the prompt is too long"), 400, "invalid_request"),
        (TooLongError("This model's maximum context length is 8 tokens."), 400, "context_length_exceeded"),
        (BusyError("too many requests"), 429, "rate_limit_exceeded"),
        (LinkError("the trusted side cannot be reached"), 503, "trusted_unavailable"),
        (IdentityError("revoked"), 403, "refused"),
        (HandshakeError("of another authority"), 403, "refused"),
        (BundleError("another split"), 403, "refused"),
        (VersionError("update the older one"), 403, "refused"),
        (VerificationError("failed its check"), 502, "verification_failed"),
        (ProtocolError("out of turn"), 502, "protocol_error"),
        (InternalError("generation failed"), 500, "internal_error"),
        (RuntimeError("a secret"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_before_the_first_text_have_a_status(error, status, code, stream, caplog):
    client = local(create_app(Backend(error)))
    response = client.post(PLAIN, json={"prompt": "x", "stream": stream})
    shown = error_of(response, status)
    assert shown["code"] == code and "secret" not in shown["message"] + caplog.text
    assert (int(response.headers.get("retry-after", 0)) > 0) == (status == 429)
    assert ("RuntimeError in test_edge_api.py" in caplog.text) == isinstance(error, RuntimeError)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (LinkError("the trusted side cannot be reached"), 2),
        (BusyError("too many requests", 1), 2),
        (IdentityError("revoked"), 1),
        (VerificationError("failed its check"), 1),
        (ProtocolError("out of turn"), 1),
        (InternalError("generation failed"), 1),
        (RuntimeError("a bug of the edge"), 1),
    ],
)
def test_openai_s_client_tries_again_only_what_passes(error, asked, monkeypatch):
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_: 0)
    backend = Backend(error)
    client = openai.OpenAI(
        base_url="http://localhost/v1", api_key="x", max_retries=1, http_client=local(create_app(backend))
    )
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="slip", prompt="x")
    assert len(backend.asked) == asked
    assert (str(error) in caught.value.message) == (not isinstance(error, RuntimeError))


@pytest.mark.parametrize("error", [LinkError("generation stopped"), RuntimeError("a secret")])
def test_failures_in_the_middle_end_the_stream_without_done(error):
    client = local(create_app(Backend(error, after=1)), raise_server_exceptions=False)
    first, last = events(client.post(PLAIN, json={"prompt": "x", "stream": True}))
    assert first["choices"][0]["text"] == "Hel" and last["error"]["type"] == "server_error"
    assert "secret" not in last["error"]["message"]
    assert "Hel" not in client.post(PLAIN, json={"prompt": "x"}).text


def test_a_generation_that_just_ends_is_an_error():
    client = local(create_app(lambda request: iter([Chunk("Hel")])))
    error_of(client.post(PLAIN, json={"prompt": "x"}), 503)


def test_empty_chunks_are_no_answer_yet():
    chunks = [Chunk(""), Chunk("Hel"), Chunk(""), Chunk("", "stop", 3, 1)]
    client = local(create_app(lambda request: iter(chunks)))
    *shown, done = events(client.post(PLAIN, json={"prompt": "x", "stream": True}))
    assert [c["choices"][0]["text"] for c in shown] == ["Hel", ""] and done == "[DONE]"

    def late() -> Iterator[Chunk]:
        yield Chunk("")
        raise RequestError("the prompt is too long")

    error_of(local(create_app(lambda request: late())).post(PLAIN, json={"prompt": "x", "stream": True}), 400)


class Several:
    """Answers with its request's seed, in two pieces with logprobs."""

    def __init__(self) -> None:
        self.asked: list[GenerateRequest] = []

    def __call__(self, request: GenerateRequest) -> Iterator[Chunk]:
        self.asked.append(request)
        yield Chunk("é", None, 3, 1, [TokenLogprob("é", -0.5, [("é", -0.5), ("e", -1.5)])])
        text = f"{request.prompt}{request.seed}"
        yield Chunk(text, "stop", 3, 3, [TokenLogprob("\ufffd", -9999.0, [("\ufffd", -1.0), ("\ufffd", -2.0)])])


def test_several_choices_have_seeds_of_their_own():
    client = local(create_app(backend := Several()))
    body = {"prompt": ["a", "b"], "n": 3, "seed": 7}
    answer = client.post(PLAIN, json=body).json()
    assert [c["index"] for c in answer["choices"]] == list(range(6))
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 18, "total_tokens": 24}
    texts = [c["text"] for c in answer["choices"]]
    assert texts[0] == "éa7" and texts[3] == "éb7" and len(set(texts)) == 6
    assert [t[2:] for t in texts[:3]] == [t[2:] for t in texts[3:]]  # the seed depends on the choice alone
    assert texts == [c["text"] for c in client.post(PLAIN, json=body).json()["choices"]]
    assert len(client.post(PLAIN, json={"prompt": "a", "n": 2}).json()["choices"]) == 2
    assert {r.seed for r in backend.asked[-2:]} == {None}


def test_several_choices_streamed():
    client = local(create_app(Several()))
    body = HELLO | {"n": 3, "seed": 7, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = events(client.post(CHAT, json=body))
    assert done == "[DONE]" and usage["usage"]["total_tokens"] == 12 and usage["choices"] == []
    assert all(c["usage"] is None for c in chunks)
    for index in range(3):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert [m["finish_reason"] for m in mine] == [None, "stop"]
        assert mine[0]["delta"] == {"role": "assistant", "content": "é"} and "role" not in mine[1]["delta"]


def test_one_failing_choice_fails_the_request():
    closed = threading.Event()

    class Endless(Iterator[Chunk]):
        def __next__(self) -> Chunk:
            time.sleep(0.01)
            return Chunk("x")

        def close(self) -> None:
            closed.set()

    def generate(request: GenerateRequest) -> Iterator[Chunk]:
        if request.seed == 7:
            time.sleep(0.1)
            raise VerificationError("failed its check")
        return Endless()

    error_of(local(create_app(generate)).post(PLAIN, json={"prompt": "x", "n": 2, "seed": 7}), 502)
    assert closed.wait(10)


def test_logprobs_as_each_endpoint_words_them():
    client = local(create_app(backend := Several()))
    chat = client.post(CHAT, json=HELLO | {"logprobs": True, "top_logprobs": 2}).json()["choices"][0]["logprobs"]
    assert backend.asked[-1].logprobs == 2 and chat["refusal"] is None
    first, second = chat["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == ("é", -0.5, [0xC3, 0xA9])
    assert [t["token"] for t in first["top_logprobs"]] == ["é", "e"]
    assert second["bytes"] is None and second["logprob"] == -9999.0
    plain = client.post(PLAIN, json={"prompt": "x", "logprobs": 2}).json()["choices"][0]["logprobs"]
    assert plain == {
        "tokens": ["é", "\ufffd"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"é": -0.5, "e": -1.5}, {"\ufffd": -1.0}],
        "text_offset": [0, 1],
    }
    *chunks, _ = events(client.post(PLAIN, json={"prompt": "x", "logprobs": 2, "stream": True}))
    assert [c["choices"][0]["logprobs"]["text_offset"] for c in chunks] == [[0], [1]]
    client.post(CHAT, json=HELLO | {"logprobs": True})
    assert backend.asked[-1].logprobs == 0
    client.post(CHAT, json=HELLO | {"logprobs": False})
    assert backend.asked[-1].logprobs is None


def test_too_many_waiting_requests_are_told_to_come_back(monkeypatch):
    monkeypatch.setattr(generations, "MAX_WAITING", 2)
    go, answers, started = threading.Event(), [], []

    def generate(_: GenerateRequest) -> Iterator[Chunk]:
        started.append(1)
        yield Chunk("x")
        go.wait(10)
        yield Chunk("", "stop", 1, 1)

    with listening(create_app(generate)) as url:
        body = {"prompt": "x", "n": generations.MAX_GENERATIONS + 2}
        first = threading.Thread(target=lambda: answers.append(httpx.post(url + PLAIN, json=body, timeout=20)))
        first.start()
        wait_until(lambda: len(started) == generations.MAX_GENERATIONS)
        response = httpx.post(url + PLAIN, json={"prompt": "x"})
        assert error_of(response, 429)["code"] == "rate_limit_exceeded" and int(response.headers["retry-after"]) > 0
        go.set()
        first.join(20)
    assert answers[0].status_code == 200 and len(answers[0].json()["choices"]) == body["n"]


# --- the whole way: HTTP client, edge, trusted side ---------------------------------------------------


@contextlib.contextmanager
def listening(app) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]

        def stop() -> None:
            server.should_exit = True

        with running(lambda: server.run([sock]), stop):
            wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"


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
