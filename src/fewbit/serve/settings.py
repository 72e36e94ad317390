"""What an operator may choose about the server."""

from __future__ import annotations

from dataclasses import dataclass, field

from fewbit.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """Limits and names of one server; times in seconds, sizes in bytes.

    `api_key` None: everyone who reaches the port is served. `allowed_hosts` empty: any Host header is taken;
    otherwise one that is not listed is refused, which keeps web pages from reaching a local server under a name
    of their own (DNS rebinding).
    """

    model_name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    queue: int = 64
    max_choices: int = 16
    max_body_bytes: int = 2_000_000
    # All requests' bodies together, from their first byte to the end of the answer.
    max_held_bytes: int = 64_000_000
    connections: int = 512
    head_timeout: float = 10.0
    body_timeout: float = 30.0
    # How long a client may leave what it was sent unread.
    stall_timeout: float = 30.0
    request_timeout: float = 600.0
    grace: float = 30.0
    page: bool = True

    def __post_init__(self) -> None:
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise UsageError("the API key must be printable ASCII without being empty, as it travels in a header")
        if self.queue < 0 or min(self.max_choices, self.max_body_bytes, self.connections) < 1:
            raise UsageError("the queue must be at least 0, the choices, the body's bytes, the connections at least 1")
        if self.max_held_bytes < self.max_body_bytes:
            raise UsageError("the bytes of all requests must be at least those of one")
        if min(self.head_timeout, self.body_timeout, self.stall_timeout, self.request_timeout) <= 0 or self.grace < 0:
            raise UsageError("time limits must be above 0 seconds, the grace time at least 0")
