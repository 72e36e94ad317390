"""One engine and many threads, forks while it works, and a decoder that two threads want at once."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from hostile_threads import asked_by_many, forked

from fewbit.errors import EngineError
from fewbit.runtime.batch import Batch
from fewbit.runtime.decoder import NativeDecoder


def test_many_threads_get_the_answers_that_one_gets():
    assert asked_by_many(8, 5) == (40, 40)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_an_engine_answers_is_an_error_in_the_child_and_none_in_the_parent():
    assert forked(3) == (3, 3)


class Slow:
    """A program whose forward waits to be let go."""

    def __init__(self) -> None:
        self.inside, self.go = threading.Event(), threading.Event()

    def run(self, *arguments: object) -> None:
        self.inside.set()
        assert self.go.wait(60)

    def copy(self, *arguments: object) -> None:
        raise AssertionError("nobody may copy while a forward runs")


def test_a_decoder_refuses_a_second_thread_and_serves_again_afterwards():
    program = Slow()
    decoder = NativeDecoder(program, vocabulary=4, context=8, slots=1, block=2, eos=())
    one = np.zeros(1, np.int32)
    batch = Batch(one, one, one, one)
    first = threading.Thread(target=decoder.forward, args=(batch,))
    first.start()
    assert program.inside.wait(60)
    with pytest.raises(EngineError, match="one thread at a time"):
        decoder.forward(batch)
    with pytest.raises(EngineError, match="one thread at a time"):
        decoder.copy(0, 0, 1)
    program.go.set()
    first.join()
    assert decoder.forward(batch).shape == (1, 4)
