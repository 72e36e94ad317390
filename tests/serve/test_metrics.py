"""The counters, in the format that Prometheus reads."""

from __future__ import annotations

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from fewbit.serve.settings import Settings


def samples(served) -> dict[tuple, float]:
    answer = httpx2.get(served.url + "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *(value for key, value in sorted(sample.labels.items()) if key != "le")): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_requests_and_tokens_are_counted(serve):
    served = serve()
    client = served.client()
    client.completions.create(model="fake", prompt="hello", max_tokens=6)
    list(client.completions.create(model="fake", prompt="hello", max_tokens=6, stream=True))
    httpx2.post(served.url + "/v1/completions", json={})
    httpx2.get(served.url + "/some/path")
    found = samples(served)
    assert found["fewbit_requests_total", "/v1/completions", "200"] == 2
    assert found["fewbit_requests_total", "/v1/completions", "400"] == 1
    # Paths that do not exist share a label, so that nobody can fill the memory with them.
    assert found["fewbit_requests_total", "other", "404"] == 1
    assert found["fewbit_prompt_tokens_total",] == 10
    assert found["fewbit_generated_tokens_total",] == 12
    assert found["fewbit_time_to_first_token_seconds_count",] == 2
    assert found["fewbit_time_per_token_seconds_count",] == 10
    assert found["fewbit_request_seconds_count", "/v1/completions"] == 3
    assert found["fewbit_running",] == found["fewbit_waiting",] == 0


def test_running_and_waiting_are_what_the_engine_says(serve, until):
    served = serve(slots=1)
    served.engine.go.clear()
    with served.client().completions.create(model="fake", prompt="a", n=3, stream=True):
        until(lambda: served.engine.stats()["running"] == 1)
        found = samples(served)
        assert (found["fewbit_running",], found["fewbit_waiting",]) == (1, 2)
        served.engine.go.set()


def test_refusals_are_counted_too(serve):
    served = serve(Settings(allowed_hosts=("127.0.0.1",)))
    httpx2.get(served.url + "/health", headers={"host": "elsewhere"})
    assert samples(served)["fewbit_requests_total", "other", "403"] == 1
