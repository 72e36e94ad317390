"""The server over the real engine, on a tiny model."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from fewbit.runtime.engine import Engine, SamplingParams

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def served(tiny_models, serve_engine):
    engine = Engine(tiny_models["tied"], slots=3, context=128, threads=1)
    engine.name = "tied"
    engine.tokenizer.chat_template = TEMPLATE
    return serve_engine(engine)


def complete(served, prompt, **options):
    defaults = {"max_tokens": 16, "temperature": 0, "extra_body": {"ignore_eos": True}}
    return served.client().completions.create(model="tied", prompt=prompt, **{**defaults, **options})


def test_answers_are_the_engines_own(served):
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    answer = complete(served, "hello there")
    assert answer.choices[0].text == served.engine.generate("hello there", params).text
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (11, 16)
    assert answer.choices[0].finish_reason == "length"
    seeded = SamplingParams(max_tokens=16, temperature=0.9, seed=8, ignore_eos=True)
    choices = complete(served, "hello there", temperature=0.9, seed=7, n=2).choices
    assert choices[1].text == served.engine.generate("hello there", seeded).text


def test_32_clients_at_once_get_what_one_alone_gets(served):
    prompts = [f"number {number} of 32: " for number in range(32)]
    alone = [complete(served, prompt).choices[0].text for prompt in prompts]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda prompt: complete(served, prompt).choices[0].text, prompts))
    assert together == alone


def test_a_stream_adds_up_and_its_logprobs_too(served):
    whole = complete(served, "once", logprobs=2)
    chunks = list(complete(served, "once", logprobs=2, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    tokens = [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens]
    assert tokens == whole.choices[0].logprobs.tokens
    assert len(tokens) == 16


def test_stop_strings_across_pieces(served):
    text = complete(served, "once").choices[0].text
    answer = complete(served, "once", stop=text[5:8]).choices[0]
    assert answer.text == text[: text.index(text[5:8])]
    assert answer.finish_reason == "stop"


def test_a_chat_reuses_what_the_turn_before_left(served):
    client = served.client()
    messages = [{"role": "user", "content": "tell me of the sea and the sky and the land"}]
    first = client.chat.completions.create(model="tied", messages=messages, max_tokens=4, temperature=0)
    assert first.usage.prompt_tokens == len("[user]" + messages[0]["content"] + "[assistant]")
    second = client.chat.completions.create(model="tied", messages=messages, max_tokens=4, temperature=0)
    assert second.usage.prompt_tokens_details.cached_tokens > 0
    assert second.choices[0].message.content == first.choices[0].message.content


def test_clients_that_leave_free_their_slots(served, until):
    async def leave():
        async with served.async_client() as client:
            streams = [
                await client.completions.create(
                    model="tied", prompt="a", max_tokens=120, stream=True, extra_body={"ignore_eos": True}
                )
                for _ in range(3)
            ]
            for stream in streams:
                await stream.close()

    asyncio.run(leave())
    until(lambda: served.engine.stats()["running"] == 0)
    until(lambda: served.admission.count == 0)
    assert complete(served, "still here").choices


def test_what_the_engine_refuses_is_a_bad_request(served):
    too_long = httpx2.post(f"{served.url}/v1/completions", json={"prompt": "x" * 128})
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "context_length_exceeded")
    outside = httpx2.post(f"{served.url}/v1/completions", json={"prompt": [96]})
    assert outside.status_code == 400
    served.engine.tokenizer.chat_template, template = None, served.engine.tokenizer.chat_template
    chat = httpx2.post(f"{served.url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    served.engine.tokenizer.chat_template = template
    assert chat.status_code == 400
    assert "chat template" in chat.json()["error"]["message"]
