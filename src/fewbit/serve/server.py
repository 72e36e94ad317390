"""uvicorn with a shutdown in two steps: first nobody comes in any more, then, when all are served, it ends."""

from __future__ import annotations

import asyncio
import logging
import time
from types import FrameType
from typing import cast

import uvicorn
from fastapi import FastAPI

from fewbit.serve.connections import connection_factory
from fewbit.serve.limits import Admission

log = logging.getLogger("fewbit.serve")

# For connections to close once nothing runs any more.
CLOSE_SECONDS = 5


class GracefulServer(uvicorn.Server):
    """On the first signal new requests get 503 and running ones have `grace` seconds; a second one ends them all."""

    def __init__(self, config: uvicorn.Config, admission: Admission, grace: float) -> None:
        super().__init__(config)
        self._admission = admission
        self._grace = grace
        self._end = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by signals, between any two instructions: it only sets flags that `on_tick` reads."""
        if self._admission.draining:
            self._end = 0.0
            self.force_exit = True
            return
        self._end = time.monotonic() + self._grace
        self._admission.drain()

    async def on_tick(self, counter: int) -> bool:
        if self._admission.draining and not self.should_exit:
            if self._admission.count and time.monotonic() >= self._end:
                log.warning("%d sequences did not finish in time and are cut off", self._admission.count)
                self._admission.abort()
                # Time for the errors to reach the clients.
                await asyncio.sleep(0.1)
                self.should_exit = True
            elif not self._admission.count:
                self.should_exit = True
        return await super().on_tick(counter)


def make_server(app: FastAPI, host: str, port: int, *, access_log: bool = False) -> GracefulServer:
    """The server of an app that `create_app` made; `run()` it in the main thread, where signals arrive."""
    service = app.state.service
    config = uvicorn.Config(
        app,
        # Not what uvicorn finds installed: other parsers have other limits.
        http=cast("type[asyncio.Protocol]", connection_factory(service.settings)),
        ws="none",
        host=host,
        port=port,
        log_config=_logging(access_log),
        access_log=access_log,
        server_header=False,
        # Anybody on this machine could write what they like into the log as their address.
        proxy_headers=False,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    return GracefulServer(config, service.admission, service.settings.grace)


def _logging(access_log: bool) -> dict[str, object]:
    """Warnings, and requests where wanted, on stderr; headers, and so keys, are never logged."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "plain", "stream": "ext://sys.stderr"}},
        "loggers": {
            "fewbit.serve": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
            "uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
            # Their warnings are of what clients send and how they leave, who could fill a disk with them.
            "uvicorn.error": {"level": "ERROR"},
            "asyncio": {"level": "ERROR"},
            "uvicorn.access": {"level": "INFO" if access_log else "WARNING"},
        },
    }
