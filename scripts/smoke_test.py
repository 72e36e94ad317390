"""Uses an installed fewbit as a user would, on the model in a directory: `smoke_test.py MODEL`.

Run by `build_wheel.sh` in an environment that has the wheel and what it depends on, nothing else.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

# MODEL, OUT and TEXT stand for paths.
COMMANDS = (
    "--help",
    "quantize MODEL OUT --calib TEXT --calib-tokens 1024 --calib-window 64",
    "verify OUT",
    "generate OUT -p Once --max-tokens 8",
)


def main(model: str) -> None:
    import fewbit
    from fewbit.ops.extension import load_native

    if load_native() is None:
        raise SystemExit("the wheel has no native extension")
    command = str(Path(sys.executable).parent / "fewbit")
    with tempfile.TemporaryDirectory() as directory:
        places = {"MODEL": model, "OUT": f"{directory}/out", "TEXT": f"{directory}/text.txt"}
        Path(places["TEXT"]).write_text("Once upon a time there was a town by the sea. " * 200, encoding="utf-8")
        for line in COMMANDS:
            arguments = [places.get(word, word) for word in line.split()]
            run = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
            if run.returncode != 0 or not run.stdout.strip():
                raise SystemExit(f"fewbit {line} failed:\n{run.stdout}{run.stderr}")
    print(f"fewbit {fewbit.__version__} works as installed in {sys.prefix}")


if __name__ == "__main__":
    main(sys.argv[1])
