"""The official client against a real server."""

import json
import socket
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import SecretStr

from qwen3_next.engine import LLM

CHAT: dict[str, Any] = {
    "model": "qwen3-next",
    "messages": [{"role": "user", "content": "Tell me a story about a dog."}],
    "temperature": 0,
    "max_completion_tokens": 12,
}
PROMPT: dict[str, Any] = {"model": "qwen3-next", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 9}


def test_chat_and_its_stream_are_the_engines_own(client: OpenAI, llm: LLM) -> None:
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)
    content, scores = answer.choices[0].message.content, answer.choices[0].logprobs
    assert content
    assert scores is not None
    assert scores.content is not None
    assert b"".join(bytes(one.bytes or ()) for one in scores.content).decode() == content
    assert all(len(one.top_logprobs) == 3 for one in scores.content)
    assert all(one.logprob <= one.top_logprobs[0].logprob for one in scores.content)
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == content
    assert chunks[-1].usage is not None
    assert answer.usage is not None
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens


def test_completions_and_their_stream_are_alike(client: OpenAI) -> None:
    answer = client.completions.create(**PROMPT)
    chunks = list(client.completions.create(**PROMPT, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason == "length"


def test_mistakes_are_the_clients_own_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="store"):
        client.chat.completions.create(**CHAT, store=True)
    with pytest.raises(openai.NotFoundError, match="other"):
        client.completions.create(**PROMPT | {"model": "other"})
    assert [model.id for model in client.models.list()] == ["qwen3-next"]


def wait_for(client: OpenAI, line: str) -> None:
    while line not in client.get("../metrics", cast_to=str):
        pass


def test_a_stream_that_is_left_ends_in_the_engine(client: OpenAI) -> None:
    with client.chat.completions.create(**CHAT | {"max_completion_tokens": 400}, stream=True) as stream:
        next(iter(stream))
    wait_for(client, "qwen3_next_open_requests 0.0")


def test_an_answer_that_nobody_waits_for_ends_in_the_engine(client: OpenAI) -> None:
    many = PROMPT | {"max_tokens": 400, "n": 30, "temperature": 1, "ignore_eos": True}
    data = json.dumps(many).encode()
    before = client.get("../metrics", cast_to=str)
    assert client.base_url.port is not None
    with socket.create_connection((client.base_url.host, client.base_url.port)) as left:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: {len(data)}\r\n\r\n"
        left.sendall(head.encode() + data)
        wait_for(client, "qwen3_next_open_requests 30.0")
    wait_for(client, "qwen3_next_open_requests 0.0")
    after = client.get("../metrics", cast_to=str)
    ended = [
        line for line in after.splitlines() if line.startswith('qwen3_next_finished_requests_total{reason="length"')
    ]
    assert ended == [line for line in before.splitlines() if line in ended]


def test_langchain_talks_to_it(client: OpenAI) -> None:
    model = ChatOpenAI(base_url=str(client.base_url), api_key=SecretStr("none"), model="qwen3-next", temperature=0)
    short = model.bind(max_tokens=12)
    answer = short.invoke([("system", "Be brief."), ("human", "Tell me a story about a dog.")])
    assert answer.content
    pieces = list(short.stream([("system", "Be brief."), ("human", "Tell me a story about a dog.")]))
    assert "".join(str(piece.content) for piece in pieces) == answer.content
    form = {
        "title": "pet",
        "type": "object",
        "properties": {"name": {"enum": ["dog", "cat"]}},
        "required": ["name"],
        "additionalProperties": False,
    }
    found = model.with_structured_output(form, method="json_schema").invoke("Name a pet.")
    assert isinstance(found, dict)
    assert found["name"] in ("dog", "cat")
