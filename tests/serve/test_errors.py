"""Every refusal has OpenAI's shape, the right status, and says what to do."""

from __future__ import annotations

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewbit.serve.schemas import REFUSED_CHAT, REFUSED_COMPLETION, ChatRequest, CompletionRequest
from fewbit.serve.settings import Settings

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}


def check(answer: httpx2.Response, status: int, code: str | None, param: str | None = None) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["code"], body["error"]["param"]) == (code, param)
    assert body["error"]["message"]
    assert isinstance(body["error"]["type"], str)
    return body["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({}, "missing_required_parameter", "prompt"),
        ({"prompt": 3}, "invalid_value", "prompt"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [[]]}, "invalid_value", "prompt"),
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": [True]}, "invalid_value", "prompt"),
        ({"prompt": ["a", 1]}, "invalid_value", "prompt"),
        ({"prompt": [256]}, "invalid_value", "prompt"),
        ({"prompt": [-1]}, "invalid_value", "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"prompt": "a", "max_tokens": "5"}, "invalid_value", "max_tokens"),
        ({"prompt": "a", "max_tokens": 1000}, "context_length_exceeded", "max_tokens"),
        ({"prompt": "a" * 1000}, "context_length_exceeded", None),
        ({"prompt": "a", "temperature": -0.1}, "invalid_value", "temperature"),
        ({"prompt": "a", "temperature": 2.1}, "invalid_value", "temperature"),
        ({"prompt": "a", "top_p": 0}, "invalid_value", "top_p"),
        ({"prompt": "a", "top_p": 1.5}, "invalid_value", "top_p"),
        ({"prompt": "a", "top_k": -2}, "invalid_value", "top_k"),
        ({"prompt": "a", "min_p": 2}, "invalid_value", "min_p"),
        ({"prompt": "a", "repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
        ({"prompt": "a", "seed": 2**63}, "invalid_value", "seed"),
        ({"prompt": "a", "seed": 0.5}, "invalid_value", "seed"),
        ({"prompt": "a", "n": 0}, "invalid_value", "n"),
        ({"prompt": "a", "n": 17}, "invalid_value", "n"),
        ({"prompt": ["a"] * 69}, "invalid_value", "prompt"),
        ({"prompt": "a", "stop": ""}, "invalid_value", "stop"),
        ({"prompt": "a", "stop": [1]}, "invalid_value", "stop"),
        ({"prompt": "a", "stop": ["x"] * 17}, "invalid_value", "stop"),
        ({"prompt": "a", "logprobs": 21}, "invalid_value", "logprobs"),
        ({"prompt": "a", "logprobs": True}, "invalid_value", "logprobs"),
        ({"prompt": "a", "stream": "yes"}, "invalid_value", "stream"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "unknown_parameter", "stream_options.x"),
        ({"prompt": "a", "echo": True}, "unsupported_parameter", "echo"),
        ({"prompt": "a", "suffix": "b"}, "unsupported_parameter", "suffix"),
        ({"prompt": "a", "best_of": 2}, "unsupported_parameter", "best_of"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, "unsupported_parameter", "logit_bias"),
        ({"prompt": "a", "presence_penalty": 0.5}, "unsupported_parameter", "presence_penalty"),
        ({"prompt": "a", "frequency_penalty": 0.5}, "unsupported_parameter", "frequency_penalty"),
        ({"prompt": "a", "tempurature": 1}, "unknown_parameter", "tempurature"),
    ],
    ids=str,
)
def test_bad_completions(shared, fields, code, param):
    check(httpx2.post(shared.url + COMPLETIONS, json=fields), 400, code, param)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({}, "missing_required_parameter", "messages"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hi"}, "invalid_value", "messages"),
        ({"messages": ["hi"]}, "invalid_value", "messages[0]"),
        ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "invalid_value", "messages[0].content"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "invalid_value", "messages[1].role"),
        ({"messages": [{**USER, "tool_calls": [{"id": "1"}]}]}, "unknown_parameter", "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "invalid_value", "messages[0].content"),
        ({"messages": [USER], "top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"messages": [USER], "logprobs": 2}, "invalid_value", "logprobs"),
        ({"messages": [USER], "max_completion_tokens": 0}, "invalid_value", "max_completion_tokens"),
        ({"messages": [USER], "tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"messages": [USER], "tool_choice": "required"}, "unsupported_parameter", "tool_choice"),
        ({"messages": [USER], "functions": [{}]}, "unsupported_parameter", "functions"),
        ({"messages": [USER], "response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"messages": [USER], "response_format": {"type": "json_schema"}}, "unsupported_parameter", "response_format"),
        ({"messages": [USER], "modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
        ({"messages": [USER], "reasoning_effort": "high"}, "unsupported_parameter", "reasoning_effort"),
        ({"messages": [USER], "store": True}, "unsupported_parameter", "store"),
        ({"messages": [{"role": "user", "content": "no template"}]}, "invalid_value", None),
    ],
    ids=str,
)
def test_bad_chats(shared, fields, code, param):
    check(httpx2.post(shared.url + CHAT, json=fields), 400, code, param)


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_another_model_is_not_here(shared, route):
    fields = {"model": "gpt-4o", "prompt": "a"} if route == COMPLETIONS else {"model": "gpt-4o", "messages": [USER]}
    message = check(httpx2.post(shared.url + route, json=fields), 404, "model_not_found", "model")
    assert "'fake'" in message
    check(httpx2.get(f"{shared.url}/v1/models/gpt-4o"), 404, "model_not_found", "model")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[1]", b'"text"', b"nul", b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"prompt": ["a", "\\udc00"]}',
        b'{"prompt": "a", "stop": "\\ud800"}', b'{"\\ud800": 1}', b'{"prompt": "a", "\\ud800": 1}',
        b"[" * 100_000,
        b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:40]),
)  # fmt: skip
def test_bodies_that_are_no_request(shared, body):
    answer = httpx2.post(shared.url + COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    check(answer, 400, answer.json()["error"]["code"], answer.json()["error"]["param"])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, *REFUSED_CHAT, *REFUSED_COMPLETION})
MESSAGES = st.lists(st.dictionaries(st.sampled_from(["role", "content", "name"]), VALUES | st.just("user")), max_size=2)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), st.text(max_size=4) | VALUES, MESSAGES)
def test_whatever_is_sent_gets_an_answer_or_an_error_in_shape(shared, fields, prompt, messages):
    for route, body in ((COMPLETIONS, {"prompt": prompt, **fields}), (CHAT, {"messages": messages, **fields})):
        answer = shared.http.post(shared.url + route, json={"max_tokens": 2, **body})
        if answer.status_code != 200:
            assert answer.status_code in (400, 404), answer.text
            check(answer, answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["param"])


def test_what_a_web_form_could_send_is_refused(shared):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = httpx2.post(shared.url + COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": kind})
        check(answer, 415, "unsupported_media_type")


def test_unknown_places_and_methods(shared):
    for path in ("/nothing", "/v1", "/v1/embeddings", "/../etc/passwd", "/page/chat.js", "/docs", "/%2e%2e/x"):
        check(httpx2.get(shared.url + path), 404, "not_found")
    for method, path in (("GET", COMPLETIONS), ("PUT", CHAT), ("DELETE", "/v1/models"), ("POST", "/health")):
        answer = httpx2.request(method, shared.url + path, json={})
        check(answer, 405, "method_not_allowed")
        assert answer.headers["allow"]


def test_openais_client_raises_its_own_errors(shared):
    client = shared.client()
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="fake", prompt="a", temperature=9)
    assert refused.value.param == "temperature"
    assert refused.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError, match="gpt-4o"):
        client.completions.create(model="gpt-4o", prompt="a")


def test_a_failure_is_told_without_its_details(serve, caplog):
    served = serve()
    served.engine.failure = RuntimeError("secret detail")
    answer = httpx2.post(served.url + COMPLETIONS, json={"prompt": "a"})
    assert "secret" not in check(answer, 500, "internal_error")
    # The next one is served.
    assert httpx2.post(served.url + COMPLETIONS, json={"prompt": "a"}).status_code == 200


def test_a_failure_outside_the_generation_too(serve, monkeypatch):
    served = serve()
    monkeypatch.setattr(served.engine, "encode_chat", lambda messages: {}["secret"])
    answer = httpx2.post(served.url + CHAT, json={"messages": [USER]})
    assert "secret" not in check(answer, 500, "internal_error")
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_failure_in_a_stream_is_an_event(serve, until):
    served = serve()
    served.engine.failure = RuntimeError("secret detail")
    with pytest.raises(openai.APIError, match="its log says why"):
        list(served.client().completions.create(model="fake", prompt="a", stream=True))
    until(lambda: served.admission.count == 0)


def test_an_engine_that_ends_is_told(serve):
    served = serve()
    served.engine.go.clear()
    with served.client().completions.create(model="fake", prompt="a", stream=True) as stream:
        served.engine.close()
        with pytest.raises(openai.APIError, match="its log says why"):
            list(stream)


def test_a_wrong_key(serve):
    served = serve(Settings(api_key="sesame"))
    with pytest.raises(openai.AuthenticationError) as refused:
        served.client("wrong").models.list()
    assert refused.value.code == "invalid_api_key"
