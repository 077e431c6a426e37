"""Who may ask the edge's API: requests for its own names, or with its key."""

from __future__ import annotations

import pytest
from edge_api import CHAT, HELLO, PLAIN, error_of, local
from starlette.testclient import TestClient

from sliplm.edge import options
from sliplm.edge.api import create_app
from sliplm.errors import IdentityError


@pytest.mark.parametrize(
    ("bound", "host", "answered"),
    [
        ("127.0.0.1", "127.0.0.1:8411", True),
        ("127.0.0.1", "LocalHost:8411", True),
        ("127.0.0.1", "[::1]:8411", True),
        ("127.0.0.1", "[::1]", True),
        ("127.0.0.1", "192.168.0.7:8411", False),
        ("127.0.0.1", "evil.example:8411", False),
        ("127.0.0.1", "localhost.evil.example", False),
        ("127.0.0.1", "", False),
        ("box.lan", "BOX.lan:8411", True),
        ("box.lan", "evil.example", False),
        ("0.0.0.0", "192.168.0.7:8411", True),
        ("0.0.0.0", "localhost", True),
        ("0.0.0.0", "evil.example", False),
        ("::", "[2001:db8::1]:8411", True),
        ("::", "evil.example", False),
    ],
)
def test_only_requests_for_its_own_names_are_answered(backend, bound, host, answered):
    """DNS rebinding: a web page whose name points here is still called by that name."""
    client = TestClient(create_app(backend, host=bound))
    for path, body in ((PLAIN, {"prompt": "x"}), (CHAT, HELLO)):
        response = client.post(path, json=body, headers={"host": host})
        assert response.status_code == (200 if answered else 403)
    if not answered:
        assert error_of(response, 403)["code"] == "forbidden" and not backend.asked
        error_of(client.get("/v1/models", headers={"host": host}), 403)


@pytest.mark.parametrize(
    ("origin", "answered"),
    [
        ("http://localhost", True),
        ("https://localhost", True),  # a proxy with TLS that hands Host on
        ("http://evil.example", False),
        ("null", False),
        ("http://localhost:3000", False),
        ("file://localhost", False),
    ],
)
def test_other_web_pages_are_refused(client, backend, origin, answered):
    response = client.post(PLAIN, json={"prompt": "x"}, headers={"origin": origin})
    assert response.status_code == (200 if answered else 403) and bool(backend.asked) == answered


def test_an_api_with_a_key_wants_it(backend):
    client = local(create_app(backend, lambda: "m", api_key="right"))
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "right"},
        {"authorization": "Bearer rigé"},
    ):
        encoded = {k: v.encode() for k, v in headers.items()}
        for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("GET", "/metrics"), ("GET", "/nowhere")):
            response = client.request(method, path, headers=encoded, json=HELLO)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    assert not backend.asked
    for path in ("/", "/healthz", "/readyz"):
        assert client.get(path).status_code == 200
    assert client.post(CHAT, json=HELLO, headers={"authorization": "Bearer right"}).status_code == 200
    assert client.get("/v1/models", headers={"authorization": "bearer right"}).status_code == 200


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"two\nlines", b"\xff", b"x" * 5000])
def test_a_file_that_holds_no_key(tmp_path, content):
    path = tmp_path / "key"
    with pytest.raises(IdentityError, match="cannot read"):
        options.read_key(path)
    path.write_bytes(content)
    with pytest.raises(IdentityError, match="does not hold"):
        options.read_key(path)
    path.write_bytes(b"a-good_key\n")
    assert options.read_key(path) == "a-good_key"


@pytest.mark.parametrize(
    ("host", "origin", "answered"),
    [
        ("edge:8411", None, True),
        ("host.docker.internal:8411", None, False),
        ("slip.example.com", "https://slip.example.com", True),
        ("127.0.0.1:8411", "https://slip.example.com", True),  # a proxy that sets Host
        ("127.0.0.1:8411", "https://evil.example", False),
        ("slip.example.com", "https://evil.example", False),
        ("edge:8411", "http://edge:3000", True),  # whoever owns the name owns what is there
        ("127.0.0.1:8411", "http://127.0.0.1:3000", False),
    ],
)
def test_names_that_the_api_was_given(backend, host, origin, answered):
    here = local(create_app(backend, api_key="right"))
    headers = {"host": "anything.example", "origin": "https://anything.example"}
    assert here.post(CHAT, json=HELLO, headers=headers).status_code == 401
    assert here.post(CHAT, json=HELLO, headers=headers | {"authorization": "Bearer right"}).status_code == 200
    assert here.get("/", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("given", "name", "host"),
    [
        ("Box.LAN", "box.lan", "BOX.lan:8443"),
        (" box.lan ", "box.lan", "box.lan"),
        ("box.lan.", "box.lan", "box.lan:80"),
        ("box.lan", "box.lan", "box.lan.:8443"),  # the same name, written in full
        ("my_edge", "my_edge", "my_edge:8411"),
        ("2001:DB8:0:0::1", "2001:db8::1", "[2001:db8::1]:8411"),
        ("[2001:db8::1]", "2001:db8::1", "[2001:DB8:0::1]"),
        ("192.168.0.7", "192.168.0.7", "192.168.0.7:8411"),
    ],
)
def test_names_are_taken_as_the_host_header_has_them(backend, given, name, host):
    assert options.read_name(given) == name
    here = TestClient(create_app(backend, names=[options.read_name(given)]))
    assert here.post(CHAT, json=HELLO, headers={"host": host}).status_code == 200
    for other in ("evil.example", f"evil.{host}", ""):
        assert here.post(CHAT, json=HELLO, headers={"host": other}).status_code == 403


@pytest.mark.parametrize(
    "text",
    ["", " ", ".", "box.lan:8443", "box.lan:", "[::1]:8411", "http://box.lan", "//box.lan", "box.lan/v1", "*.box.lan",
     "*", "b\xfccher.example", "two names", "a..b", ".lan", "10.0.0.300", "1234"],
)  # fmt: skip
def test_what_is_no_name(text):
    """It would never match, or, the empty one, match requests without a name."""
    with pytest.raises(IdentityError, match="without scheme, port or path"):
        options.read_name(text)


def test_an_address_that_the_api_is_bound_to_has_several_spellings(backend):
    here = TestClient(create_app(backend, host="2001:DB8:0::1"))
    assert here.get("/healthz", headers={"host": "[2001:db8::1]:8411"}).status_code == 200


APP = "https://app.example.com"
PREFLIGHT = {
    "origin": APP,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type, x-stainless-lang",
    "access-control-request-private-network": "true",
}


@pytest.mark.parametrize("key", [None, "right"])
def test_web_pages_that_may_ask(backend, key):
    """A browser asks for leave first, without the key; then it sends the request, and lets the page see the answer."""
    here = local(create_app(backend, lambda: "m", api_key=key, origins=[APP, "http://localhost:3000"]))
    leave = here.options(CHAT, headers=PREFLIGHT)
    assert leave.status_code == 200 and leave.headers["access-control-allow-origin"] == APP
    assert "POST" in leave.headers["access-control-allow-methods"]
    assert leave.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
    assert leave.headers["access-control-allow-private-network"] == "true"
    with_key = {"origin": APP, "authorization": f"Bearer {key}"}
    for stream in (False, True):
        answer = here.post(CHAT, json=HELLO | {"stream": stream}, headers=with_key)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == APP
        # A client in a page sees these two only if it may, and does not know otherwise when to try again.
        assert answer.headers["access-control-expose-headers"] == "retry-after, x-should-retry"
        assert "Origin" in answer.headers["vary"] and "access-control-allow-credentials" not in answer.headers
    for wrong in (here.post(CHAT, json={}, headers=with_key), here.get("/nowhere", headers=with_key)):
        assert wrong.status_code in (400, 404) and wrong.headers["access-control-allow-origin"] == APP
    if key:
        refused = here.post(CHAT, json=HELLO, headers={"origin": APP})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == APP


@pytest.mark.parametrize("origins", [[], [APP]])
@pytest.mark.parametrize("key", [None, "right"])
@pytest.mark.parametrize("origin", ["https://evil.example", f"{APP}.evil.example", "http://app.example.com", "null"])
def test_other_web_pages_get_no_leave(backend, origins, key, origin):
    here = local(create_app(backend, lambda: "m", api_key=key, origins=origins))
    leave = here.options(CHAT, headers=PREFLIGHT | {"origin": origin})
    assert leave.status_code >= 400 and "access-control-allow-origin" not in leave.headers
    answer = here.post(CHAT, json=HELLO, headers={"origin": origin, "authorization": "Bearer wrong"})
    assert answer.status_code == (401 if key else 403) and "access-control-allow-origin" not in answer.headers
    assert not backend.asked


def test_a_page_that_may_ask_may_not_rename_this_api(backend):
    """DNS rebinding from an allowed page's name stays what it is."""
    here = local(create_app(backend, origins=[APP]))
    assert here.post(CHAT, json=HELLO, headers={"origin": APP, "host": "app.example.com"}).status_code == 403


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://app.example.com/", APP),
        ("HTTPS://App.Example.com:443", APP),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:80/", "http://[::1]"),
        ("chrome-extension://abcdefghijklmnop", "chrome-extension://abcdefghijklmnop"),
    ],
)
def test_origins_are_taken_as_browsers_write_them(text, origin):
    assert options.read_origin(text) == origin


@pytest.mark.parametrize(
    "text", ["", "*", "null", "app.example.com", f"{APP}/page", f"{APP}?x", "https://a b", "https://*"]
)
def test_what_is_no_origin(text):
    with pytest.raises(IdentityError, match="not the origin"):
        options.read_origin(text)
