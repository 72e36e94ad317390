"""The scheduler: whatever runs together, every answer is the one that a sequence gets alone."""

from __future__ import annotations

import random

import pytest
import torch

from fewbit.errors import UsageError
from fewbit.runtime.results import Piece, join_pieces
from fewbit.runtime.sampling import SamplingParams, sample_reference, uniform
from fewbit.runtime.scheduler import Scheduler, _split
from fewbit.runtime.sequence import Sequence
from fewbit.runtime.torch_decoder import TorchDecoder


class Asked:
    """A sequence and what it gave."""

    def __init__(self, decoder, tokenizer, prompt, **settings) -> None:
        self.given: list[Piece | BaseException] = []
        params = SamplingParams(**settings)
        self.sequence = Sequence(list(prompt), params, tokenizer, decoder.eos, self.given.append)

    @property
    def pieces(self) -> list[Piece]:
        assert all(isinstance(piece, Piece) for piece in self.given), self.given
        return [piece for piece in self.given if isinstance(piece, Piece)]

    @property
    def answer(self) -> tuple[str, tuple[int, ...], str | None]:
        text, ids, _, reason = join_pieces(self.pieces)
        return text, ids, reason


def expected(decoder, prompt, params: SamplingParams) -> tuple[int, ...]:
    """The tokens of an answer, one by one from the definition."""
    tokens = list(prompt)
    limit = min(params.max_tokens, decoder.context - len(prompt))
    for number in range(limit):
        draw = uniform(params.seed or 0, number)
        tokens.append(sample_reference(decoder.logits(tokens), params, tokens, draw))
        if tokens[-1] in decoder.eos and not params.ignore_eos:
            break
    return tuple(tokens[len(prompt) :])


def prompts_of(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    chance = random.Random(seed)
    return [chance.choices(range(3, 64), k=chance.randint(1, longest)) for _ in range(count)]


SETTINGS = [
    {"max_tokens": 12},
    {"max_tokens": 20, "temperature": 1.0, "seed": 5, "ignore_eos": True},
    {"max_tokens": 9, "temperature": 0.8, "seed": 6, "top_k": 9, "top_p": 0.9},
    {"max_tokens": 15, "repetition_penalty": 1.3, "temperature": 0.5, "seed": 8},
]


@pytest.mark.parametrize("draft", [0, 1, 6])
@pytest.mark.parametrize("slots", [1, 3])
def test_sequences_that_join_and_leave_get_the_tokens_of_the_definition(make_decoder, byte_tokenizer, slots, draft):
    decoder = make_decoder(slots=slots, block=16, repeat=3.0)
    scheduler = Scheduler(decoder, draft)
    chance = random.Random(slots)
    asked = []
    for index, prompt in enumerate(prompts_of(14)):
        asked.append(Asked(decoder, byte_tokenizer, prompt, **SETTINGS[index % len(SETTINGS)]))
        scheduler.add(asked[-1].sequence)
        for _ in range(chance.randint(0, 6)):
            scheduler.step()
    while scheduler.step():
        pass
    for item in asked:
        sequence = item.sequence
        prompt = sequence.tokens[: sequence.prompt_tokens]
        assert item.answer[1] == expected(decoder, prompt, sequence.params)
    assert max(sum(counts.values()) for counts in decoder.forwards) <= 16
    assert scheduler.counts.finished == 14
    assert (scheduler.counts.accepted_tokens > 0) == (draft > 0)


def test_drafts_save_forwards_and_change_nothing(make_decoder, byte_tokenizer):
    found = {}
    for draft in (0, 8):
        decoder = make_decoder(slots=1, context=400, block=64, repeat=6.0)
        scheduler = Scheduler(decoder, draft)
        asked = Asked(decoder, byte_tokenizer, [5, 6, 7, 8], max_tokens=200, temperature=0.3, seed=1, ignore_eos=True)
        scheduler.add(asked.sequence)
        while scheduler.step():
            pass
        found[draft] = (asked.answer, scheduler.counts.steps)
    assert found[0][0] == found[8][0]
    assert found[8][1] < 0.8 * found[0][1]


def test_log_probabilities_are_the_same_with_drafts(make_decoder, byte_tokenizer):
    found = []
    for draft in (0, 5):
        decoder = make_decoder(slots=1, repeat=3.0)
        scheduler = Scheduler(decoder, draft)
        asked = Asked(decoder, byte_tokenizer, [5, 6], max_tokens=40, logprobs=2, ignore_eos=True)
        scheduler.add(asked.sequence)
        while scheduler.step():
            pass
        found.append(join_pieces(asked.pieces)[2])
    assert found[0] == found[1]
    assert len(found[0]) == 40
    assert all(entry.logprob == entry.top[0][2] and entry.token_id == entry.top[0][0] for entry in found[0])


class Stripping:
    """Words behind a space, which is left out where a text begins, as SentencePiece's decoders have it."""

    def decode(self, tokens: list[int], **options: bool) -> str:
        return "".join(f" w{token}" for token in tokens).removeprefix(" ")


def test_tokens_of_log_probabilities_keep_the_space_that_they_begin_with(make_decoder):
    decoder = make_decoder(slots=1)
    scheduler = Scheduler(decoder)
    asked = Asked(decoder, Stripping(), [5, 6], max_tokens=8, logprobs=3, ignore_eos=True)
    scheduler.add(asked.sequence)
    while scheduler.step():
        pass
    logprobs = join_pieces(asked.pieces)[2]
    assert len(logprobs) == 8
    assert all(words == f" w{token}" for entry in logprobs for token, words, _ in entry.top)
    assert all(entry.text == f" w{entry.token_id}" for entry in logprobs)


def test_a_long_prompt_does_not_stall_the_others(make_decoder, byte_tokenizer):
    decoder = make_decoder(slots=4, context=1000, block=40)
    scheduler = Scheduler(decoder)
    first = Asked(decoder, byte_tokenizer, [3, 4, 5], max_tokens=60, ignore_eos=True)
    long = Asked(decoder, byte_tokenizer, prompts_of(1, longest=1)[0] * 600, max_tokens=2)
    short = Asked(decoder, byte_tokenizer, [7] * 10, max_tokens=2, ignore_eos=True)
    scheduler.add(first.sequence)
    scheduler.step()
    scheduler.add(long.sequence)
    scheduler.step()
    scheduler.add(short.sequence)
    before = len(decoder.forwards)
    while short.sequence.finish_reason is None:
        scheduler.step()
    assert len(decoder.forwards) - before <= 3, "the short prompt shares the first step"
    assert long.sequence.generated == 0
    while scheduler.step():
        pass
    busy = [counts for counts in decoder.forwards if 1 in counts and counts[1] > 1]
    assert len(busy) > 15
    assert all(counts.get(0) == 1 for counts in busy[: 60 - 3]), "the first sequence goes on in every step"


def test_sequences_wait_in_the_order_of_their_arrival(make_decoder, byte_tokenizer):
    decoder = make_decoder(slots=1)
    scheduler = Scheduler(decoder)
    asked = [Asked(decoder, byte_tokenizer, prompt, max_tokens=3, ignore_eos=True) for prompt in prompts_of(5)]
    finished: list[int] = []
    for item in asked:
        scheduler.add(item.sequence)
    while scheduler.step():
        finished += [index for index, item in enumerate(asked)
                     if item.sequence.finish_reason and index not in finished]  # fmt: skip
    assert finished == [0, 1, 2, 3]
    assert asked[4].sequence.finish_reason == "length"


def run_one(scheduler, decoder, tokenizer, prompt, **settings) -> Asked:
    asked = Asked(decoder, tokenizer, prompt, **settings)
    scheduler.add(asked.sequence)
    while scheduler.step():
        pass
    return asked


def test_a_prompt_that_begins_like_an_earlier_one_begins_behind_it(make_decoder, byte_tokenizer):
    decoder = make_decoder(slots=2)
    scheduler = Scheduler(decoder)
    prompt = prompts_of(1, 3)[0] + [9] * 20
    first = run_one(scheduler, decoder, byte_tokenizer, prompt, max_tokens=6, ignore_eos=True)
    turn = [*first.sequence.tokens, 11, 12, 13]
    second = run_one(scheduler, decoder, byte_tokenizer, turn, max_tokens=6, ignore_eos=True)
    assert second.sequence.cached_tokens == len(first.sequence.tokens) - 1
    assert second.answer[1] == expected(decoder, turn, second.sequence.params)
    again = run_one(scheduler, decoder, byte_tokenizer, turn, max_tokens=6, ignore_eos=True)
    assert again.sequence.cached_tokens == len(turn) - 1, "one token at least is run"
    assert again.answer == second.answer
    assert scheduler.counts.cached_tokens == len(first.sequence.tokens) - 1 + len(turn) - 1
    total = scheduler.counts.prompt_tokens + scheduler.counts.cached_tokens
    assert total == len(prompt) + 2 * len(turn)


def beginning_alike(decoder, tokenizer) -> tuple[Scheduler, Asked, Asked]:
    """A scheduler with a sequence that runs, and one that waits and begins with the same 24 tokens."""
    scheduler = Scheduler(decoder)
    shared = [9, 8, 7, 6] * 6
    running = Asked(decoder, tokenizer, shared, max_tokens=50, ignore_eos=True)
    scheduler.add(running.sequence)
    for _ in range(6):
        scheduler.step()
    other = Asked(decoder, tokenizer, [*shared, 30, 31], max_tokens=5, ignore_eos=True)
    scheduler.add(other.sequence)
    return scheduler, running, other


def test_a_beginning_is_copied_from_a_sequence_that_is_still_running(make_decoder, byte_tokenizer):
    decoder = make_decoder(slots=2, context=200)
    scheduler, running, other = beginning_alike(decoder, byte_tokenizer)
    while scheduler.step():
        pass
    assert decoder.copies == 1
    assert other.sequence.cached_tokens == 24
    for item in (running, other):
        prompt = item.sequence.tokens[: item.sequence.prompt_tokens]
        assert item.answer[1] == expected(decoder, prompt, item.sequence.params)


def test_a_copy_that_fails_fails_the_sequence_that_it_was_for(make_decoder, byte_tokenizer, monkeypatch):
    decoder = make_decoder(slots=2, context=200)
    scheduler, running, other = beginning_alike(decoder, byte_tokenizer)

    def fail(source: int, target: int, length: int) -> None:
        raise MemoryError

    monkeypatch.setattr(decoder, "copy", fail)
    with pytest.raises(MemoryError):
        scheduler.step()
    scheduler.fail(MemoryError())
    assert other.sequence.finish_reason == running.sequence.finish_reason == "error"


def test_a_shared_system_prompt_does_not_cost_another_conversation_its_cache(make_decoder, byte_tokenizer):
    decoder = make_decoder(slots=2, context=200)
    scheduler = Scheduler(decoder)
    system = [9, 8, 7, 6] * 5
    first = [*system, *range(10, 50)]
    run_one(scheduler, decoder, byte_tokenizer, first, max_tokens=3, ignore_eos=True)
    run_one(scheduler, decoder, byte_tokenizer, [*system, 60, 61], max_tokens=3, ignore_eos=True)
    assert decoder.copies == 1
    back = run_one(scheduler, decoder, byte_tokenizer, [*first, 33], max_tokens=3, ignore_eos=True)
    assert back.sequence.cached_tokens == len(first)


def test_cancelled_sequences_leave_before_the_next_step(make_decoder, byte_tokenizer):
    decoder = make_decoder(slots=1)
    scheduler = Scheduler(decoder)
    running, waiting, kept = (
        Asked(decoder, byte_tokenizer, prompt, max_tokens=30, ignore_eos=True) for prompt in prompts_of(3, longest=9)
    )
    for item in (running, waiting, kept):
        scheduler.add(item.sequence)
    for _ in range(5):
        scheduler.step()
    running.sequence.cancel()
    waiting.sequence.cancel()
    while scheduler.step():
        pass
    assert running.answer[2] == "cancelled"
    assert 0 < len(running.answer[1]) < 30
    assert waiting.answer == ("", (), "cancelled")
    prompt = kept.sequence.tokens[: kept.sequence.prompt_tokens]
    assert kept.answer[1] == expected(decoder, prompt, kept.sequence.params)


def scripted(make_decoder, tokens: list[int]):
    """A decoder that says these tokens in turn, behind a prompt of one token."""
    decoder = make_decoder(slots=1)

    def logits(held: list[int]):
        values = torch.zeros(64).numpy()
        values[tokens[min(len(held) - 1, len(tokens) - 1)]] = 9.0
        return values

    decoder.logits = logits
    return decoder


def test_a_stop_string_across_tokens_is_never_shown(make_decoder, byte_tokenizer):
    ids = byte_tokenizer("on we go E")["input_ids"] + byte_tokenizer("N")["input_ids"]
    ids += byte_tokenizer("D")["input_ids"] + byte_tokenizer("and on")["input_ids"]
    decoder = scripted(make_decoder, ids)
    asked = run_one(Scheduler(decoder), decoder, byte_tokenizer, [5], max_tokens=40, stop=("END",))
    assert asked.answer[0] == "on we go "
    assert asked.answer[2] == "stop"
    assert all("E" not in piece.text for piece in asked.pieces)
    almost = run_one(Scheduler(decoder), decoder, byte_tokenizer, [5], max_tokens=len(ids), stop=("ENDED",))
    assert almost.answer[0] == "on we go ENDand on"


def test_what_was_held_back_comes_when_the_model_ends_itself(make_decoder, byte_tokenizer):
    decoder = scripted(make_decoder, [*byte_tokenizer("go E")["input_ids"], 2])
    asked = run_one(Scheduler(decoder), decoder, byte_tokenizer, [5], max_tokens=40, stop=("END",))
    assert asked.answer[0] == "go E"
    assert asked.answer[2] == "stop"
    assert asked.answer[1][-1] == 2, "the token that ended it counts"
    ignoring = run_one(Scheduler(decoder), decoder, byte_tokenizer, [5], max_tokens=9, ignore_eos=True)
    assert ignoring.answer[2] == "length"
    assert len(ignoring.answer[1]) == 9


def test_pieces_hold_whole_characters(make_decoder, byte_tokenizer):
    ids = byte_tokenizer("a€b😀é")["input_ids"]
    decoder = scripted(make_decoder, ids)
    asked = run_one(Scheduler(decoder), decoder, byte_tokenizer, [5], max_tokens=len(ids))
    assert [piece.text for piece in asked.pieces] == ["a", "€", "b", "😀", "é"]
    assert asked.answer[1] == tuple(ids)
    cut = run_one(Scheduler(decoder), decoder, byte_tokenizer, [5], max_tokens=len(ids) - 1)
    assert cut.answer[0] == "a€b😀", "half a character at the end is left out"


def test_the_context_ends_an_answer(make_decoder, byte_tokenizer):
    decoder = make_decoder(slots=1, context=20, repeat=3.0)
    for draft in (0, 6):
        asked = run_one(Scheduler(decoder, draft), decoder, byte_tokenizer, [5] * 12, max_tokens=50, ignore_eos=True)
        assert len(asked.answer[1]) == 8
        assert asked.answer[2] == "length"


def test_a_failure_reaches_everyone_and_the_cache_is_forgotten(make_decoder, byte_tokenizer):
    decoder = make_decoder(slots=1)
    scheduler = Scheduler(decoder)
    asked = [Asked(decoder, byte_tokenizer, prompt, max_tokens=9) for prompt in prompts_of(2)]
    for item in asked:
        scheduler.add(item.sequence)
    scheduler.step()
    scheduler.fail(UsageError("enough"))
    assert [str(item.given[-1]) for item in asked] == ["enough", "enough"]
    assert not scheduler.step()
    prompt = asked[0].sequence.tokens[: asked[0].sequence.prompt_tokens]
    assert run_one(scheduler, decoder, byte_tokenizer, prompt, max_tokens=4).sequence.cached_tokens == 0


def test_prompts_share_a_step_fairly():
    assert _split(100, [500, 10, 500]) == [45, 10, 45]
    assert _split(10, [100]) == [10]
    assert _split(2, [9, 9, 9]) == [1, 1, 0]
    assert _split(0, [9]) == [0]
    assert _split(50, []) == []


def test_more_slots_than_a_block_holds_are_refused(make_decoder):
    with pytest.raises(UsageError, match="blocks of at least as many tokens"):
        Scheduler(make_decoder(slots=8, block=4))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_transformers_model_answers_as_it_generates_by_itself(make_tiny, byte_tokenizer, kind):
    model = make_tiny(kind)
    decoder = TorchDecoder(model, slots=3, block=24)
    asked = [Asked(decoder, byte_tokenizer, prompt, max_tokens=10, ignore_eos=True) for prompt in prompts_of(5, 4)]
    scheduler = Scheduler(decoder, draft=4)
    for item in asked:
        scheduler.add(item.sequence)
        scheduler.step()
    while scheduler.step():
        pass
    for item in asked:
        prompt = torch.tensor([item.sequence.tokens[: item.sequence.prompt_tokens]])
        alone = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, min_new_tokens=10, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        assert item.answer[1] == tuple(alone[0, prompt.shape[1] :].tolist())
