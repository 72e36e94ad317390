"""Runs a script in a fresh interpreter, where another instruction set or none at all can be chosen."""

import os
import subprocess
import sys

import pytest


def _run(script: str, isa: str | None = None, threads: int = 0, *flags: str) -> list[str]:
    environment = {key: value for key, value in os.environ.items() if key != "FEWBIT_ISA"}
    if isa:
        environment["FEWBIT_ISA"] = isa
    command = [sys.executable, "-c", script, str(threads), *flags]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.fixture(scope="session")
def run_script():
    """The function `run(script, isa=None, threads=0, *flags)`: the words that the script prints."""
    return _run
