"""The blocks of the hosts' page about Ray and about files do what the page says, as they stand there."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gguf_files import write_gguf

PAGE = Path(__file__).resolve().parent.parent / "docs" / "hosts.md"


def blocks(section: str, language: str) -> list[str]:
    """The fenced blocks in one language of a section of the page."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    text = text.partition("\n### ")[0]
    return [textwrap.dedent(body) for body in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


def fewbit_lines(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "fewbit", line
        yield arguments


def test_gguf_goes_in_and_safetensors_come_out(make_tiny, calibration_text, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "model.gguf", make_tiny("qwen2"), "F16")
    (tmp_path / "calibration.txt").write_text(calibration_text.read_text()[:4000])
    compress, convert = blocks("GGUF in, safetensors out", "sh")
    for arguments in [*fewbit_lines(compress), *fewbit_lines(convert)]:
        code, _, err = run(*arguments)
        assert code == 0, err
    assert (tmp_path / "CONVERTED" / "model.safetensors").exists()
    (program,) = blocks("GGUF in, safetensors out", "python")
    blocked = "import sys\nsys.modules['fewbit'] = None\n"
    done = subprocess.run([sys.executable, "-c", blocked + program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen) -> None:
    for _ in range(600):
        assert process.poll() is None, "the head ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError("the head did not start")


@pytest.mark.slow
def test_a_cluster_of_two_nodes_quantizes(tiny_models, calibration_text, tmp_path):
    pytest.importorskip("ray")
    shared = tmp_path / "SHARED"
    shared.mkdir()
    (shared / "model").symlink_to(tiny_models["tied"])
    port, started = free_port(), []
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}

    def here(block: str) -> str:
        return block.replace("HEAD:6379", f"127.0.0.1:{port}").replace("6379", str(port)).replace("SHARED", str(shared))

    token, start, quantize = map(here, blocks("Ray", "sh"))
    subprocess.run(["sh", "-ec", token], check=True, env=environment)
    assert (shared / "ray-token").stat().st_mode & 0o077 == 0
    # Clusters that others have on this machine stay what they are.
    environment |= dict(word.split("=", 1) for word in start.splitlines()[0].split()[1:])
    environment.pop("RAY_ADDRESS", None)
    try:
        for line in start.splitlines()[1:]:
            # In the foreground, so that this test ends what it began and nothing else.
            command = [*shlex.split(line), "--block", "--num-cpus=1", "--disable-usage-stats"]
            if "--head" in command:
                command.append("--include-dashboard=false")
            started.append(subprocess.Popen(command, start_new_session=True, env=environment))
            wait_for(port, started[0])
        (arguments,) = fewbit_lines(quantize)
        program = [sys.executable, "-c", "from fewbit.cli import main; main()"]
        sizes = ["--calib", str(calibration_text), "--calib-tokens", "1024", "--calib-window", "128", "--no-tune"]
        subprocess.run([*program, *arguments, *sizes], check=True, env=environment)
        assert (shared / "out" / "config.json").exists()
        assert not (shared / "work").exists()
    finally:
        for process in reversed(started):
            os.killpg(process.pid, signal.SIGTERM)
        for process in reversed(started):
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
