"""One engine and many threads, a fork while it works, and the pool of threads under ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hostile_seeds import make_seeds

from fewbit.errors import EngineError
from fewbit.runtime.engine import Engine
from fewbit.runtime.sampling import SamplingParams

NATIVE = Path(__file__).resolve().parents[2] / "src" / "fewbit" / "native"
PROGRAM = Path(__file__).resolve().parents[1] / "native" / "threads.cpp"


def _prompt(number: int) -> list[int]:
    return [3 + (number * 7 + place * place) % 90 for place in range(2 + number % 9)]


def _params(number: int) -> SamplingParams:
    return SamplingParams(max_tokens=12, temperature=0.0 if number % 2 else 0.8, seed=number, ignore_eos=True)


def asked_by_many(threads: int, requests: int) -> tuple[int, int]:
    """How many answers many threads asked one engine for, and how many are those that it gives when asked in turn."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = make_seeds(Path(directory))["trellis"]
        numbers = range(threads * requests)
        with Engine(checkpoint, slots=1, threads=1) as engine:
            alone = [engine.submit(_prompt(number), _params(number)).result().token_ids for number in numbers]
        with Engine(checkpoint, slots=4, threads=2) as engine, ThreadPoolExecutor(threads) as pool:

            def ask(number: int) -> bool:
                return engine.submit(_prompt(number), _params(number)).result().token_ids == alone[number]

            right = sum(pool.map(ask, numbers))
    return len(numbers), right


def forked(times: int) -> tuple[int, int]:
    """How often a process was forked while its engine answered, and how often all went well: the child gets
    `EngineError` from that engine and an answer from one of its own, and the parent its answer."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = make_seeds(Path(directory))["trellis"]
        right = 0
        with Engine(checkpoint, slots=2, threads=2) as engine:
            wanted = engine.submit(_prompt(1), _params(1)).result().token_ids
            for _ in range(times):
                answer: list[bool] = []

                def ask(found: list[bool] = answer) -> None:
                    found.append(engine.submit(_prompt(1), _params(1)).result().token_ids == wanted)

                busy = threading.Thread(target=ask)
                busy.start()
                child = os.fork()
                if child == 0:
                    os._exit(0 if _in_child(engine, checkpoint, list(wanted)) else 1)
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                busy.join()
                right += status == 0 and answer == [True]
    return times, right


def _in_child(engine: Engine, checkpoint: Path, wanted: list[int]) -> bool:
    try:
        engine.submit(_prompt(1), _params(1))
    except EngineError:
        with Engine(checkpoint, slots=1, threads=2) as own:
            return list(own.submit(_prompt(1), _params(1)).result().token_ids) == wanted
    return False


def sanitized(times: int) -> tuple[int, int]:
    """How often the program of `tests/native/test_threads.py` ran under ThreadSanitizer, and how often without a word
    from it."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")))
    plain = shutil.which("setarch")
    with tempfile.TemporaryDirectory() as directory:
        built = Path(directory) / "threads"
        flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", "-I", str(NATIVE)]
        subprocess.run([compiler, *flags, str(PROGRAM), str(NATIVE / "threads.cpp"), "-o", str(built)], check=True)
        command = [*([plain, "-R"] if plain else []), str(built)]
        runs = [subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(times)]
    return times, sum(run.returncode == 0 and not run.stderr for run in runs)
