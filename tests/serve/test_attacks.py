"""What an attacker would send: requests that cost more than they should, paths, names, lines for the log."""

from __future__ import annotations

import json
import logging
import logging.config
import socket

import httpx2
import pytest

from fewbit.errors import UsageError
from fewbit.runtime.sampling import SamplingParams
from fewbit.serve.api_errors import LONGEST_MESSAGE, ApiError
from fewbit.serve.schemas import MOST_MESSAGES, MOST_PROMPTS, ChatRequest, CompletionRequest
from fewbit.serve.server import _logging
from fewbit.serve.settings import Settings

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}
MANY = 50_000


def errors(model, data) -> list:
    with pytest.raises(ValueError, match="validation error") as refused:
        model.model_validate(data)
    return refused.value.errors(include_input=False)


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (ChatRequest, {"messages": [1] * MOST_MESSAGES}),
        (ChatRequest, {"messages": [1] * MANY}),
        (ChatRequest, {"messages": [{**USER, **{f"a{number}": 1 for number in range(MANY)}}]}),
        (CompletionRequest, {"prompt": "a", **{f"a{number}": 1 for number in range(MANY)}}),
        (CompletionRequest, {"prompt": "a", "stream": True, "stream_options": dict.fromkeys(map(str, range(MANY)), 1)}),
        (CompletionRequest, {"prompt": [[]] * MANY}),
        (CompletionRequest, {"prompt": ["a"] * (MOST_PROMPTS + 1)}),
    ],
    ids=[
        "no messages",
        "many messages",
        "a message's fields",
        "fields",
        "a field's fields",
        "empty prompts",
        "prompts",
    ],
)
def test_the_first_mistake_ends_the_look_at_a_request(model, data):
    # One complaint per item would take gigabytes for a request of two megabytes, and minutes.
    assert len(errors(model, data)) == 1


def test_a_text_with_many_mistakes_is_looked_at_once(shared):
    found = errors(CompletionRequest, {"prompt": ["\ud800"] * MOST_PROMPTS})
    assert len(found) <= 2  # one for each kind of prompt that it could have been
    body = json.dumps({"prompt": ["\ud800"] * MOST_PROMPTS}).encode()
    answer = httpx2.post(shared.url + COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400


@pytest.mark.parametrize("fields", [{"model": "m" * 1_000_000}, {"m" * 1_000_000: 1}], ids=["value", "name"])
def test_what_is_sent_comes_back_shortened(shared, fields):
    answer = httpx2.post(shared.url + COMPLETIONS, json={"prompt": "a", **fields}, timeout=30)
    assert answer.status_code in (400, 404)
    assert len(answer.content) < 3 * LONGEST_MESSAGE
    assert answer.json()["error"]["message"].endswith("...")


def test_short_messages_stay_as_they_are():
    assert str(ApiError(400, "m" * LONGEST_MESSAGE)) == "m" * LONGEST_MESSAGE


def test_deep_nesting_is_a_bad_request_wherever_it_stands(shared):
    for depth in (100, 900, 5_000, 90_000):
        deep = b"[" * depth + b"]" * depth
        for body in (b'{"prompt": %s}', b'{"prompt": "a", "x": %s}', b'{"prompt": "a", "logit_bias": %s}',
                     b'{"prompt": "a", "stop": %s}', b'{"prompt": "a", "stream_options": %s}'):  # fmt: skip
            content = body.replace(b"%s", deep)
            answer = httpx2.post(
                shared.url + COMPLETIONS, content=content, headers={"content-type": "application/json"}
            )
            assert answer.status_code == 400, (depth, body)


def test_of_a_field_given_twice_the_last_one_counts(serve):
    served = serve()
    body = b'{"prompt": "a", "max_tokens": 3, "max_tokens": 5}'
    answer = httpx2.post(served.url + COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert answer.json()["usage"]["completion_tokens"] == 5


PATHS = [
    "/../../etc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/..%2f..%2fetc%2fpasswd",
    "/page/index.html",
    "/chat.js/../app.py",
    "//etc/passwd",
    "/style.css%00.html",
    "/v1/models/../../../etc/passwd",
    "/v1/models//etc/passwd",
    "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "/static/app.py",
]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leads_to_a_file(shared, path):
    """Over a socket: clients tidy paths up before they send them."""
    with socket.create_connection(("127.0.0.1", shared.port), timeout=30) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"root:" not in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] in ("not_found", "model_not_found")


def test_other_sites_are_not_told_that_they_may_ask(shared):
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    answer = httpx2.options(shared.url + COMPLETIONS, headers=asked)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_errors_name_no_file_and_no_line(serve):
    served = serve()
    served.engine.failure = RuntimeError('File "/home/somebody/model.py", line 3')
    failed = httpx2.post(served.url + COMPLETIONS, json={"prompt": "a"})
    assert failed.status_code == 500
    others = [httpx2.post(served.url + COMPLETIONS, json=body) for body in ({}, {"prompt": {}}, {"prompt": "a" * 2000})]
    for text in (answer.text for answer in (failed, *others)):
        assert "/home" not in text
        assert ".py" not in text
        assert "Traceback" not in text


def test_the_key_is_in_no_log_whatever_is_asked(serve, logged):
    served = serve(Settings(api_key="sesame-open"))
    served.engine.failure = RuntimeError("broken")
    records = logged()
    client = {"authorization": "Bearer sesame-open", "content-type": "application/json"}
    assert httpx2.post(served.url + COMPLETIONS, json={"prompt": "a"}, headers=client).status_code == 500
    for headers in (client, {"authorization": "sesame-open"}, {"x-key": "sesame-open"}):
        httpx2.post(served.url + COMPLETIONS, content=b"{", headers=headers)
        httpx2.get(served.url + "/v1/models", headers=headers)
    assert [record.getMessage() for record in records] == ["generation failed"]
    text = "\n".join(logging.Formatter().format(record) for record in records)
    assert "sesame-open" not in text


def test_clients_cannot_write_lines_into_the_log(serve, monkeypatch):
    served = serve()
    config = served.server.config
    logging.config.dictConfig(_logging(True))
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    access = logging.getLogger("uvicorn.access")
    monkeypatch.setattr(access, "handlers", [handler])
    config.access_log = True
    try:
        forged = {"x-forwarded-for": "1.2.3.4\x1b[31m", "x-forwarded-proto": "gopher"}
        httpx2.get(served.url + "/no%0a2026-01-01 INFO fewbit.serve: all is well%1b[31m", headers=forged)
    finally:
        access.setLevel(logging.WARNING)
    assert len(lines) == 1
    assert lines[0].isprintable()
    assert "1.2.3.4" not in lines[0]


def test_a_text_that_cannot_fit_is_not_even_tokenized(serve, monkeypatch):
    served = serve()
    seen: list[int] = []
    tokenizer = served.engine.tokenizer
    monkeypatch.setattr(served.engine, "tokenizer", lambda text: seen.append(len(text)) or tokenizer(text))
    for route, body in (
        (COMPLETIONS, {"prompt": "a" * 1_000_000}),
        (COMPLETIONS, {"prompt": ["a", "a" * 1_000_000]}),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 1_000_000}]}),
    ):
        answer = httpx2.post(served.url + route, json=body, timeout=30)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert max(seen, default=0) <= 1
    assert served.engine.chats == []


@pytest.mark.parametrize("value", ["a\u0000b", "\u202e\u0007", "\x1b]0;title\x07"])
def test_control_characters_are_text_like_any_other(shared, value):
    answer = httpx2.post(shared.url + COMPLETIONS, json={"prompt": value, "max_tokens": 2})
    assert answer.status_code == 200
    other = httpx2.post(shared.url + COMPLETIONS, json={"prompt": "a", value: 1})
    assert other.status_code == 400
    # Escaped, as JSON does it: a terminal that shows the answer does not obey it.
    assert not any(byte < 32 for byte in other.content)


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e-38, 0.009])
def test_a_penalty_that_would_make_logits_infinite_is_refused(shared, penalty):
    """It would end the step that it is part of, with everybody's answers."""
    answer = httpx2.post(shared.url + COMPLETIONS, json={"prompt": "a", "repetition_penalty": penalty})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "repetition_penalty")
    with pytest.raises(UsageError, match="repetition_penalty must be at least"):
        SamplingParams(repetition_penalty=penalty)
