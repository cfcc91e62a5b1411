"""`corematching serve`: answer chats over HTTP, as OpenAI's servers do."""

from __future__ import annotations

import ipaddress
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from corematching.cli import console, options
from corematching.cli.once import OnceCommand
from corematching.errors import unknown_name
from corematching.extras import require

EXAMPLES = """
[bold]Examples[/bold]

  corematching serve

  corematching serve --model llava-hf/llava-1.5-7b-hf --port 8080 --kv-memory 4GiB

  corematching serve --method corematching:keep_ratio=0.2 --api-key-file keys.txt --host 0.0.0.0
"""
LEVELS = ("debug", "info", "warning", "error")
FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
ACCESS = "Access"

Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Ask clients for one of the keys in this file, one a line.",
        rich_help_panel=ACCESS,
    ),
]
MaxBatch = Annotated[int, typer.Option(min=1, help="Answers that decode at a time.")]
KvMemory = Annotated[
    str,
    typer.Option(metavar="SIZE", help="For keys and values of running answers, such as 2GiB."),
]
MaxQueue = Annotated[int, typer.Option(min=1, help="Requests that wait; more get a 429.")]
ImageMemory = Annotated[
    str,
    typer.Option(metavar="SIZE", help="For vision features of recent pictures; 0 keeps none."),
]
LocalMedia = Annotated[
    Path | None,
    typer.Option(
        "--allowed-local-media-path",
        metavar="DIR",
        help="Read file:// pictures under this directory; default: none.",
        rich_help_panel=ACCESS,
    ),
]
MediaDomains = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-media-domains",
        metavar="HOST",
        help="Fetch http(s) pictures from this host; repeat it for several; default: none.",
        rich_help_panel=ACCESS,
    ),
]
Grace = Annotated[
    float, typer.Option(min=0, help="Seconds that running answers get to end after a SIGTERM.")
]
LogLevel = Annotated[str, typer.Option(help=f"{', '.join(LEVELS)}.")]


def serve(
    model: options.Model = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key_file: KeyFile = None,
    max_batch: MaxBatch = 16,
    kv_memory: KvMemory = "2GiB",
    max_queue: MaxQueue = 64,
    image_memory: ImageMemory = "256MiB",
    allowed_local_media_path: LocalMedia = None,
    allowed_media_domains: MediaDomains = None,
    grace: Grace = 30.0,
    log_level: LogLevel = "info",
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    engine: options.Engine = "auto",
    method: options.MethodName = "corematching",
) -> None:
    """Answer chats over HTTP, as OpenAI's servers do; the default model is SceneVLM."""
    console.keep_bars_away(own_bars=model is None)
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, "serve", "`corematching serve`")
    from corematching.cli.method_options import build_method, build_text_method
    from corematching.serving.http.server import open_socket
    from corematching.serving.http.settings import Settings, read_keys
    from corematching.sizes import parse_size

    start_log(log_level)
    parse_size("--kv-memory", kv_memory)
    if image_memory != "0":
        parse_size("--image-memory", image_memory)
    with console.noting_old_names():
        chosen = build_method(method, {})
    settings = Settings(
        api_keys=() if api_key_file is None else read_keys(api_key_file),
        local_media=allowed_local_media_path,
        media_hosts=frozenset(allowed_media_domains or ()),
    )
    listening = open_socket(host, port)
    warn_of_strangers(host, settings.api_keys)
    loaded = load(model, device, dtype)
    if not loaded.takes_images:
        chosen = build_text_method(method, {})
    run(
        loaded,
        chosen,
        settings,
        listening,
        grace,
        {
            "max_batch": max_batch,
            "kv_memory": kv_memory,
            "max_queue": max_queue,
            "image_memory": None if image_memory == "0" else image_memory,
            "engine": engine,
        },
    )


def load(model: str | None, device: str | None, dtype: str) -> Any:
    """The model, with progress."""
    from corematching.cli.loading import load_model

    return load_model(model, device, dtype)


def run(
    loaded: Any, method: Any, settings: Any, listening: Any, grace: float, limits: dict[str, Any]
) -> None:
    """Serve until a signal."""
    from corematching import __version__
    from corematching.serving import Engine
    from corematching.serving.http.app import make_app
    from corematching.serving.http.metrics import Metrics
    from corematching.serving.http.server import serve as serve_until_signal

    metrics = Metrics(loaded.name)
    with console.waiting("preparing the engine"):
        started = Engine(loaded, method, observer=metrics, **limits)
    app = make_app(started, metrics, settings, __version__)
    address, port = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    console.note(f"{loaded.name} answers at http://{shown}:{port}/v1 (see /docs)")
    serve_until_signal(app, started, listening, grace)


def start_log(level: str) -> None:
    """Log to stderr.

    Raises
    ------
    ConfigError
        There is no such level.
    """
    if level.lower() not in LEVELS:
        raise unknown_name("log level", level, LEVELS)
    logging.basicConfig(format=FORMAT, level=logging.WARNING)
    for name in ("corematching", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())


def warn_of_strangers(host: str, keys: tuple[str, ...]) -> None:
    """Say so where other machines can reach the server and no key is asked for."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not keys:
        console.note(f"anyone who reaches {host} can use this server: give --api-key-file")


def register_serve(app: typer.Typer) -> None:
    """Make it a command of the app."""
    app.command(epilog=EXAMPLES, cls=OnceCommand)(serve)
