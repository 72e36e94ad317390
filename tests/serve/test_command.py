"""`fewbit serve`: what it refuses, what it warns of, and that it really serves and ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import openai
import pytest
from typer.testing import CliRunner

from fewbit.cli import app
from fewbit.errors import FewbitError, UsageError
from fewbit.serve import command


@pytest.fixture
def called(monkeypatch):
    """What the verb would run; nothing is opened."""
    seen = {}

    def run(path, options, settings, server, host, port, access_log):
        seen.update(path=path, options=options, settings=settings, host=host, port=port)

    monkeypatch.setattr(command, "_run", run)
    monkeypatch.delenv("FEWBIT_API_KEY", raising=False)
    return seen


def invoke(*arguments: str, **environment: str):
    return CliRunner().invoke(app, ["serve", "model", "--port", "0", *arguments], env=environment)


def test_it_listens_to_this_machine_alone_unless_told(called):
    result = invoke()
    assert result.exit_code == 0, result.output
    assert called["host"] == "127.0.0.1"
    assert set(called["settings"].allowed_hosts) == {"localhost", "127.0.0.1", "::1"}
    assert called["settings"].api_key is None
    assert "warning" not in result.output


def test_any_free_port_is_told_and_every_address_of_this_machine_may_be_used(called):
    assert invoke("--host", "127.0.0.2").exit_code == 0
    assert called["port"] > 0
    assert "127.0.0.2" in called["settings"].allowed_hosts


def test_listening_elsewhere_without_a_key_is_warned_of(called):
    result = invoke("--host", "0.0.0.0")
    assert "no key is set" in result.output
    assert called["settings"].allowed_hosts == ()
    assert "warning" not in invoke("--host", "0.0.0.0", "--api-key", "sesame").output


def test_the_key_comes_from_the_environment_and_is_not_shown(called):
    result = invoke(FEWBIT_API_KEY="sesame")
    assert called["settings"].api_key == "sesame"
    assert called["settings"].allowed_hosts == ()
    assert "sesame" not in result.output + repr(called["settings"])
    assert "sesame" not in invoke("--help", FEWBIT_API_KEY="sesame").output


def test_options_reach_the_engine_and_the_server(called):
    invoke("--slots", "3", "--context", "99", "--draft", "4", "--kv", "int8", "--max-body", "1kB", "--timeout", "5",
           "--queue", "2", "--grace", "1", "--name", "mine", "--no-page", "--allow-host", "Box.local")  # fmt: skip
    assert called["options"] == {"slots": 3, "context": 99, "threads": None, "kv": "int8", "draft": 4}
    settings = called["settings"]
    assert (settings.max_body_bytes, settings.request_timeout, settings.queue, settings.grace) == (1000, 5, 2, 1)
    assert (settings.model_name, settings.page) == ("mine", False)
    assert "box.local" in settings.allowed_hosts


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.5", False), ("example.org", False)],
)  # fmt: skip
def test_loopback_addresses(host, alone):
    assert command.is_loopback(host) is alone


def test_a_port_in_use_is_told_before_the_model_is_opened(called):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = CliRunner().invoke(app, ["serve", "model", "--port", str(taken.getsockname()[1])])
    assert isinstance(result.exception, UsageError)
    assert "--port" in str(result.exception)
    assert not called


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fewbit.serve.server", None)
    with pytest.raises(FewbitError, match="install the server"):
        command._import_server()


@pytest.mark.slow
def test_a_real_model_is_served_and_the_server_ends_cleanly(smollm2_dir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from fewbit.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(next(smollm2_dir.glob("*.gguf"))), "--port", str(port)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "FEWBIT_API_KEY": "sesame"},
    )  # fmt: skip
    try:
        assert process.stdout.readline().startswith("Serving ")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="sesame", max_retries=20)
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat.completions.create(model=client.models.list().data[0].id, messages=question, temperature=0)
        assert "Paris" in answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "stop"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_more_connections_than_files_may_be_open_are_refused_at_once(called):
    result = invoke("--connections", "99999999999")
    assert isinstance(result.exception, UsageError)
    assert "give fewer to --connections" in str(result.exception)
    assert not called


def test_the_limit_of_open_files_follows_the_connections(called):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(before[1], 4096) - command.OTHER_FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
    try:
        assert invoke("--connections", str(wanted)).exit_code == 0
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == wanted + command.OTHER_FILES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
