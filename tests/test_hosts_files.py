"""The blocks of the hosts' page about Ray and about files do what the page says, as they stand there."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gguf_files import write_gguf
from pages import ROOT, Block, blocks

PAGE = ROOT / "docs" / "hosts.md"


@pytest.mark.usefixtures("few_steps")
def test_gguf_goes_in_and_safetensors_come_out(make_tiny, calibration_text, tmp_path, reader):
    write_gguf(tmp_path / "model.gguf", make_tiny("qwen2"), "F16")
    (tmp_path / "calibration.txt").write_text(calibration_text.read_text()[:4000])
    section = "GGUF in, safetensors out"
    reader.read(blocks(PAGE, "sh", section=section))
    assert (tmp_path / "CONVERTED" / "model.safetensors").exists()
    (program,) = blocks(PAGE, "python", section=section)
    blocked = "import sys\nsys.modules['fewbit'] = None\n"
    done = subprocess.run([sys.executable, "-c", blocked + program.code], capture_output=True, text=True, check=False)
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

    def here(block: Block) -> str:
        code = block.code.replace("HEAD:6379", f"127.0.0.1:{port}").replace("6379", str(port))
        return code.replace("SHARED", str(shared))

    token, start, quantize = map(here, blocks(PAGE, "sh", section="Ray"))
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
        program = [sys.executable, "-c", "from fewbit.cli import main; main()"]
        arguments = shlex.split(quantize)[1:]
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
