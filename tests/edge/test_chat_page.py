"""The chat page in a real browser, in front of an API whose model says what it is told to."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from edge_api import listening
from starlette.testclient import TestClient

from sliplm.edge.api import create_app, page
from sliplm.errors import LinkError, VerificationError
from sliplm.protocol.messages import Chunk, GenerateRequest

pytestmark = pytest.mark.slow

needs_browser = pytest.mark.skipif(browser.find() is None, reason="Chromium is not installed: apt-get install chromium")
EVIL = '<img src=x onerror="document.title=1"><script>document.title="2"</script>'
RICH = f"""# A heading

Some **bold** text, `code <b>` and {EVIL}:

```python
def f():
    return "<b>"
```

- one
- two

3. three"""


class Model:
    """Says what it was asked to say; special questions make it fail, or never end."""

    def __init__(self) -> None:
        self.asked: list[GenerateRequest] = []
        self.cancelled = threading.Event()

    def __call__(self, request: GenerateRequest) -> Iterator[Chunk]:
        self.asked.append(request)
        question = request.messages[-1].content
        if question == "break":
            yield Chunk("half an ")
            raise LinkError("generation stopped")
        if question == "cheat":
            raise VerificationError("an answer of this edge failed its check")
        if question == "talk":
            yield from self._endless()
        count = 0
        for count, piece in enumerate(re.findall(r"\s*\S+", question), 1):
            yield Chunk(piece, None, 5, count)
            time.sleep(0.002)
        yield Chunk("", "stop", 5, count)

    def _endless(self) -> Iterator[Chunk]:
        try:
            while True:
                yield Chunk("word ")
                time.sleep(0.01)
        except GeneratorExit:
            self.cancelled.set()
            raise


class Closable(Iterator[Chunk]):
    """As the edge's generations: may be closed from any thread."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self._chunks, self._lock, self._closed = chunks, threading.Lock(), False

    def __next__(self) -> Chunk:
        with self._lock:
            if self._closed:
                raise LinkError("cancelled")
            return next(self._chunks)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._chunks.close()  # type: ignore[attr-defined]


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def up() -> list[bool]:
    return [True]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    started = browser.Browser(tmp_path_factory.mktemp("chromium"))
    yield started
    started.close()


@pytest.fixture
def tab(chromium: browser.Browser, model: Model, up: list[bool]) -> Iterator[browser.Browser]:
    app = create_app(lambda r: Closable(model(r)), lambda: "tiny-model", lambda: up[0], "127.0.0.1")
    with listening(app) as url:
        chromium.problems.clear()
        chromium.open(url)
        chromium.until("document.querySelector('#model').textContent === 'tiny-model'")
        yield chromium
        chromium.open("about:blank")


def say(tab: browser.Browser, text: str) -> None:
    tab.type(text)
    tab.press("Enter", 13, "\r")


def last(tab: browser.Browser) -> str:
    return tab.run("[...document.querySelectorAll('article.assistant')].at(-1)?.innerText ?? ''")


def idle(tab: browser.Browser) -> None:
    tab.until("document.querySelector('#log').ariaBusy === 'false'")


def test_it_loads_nothing_and_runs_nothing_else() -> None:
    client = TestClient(create_app(lambda r: iter(())), base_url="http://localhost")
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert policy.count("sha256-") == 2
    html = page.FILE.read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:)", html) and "innerHTML" not in html
    assert not re.search(r"\son\w+=|\sstyle=", html)  # the policy would block them
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg", "", html)


@needs_browser
def test_a_conversation_by_keyboard(tab: browser.Browser, model: Model) -> None:
    assert tab.run("document.activeElement.id") == "text"
    tab.type("first line")
    tab.press("Enter", 13, "\r", modifiers=8)  # with Shift
    say(tab, "second")
    idle(tab)
    assert last(tab).startswith("first line\nsecond") and "3 tokens" in last(tab)
    say(tab, "and again")
    idle(tab)
    roles = [m.role for m in model.asked[-1].messages]
    assert roles == ["user", "assistant", "user"] and model.asked[-1].messages[1].content == "first line\nsecond"
    tab.run("document.querySelector('#system').value = 'Be brief.'")
    tab.run("document.querySelector('#new').click()")
    say(tab, "fresh")
    idle(tab)
    assert [(m.role, m.content) for m in model.asked[-1].messages] == [("system", "Be brief."), ("user", "fresh")]
    assert not tab.problems


@needs_browser
def test_text_of_the_model_stays_text(tab: browser.Browser) -> None:
    say(tab, RICH)
    idle(tab)
    inside = "document.querySelector('article.assistant')"
    assert tab.run(f"{inside}.querySelectorAll('img, script, b').length") == 0
    assert "onerror" in last(tab) and tab.run("document.title") == "tiny-model · SLIP chat"
    for selector, shown in (("h3", "A heading"), ("strong", "bold"), ("p code", "code <b>"), ("li", "one")):
        assert tab.run(f"{inside}.querySelector('{selector}').textContent") == shown
    assert tab.run(f"{inside}.querySelector('pre').textContent") == 'def f():\n    return "<b>"'
    assert tab.run(f"{inside}.querySelector('ol').start") == 3
    say(tab, EVIL)
    idle(tab)
    assert tab.run("document.querySelectorAll('main img, main script').length") == 0 and not tab.problems


@needs_browser
def test_the_policy_blocks_what_gets_in(tab: browser.Browser) -> None:
    """Even if HTML did get in, its scripts and images would not be loaded."""
    script = "(() => { try { document.body.innerHTML = '<img src=/x onerror=alert(1)>'; return 'in' } catch (e) { return e.name } })()"  # noqa: E501
    assert tab.run(script) == "TypeError"
    tab.run("{ const s = document.createElement('img'); s.src = 'http://localhost/x.png'; document.body.append(s) }")
    tab.until("true")
    assert any("Content Security Policy" in p or "TrustedHTML" in p for p in tab.problems)


@needs_browser
@pytest.mark.parametrize("how", ["button", "key"])
def test_stopping(tab: browser.Browser, model: Model, how: str) -> None:
    say(tab, "talk")
    tab.until("document.querySelector('article.assistant')?.innerText.includes('word word')")
    assert tab.run("document.querySelector('#send').hidden")
    if how == "button":
        tab.run("document.querySelector('#stop').click()")
    else:
        tab.press("Escape", 27)
    idle(tab)
    assert last(tab).endswith("stopped") and model.cancelled.wait(10)
    say(tab, "go on")
    idle(tab)
    assert [m.role for m in model.asked[-1].messages] == ["user", "assistant", "user"]


@needs_browser
def test_errors_are_shown_and_can_be_tried_again(tab: browser.Browser, model: Model, up: list[bool]) -> None:
    say(tab, "cheat")
    idle(tab)
    assert "failed its check" in tab.run("document.querySelector('[role=alert]').innerText")
    tab.run("document.querySelector('[role=alert] button').click()")
    idle(tab)
    tab.until("document.querySelectorAll('[role=alert]').length === 1")
    assert [m.content for m in model.asked[-1].messages] == ["cheat"]
    tab.run("document.querySelector('#new').click()")
    say(tab, "break")
    idle(tab)
    assert "Incomplete" in last(tab) and "generation stopped" in tab.run("document.querySelector('main').innerText")
    up[0] = False
    tab.until("document.querySelector('#state').innerText.includes('away')")


@needs_browser
def test_it_asks_for_the_key(chromium: browser.Browser, model: Model) -> None:
    with listening(create_app(model, lambda: "m", host="127.0.0.1", api_key="sk-1")) as url:
        chromium.open(url)
        chromium.until("document.querySelector('#state').innerText === 'needs its key'")
        say(chromium, "hi")
        chromium.until("document.querySelector('[role=alert]')?.innerText.includes('needs its key')")
        chromium.run("document.querySelector('#settings').click()")
        chromium.run("document.querySelector('#key').value = 'sk-1'")
        chromium.run("document.querySelector('#options').close()")
        chromium.until("document.querySelector('#model').textContent === 'm'")
        chromium.run("document.querySelector('[role=alert] button').click()")
        chromium.until("document.querySelector('article.assistant')?.innerText.includes('hi')")
        chromium.open("about:blank")


@needs_browser
@pytest.mark.parametrize(("width", "height", "dark", "phone"), [(1100, 800, False, False), (390, 780, True, True)])
def test_it_fits(tab: browser.Browser, tmp_path: Path, width: int, height: int, dark: bool, phone: bool) -> None:
    tab.resize(width, height, dark, phone)
    say(tab, "What can you show me?")
    idle(tab)
    say(tab, RICH + "\n\n" + "a_very_long_word_" * 30 + "\n```\n" + "x" * 400 + "\n```")
    idle(tab)
    assert tab.run("document.documentElement.scrollWidth") <= width
    box = tab.run("JSON.stringify(document.querySelector('#send').getBoundingClientRect())")
    edges = json.loads(box)
    assert edges["right"] <= width and edges["bottom"] <= height
    dark_page = tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 23)"
    assert dark_page == dark
    tab.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
    tab.resize(1100, 800)


@needs_browser
@pytest.mark.parametrize("allowed", [True, False])
def test_a_page_from_elsewhere(chromium: browser.Browser, model: Model, allowed: bool) -> None:
    """As `dangerouslyAllowBrowser` in OpenAI's client: a page of another origin, and an API with a key."""
    with listening(create_app(model, host="127.0.0.1")) as page_of_somebody:
        elsewhere = page_of_somebody.replace("127.0.0.1", "localhost")
        app = create_app(
            model, host="127.0.0.1", api_key="right", origins=[elsewhere] if allowed else ["https://x.example"]
        )
        with listening(app) as api:
            body = json.dumps({"messages": [{"role": "user", "content": "hello there"}]})
            headers = '{"Content-Type": "application/json", "Authorization": "Bearer right", "X-Stainless-Lang": "js"}'
            options = f'{{method: "POST", headers: {headers}, body: {json.dumps(body)}}}'
            script = f"""fetch("{api}/v1/chat/completions", {options})
                         .then(r => r.json()).then(a => a.choices[0].message.content).catch(e => e.name)"""
            chromium.open(f"{elsewhere}/healthz")
            assert chromium.run(script) == ("hello there" if allowed else "TypeError")
            assert bool(model.asked) == allowed
            chromium.open("about:blank")
