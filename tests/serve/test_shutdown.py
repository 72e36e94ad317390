"""The end of a server: what runs finishes, nobody comes in, and there is a limit to it."""

from __future__ import annotations

import threading

import httpx2
import openai
import pytest

from fewbit.serve.settings import Settings


def test_running_requests_finish_and_new_ones_are_turned_away(serve, until):
    served = serve()
    served.engine.go.clear()
    stream = served.client().completions.create(model="fake", prompt="a", max_tokens=20, temperature=0, stream=True)
    served.terminate()
    until(lambda: served.admission.draining)
    answer = httpx2.post(served.url + "/v1/completions", json={"prompt": "b"})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "shutting_down"
    assert answer.headers["retry-after"]
    health = httpx2.get(served.url + "/health")
    assert (health.status_code, health.json()["status"]) == (503, "draining")
    served.engine.go.set()
    assert len("".join(chunk.choices[0].text for chunk in stream)) == 20
    served.thread.join(30)
    assert not served.thread.is_alive()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(served.url + "/health")


def test_an_idle_server_ends_at_once(serve):
    served = serve()
    served.terminate()
    served.thread.join(30)
    assert not served.thread.is_alive()


def test_what_does_not_finish_in_time_is_told_so(serve, until):
    served = serve(Settings(grace=0.2))
    served.engine.go.clear()
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(httpx2.post(served.url + "/v1/completions", json={"prompt": "a"}))
    )
    thread.start()
    stream = served.client().completions.create(model="fake", prompt="a", max_tokens=20, stream=True)
    until(lambda: served.admission.count == 2)
    served.terminate()
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    thread.join(30)
    assert answers[0].status_code == 503
    served.thread.join(30)
    assert not served.thread.is_alive()
    until(lambda: served.engine.stats()["running"] == 0)


def test_a_second_signal_does_not_wait(serve, until):
    served = serve(Settings(grace=1000))
    served.engine.go.clear()
    stream = served.client().completions.create(model="fake", prompt="a", max_tokens=20, stream=True)
    served.terminate()
    served.terminate()
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    served.thread.join(30)
    assert not served.thread.is_alive()
