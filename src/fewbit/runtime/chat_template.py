"""Renders a model's chat template as transformers does, without importing it.

Templates come with models from anywhere: they run in jinja2's sandbox, see plain data only, and may keep nothing under
a name that begins with an underscore.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning, the usual one first


class _Generation(Extension):
    """`{% generation %}` marks what a model wrote, for training; it changes nothing of the text."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Dict:
    """What `dict` is in a template: calls, and none of a type's attributes."""

    def __call__(self, *values: Any, **named: Any) -> dict[Any, Any]:
        return dict(*values, **named)

    def fromkeys(self, *values: Any) -> dict[Any, Any]:
        return dict.fromkeys(*values)


class _Namespace(Namespace):
    """What `namespace` is in a template."""

    def __init__(*arguments: Any, **named: Any) -> None:
        self, values = arguments[0], dict(*arguments[1:], **named)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template may not store {name!r} on a namespace")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes what HTML does not allow.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A template, compiled once."""

    def __init__(self, text: str) -> None:
        """Raises jinja2's `TemplateSyntaxError` for a text that is none."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControls]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        self._template = environment.from_string(text)

    def render(self, messages: list[dict[str, Any]], tokens: dict[str, str], add_generation_prompt: bool) -> str:
        """The text of a conversation; `tokens` are special tokens by the names that templates know them by.

        Raises `ValueError` for a conversation without messages and whatever the template itself raises.
        """
        if not messages:
            raise ValueError("a conversation has one message at least")
        plain = [_message(_plain(message)) for message in messages]
        return self._template.render(
            messages=plain, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **tokens
        )


def _message(fields: dict[str, Any]) -> dict[str, Any]:
    """A message without fields that are None, its reasoning under the names that templates read."""
    found = {name: value for name, value in fields.items() if value is not None}
    reasoning = next((found[name] for name in _REASONING if name in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """Nothing but JSON's types: methods of other objects are beyond the sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"
