"""`mlx-resonance server`: an OpenAI-compatible server in front of one engine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ..errors import UsageError
from ..storage import check_output_folder
from .engine import open_engine
from .options import (
    LARGEST,
    CacheFolder,
    CacheSize,
    Context,
    Factor,
    Force,
    KvBits,
    Memory,
    MinP,
    Model,
    NoCache,
    Penalty,
    PrefillStep,
    Temp,
    TopK,
    TopP,
)
from .output import stderr
from .processes import LAUNCHED

if TYPE_CHECKING:
    from ..server.worker import Worker

LOOPBACK = ("127.", "::1", "localhost")
GRACE = 5  # seconds for connections to end once the server stops


def command(
    model: Model,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 8080,
    api_key: Annotated[
        str | None, Option(envvar="MLX_RESONANCE_API_KEY", metavar="KEY", help="Key that clients must send.")
    ] = None,
    queue: Annotated[int, Option(min=0, max=10_000, help="Maximum number of waiting requests.")] = 16,
    max_tokens: Annotated[
        int | None,
        Option(min=1, max=LARGEST, help="Maximum number of tokens to generate for requests that do not say."),
    ] = None,
    temp: Temp = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    factor: Factor = None,
    context: Context = None,
    kv_bits: KvBits = None,
    prefill_step_size: PrefillStep = 2048,
    memory: Memory = None,
    force: Force = False,
    prompt_cache: CacheFolder = None,
    prompt_cache_size: CacheSize = "10GB",  # type: ignore[assignment]
    no_prompt_cache: NoCache = False,
) -> None:
    """Serve a model with OpenAI's API, one request at a time."""
    check_server(host, api_key)
    if prompt_cache is not None:
        check_output_folder(prompt_cache, "prompt_cache")

    from ..checkpoint import Checkpoint
    from ..generation.sampling import sampling_for
    from ..server.app import create_app
    from ..server.service import Service
    from ..server.worker import Worker

    with listen(host, port) as listener, terminated():
        checkpoint = Checkpoint.open(model, factor=factor)
        given = {"temp": temp, "top_p": top_p, "top_k": top_k, "min_p": min_p}
        sampling, defaults = sampling_for(checkpoint, **given, repetition_penalty=repetition_penalty)
        engine = open_engine(
            checkpoint,
            context=context,
            kv_bits=kv_bits,
            prefill_step_size=prefill_step_size,
            memory=memory,
            force=force,
            prompt_cache=prompt_cache,
            prompt_cache_size=prompt_cache_size,
            no_prompt_cache=no_prompt_cache,
        )
        if defaults:
            values = ", ".join(f"{name} {value}" for name, value in defaults.items())
            stderr.print(f"sampling by default, from generation_config.json: {values}", soft_wrap=True)
        worker = Worker(engine)
        app = create_app(Service(worker, checkpoint.name, sampling, max_tokens, queue), api_key)
        serve(app, worker, listener)


def check_server(host: str, api_key: str | None) -> None:
    """Refuse what cannot be served, before anything is opened; say if anyone on the network may ask."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UsageError('the server needs FastAPI and uvicorn: pip install "mlx-resonance[server]"') from None
    if any(name in os.environ for name in LAUNCHED):
        raise UsageError("the server runs in one process: start it without mlx.launch")
    if api_key is not None and not (api_key.strip() and api_key.isascii() and api_key.isprintable()):
        raise UsageError("a key has ASCII characters, at least one", option="api_key")
    if api_key is None and not host.startswith(LOOPBACK):
        stderr.print(f"warning: everyone who reaches {host} can use this server: it has no --api-key", soft_wrap=True)


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens, before a model is loaded in vain.

    Raises:
        UsageError: the port is in use, or the address is not one of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot listen on {host} port {port}: {reason}", option="port") from None
    with listener:
        yield listener


@contextmanager
def terminated() -> Iterator[None]:
    """Make SIGTERM a clean end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def serve(app: Any, worker: Worker, listener: socket.socket) -> None:
    """Serve until interrupted: HTTP on another thread, the engine on this one, where interrupts arrive."""
    import uvicorn

    logger, handler = logging.getLogger("mlx_resonance.server"), logging.StreamHandler(sys.stderr)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a line for every request, tracebacks too
    logger.addHandler(handler)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE,
        )
    )

    def run() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            worker.stop()

    thread = threading.Thread(target=run, name="http", daemon=True)
    host, port = listener.getsockname()[:2]
    stderr.print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}/v1", soft_wrap=True)
    thread.start()
    try:
        worker.run()
    finally:
        server.should_exit = True
        thread.join(2 * GRACE)
        logger.removeHandler(handler)
        logger.propagate = True
