"""Uses an installed fewbit as a user would, on the model in a directory: `smoke_test.py MODEL`.

Run by `build_wheel.sh` in an environment that has the wheel and what it depends on, nothing else.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import fewbit
from fewbit.ops.extension import load_native


def main(model: str) -> None:
    if load_native() is None:
        raise SystemExit("the wheel has no native extension")
    command = str(Path(sys.executable).parent / "fewbit")
    with tempfile.TemporaryDirectory() as directory:
        out, text = (str(Path(directory) / name) for name in ("out", "text.txt"))
        Path(text).write_text("Once upon a time there was a town by the sea. " * 200, encoding="utf-8")
        for arguments in (
            ["--help"],
            ["quantize", model, out, "--calib", text, "--calib-tokens", "1024", "--calib-window", "64"],
            ["verify", out],
            ["generate", out, "-p", "Once upon", "--max-tokens", "8"],
        ):
            run = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
            if run.returncode != 0 or not run.stdout.strip():
                raise SystemExit(f"fewbit {' '.join(arguments)} failed:\n{run.stdout}{run.stderr}")
    print(f"fewbit {fewbit.__version__} works as installed in {sys.prefix}")


if __name__ == "__main__":
    main(sys.argv[1])
