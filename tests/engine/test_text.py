"""Answers as text: where they end, their first space, their last character, and what chat templates make of chats."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import transformers
from loading import attached
from texts import CHATML, GEMMA, LLAMA3, MISTRAL, WORDY, llama_tokenizer, make_bundle, say
from tiny import byte_tokenizer

from sliplm.engine.builtin import BuiltinEngine
from sliplm.engine.detokenise import Text, special_tokens
from sliplm.engine.stops import StopTexts, end_tokens
from sliplm.engine.template import Chat
from sliplm.errors import RequestError, SlipError
from sliplm.protocol.messages import GenerateRequest, Message

CHAT = {"messages": [Message("user", "Hello")]}
SMILE = ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
Say = Callable[..., Any]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> BuiltinEngine:
    """Its generation settings know one end token of three."""
    tokenizer = llama_tokenizer(CHATML)
    start = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    directory = make_bundle(tmp_path_factory.mktemp("llama"), tokenizer, {"eos_token_id": start}, eos_token_id=start)
    return attached(BuiltinEngine(directory, stock=0))


# --- where an answer ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["<|eot_id|>", "</s>", "<|im_end|>"])
def test_whoever_knows_an_end_token_ends_the_answer(
    engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    for how in (CHAT, {"prompt": "The"}):
        text, last = say(engine, monkeypatch, ["▁Paris", end, "▁is", "▁is"], **how)
        assert text.strip() == "Paris" and last.finish_reason == "stop" and last.completion_tokens == 2


@pytest.mark.slow
def test_the_real_models_end_of_turn_counts_beside_a_configuration_that_lacks_it(smollm2: str) -> None:
    path = Path(smollm2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_tokens(tokenizer, 0, Chat(tokenizer, len(tokenizer)), len(tokenizer)) == sorted(
        {0, turn, tokenizer.eos_token_id}
    )


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA3, "<|eot_id|>"),
        (GEMMA, "<end_of_turn>"),
        (MISTRAL, "</s>"),
        (WORDY, None),
        (CHATML.replace("<|im_end|>", "<plain_end>"), "<plain_end>"),
        # closed only before another turn, or in another way there
        ("{% for m in messages %}{{ m.content }}{% if not loop.last %}<|call|>{% endif %}{% endfor %}", "<|call|>"),
        (
            "{% for m in messages %}{{ m.content }}{{ '<|im_end|>' if loop.last else '<|call|>' }}{% endfor %}",
            "<|im_end|>",
        ),
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_the_end_of_a_turn_is_found_in_the_template(template: str | None, end: str | None) -> None:
    tokenizer = llama_tokenizer(template)
    found = Chat(tokenizer, len(tokenizer)).end_of_turn()
    assert found == (None if end is None else tokenizer.convert_tokens_to_ids(end))


def test_an_end_token_that_is_not_special_is_no_part_of_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = llama_tokenizer(CHATML.replace("<|im_end|>", "<plain_end>"))
    engine = attached(BuiltinEngine(make_bundle(tmp_path, tokenizer), stock=0))
    text, last = say(engine, monkeypatch, ["▁Paris", "<plain_end>", "▁is"], **CHAT)
    assert (text, last.finish_reason) == ("Paris", "stop")


def test_ends_that_the_model_does_not_have_are_no_ends() -> None:
    tokenizer = byte_tokenizer()
    for configured in (None, 999, [3, 999, None, "x"], -1):
        assert end_tokens(tokenizer, configured, Chat(tokenizer, 257), 257) == (
            [3, 256] if configured == [3, 999, None, "x"] else [256]
        )


@pytest.mark.parametrize(
    ("stop", "text", "finish"),
    [
        ("<|call|>", " Paris", "stop"),
        ("Paris<|call|>", " ", "stop"),
        ("<|call|> is", " Paris", "stop"),
        ("<|call|>Paris", " Paris is.", "length"),
        ("is.<|call|>", " Paris is.", "length"),
        ("s is", " Pari", "stop"),  # without a special token: in what the reader sees
        ("|call|", " Paris is.", "length"),
    ],
)
def test_a_stop_text_may_contain_a_special_token(
    engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch, stop: str, text: str, finish: str
) -> None:
    tokens = ["▁Paris", "<|call|>", "▁is", "."]
    got, last = say(engine, monkeypatch, tokens, prompt="The", stop=["never", stop])
    assert (got, last.finish_reason) == (text, finish)


def test_no_text_is_sent_that_may_be_the_beginning_of_a_stop_text() -> None:
    tokenizer = llama_tokenizer()
    silent = special_tokens(tokenizer)
    markers = tokenizer.convert_ids_to_tokens(sorted(silent))
    text, stops = Text(tokenizer, silent), StopTexts(["is.<|call|> The"], markers)
    certain = []
    for token in tokenizer.convert_tokens_to_ids(["▁Paris", "▁is", ".", "<|call|>", "▁The"]):
        text.push(token)
        certain.append(stops.certain(text))
    assert text.full == "Paris is.<|call|> The" and text.shown == "Paris is. The"
    assert certain[:4] == [3, 6, 6, 6] and stops.find(text) == 6


# --- its first and its last character ---------------------------------------------------------------------------


def test_a_continued_text_keeps_its_first_space(engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert say(engine, monkeypatch, ["▁Paris", "▁is", "."], prompt="The")[0] == " Paris is."
    assert say(engine, monkeypatch, ["is", "▁Paris"], prompt="The Par")[0] == "is Paris"
    assert say(engine, monkeypatch, ["▁▁▁", "▁return"], prompt="The:")[0] == "    return"
    assert say(engine, monkeypatch, ["<|call|>", "▁Paris"], prompt="The")[0] == " Paris"


def test_a_chats_answer_begins_without_one(engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert say(engine, monkeypatch, ["▁Paris", "▁is"], **CHAT)[0] == "Paris is"
    assert say(engine, monkeypatch, ["<|call|>", "▁Paris", "▁is"], **CHAT)[0] == "Paris is"


def test_an_answer_that_is_cut_ends_with_a_whole_character(
    engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = ["▁Paris", *SMILE, "▁is"]
    for count, text in [(1, " Paris"), (2, " Paris"), (4, " Paris"), (5, " Paris😀"), (6, " Paris😀 is")]:
        got, last = say(engine, monkeypatch, tokens, prompt="The", max_tokens=count)
        assert (got, last.finish_reason, last.completion_tokens) == (text, "length", count)
    broken = ["▁Paris", *SMILE[:2], "<|call|>"]
    assert say(engine, monkeypatch, broken, prompt="The")[0] == " Paris"
    # what is in the middle, or what the model ends with, it has said
    assert say(engine, monkeypatch, [*broken, "▁is"], prompt="The")[0] == " Paris\ufffd\ufffd is"
    assert say(engine, monkeypatch, [*broken[:3], "</s>"], prompt="The")[0] == " Paris\ufffd\ufffd"


@pytest.mark.parametrize("make", [llama_tokenizer, byte_tokenizer])
def test_the_pieces_are_the_whole(make: Callable[[], Any]) -> None:
    tokenizer = make()
    draw = random.Random(0)
    silent = special_tokens(tokenizer)
    for _ in range(50):
        words = "".join(draw.choice(["Paris ", "é", "😀", "  ", "a", "\n", "漢字"]) for _ in range(12))
        ids = tokenizer(words, add_special_tokens=False)["input_ids"]
        for _ in range(draw.randrange(3)):
            ids.insert(draw.randrange(len(ids)), draw.choice(sorted(silent)))
        text, pieces = Text(tokenizer, silent), []
        for token in ids:
            text.push(token)
            pieces.append(text.shown)
        text.finish()
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        if "\ufffd" not in whole + text.shown:  # a special token may have come between the bytes of a character
            assert text.shown == whole
        assert all(b.startswith(a) for a, b in itertools.pairwise(pieces))
        assert text.shown_before(len(text.full)) == len(text.shown) and text.count == len(ids)


class Straddling:
    """Two bytes a token, the first of which ends a character: as byte-level tokenizers have for some alphabets."""

    added_tokens_decoder: ClassVar[dict[int, Any]] = {}
    all_special_ids = ()

    def decode(self, ids: list[int]) -> str:
        self.longest = max(getattr(self, "longest", 0), len(ids))
        return b"".join(i.to_bytes(2, "big") for i in ids).decode("utf-8", "replace")


def shown(tokenizer: Any, ids: list[int]) -> str:
    text = Text(tokenizer, set())
    for token in ids:
        text.push(token)
    text.finish()
    assert text.full == text.shown and text.count == len(ids)
    return text.shown


@pytest.mark.parametrize("words", ["éжßλ", "éжßλ漢字", "漢a"])
def test_tokens_that_straddle_characters(words: str) -> None:
    for length in (*range(2, 80, 2), 300):
        data = (b"!" + words.encode() * 50)[:length]
        ids = [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data) - 1, 2)]
        tokenizer = Straddling()
        assert shown(tokenizer, ids) == tokenizer.decode(ids)


def test_what_is_no_character_costs_no_more_than_text() -> None:
    tokenizer = Straddling()
    assert shown(tokenizer, [0xFFFF] * 500 + [0x4142]) == "\ufffd" * 1000 + "AB"
    assert tokenizer.longest <= 16
    made = llama_tokenizer()
    bad = made.convert_tokens_to_ids("<0xFF>")
    assert shown(made, [bad] * 100 + made.convert_tokens_to_ids(["▁is"])) == "\ufffd" * 100 + " is"


def test_a_decoder_that_leaves_unfinished_characters_out() -> None:
    tokenizer = transformers.ByT5Tokenizer()
    words = "Köln 漢字 😀, ça"
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    assert shown(tokenizer, ids) == words
    stray = tokenizer.convert_tokens_to_ids([chr(0xFF)])
    assert shown(tokenizer, stray * 20 + ids) == words


# --- chats ------------------------------------------------------------------------------------------------------


def rendered(chat: Chat, tokenizer: Any, *messages: tuple[str, str]) -> str:
    ids = chat.tokens([Message(*m) for m in messages])
    return str(tokenizer.decode(ids))


@pytest.mark.parametrize("template", [GEMMA, MISTRAL])
def test_a_template_without_a_system_role_gets_it_in_the_users_turn(template: str) -> None:
    """Gemma's raises, others leave it out."""
    tokenizer = llama_tokenizer(template)
    chat = Chat(tokenizer, len(tokenizer))
    assert chat.refusal is None
    system, user = ("system", "Be brief."), ("user", "Hello")
    assert "Be brief.\n\nHello" in rendered(chat, tokenizer, system, user)
    assert "Be brief." in rendered(chat, tokenizer, system)
    assert "Hello" in rendered(chat, tokenizer, user) and "Be" not in rendered(chat, tokenizer, user)
    later = rendered(chat, tokenizer, system, user, ("assistant", "Paris"), ("user", "is"))
    assert later.count("Be brief.") == 1


def test_a_template_with_a_system_role_gets_it_there() -> None:
    tokenizer = llama_tokenizer(CHATML)
    chat = Chat(tokenizer, len(tokenizer))
    text = rendered(chat, tokenizer, ("system", "Be brief."), ("user", "Hello"))
    assert "system\nBe brief.<|im_end|>" in text.replace("> ", ">")


FAULTS = [
    (None, "no chat template"),
    ("{% for m in messages %}{{ m.content }}", "does not work"),
    ("{{ 1 / 0 }}", "does not work"),
    ("{% if false %}{{ messages }}{% endif %}", "renders nothing"),
    ("{% for m in messages %}{{ m.role }}{% endfor %}assistant:", "leaves out"),
]


@pytest.mark.parametrize(("template", "why"), FAULTS)
def test_a_model_without_a_working_template_says_so_and_still_completes(
    engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch, template: str | None, why: str
) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    monkeypatch.setattr(engine, "chat", Chat(engine.tokenizer, len(engine.tokenizer)))
    assert why in (engine.chat.refusal or "")
    with pytest.raises(RequestError, match="takes no chats"):
        list(engine.generate(GenerateRequest(**CHAT), engine.model.slip.default_link))
    with pytest.raises(SlipError, match=why):
        engine.rehearse("Be brief.")
    assert say(engine, monkeypatch, ["▁Paris"], prompt="The")[0] == " Paris"


def test_the_reason_is_logged_at_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="sliplm")
    attached(BuiltinEngine(make_bundle(tmp_path, llama_tokenizer()), stock=0))
    assert "plain prompts only, no chats: it has no chat template" in caplog.text


def test_a_chat_of_which_the_template_makes_nothing_is_refused(
    engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    chat = Chat(engine.tokenizer, len(engine.tokenizer))
    with pytest.raises(RequestError, match="makes nothing"):
        chat.tokens([Message("assistant", "Hello")])


def test_the_owners_system_prompt_is_tried_at_start(engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.rehearse("Be brief.")
    with pytest.raises(SlipError, match="too long"):
        engine.rehearse("Be brief. " * 100)
    monkeypatch.setattr(engine.tokenizer, "chat_template", GEMMA)
    monkeypatch.setattr(engine, "chat", Chat(engine.tokenizer, len(engine.tokenizer)))
    engine.rehearse("Be brief.")
    monkeypatch.setattr(engine.tokenizer, "chat_template", "{{ raise_exception('I want tools') }}")
    with pytest.raises(SlipError, match="I want tools"):
        engine.rehearse("Be brief.")
