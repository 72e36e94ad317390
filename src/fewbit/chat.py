"""The conversation behind `fewbit chat`: turns, commands, and answers that can be stopped.

Turns share their beginning, so each prompt is in the decoder's cache but for the newest message.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fewbit.checkpoint.store import disk_errors
from fewbit.errors import FewbitError, UsageError
from fewbit.runtime.engine import Engine
from fewbit.runtime.sampling import SamplingParams

WORDS: dict[str, Any] = {"True": True, "False": False, "None": None}  # as /settings shows them
HELP = """\
/help              this list
/reset             forget the conversation; the system message stays
/system [TEXT]     set the system message, or remove it
/retry             answer the last message again
/set NAME VALUE    change a setting of the sampling, such as temperature 0.7
/settings          show the settings
/save FILE         write the conversation as one line of JSON
/quit              end; so does the end of the input (Ctrl-D)
Ctrl-C stops an answer."""


class Chat:
    """A conversation with an engine, printed on `out`; remarks go there too unless `quiet`.

    Raises `UsageError` at once if the model has no chat template.
    """

    def __init__(self, engine: Engine, params: SamplingParams, system: str, out: Console, quiet: bool = False) -> None:
        self.messages: list[dict[str, str]] = []
        self._engine = engine
        self._params = params
        self._out = out
        self._quiet = quiet
        self._set_system(system)
        engine.encode_chat([{"role": "user", "content": "?"}])

    def run(self, lines: Iterable[str]) -> None:
        """Take lines until they end or one says /quit; errors are shown and the conversation goes on."""
        for line in lines:
            line = line.strip()
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self.say(line)
            except FewbitError as error:
                self._out.print(str(error), style="red", markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One turn: the message and its answer."""
        self.messages.append({"role": "user", "content": text})
        try:
            self._answer()
        except BaseException:
            self.messages.pop()
            raise

    def _answer(self) -> None:
        request = self._engine.submit(self._prompt(), self._params)
        texts = []
        pieces = iter(request)
        while True:
            try:
                for piece in pieces:
                    texts.append(piece.text)
                    self._out.file.write(piece.text)
                    self._out.file.flush()
                break
            except KeyboardInterrupt:
                request.cancel()
                pieces = iter(request)  # what is still on its way, up to the piece that says "cancelled"
        self._out.print()
        self.messages.append({"role": "assistant", "content": "".join(texts)})
        if not self._quiet:
            self._remark(request.summary())

    def _prompt(self) -> list[int]:
        """The conversation as token ids; the oldest turns are dropped where it leaves no room to answer."""
        room = min(self._params.max_tokens, self._engine.context // 4)
        ids = self._engine.encode_chat(self.messages)
        while len(ids) + room > self._engine.context and len(self._turns()) > 1:
            first = len(self.messages) - len(self._turns())
            del self.messages[first : first + 2]
            self._remark("The context is full: the oldest turn is forgotten.")
            ids = self._engine.encode_chat(self.messages)
        return ids

    def _turns(self) -> list[dict[str, str]]:
        return [message for message in self.messages if message["role"] != "system"]

    def _remark(self, text: str) -> None:
        if not self._quiet:
            self._out.print(text, style="dim", markup=False, soft_wrap=True)

    # ---- commands

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        command = getattr(self, f"_do_{name}", None)
        if command is None:
            raise UsageError(f"unknown command /{name}; /help lists them, and a text must not begin with /")
        command(rest.strip())

    def _do_help(self, rest: str) -> None:
        self._out.print(HELP, markup=False, highlight=False)

    def _do_reset(self, rest: str) -> None:
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self._remark("The conversation is forgotten.")

    def _do_system(self, rest: str) -> None:
        self._set_system(rest)
        self._remark("The system message is set." if rest else "The system message is removed.")

    def _set_system(self, text: str) -> None:
        system = [{"role": "system", "content": text}] if text else []
        self.messages = system + self._turns()

    def _do_retry(self, rest: str) -> None:
        turns = self._turns()
        if len(turns) < 2:
            raise UsageError("there is no answer yet to try again")
        answer = self.messages.pop()
        try:
            self._answer()
        except BaseException:
            self.messages.append(answer)
            raise

    def _do_set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        known = [field.name for field in fields(SamplingParams)]
        if name not in known:
            raise UsageError(f"unknown setting '{name}': choose from {', '.join(known)}")
        found: Any = value.strip()
        if found in WORDS:
            found = WORDS[found]
        else:
            with contextlib.suppress(ValueError):  # a stop string may be written without quotes
                found = json.loads(found)
        self._params = replace(self._params, **{name: found})
        self._remark(f"{name} is {getattr(self._params, name)}.")

    def _do_settings(self, rest: str) -> None:
        text = "\n".join(f"{field.name} {getattr(self._params, field.name)}" for field in fields(SamplingParams))
        self._out.print(text, markup=False, highlight=False)

    def _do_save(self, rest: str) -> None:
        if not rest:
            raise UsageError("/save needs the name of a file")
        path = Path(rest).expanduser()
        with disk_errors(path.parent):
            path.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n", encoding="utf-8")
        self._remark(f"Saved to {path}.")


def typed_lines(coloured: bool = False) -> Iterable[str]:
    """Lines from the terminal until Ctrl-D; Ctrl-C drops what was typed."""
    prompt = "> "
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # editing and history in input()

        if coloured:
            prompt = "\001\033[1;36m\002> \001\033[0m\002"  # 1 and 2 tell it what takes no room
    while True:
        try:
            yield input(prompt)
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D ends)")
        except EOFError:
            print()
            return
