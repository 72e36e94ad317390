"""What OpenAI's own client package gets from the server."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx2
import pytest

from fewbit.runtime.results import Piece, TokenLogprob
from fewbit.serve.answers import LOWEST_LOGPROB, ChatAnswer, Choice, CompletionAnswer

HELLO = [{"role": "user", "content": "hello"}]


def complete(client, prompt="hello", **options):
    return client.completions.create(model="fake", prompt=prompt, **{"max_tokens": 12, "temperature": 0, **options})


def chat(client, messages=HELLO, **options):
    return client.chat.completions.create(
        model="fake", messages=messages, **{"max_tokens": 12, "temperature": 0, **options}
    )


def test_models_are_listed_and_found_by_name(shared):
    client = shared.client()
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.max_model_len) == ("fake", "fewbit", 1000)
    assert client.models.retrieve("fake") == model


def test_a_completion_has_text_reason_and_usage(shared):
    answer = complete(shared.client())
    assert answer.object == "text_completion"
    assert answer.model == "fake"
    assert len(answer.choices[0].text) == 12
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 12, 17)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_a_completion_defaults_to_16_tokens_and_a_chat_to_what_the_context_holds(shared):
    client = shared.client()
    assert client.completions.create(model="fake", prompt="a").usage.completion_tokens == 16
    answer = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "x" * 900}])
    assert answer.usage.total_tokens == 1000


def test_defaults_of_sampling_are_openais(serve):
    served = serve()
    served.client().completions.create(model="fake", prompt="a")
    params = served.engine.seen[-1]
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (1.0, 1.0, 0, 0.0, None)
    assert (params.repetition_penalty, params.stop, params.logprobs) == (1.0, (), None)


def test_every_sampling_field_reaches_the_engine(serve):
    served = serve()
    extensions = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True}
    complete(served.client(), temperature=0.5, top_p=0.9, seed=4, stop=["xx"], logprobs=3, extra_body=extensions)
    params = served.engine.seen[-1]
    assert (params.max_tokens, params.temperature, params.top_p, params.seed) == (12, 0.5, 0.9, 4)
    assert (params.top_k, params.min_p, params.repetition_penalty, params.ignore_eos) == (7, 0.1, 1.2, True)
    assert (params.stop, params.logprobs) == (("xx",), 3)


def test_prompts_may_be_texts_token_ids_or_lists_of_either(shared):
    client = shared.client()
    one, ids = complete(client, "hello"), complete(client, list(b"hello"))
    assert one.choices[0].text == ids.choices[0].text
    many = complete(client, ["hello", "other"])
    assert [choice.index for choice in many.choices] == [0, 1]
    assert many.choices[0].text == one.choices[0].text != many.choices[1].text
    assert many.usage.prompt_tokens == 10
    lists = complete(client, [list(b"hello"), list(b"other")])
    assert [choice.text for choice in lists.choices] == [choice.text for choice in many.choices]


def test_choices_of_one_seed_differ_and_come_again(shared):
    client = shared.client()
    first, again = (chat(client, n=3, seed=5, temperature=1) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    # One prompt, however many answers it gets.
    assert (first.usage.prompt_tokens, first.usage.completion_tokens) == (11, 36)
    assert chat(client, seed=5, temperature=1).choices[0].message.content == texts[0]


def test_without_a_seed_answers_differ(shared):
    assert len({chat(shared.client(), temperature=1).choices[0].message.content for _ in range(4)}) > 1


def test_stop_strings_end_the_answer(shared):
    client = shared.client()
    text = complete(client, max_tokens=50).choices[0].text
    for stop in (text[5], [text[5], "zzz"]):
        choice = complete(client, max_tokens=50, stop=stop).choices[0]
        assert choice.text == text[: text.index(text[5])]
        assert choice.finish_reason == "stop"


def test_a_chat_goes_through_the_template(serve):
    served = serve()
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}], "name": "me"},
        {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "go on"},
    ]
    answer = chat(served.client(), messages)
    assert served.engine.chats[-1] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "go on"},
    ]
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert len(answer.choices[0].message.content) == 12


def test_an_answer_can_be_sent_back_as_the_client_holds_it(shared):
    client = shared.client()
    first = chat(client)
    chat(client, [*HELLO, first.choices[0].message, {"role": "user", "content": "and?"}])


def test_max_completion_tokens_counts_before_max_tokens(shared):
    answer = chat(shared.client(), max_tokens=9, max_completion_tokens=4)
    assert answer.usage.completion_tokens == 4


def test_null_means_the_default(shared):
    nothing = dict.fromkeys(("top_p", "seed", "stop", "n", "stream", "logprobs", "tools", "user", "stream_options"))
    answer = httpx2.post(
        f"{shared.url}/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2, "temperature": 0, **nothing}
    )
    assert answer.status_code == 200, answer.text


def test_fields_that_ask_for_nothing_are_taken(shared):
    chat(
        shared.client(), tools=[], tool_choice="none", response_format={"type": "text"}, logit_bias={},
        presence_penalty=0, frequency_penalty=0.0, user="me", metadata={"a": "b"}, store=False,
    )  # fmt: skip


def test_a_streamed_completion_adds_up_to_the_whole_one(shared):
    client = shared.client()
    whole = complete(client, logprobs=2)
    chunks = list(complete(client, logprobs=2, stream=True))
    assert all(chunk.object == "text_completion" and chunk.usage is None for chunk in chunks)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 11 + ["length"]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [part for chunk in chunks for part in getattr(chunk.choices[0].logprobs, key)]
        assert parts == getattr(whole.choices[0].logprobs, key)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_streamed_chat_adds_up_to_the_whole_one(shared):
    client = shared.client()
    whole = chat(client, logprobs=True, top_logprobs=3)
    chunks = list(chat(client, logprobs=True, top_logprobs=3, stream=True))
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    content = [
        part for chunk in chunks if chunk.choices[0].logprobs for part in chunk.choices[0].logprobs.content
    ]  # fmt: skip
    assert content == whole.choices[0].logprobs.content


def test_choices_and_prompts_are_streamed_side_by_side(shared):
    client = shared.client()
    prompts = ["one", "two"]
    whole = complete(client, prompts, n=2, seed=1, temperature=1)
    texts = ["", "", "", ""]
    for chunk in complete(client, prompts, n=2, seed=1, temperature=1, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert len(set(texts)) == 4


def test_usage_comes_last_in_a_stream_that_asks_for_it(shared):
    for ask in (complete, chat):
        chunks = list(ask(shared.client(), stream=True, stream_options={"include_usage": True}))
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == 12
        assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_is_events_that_end_with_done(shared):
    body = {"prompt": "hello", "max_tokens": 2, "temperature": 0, "stream": True}
    answer = httpx2.post(f"{shared.url}/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert [json.loads(line.removeprefix("data: "))["object"] for line in lines[:-2]] == ["text_completion"] * 2


def test_logprobs_of_a_completion(shared):
    choice = complete(shared.client(), max_tokens=4, logprobs=2).choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset == [0, 1, 2, 3]
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)
    for token, logprob, top in zip(
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values()) < 0
    assert complete(shared.client(), logprobs=0).choices[0].logprobs.top_logprobs[0].keys() == {choice.text[0]}


def test_a_token_that_is_part_of_a_character_has_no_bytes():
    choice = Choice()
    choice.add(Piece("a", (1, 2), (TokenLogprob(1, "a", -0.5, ()), TokenLogprob(2, "\ufffd", -0.5, ())), "stop"))
    content = ChatAnswer("fake", True).choice(0, choice)["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[97], None]


def test_logprobs_of_a_chat(shared):
    choice = chat(shared.client(), max_tokens=4, logprobs=True, top_logprobs=2).choices[0]
    for entry in choice.logprobs.content:
        assert bytes(entry.bytes).decode() == entry.token
        assert [entry.token, entry.logprob] == [entry.top_logprobs[0].token, entry.top_logprobs[0].logprob]
        assert len(entry.top_logprobs) == 2
    assert chat(shared.client(), logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_impossible_tokens_have_a_logprob_that_json_can_hold():

    token = TokenLogprob(1, "a", float("-inf"), ((2, "b", float("-inf")),))
    for answer in (CompletionAnswer("m", True), ChatAnswer("m", True)):
        shown = json.dumps(answer.choice(0, Choice("a", 1, [token], "stop")), allow_nan=False)
        assert str(LOWEST_LOGPROB) in shown


def test_alternatives_with_one_text_keep_the_likelier():

    token = TokenLogprob(3, "\ufffd", -3.0, ((1, "\ufffd", -0.5), (2, "b", -1.0)))
    choice = CompletionAnswer("m", True).choice(0, Choice("", 1, [token], "stop"))
    assert choice["logprobs"]["top_logprobs"] == [{"\ufffd": -0.5, "b": -1.0}]


def test_the_async_client_gets_the_same(shared):
    async def ask():
        async with shared.async_client() as client:
            whole = await complete(client)
            stream = await chat(client, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return whole.choices[0].text, "".join(pieces)

    client = shared.client()
    assert asyncio.run(ask()) == (complete(client).choices[0].text, chat(client).choices[0].message.content)


def test_32_clients_at_once_get_what_one_alone_gets(serve):
    served = serve(slots=4)
    prompts = [f"prompt number {number}" for number in range(32)]
    alone = [complete(served.client(), prompt, max_tokens=20).choices[0].text for prompt in prompts]

    async def ask(client, number: int) -> str:
        if number % 2:
            return (await complete(client, prompts[number], max_tokens=20)).choices[0].text
        stream = await complete(client, prompts[number], max_tokens=20, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def together():
        async with served.async_client() as client:
            return await asyncio.gather(*(ask(client, number) for number in range(32)))

    assert asyncio.run(together()) == alone


def test_threads_share_a_server(shared):
    texts = {}

    def ask(number: int) -> None:
        texts[number] = complete(shared.client(), f"thread {number % 3}").choices[0].text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(texts.values())) == 3
    assert all(texts[number] == texts[number + 3] for number in range(3))


def test_a_model_can_be_served_under_another_name(serve):
    from fewbit.serve.settings import Settings

    client = serve(Settings(model_name="team/small")).client()
    assert client.models.retrieve("team/small").id == "team/small"
    assert client.completions.create(model="team/small", prompt="a").model == "team/small"


@pytest.mark.parametrize("text", ["h\u00e9llo \U0001f642", "a\u0000b", ""])
def test_any_text_can_be_in_a_message(shared, text):
    assert chat(shared.client(), [{"role": "user", "content": text}]).usage.completion_tokens == 12
