"""Streams that tell accepted drafts from the network's own tokens, and pieces of updates."""

import random
from typing import Any

import httpx
import pytest
from tests.server.conftest import Ask
from tests.server.test_app import BODY, CHAT, events_of, text_of

from qwen3_next.engine import LLM, AsyncEngine, EngineConfig, FinishReason, Step, StreamUpdate
from qwen3_next.engine.sampler import Drawn
from qwen3_next.server.drafts import Origin, cut

DRAFTS = {"stream": True, "stream_options": {"include_drafts": True}}


@pytest.fixture(scope="session")
def llm() -> LLM:
    config = EngineConfig(max_sequences=8, token_budget=256, max_context=512, memory_bytes=2**27, drafts=2)
    return LLM(dtype="float32", device="cpu", config=config)


def test_chunks_hold_drafts_or_other_tokens_and_add_up(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        body = BODY | {"max_tokens": 60, "ignore_eos": True, "logprobs": True, "n": 2, "seed": 3, "temperature": 0.5}
        plain = events_of((await client.post(CHAT, json=body | {"stream": True})).text)
        events = events_of((await client.post(CHAT, json=body | DRAFTS)).text)
        before = engine.llm.engine.drafts.figures.by_position
        for index in range(2):
            assert text_of(events, index) == text_of(plain, index)
        choices = [choice for event in events for choice in event["choices"] if "drafts" in choice]
        assert all(choice["drafts"]["accepted"] in (0, choice["drafts"]["tokens"]) for choice in choices)
        assert all(len(choice["logprobs"]["content"]) == choice["drafts"]["tokens"] for choice in choices)
        assert sum(choice["drafts"]["tokens"] for choice in choices) == 120
        assert sum(choice["drafts"]["accepted"] for choice in choices) > 20
        await client.post(CHAT, json=body | DRAFTS)
        told = events_of((await client.post(CHAT, json=body | DRAFTS)).text)
        after = engine.llm.engine.drafts.figures.by_position
        counts = [choice["drafts"] for event in told for choice in event["choices"] if "drafts" in choice]
        proposed = sum(one.proposed for one in after) - sum(one.proposed for one in before)
        assert 2 * sum(count["accepted"] + count["rejected"] for count in counts) == proposed > 0

    ask(use)


def test_completions_tell_drafts_too_and_others_are_spared(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        body = {"model": "qwen3-next", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 20}
        told = events_of((await client.post("/v1/completions", json=body | DRAFTS)).text)
        plain = events_of((await client.post("/v1/completions", json=body | {"stream": True})).text)
        assert sum(event["choices"][0]["drafts"]["tokens"] for event in told) == 20
        assert all("drafts" not in event["choices"][0] for event in plain)
        refused = await client.post(CHAT, json=BODY | {"stream_options": {"include_drafts": True}})
        assert (refused.status_code, "stream = true" in refused.text) == (400, True)

    ask(use)


def update_of(steps: list[Step], rest: str, **changes: Any) -> StreamUpdate:
    lengths = [length for step in steps for length in step.lengths]
    text = "".join(chr(97 + place % 26) * length for place, length in enumerate(lengths)) + rest
    settings: dict[str, Any] = {
        "sample": 1,
        "text": text,
        "token_ids": tuple(range(len(lengths))),
        "steps": tuple(steps),
        "finish": None,
        "error": None,
        "logprobs": tuple(Drawn(token, -1.0) for token in range(len(lengths))),
        "prompt_logprobs": None,
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "output_tokens": len(lengths),
    }
    return StreamUpdate(**(settings | changes))


def test_pieces_add_up_to_the_update(fresh_seed: int) -> None:
    chance = random.Random(fresh_seed)
    for _ in range(200):
        steps = [
            Step(lengths=tuple(lengths), accepted=chance.randint(0, len(lengths)), rejected=chance.randint(0, 2))
            for lengths in [
                [chance.randint(0, 4) for _ in range(chance.randint(1, 4))] for _ in range(chance.randint(0, 4))
            ]
        ]
        update = update_of(steps, chance.choice(["", "rest"]), finish=chance.choice([None, FinishReason.STOP]))
        parts = list(cut(update))
        assert "".join(part.text for part, _ in parts) == update.text
        assert tuple(token for part, _ in parts for token in part.token_ids) == update.token_ids
        assert tuple(drawn for part, _ in parts for drawn in part.logprobs or ()) == update.logprobs
        assert [part.finish for part, _ in parts] == [None] * (len(parts) - 1) + [update.finish]
        assert sum(origin.accepted for _, origin in parts) == sum(step.accepted for step in steps)
        assert sum(origin.rejected for _, origin in parts) == sum(step.rejected for step in steps)
        assert all(len(part.token_ids) == origin.tokens for part, origin in parts)


def test_text_goes_with_the_token_that_showed_it() -> None:
    steps = [Step(lengths=(2, 0, 3), accepted=2, rejected=0), Step(lengths=(1,), accepted=0, rejected=2)]
    parts = [(part.text, part.token_ids, origin) for part, origin in cut(update_of(steps, "held"))]
    assert parts == [("aa", (0, 1), Origin(2, 2, 0)), ("ccc", (2,), Origin(1, 0, 0)), ("dheld", (3,), Origin(1, 0, 2))]
    assert [(part.text, origin) for part, origin in cut(update_of([], "held"))] == [("held", Origin())]
