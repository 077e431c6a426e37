"""The edge's OpenAI-compatible API: its formats."""

from __future__ import annotations

from collections.abc import Iterator

from edge_api import CHAT, HELLO, PLAIN, Backend, error_of, events, local

from sliplm.edge.api import create_app
from sliplm.errors import RequestError
from sliplm.protocol.messages import Chunk, GenerateRequest, Message, TokenLogprob


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


def test_usage_counts_guessed_tokens(backend, monkeypatch):
    last = Chunk("", "stop", 3, 9, accepted_tokens=5, rejected_tokens=2)
    answer = local(create_app(lambda _: iter([Chunk("x"), last]))).post(CHAT, json=HELLO | {"n": 2}).json()
    details = {"accepted_prediction_tokens": 10, "rejected_prediction_tokens": 4}
    assert answer["usage"]["completion_tokens"] == 18 and answer["usage"]["completion_tokens_details"] == details


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
