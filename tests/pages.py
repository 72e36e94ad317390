"""The documentation as readers take it: the code blocks of its pages, and a reader who does what they say."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$"
PARTS = re.compile(rf"^#+ (?P<heading>[^\n]+)$|{FENCED}", re.MULTILINE | re.DOTALL)
ADDRESS = "127.0.0.1:8000"  # of the server, in the pages
TYPED = "What is a lighthouse for?\n"  # into programs that ask
START_SECONDS = 120  # for a server to answer on a busy machine


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, and its code without indentation."""

    page: Path
    section: str  # the heading above it
    line: int
    language: str
    code: str

    def commands(self) -> list[str]:
        """The commands of a shell block as they stand there, continued lines joined."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if words_of(line)]


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(FENCED, "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str, section: str | None = None) -> list[Block]:
    """The fenced blocks of a page: all, or those in some languages, or those directly under a heading."""
    text, found, heading = text_of(page), [], ""
    for part in PARTS.finditer(text):
        if part["heading"]:
            heading = part["heading"]
            continue
        line = text.count("\n", 0, part.start("code")) + 1
        found.append(Block(page, heading, line, part["language"], textwrap.dedent(part["code"])))
    return [b for b in found if (not languages or b.language in languages) and section in (None, b.section)]


class Reader:
    """Runs blocks in a directory where things lie under the names that the pages take for given.

    Python blocks share one namespace. Commands of fewbit run in this process, through `run`; servers run in others, on
    free ports of this machine. The first server stays, and later blocks find it where the pages say 8000.
    """

    def __init__(self, run: Callable[..., tuple[int, str, str]], monkeypatch: Any, directory: Path) -> None:
        self.directory = directory
        self.namespace: dict[str, Any] = {"__name__": "example"}
        self.printed: list[str] = []
        self.not_asked: list[str] = []  # commands whose program this machine lacks
        self._run = run
        self._monkeypatch = monkeypatch
        self._servers: list[subprocess.Popen[bytes]] = []
        self._address = ADDRESS

    def put(self, **places: Path) -> None:
        for name, path in places.items():
            (self.directory / name).symlink_to(path)

    def read(self, found: Sequence[Block], left_out: Iterable[str] = ()) -> dict[str, Any]:
        """Run blocks in their order, without some commands; the namespace of the Python blocks."""
        assert found, "the page has no such blocks"
        for block in found:
            if block.language == "python":
                # Blank lines in front, so that errors name the line of the page.
                code = "\n" * (block.line - 1) + block.code.replace(ADDRESS, self._address)
                exec(compile(code, str(block.page), "exec", dont_inherit=True), self.namespace)
            elif block.language == "sh":
                for command in block.commands():
                    if " ".join(words_of(command)) not in left_out:
                        self._do(command)
            elif block.language == "json":
                json.loads(block.code if block.code.startswith(("{", "[")) else f"{{{block.code}}}")
            else:
                assert block.language == "text", f"{block.page}:{block.line}: who runs '{block.language}'?"
        return self.namespace

    def close(self) -> None:
        for server in self._servers:
            server.terminate()
        assert {server.wait(START_SECONDS) for server in self._servers} <= {0}

    def _do(self, command: str) -> None:
        words, settings = words_of(command), {}
        while re.match(r"[A-Z_]+=", words[0]):
            name, _, settings[name] = words.pop(0).partition("=")
        program, *arguments = words
        if program == "fewbit" and arguments[0] == "serve":
            self._serve(arguments, settings)
        elif program == "fewbit" and not settings:
            self._fewbit(arguments)
        elif program == "curl" and not settings:
            self._ask(arguments)
        else:
            raise AssertionError(f"who runs '{command}'?")

    def _fewbit(self, arguments: list[str]) -> None:
        if arguments[0] == "quantize":
            # Commands with one output are alternatives.
            out = self.directory / arguments[2]
            if out.is_symlink():
                out.unlink()
            elif out.exists():
                shutil.rmtree(out)
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(TYPED))
        code, out, err = self._run(*arguments)
        assert code == 0, f"fewbit {shlex.join(arguments)}: {err}"
        self.printed.append(out)

    def _serve(self, arguments: list[str], settings: dict[str, str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        host, port = address.split(":")
        program = [sys.executable, "-c", "from fewbit.cli import main; main()", *arguments]
        program += ["--host", host, "--port", port]  # of an option that comes twice the last one counts
        log = self.directory / "server.log"
        with log.open("wb") as file:
            server = subprocess.Popen(program, cwd=self.directory, env={**os.environ, **settings}, stderr=file)
        self._servers.append(server)
        give_up = time.monotonic() + START_SECONDS
        while not _answers(f"http://{address}/health"):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < give_up, log.read_text()
            time.sleep(0.1)
        if len(self._servers) == 1:
            self._address = address
        else:
            self._servers.pop()
            server.terminate()
            assert server.wait(START_SECONDS) == 0, log.read_text()

    def _ask(self, arguments: list[str]) -> None:
        if shutil.which("curl") is None:
            self.not_asked.append(shlex.join(arguments))
            return
        arguments = [argument.replace(ADDRESS, self._address) for argument in arguments]
        command = ["curl", *arguments, "--fail-with-body", "--silent", "--show-error"]
        done = subprocess.run(command, cwd=self.directory, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
        self.printed.append(done.stdout)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url).close()
    except (urllib.error.URLError, ConnectionError):
        return False
    return True
