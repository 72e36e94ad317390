"""The engine: many threads and tasks ask, one thread answers, and everything ends."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import threading
import time
import weakref

import pytest

import fewbit
from fewbit.errors import EngineError, UsageError
from fewbit.runtime.engine import Engine
from fewbit.runtime.sampling import SamplingParams

PARAMS = SamplingParams(max_tokens=12, temperature=0.9, seed=3, ignore_eos=True)
PROMPTS = ["the sea and", "who", "we were on the road, and the", "all", "one", "stop here"]


@pytest.fixture
def engine(make_decoder, byte_tokenizer):
    with Engine("toy/model", decoder=make_decoder(), tokenizer=byte_tokenizer) as engine:
        yield engine


def thread_alive() -> bool:
    return any(thread.name == "fewbit-engine" for thread in threading.enumerate())


def test_the_package_exports_it(engine):
    assert fewbit.Engine is Engine
    assert fewbit.SamplingParams is SamplingParams
    assert (engine.name, engine.context, engine.vocabulary) == ("model", 128, 64)


def test_a_batch_gives_the_answers_of_single_requests_in_order(engine):
    single = [engine.generate(prompt, PARAMS) for prompt in PROMPTS]
    together = engine.generate(PROMPTS, PARAMS)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in single]
    assert [answer.text for answer in together] == [answer.text for answer in single]
    assert engine.generate([], PARAMS) == []


def test_token_ids_are_prompts_alone_and_in_lists(engine, byte_tokenizer):
    ids = byte_tokenizer("the sea")["input_ids"]
    expected = engine.generate("the sea", PARAMS)
    assert engine.generate(ids, PARAMS).token_ids == expected.token_ids
    assert engine.generate(tuple(ids), PARAMS).token_ids == expected.token_ids
    both = engine.generate([ids, "the sea"], PARAMS)
    assert [answer.token_ids for answer in both] == [expected.token_ids] * 2


def test_a_completion_tells_its_length_its_cache_and_its_speed(engine, byte_tokenizer):
    first = engine.generate("the sea and the", SamplingParams(max_tokens=5, logprobs=2, ignore_eos=True))
    assert (len(first.token_ids), first.finish_reason, first.cached_tokens) == (5, "length", 0)
    assert first.prompt_tokens == len(byte_tokenizer("the sea and the")["input_ids"])
    assert len(first.logprobs) == 5
    assert all(len(entry.top) == 2 and entry.logprob <= 0 for entry in first.logprobs)
    assert first.seconds_to_first_token > 0
    assert first.to_json()["tokens"] == 5
    again = engine.generate("the sea and the", SamplingParams(max_tokens=5, ignore_eos=True))
    assert again.cached_tokens == first.prompt_tokens - 1
    assert again.token_ids == first.token_ids


def test_without_a_seed_answers_differ_and_with_one_they_do_not(engine):
    free = SamplingParams(max_tokens=20, temperature=2.0, ignore_eos=True)
    assert len({engine.generate("the", free).token_ids for _ in range(4)}) > 1
    assert engine.generate("the", PARAMS).token_ids == engine.generate("the", PARAMS).token_ids


def test_a_stream_is_the_answer_in_pieces(engine):
    pieces = list(engine.stream("the sea", PARAMS))
    answer = engine.generate("the sea", PARAMS)
    assert "".join(piece.text for piece in pieces) == answer.text
    assert [token for piece in pieces for token in piece.token_ids] == list(answer.token_ids)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


LONG = SamplingParams(max_tokens=100_000, ignore_eos=True)


@pytest.fixture
def endless(make_decoder, byte_tokenizer):
    """An engine whose answers are far longer than a test."""
    with Engine("toy", decoder=make_decoder(context=1_000_000), tokenizer=byte_tokenizer) as engine:
        yield engine


def test_closing_a_stream_cancels_its_request(endless):
    stream = endless.stream("the", LONG)
    next(stream)
    assert endless.stats()["running"] == 1
    stream.close()
    until(lambda: endless.stats()["running"] == 0)
    assert endless.stats()["finished_total"] == 1


def test_a_cancelled_request_ends_with_a_piece_that_says_so(endless):
    request = endless.submit("the", LONG)
    next(iter(request))
    request.cancel()
    *_, last = request
    assert last.finish_reason == "cancelled"
    assert list(request) == [], "nothing comes twice"


def test_many_threads_get_their_own_answers(engine):
    expected = {prompt: engine.generate(prompt, PARAMS).token_ids for prompt in PROMPTS}
    found: list[tuple[str, tuple[int, ...]]] = []

    def ask(offset: int) -> None:
        for step in range(4):
            prompt = PROMPTS[(offset + step) % len(PROMPTS)]
            found.append((prompt, engine.generate(prompt, PARAMS).token_ids))

    threads = [threading.Thread(target=ask, args=(offset,)) for offset in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 32
    assert all(tokens == expected[prompt] for prompt, tokens in found)
    stats = engine.stats()
    assert (stats["running"], stats["waiting"], stats["finished_total"]) == (0, 0, 32 + len(PROMPTS))


def test_tasks_of_an_event_loop_get_their_own_answers(engine):
    expected = [engine.generate(prompt, PARAMS).token_ids for prompt in PROMPTS]

    async def ask(prompt: str) -> tuple[int, ...]:
        return tuple([token async for piece in engine.astream(prompt, PARAMS) for token in piece.token_ids])

    async def everyone() -> list[tuple[int, ...]]:
        return await asyncio.gather(*map(ask, PROMPTS))

    assert asyncio.run(everyone()) == expected


def test_cancelling_a_task_cancels_its_request(endless):
    async def scenario() -> None:
        started = asyncio.Event()

        async def ask() -> None:
            async for _ in endless.astream("the", LONG):
                started.set()

        task = asyncio.create_task(ask())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    until(lambda: endless.stats()["running"] == 0)


def test_an_event_loop_that_is_gone_does_no_harm(endless):
    async def leave() -> object:
        request = endless.submit("the", LONG)
        pieces = aiter(request)
        await anext(pieces)
        return pieces

    pieces = asyncio.run(leave())
    until(lambda: endless.stats()["running"] == 0)
    assert endless.generate("the", PARAMS).finish_reason == "length"
    del pieces


def test_requests_beyond_the_slots_wait(make_decoder, byte_tokenizer):
    decoder = make_decoder(slots=2)
    decoder.gate = threading.Event()
    with Engine("toy", decoder=decoder, tokenizer=byte_tokenizer) as engine:
        requests = [engine.submit(prompt, PARAMS) for prompt in PROMPTS[:5]]
        until(lambda: engine.stats()["running"] > 0)
        stats = engine.stats()
        assert stats["running"] + stats["waiting"] == 5
        assert stats["waiting"] >= 3
        decoder.gate.set()
        assert all(request.result().finish_reason == "length" for request in requests)


def test_an_error_of_the_decoder_reaches_every_request_and_the_engine_goes_on(make_decoder, byte_tokenizer):
    decoder = make_decoder(slots=2)
    decoder.gate = threading.Event()
    with Engine("toy", decoder=decoder, tokenizer=byte_tokenizer) as engine:
        requests = [engine.submit(prompt, PARAMS) for prompt in PROMPTS[:5]]
        until(lambda: engine.stats()["running"] > 0)
        decoder.fails = RuntimeError("no memory")
        decoder.gate.set()
        for request in requests:
            with pytest.raises(EngineError, match="decoding failed: RuntimeError: no memory"):
                request.result()
        decoder.fails = None
        assert engine.generate("the", PARAMS).finish_reason == "length"

        async def ask() -> None:
            decoder.fails = RuntimeError("again")
            async for _ in engine.astream("the", PARAMS):
                pass

        with pytest.raises(EngineError, match="again"):
            asyncio.run(ask())


def test_closing_ends_promptly_with_an_error_for_what_was_in_work(make_decoder, byte_tokenizer):
    decoder = make_decoder(slots=1, context=1_000_000)
    engine = Engine("toy", decoder=decoder, tokenizer=byte_tokenizer)
    running, waiting = engine.submit("the", LONG), engine.submit("who", LONG)
    next(iter(running))
    engine.close()
    for request in (running, waiting):
        with pytest.raises(EngineError, match="closed before the answer was complete"):
            request.result()
    assert decoder.closed
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.submit("the", PARAMS)
    engine.close()


def test_an_engine_that_is_forgotten_ends_its_thread(make_decoder, byte_tokenizer):
    decoder = make_decoder()
    engine = Engine("toy", decoder=decoder, tokenizer=byte_tokenizer)
    engine.generate("the", PARAMS)
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    assert decoder.closed
    assert not thread_alive()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_gets_an_error_and_can_end(engine, capfd):
    engine.generate("the", PARAMS)

    def child() -> None:
        try:
            engine.generate("the", PARAMS)
        except EngineError as error:
            print(error)
        engine.close()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert "forked process" in capfd.readouterr().out
    assert engine.generate("the", PARAMS).finish_reason == "length"


def test_prompts_that_cannot_be_answered_are_refused(engine):
    with pytest.raises(UsageError, match="empty"):
        engine.generate("", PARAMS)
    with pytest.raises(UsageError, match="128 must hold it"):
        engine.generate([5] * 128, PARAMS)
    with pytest.raises(UsageError, match="token 64 is not in the vocabulary of 64"):
        engine.generate([5, 64], PARAMS)
    assert len(engine.generate([5] * 127, PARAMS).token_ids) == 1
    with pytest.raises(UsageError, match="draft must be between 0 and 64"):
        Engine("toy", draft=65)


def test_a_refused_prompt_of_a_batch_cancels_the_others(endless):
    with pytest.raises(UsageError, match="empty"):
        endless.generate(["the", "who", ""], LONG)
    until(lambda: endless.stats()["running"] + endless.stats()["waiting"] == 0)


def test_a_conversation_goes_through_the_template(engine, byte_tokenizer, monkeypatch):
    ids = engine.encode_chat([{"role": "user", "content": "who"}])
    assert byte_tokenizer.decode(ids) == "u who. a "
    with pytest.raises(UsageError, match="refuses these messages: the first message must be the user's"):
        engine.encode_chat([{"role": "tool", "content": "who"}])
    monkeypatch.setattr(type(byte_tokenizer), "chat_template", None)
    with pytest.raises(UsageError, match="no chat template"):
        engine.encode_chat([{"role": "user", "content": "who"}])


@pytest.mark.parametrize("draft", [0, 4])
def test_a_checkpoint_answers_the_same_alone_and_together(tiny_models, tmp_path_factory, draft):
    from fewbit.pipeline.options import QuantizeOptions
    from fewbit.pipeline.run import quantize

    out = tmp_path_factory.mktemp("engine") / "out"
    quantize(tiny_models["tied"], out, QuantizeOptions(rounding="nearest"), [])
    params = SamplingParams(max_tokens=16, temperature=0.5, seed=1, ignore_eos=True)
    prompts = ["the quick", "many words", "reads", "forgets most of them and the", "a", "quick quick quick"]
    with Engine(out, slots=1) as engine:
        single = [engine.generate(prompt, params).token_ids for prompt in prompts]
    with Engine(out, slots=4, block=16, draft=draft) as engine:
        together = [answer.token_ids for answer in engine.generate(prompts, params)]
    assert together == single
