"""LangChain and LlamaIndex: text."""

from __future__ import annotations

import pytest
from conftest import CAPITAL, Server
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableLambda
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

QUESTION = CAPITAL[0]["content"]


@pytest.fixture
def langchain(server: Server) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=server.url, api_key=server.key, model=server.model, temperature=0, max_tokens=8, max_retries=0
    )


def test_langchain(langchain: ChatOpenAI) -> None:
    answer = langchain.invoke(QUESTION)
    assert "Paris" in answer.content and answer.usage_metadata["output_tokens"] <= 8
    assert "".join(chunk.content for chunk in langchain.stream(QUESTION)) == answer.content
    again = langchain.invoke([HumanMessage(QUESTION), answer, HumanMessage("And of Italy?")])
    assert isinstance(again, AIMessage) and again.content


def test_langchain_falls_back_from_a_prompt_that_is_too_long(
    langchain: ChatOpenAI, too_long: list[dict[str, str]]
) -> None:
    with pytest.raises(ContextOverflowError, match="8192"):
        langchain.invoke(too_long)
    larger = RunnableLambda(lambda _: AIMessage("from a larger model"))
    either = langchain.with_fallbacks([larger], exceptions_to_handle=(ContextOverflowError,))
    assert either.invoke(too_long).content == "from a larger model"


def test_llama_index(server: Server) -> None:
    llm = OpenAILike(
        model=server.model, api_base=server.url, api_key=server.key, is_chat_model=True, context_window=8192,
        temperature=0, max_tokens=8, max_retries=0,
    )  # fmt: skip
    question = ChatMessage(role="user", content=QUESTION)
    answer = llm.chat([question])
    assert "Paris" in answer.message.content
    streamed = list(llm.stream_chat([question]))
    assert "".join(piece.delta or "" for piece in streamed) == answer.message.content
    assert llm.chat([question, answer.message, ChatMessage(role="user", content="And of Italy?")]).message.content
    assert "Paris" in llm.complete(QUESTION).text
