"""Keys, sizes, queues, times, clients that leave, host names, headers."""

from __future__ import annotations

import json
import socket
import threading

import httpx2
import openai
import pytest

from fewbit.errors import UsageError
from fewbit.serve.limits import OPEN, host_name
from fewbit.serve.settings import Settings

COMPLETIONS = "/v1/completions"
ENDLESS = {"prompt": "a", "max_tokens": 900, "temperature": 0}


def raw(port: int, *parts: bytes) -> bytes:
    """Send bytes over a connection and read the answer to its end."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def background(function, *arguments, **options) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, kwargs=options, daemon=True)
    thread.start()
    return thread


def test_a_key_opens_everything_but_the_page_and_health(serve):
    served = serve(Settings(api_key="sesame"))
    routes = {route.path for route in served.app.routes}
    assert routes > OPEN
    for path in routes - OPEN:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "sesame"},
            {"authorization": "Bearer"},
        ):
            answer = httpx2.get(served.url + path.replace("{name:path}", "fake"), headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert "sesame" not in answer.text
    for path in OPEN:
        assert httpx2.get(served.url + path).status_code == 200
    assert served.client("sesame").completions.create(model="fake", prompt="a").choices
    assert httpx2.get(served.url + "/health").json()["key_required"] is True


def test_a_key_is_asked_for_before_the_body_is_read(serve):
    served = serve(Settings(api_key="sesame"))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    answer = raw(served.port, head)
    assert answer.startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("key", ["", "caf\u00e9", "two\nlines"])
def test_keys_that_no_header_can_carry_are_refused(key):
    with pytest.raises(UsageError, match="API key"):
        Settings(api_key=key)


def test_settings_are_checked():
    for wrong in ({"queue": -1}, {"max_choices": 0}, {"request_timeout": 0}, {"grace": -1}, {"max_body_bytes": 0}):
        with pytest.raises(UsageError):
            Settings(**wrong)


def test_a_large_body_is_refused_by_its_announced_length(serve):
    served = serve(Settings(max_body_bytes=1000))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    # No byte of the body is ever sent.
    answer = raw(served.port, head % 1001)
    assert answer.startswith(b"HTTP/1.1 413")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_too_large"


def test_a_large_body_without_a_length_is_refused_when_it_passes_the_limit(serve):
    served = serve(Settings(max_body_bytes=1000))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunk = b"100\r\n" + b" " * 256 + b"\r\n"
    # The last chunk, which would end the body, never comes.
    answer = raw(served.port, head + b"Transfer-Encoding: chunked\r\n\r\n", chunk * 5)
    assert answer.startswith(b"HTTP/1.1 413")


def test_a_body_of_exactly_the_limit_is_read(serve):
    served = serve(Settings(max_body_bytes=100))
    body = b'{"prompt": "a"}'.ljust(100)
    headers = {"content-type": "application/json"}
    assert httpx2.post(served.url + COMPLETIONS, content=body, headers=headers).status_code == 200
    assert httpx2.post(served.url + COMPLETIONS, content=body + b" ", headers=headers).status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for(serve):
    served = serve(Settings(body_timeout=0.05))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{"
    assert raw(served.port, head).startswith(b"HTTP/1.1 408")


def test_a_full_queue_answers_429_with_a_time(serve, until):
    served = serve(Settings(queue=1), slots=2)
    served.engine.go.clear()
    threads = [background(httpx2.post, served.url + COMPLETIONS, json=ENDLESS) for _ in range(3)]
    until(lambda: served.admission.count == 3)
    answer = httpx2.post(served.url + COMPLETIONS, json=ENDLESS)
    assert answer.status_code == 429
    assert answer.json()["error"] == {
        "message": answer.json()["error"]["message"], "type": "rate_limit_error", "param": None, "code": "queue_full"
    }  # fmt: skip
    assert int(answer.headers["retry-after"]) >= 1
    with pytest.raises(openai.RateLimitError):
        served.client().completions.create(model="fake", prompt="a")
    health = httpx2.get(served.url + "/health").json()
    assert (health["running"], health["waiting"]) == (2, 1)
    served.engine.go.set()
    for thread in threads:
        thread.join()
    until(lambda: served.admission.count == 0)
    assert httpx2.post(served.url + COMPLETIONS, json=ENDLESS).status_code == 200


def test_choices_count_one_by_one(serve):
    served = serve(Settings(queue=1), slots=2)
    assert httpx2.post(served.url + COMPLETIONS, json={"prompt": "a", "n": 3}).status_code == 200
    answer = httpx2.post(served.url + COMPLETIONS, json={"prompt": "a", "n": 4})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
    answer = httpx2.post(served.url + COMPLETIONS, json={"prompt": ["a", "b", "c", "d"]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert "fewer in 'prompt'" in answer.json()["error"]["message"]


def test_a_request_that_takes_too_long_is_ended(serve, until):
    served = serve(Settings(request_timeout=0.1))
    served.engine.go.clear()
    answer = httpx2.post(served.url + COMPLETIONS, json=ENDLESS)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"
    # OpenAI's client would ask for the same twice more.
    assert answer.headers["x-should-retry"] == "false"
    until(lambda: served.engine.stats()["running"] == 0)


def test_a_stream_that_takes_too_long_ends_with_an_error(serve, until):
    served = serve(Settings(request_timeout=0.3))
    served.engine.go.clear()
    stream = served.client().completions.create(model="fake", prompt="a", max_tokens=900, stream=True)
    with pytest.raises(openai.APIError, match="limit"):
        list(stream)
    until(lambda: served.engine.stats()["running"] == 0)
    until(lambda: served.admission.count == 0)


def test_a_client_that_reads_nothing_is_let_go(serve, until, monkeypatch):
    monkeypatch.setattr("fewbit.serve.streaming.STALLED_SECONDS", 0.1)
    served = serve(Settings(request_timeout=1.0), script="word" * 200_000)
    body = json.dumps({"prompt": "a", "max_tokens": 900, "stream": True, "logprobs": 0}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(head % len(body) + body)
        until(lambda: served.admission.count == 1)
        until(lambda: served.admission.count == 0)
        until(lambda: served.engine.stats()["running"] == 0)


def test_a_silent_stream_shows_signs_of_life(serve, monkeypatch):
    monkeypatch.setattr("fewbit.serve.answers.KEEP_ALIVE_SECONDS", 0.02)
    served = serve()
    served.engine.go.clear()
    with httpx2.stream("POST", served.url + COMPLETIONS, json={**ENDLESS, "max_tokens": 3, "stream": True}) as answer:
        lines = answer.iter_lines()
        assert [next(lines) for _ in range(4)] == [": still working", ""] * 2
        served.engine.go.set()
        assert "data: [DONE]" in list(lines)


def test_a_client_that_leaves_a_stream_frees_its_slot(serve, until):
    served = serve(slots=1)
    stream = served.client().completions.create(model="fake", prompt="a", max_tokens=900, stream=True)
    next(iter(stream))
    served.engine.go.clear()
    stream.close()
    until(lambda: served.engine.stats()["running"] == 0)
    until(lambda: served.admission.count == 0)
    served.engine.go.set()
    assert served.client().completions.create(model="fake", prompt="b").choices


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_its_first_token_frees_its_slot(serve, until, stream):
    served = serve(slots=1)
    served.engine.go.clear()
    body = json.dumps({**ENDLESS, "stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", served.port))
    connection.sendall(head % len(body) + body)
    until(lambda: served.engine.stats()["running"] == 1)
    connection.close()
    until(lambda: served.engine.stats()["running"] == 0)
    until(lambda: served.admission.count == 0)


def test_a_waiting_client_that_leaves_frees_its_place(serve, until):
    served = serve(Settings(queue=1), slots=1)
    served.engine.go.clear()
    thread = background(httpx2.post, served.url + COMPLETIONS, json=ENDLESS)
    until(lambda: served.admission.count == 1)
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(served.url + COMPLETIONS, json=ENDLESS, timeout=0.2)
    until(lambda: served.admission.count == 1)
    served.engine.go.set()
    thread.join()


def test_local_servers_answer_to_local_names_only(serve):
    served = serve(Settings(allowed_hosts=("localhost", "127.0.0.1", "::1")))
    for host in ("localhost", f"localhost:{served.port}", "127.0.0.1:1", "[::1]:80", "LOCALHOST"):
        assert httpx2.get(served.url + "/health", headers={"host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example:80", "", "[::2]"):
        answer = httpx2.get(served.url + "/health", headers={"host": host})
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "host_not_allowed"


def test_host_names_without_their_ports():
    assert [host_name(host) for host in ("a:1", "A", "[::1]:8", "[::1]", "")] == ["a", "a", "::1", "::1", ""]


@pytest.mark.parametrize("path", [*sorted(OPEN), "/v1/models", "/nothing", "/metrics"])
def test_every_answer_has_the_security_headers(shared, path):
    headers = httpx2.get(shared.url + path).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-request-id"]
    assert headers["cache-control"] == ("no-cache" if path in OPEN - {"/health"} else "no-store")
    assert "server" not in headers
    assert "access-control-allow-origin" not in headers
