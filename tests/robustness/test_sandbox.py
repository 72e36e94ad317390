"""The sandbox of hostile files sees what must not happen.

Not in `test_files.py`, which also runs under sanitizers: they report the crash here, and memory of theirs takes long.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import hostile_sandbox
import hostile_targets
import pytest
from hostile_sandbox import CONSTANT_BYTES

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and memory are Linux's")

MUCH = CONSTANT_BYTES + (100 << 20)
BAD = {
    "crash": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "hang": "while True: pass",
    "untyped": "raise ValueError('x')",
    "memory": f"x = bytes(1) * {MUCH}",
    "wrote": "open(path.parent / 'outside' / 'more', 'w').close()",
}


@pytest.mark.parametrize("result", BAD)
def test_the_sandbox_notices_what_must_not_happen(result, tmp_path, monkeypatch):
    def bad(path, out):
        exec(BAD[result], {"path": path})

    monkeypatch.setattr(hostile_sandbox, "CPU_SECONDS", 1)
    monkeypatch.setitem(hostile_targets.TARGETS, "plain", (bad,))
    for name in ("in", "out", "outside"):
        (tmp_path / name).mkdir()
    outcome = hostile_sandbox._fork("plain", "bad", 0, tmp_path, 0)
    assert outcome.result == result
    assert not outcome.fine
    assert replace(outcome, result="typed").fine
    assert os.getcwd() != str(tmp_path / "out")
