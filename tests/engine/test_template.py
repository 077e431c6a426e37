"""What chat templates make of chats: what the owner says is there, or the chat is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import templates
from loading import attached
from tiny import byte_tokenizer

from sliplm.engine.builtin import BuiltinEngine
from sliplm.engine.once import Once
from sliplm.engine.template import Chat
from sliplm.engine.tools import find_syntax
from sliplm.errors import RequestError, SlipError
from sliplm.protocol.messages import GenerateRequest, Message, Tool, ToolCall
from sliplm.serve.rules import SystemPrompt

OWNER = "  Never talk of Xanadu. "
USER = Message("user", "Hi")
TOOL = Tool("f", "A function")
CALL = ToolCall("abcdef123", "f", "{}")
CALLED = [USER, Message("assistant", "", [CALL]), Message("tool", "rain", [], CALL.id)]
QUOTED = [USER, Message("assistant", OWNER), Message("tool", OWNER, [], CALL.id)]


def prompt(template: Any, messages: list[Message], *tools: Tool) -> str:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.bos_token = "<s>"
    request = SystemPrompt(OWNER).request(GenerateRequest(messages=messages, tools=list(tools)), "laptop")
    return str(tokenizer.decode(Chat(tokenizer, len(tokenizer)).tokens(request.messages or [], request.tools)))


@pytest.mark.parametrize("messages", [[USER], CALLED, QUOTED, [USER, Message("assistant", "Sure, ")]])
@pytest.mark.parametrize("tools", [[], [TOOL], [Tool("f", OWNER)]])
@pytest.mark.parametrize("template", ["HERMES", "LLAMA", "MISTRAL", "MISTRAL_LAST", "FORGETFUL", "FUNCTION"])
def test_the_owners_words_are_in_every_prompt(template: str, messages: list[Message], tools: list[Tool]) -> None:
    text = prompt(getattr(templates, template), messages, *tools)
    quoted = sum(m.content == OWNER for m in messages) + sum(t.description == OWNER for t in tools)
    assert text.count(OWNER.strip()) == quoted + 1


@pytest.mark.parametrize("messages", [CALLED, QUOTED])
def test_a_chat_in_which_they_cannot_be_is_refused(messages: list[Message]) -> None:
    last = "{{ messages[-1].content }}"
    with pytest.raises(RequestError, match="leaves out a system message"):
        prompt(last, messages)
    assert OWNER.strip() in prompt(last, [USER])


def test_a_system_message_in_the_middle_is_not_dropped_silently() -> None:
    with pytest.raises(RequestError, match="leaves out a system message"):
        prompt(templates.MISTRAL, [USER, Message("system", "Be brief."), USER])


INSISTS = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
PARTS = templates.FUNCTION.replace("m.content", "m.content[0]['text']")


@pytest.mark.parametrize("template", [INSISTS + templates.FUNCTION, PARTS, INSISTS + PARTS])
def test_templates_get_what_they_insist_on(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    chat = Chat(tokenizer, 257)
    assert chat.refusal is None and chat.wants_system == ("system first" in template)
    assert find_syntax(chat.example).head == "<function=" and prompt(template, [USER]).count(OWNER) == 1
    assert "rain" in prompt(template, CALLED, TOOL)
    if chat.wants_system:
        with pytest.raises(RequestError, match="wants a system message at the beginning"):
            chat.tokens([USER])
    else:
        assert tokenizer.decode(chat.tokens([USER])) == "<user>Hi<eos><assistant>"


def test_they_are_tried_at_start_with_tools_too(tiny_split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = attached(BuiltinEngine(tiny_split / "trusted", stock=0))
    monkeypatch.setattr(engine, "_room", 4000)
    for template in (templates.HERMES, templates.FORGETFUL):
        monkeypatch.setattr(engine.tokenizer, "chat_template", template)
        monkeypatch.setattr(engine, "_syntax", Once(lambda: find_syntax(engine.chat.example)))
        engine.rehearse(OWNER)
    short = {
        **templates.FORGETFUL,
        "tool_use": templates.FORGETFUL["tool_use"].replace("m.content +", "m.content[:9] +"),
    }
    monkeypatch.setattr(engine.tokenizer, "chat_template", short)
    with pytest.raises(SlipError, match="leaves out a system message"):
        engine.rehearse(OWNER)
