"""`fewbit serve`: opens a model and serves it until a signal ends it."""

from __future__ import annotations

import ipaddress
import socket
import time
from typing import Annotated, Any

import typer

from fewbit.console import human_seconds, parse_size, stderr, stdout
from fewbit.errors import FewbitError, UsageError

ENGINE, LIMITS, ACCESS = "Engine", "Limits", "Access"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def serve(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A fewbit checkpoint, or any model quantize takes.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all.", rich_help_panel=ACCESS)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535, rich_help_panel=ACCESS)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="FEWBIT_API_KEY",
            show_envvar=True,
            help="Serve only those who send this key. Others on the machine can read command lines: better set it in "
            "the environment.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name that the server may be called by, repeatable. Default: the names of this machine's loopback "
            "when it listens there without a key, any name otherwise.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name for clients. Default: its directory's.")] = None,
    slots: Annotated[int, typer.Option(help="Sequences decoded at once.", min=1, max=256, rich_help_panel=ENGINE)] = 8,
    context: Annotated[
        int | None, typer.Option(help="Tokens per sequence. Default: the model's, up to 4096.", rich_help_panel=ENGINE)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads. Default: one per processor core.", rich_help_panel=ENGINE)
    ] = None,
    kv: Annotated[str, typer.Option(help="Cache of keys and values: bf16 or int8.", rich_help_panel=ENGINE)] = "bf16",
    draft: Annotated[
        int, typer.Option(help="Longest draft looked up in the text so far; 0: none.", min=0, rich_help_panel=ENGINE)
    ] = 0,
    queue: Annotated[
        int, typer.Option(help="Sequences that may wait for a slot; beyond them, 429.", min=0, rich_help_panel=LIMITS)
    ] = 64,
    timeout: Annotated[
        float, typer.Option(help="Seconds that a request may take, waiting included.", rich_help_panel=LIMITS)
    ] = 600.0,
    max_body: Annotated[str, typer.Option(help="Largest request.", rich_help_panel=LIMITS)] = "2MB",
    grace: Annotated[
        float, typer.Option(help="Seconds that running requests have to finish at the end.", rich_help_panel=LIMITS)
    ] = 30.0,
    page: Annotated[bool, typer.Option(help="Serve the chat page at /.")] = True,
    access_log: Annotated[bool, typer.Option("--access-log", help="One line per request on stderr.")] = False,
) -> None:
    """Serve a model over HTTP as OpenAI does, with a chat page at /."""
    server_class = _import_server()
    from fewbit.serve.settings import Settings

    hosts = tuple(name.lower() for name in allow_host or ())
    if api_key is None and is_loopback(host):
        hosts = (*LOOPBACK_NAMES, *hosts)
    settings = Settings(
        model_name=name,
        api_key=api_key,
        allowed_hosts=hosts,
        queue=queue,
        max_body_bytes=parse_size(max_body),
        request_timeout=timeout,
        grace=grace,
        page=page,
    )
    if api_key is None and not is_loopback(host):
        stderr.print(
            f"[yellow]warning:[/yellow] {host} can be reached from other machines, and no key is set: anyone there may "
            "use the model; set FEWBIT_API_KEY",
            soft_wrap=True,
        )
    _check_free(host, port)
    engine_options: dict[str, Any] = {
        "slots": slots, "context": context, "threads": threads, "kv": kv, "draft": draft
    }  # fmt: skip
    _run(path, engine_options, settings, server_class, host, port, access_log)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _import_server() -> Any:
    try:
        from fewbit.serve import server
    except ModuleNotFoundError as error:
        raise FewbitError(
            f"{error.name} is missing; install fewbit with its server: pip install 'fewbit[serve]'"
        ) from error
    return server


def _check_free(host: str, port: int) -> None:
    """Fail before the model is loaded, which may take long."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"cannot listen on {host} port {port}: {reason}; choose others with --host, --port") from error


def _run(
    path: str, engine_options: dict[str, Any], settings: Any, server: Any, host: str, port: int, access_log: bool
) -> None:
    from fewbit.runtime.engine import Engine
    from fewbit.serve.app import create_app

    start = time.perf_counter()
    with Engine(path, **engine_options) as engine:
        app = create_app(engine, settings)
        running = server.make_server(app, host, port, access_log=access_log)
        shown = f"[{host}]" if ":" in host else host
        stdout.print(
            f"Serving {app.state.service.name} at http://{shown}:{port} (ready after "
            f"{human_seconds(time.perf_counter() - start)}; Ctrl+C ends it)",
            soft_wrap=True,
        )
        running.run()
