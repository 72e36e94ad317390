"""Clients that send nothing, read nothing, or are too many; and what is not HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import httpx2
import pytest
from uvicorn.server import ServerState

from fewbit.runtime.results import Piece
from fewbit.serve import connections
from fewbit.serve.settings import Settings

COMPLETIONS = "/v1/completions"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def connect(served, *parts: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=30)
    for part in parts:
        connection.sendall(part)
    return connection


def rest(connection: socket.socket) -> bytes:
    """Everything up to the connection's end."""
    answer = b""
    try:
        while part := connection.recv(65536):
            answer += part
    except ConnectionResetError:
        pass
    connection.close()
    return answer


def request(**fields) -> bytes:
    body = json.dumps({"prompt": "a", "max_tokens": 900, "temperature": 0, **fields}).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize("begun", [b"", b"POST /v1/comp", HEAD], ids=repr)
def test_a_head_that_does_not_come_is_not_waited_for(serve, begun):
    served = serve(Settings(head_timeout=0.1))
    assert rest(connect(served, begun)) == b""


def test_a_head_that_trickles_is_not_waited_for(serve):
    served = serve(Settings(head_timeout=0.2))
    connection = connect(served, HEAD)
    deadline = time.monotonic() + 30
    with pytest.raises(OSError, match=r"reset|pipe"):  # noqa: PT012
        while time.monotonic() < deadline:
            connection.sendall(b"X-A: b\r\n")
            time.sleep(0.02)
    connection.close()


def test_the_second_head_of_a_connection_must_come_in_time_too(serve):
    served = serve(Settings(head_timeout=1.0))
    connection = connect(served, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    connection.sendall(b"GET /hea")
    assert rest(connection).count(b"HTTP/1.1") == 0


def test_a_long_answer_is_no_missing_head(serve):
    served = serve(Settings(head_timeout=1.0), script="word" * 40, step_seconds=0.05)
    answer = httpx2.post(served.url + COMPLETIONS, json={"prompt": "a", "max_tokens": 900}, timeout=30)
    assert answer.json()["choices"][0]["text"] == "word" * 40


def test_who_reads_nothing_is_let_go_long_before_the_requests_time_is_over(serve, until):
    served = serve(Settings(stall_timeout=0.2), script="w", step_seconds=0.005)
    served.engine._scripted = lambda request: Piece("w" * 100_000, (0,), (), None)
    connection = connect(served, request(stream=True))
    until(lambda: served.admission.count == 1)
    until(lambda: served.admission.count == 0)
    until(lambda: served.engine.stats()["running"] == 0)
    connection.close()


def test_an_answer_that_is_never_read_does_not_keep_its_connection(serve, until):
    # Larger than the system's buffers.
    served = serve(Settings(stall_timeout=0.2), script="w" * 12_000_000)
    served.engine._scripted = lambda request: Piece(served.engine.script, (0,), (), "stop")
    connection = connect(served, request())
    until(lambda: served.server.server_state.total_requests == 1)
    until(lambda: not served.server.server_state.connections)
    connection.close()


def test_an_idle_connection_makes_room_for_a_new_one(serve, until):
    served = serve(Settings(connections=3))
    idle = [connect(served) for _ in range(3)]
    until(lambda: len(served.server.server_state.connections) == 3)
    for _ in range(5):
        assert httpx2.get(served.url + "/health").status_code == 200
    assert len(served.server.server_state.connections) <= 3
    assert rest(idle[0]) == b""
    for connection in idle[1:]:
        connection.close()


def test_where_all_connections_work_a_new_one_is_told_so(serve, until):
    served = serve(Settings(connections=2), slots=2)
    served.engine.go.clear()
    busy = [connect(served, request()) for _ in range(2)]
    until(lambda: served.admission.count == 2)
    answer = httpx2.post(served.url + COMPLETIONS, json={"prompt": "a"})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "too_many_connections"
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["x-content-type-options"] == "nosniff"
    served.engine.go.set()
    for connection in busy:
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.close()
    until(lambda: not served.server.server_state.connections)
    assert httpx2.get(served.url + "/health").status_code == 200


NOT_HTTP = [
    b"\x16\x03\x01\x02\x00\x01",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET /\x1b[31m HTTP/1.1\r\nHost: x\r\n\r\n",
    HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
    HEAD + b"X: " + b"y" * 200_000,
]


@pytest.mark.parametrize("sent", NOT_HTTP, ids=["tls", "no host", "escape", "two lengths", "long head"])
def test_what_is_not_http_gets_an_error_in_shape_and_no_line_in_the_log(serve, logged, sent):
    served = serve()
    records = logged()
    answer = rest(connect(served, sent, b"\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 400 ")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert json.loads(body)["error"]["code"] == "invalid_http"
    assert b"x-frame-options: DENY" in head
    assert not records


def test_clients_that_leave_in_mid_stream_leave_no_line_in_the_log(serve, logged, until):
    served = serve(script="word" * 5000)
    records = logged()
    for _ in range(3):
        connection = connect(served, request(stream=True, logprobs=0))
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closing resets
        connection.close()
    until(lambda: served.admission.count == 0)
    assert not records


def test_two_lengths_of_one_body_are_refused(serve):
    served = serve()
    head = HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    answer = rest(connect(served, head + b"0\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"invalid_http" in answer


@pytest.mark.parametrize("settings", [Settings(max_body_bytes=1000), Settings(api_key="sesame")], ids=["size", "key"])
def test_a_client_that_sends_all_of_a_refused_body_can_read_why(serve, settings):
    served = serve(settings)
    body = b'{"prompt": "' + b"a" * 10_000_000 + b'"}'
    answer = httpx2.post(served.url + COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == (401 if settings.api_key else 413)
    assert answer.json()["error"]["message"]


def test_unfinished_bodies_share_a_limit(serve, until):
    served = serve(Settings(max_body_bytes=100_000, max_held_bytes=100_000))
    head = HEAD + b"Content-Length: 90000\r\n\r\n"
    waiting = connect(served, head, b" " * 89_000)
    body = b'{"prompt": "a"}'.ljust(50_000)
    headers = {"content-type": "application/json"}
    until(lambda: httpx2.post(served.url + COMPLETIONS, content=body, headers=headers).status_code == 429)
    answer = httpx2.post(served.url + COMPLETIONS, content=body, headers=headers)
    assert (answer.json()["error"]["code"], answer.headers["retry-after"]) == ("too_many_bytes", "1")
    waiting.close()
    until(lambda: httpx2.post(served.url + COMPLETIONS, content=body, headers=headers).status_code == 200)


def test_the_parsers_are_the_ones_with_limits_whatever_is_installed(serve):
    config = serve().server.config
    loop = asyncio.new_event_loop()
    assert isinstance(config.http_protocol_class(config, ServerState(), {}, _loop=loop), connections.Connection)
    loop.close()
    assert config.ws_protocol_class is None
    assert not config.proxy_headers
