"""`fewbit serve`: opens a model and serves it until a signal ends it."""

from __future__ import annotations

import importlib
import ipaddress
import socket
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit import cli_options as o
from fewbit.console import human_seconds, parse_size, stderr, stdout
from fewbit.errors import FewbitError, UsageError

if TYPE_CHECKING:
    from fewbit.serve.settings import Settings

LIMITS, ACCESS = "Limits", "Access"
LOOPBACK = "127.0.0.1"
LOOPBACK_NAMES = ("localhost", LOOPBACK, "::1")
OTHER_FILES = 64  # that a server may have open beside its connections

ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="FEWBIT_API_KEY",
        help="Serve only those who send this key. Others on the machine can read command lines: better set it in "
        "the environment.",
        rich_help_panel=ACCESS,
    ),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(
        help="A name that the server may be called by, repeatable. Default: this machine's names for itself when "
        "it listens there alone and without a key, any name otherwise.",
        rich_help_panel=ACCESS,
    ),
]


def serve(
    path: o.AnyModel,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.", rich_help_panel=ACCESS)] = LOOPBACK,
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0: any that is free.", min=0, max=65535, rich_help_panel=ACCESS)
    ] = 8000,
    api_key: ApiKey = None,
    allow_host: AllowHost = None,
    name: Annotated[str | None, typer.Option(help="The model's name for clients. Default: its directory's.")] = None,
    slots: Annotated[int, typer.Option(help="Answers in work at once.", min=1, max=256, rich_help_panel=o.ENGINE)] = 8,
    context: o.Context = None,
    threads: o.Threads = None,
    kv: o.Kv = "bf16",
    draft: o.Draft = 0,
    queue: Annotated[
        int, typer.Option(help="Answers that may wait for a slot; beyond them, 429.", min=0, rich_help_panel=LIMITS)
    ] = 64,
    connections: Annotated[int, typer.Option(help="Clients connected at once.", min=1, rich_help_panel=LIMITS)] = 512,
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
    server = _import_server()
    from fewbit.serve.settings import Settings

    hosts = tuple(allowed.lower() for allowed in allow_host or ())
    if api_key is None and is_loopback(host):
        hosts = (*LOOPBACK_NAMES, host.lower(), *hosts)
    largest = parse_size(max_body)
    settings = Settings(
        model_name=name,
        api_key=api_key,
        allowed_hosts=hosts,
        queue=queue,
        max_body_bytes=largest,
        max_held_bytes=max(largest, Settings.max_held_bytes),
        connections=connections,
        request_timeout=timeout,
        grace=grace,
        page=page,
    )
    if api_key is None and not is_loopback(host):
        _warn_open(host)
    port = _check_free(host, port)
    _allow_files(connections + OTHER_FILES)
    options = {"slots": slots, "context": context, "threads": threads, "kv": kv, "draft": draft}
    _run(path, options, settings, server, host, port, access_log)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _warn_open(host: str) -> None:
    stderr.print(
        f"[yellow]warning:[/yellow] {host} can be reached from other machines, and no key is set: anyone there may "
        "use the model; set FEWBIT_API_KEY",
        soft_wrap=True,
    )


def _import_server() -> Any:
    try:
        return importlib.import_module("fewbit.serve.server")
    except ModuleNotFoundError as error:
        raise FewbitError(f"{error.name} is missing; install the server: pip install 'fewbit[serve]'") from error


def _check_free(host: str, port: int) -> int:
    """The port to listen on, a free one for 0. Fails before the model is loaded, which may take long."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"cannot listen on {host} port {port}: {reason}; choose others with --host, --port") from error


def _allow_files(needed: int) -> None:
    """Let this process have so many files open, where the system has a limit."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        if soft != resource.RLIM_INFINITY and soft < needed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError, OverflowError) as error:
        raise UsageError(
            f"so many connections need {needed} open files, and this process may have {hard}; give fewer to "
            "--connections, or raise the limit: ulimit -n"
        ) from error


def _run(
    path: str, options: dict[str, Any], settings: Settings, server: Any, host: str, port: int, access_log: bool
) -> None:
    from fewbit.runtime.engine import Engine
    from fewbit.serve.app import create_app

    start = time.perf_counter()
    with Engine(path, **options) as engine:
        app = create_app(engine, settings)
        running = server.make_server(app, host, port, access_log=access_log)
        shown = f"[{host}]" if ":" in host else host
        stdout.print(
            f"Serving {app.state.service.name} at http://{shown}:{port} (ready after "
            f"{human_seconds(time.perf_counter() - start)}; Ctrl+C ends it)",
            soft_wrap=True,
            markup=False,
        )
        running.run()
