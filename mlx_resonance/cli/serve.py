"""`mlx-resonance server`: an OpenAI-compatible server in front of one engine."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ..errors import UsageError
from ..release import install_hint
from ..storage import check_output_folder
from .engine import plan_engine
from .options import (
    LARGEST,
    CacheFolder,
    CacheSize,
    Context,
    DraftModel,
    Extend,
    Factor,
    Force,
    KvBits,
    KvRotate,
    Memory,
    MinP,
    Model,
    NoCache,
    Penalty,
    PrefillStep,
    PromptLookup,
    Temp,
    TopK,
    TopP,
    kv_format,
)
from .output import stderr
from .processes import LAUNCHED

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..server.worker import Worker

GRACE = 5  # seconds for connections to end once the server stops
ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


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
    extend: Extend = None,
    context: Context = None,
    kv_bits: KvBits = None,
    kv_rotate: KvRotate = False,
    prefill_step_size: PrefillStep = 2048,
    memory: Memory = None,
    force: Force = False,
    prompt_cache: CacheFolder = None,
    prompt_cache_size: CacheSize = None,
    no_prompt_cache: NoCache = False,
    prompt_lookup: PromptLookup = "auto",
    draft_model: DraftModel = None,
) -> None:
    """Serve a model with OpenAI's API, one request at a time."""
    check_server(api_key)
    kv_bits = kv_format(kv_bits, kv_rotate)
    if prompt_cache is not None:
        check_output_folder(prompt_cache, "prompt_cache")

    from ..checkpoint import Checkpoint
    from ..generation.sampling import sampling_for
    from ..server.app import create_app
    from ..server.service import Service
    from ..server.worker import Worker

    with listen(host, port) as listeners, terminated():
        local = all(is_loopback(listener) for listener in listeners)
        if api_key is None and not local:
            warning = f"warning: everyone who reaches {host} can use this server: it has no --api-key"
            stderr.print(warning, soft_wrap=True)
        checkpoint = Checkpoint.open(model, factor=factor).extended(extend, context)
        given = {"temp": temp, "top_p": top_p, "top_k": top_k, "min_p": min_p}
        sampling, defaults = sampling_for(checkpoint, **given, repetition_penalty=repetition_penalty)
        engine = plan_engine(
            checkpoint,
            context=context,
            kv_bits=kv_bits,
            prefill_step_size=prefill_step_size,
            memory=memory,
            force=force,
            prompt_cache=prompt_cache,
            prompt_cache_size=prompt_cache_size,
            no_prompt_cache=no_prompt_cache,
            prompt_lookup=prompt_lookup,
            draft_model=draft_model,
        ).load()
        if defaults:
            values = ", ".join(f"{name} {value}" for name, value in defaults.items())
            stderr.print(f"sampling by default, from generation_config.json: {values}", soft_wrap=True)
        worker = Worker(engine)
        service = Service(worker, public_name(checkpoint), sampling, max_tokens, queue, other_name=checkpoint.name)
        serve(create_app(service, api_key, host if local else None), worker, listeners)


def public_name(checkpoint: Checkpoint) -> str:
    """The model's name for clients: a hub id, or the name of a folder, without the path to it."""
    folder = Path(checkpoint.name).expanduser()
    return folder.resolve().name or checkpoint.name if folder.is_dir() else checkpoint.name


def check_server(api_key: str | None) -> None:
    """Refuse what cannot be served, before anything is opened."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UsageError(f"the server needs FastAPI and uvicorn: {install_hint('server')}") from None
    if any(name in os.environ for name in LAUNCHED):
        raise UsageError("the server runs in one process: start it without mlx.launch")
    if api_key is not None and not (api_key.strip() and api_key.isascii() and api_key.isprintable()):
        raise UsageError("a key has ASCII characters, at least one", option="api_key")


@contextmanager
def listen(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Sockets that listen on all addresses of a host, before a model is loaded in vain.

    Raises:
        UsageError: the port is in use, or no address is one of this machine.
    """
    with ExitStack() as stack:
        listeners: list[socket.socket] = []
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            for family, address in dict.fromkeys((family, address[:2]) for family, _, _, _, address in found):
                try:
                    at = (address[0], port or (listeners[0].getsockname()[1] if listeners else 0))
                    listeners.append(stack.enter_context(socket.create_server(at, family=family, backlog=2048)))
                except OSError as error:  # a machine without IPv6 may have a name for its addresses
                    if (not listeners and len(found) == 1) or error.errno == errno.EADDRINUSE:
                        raise
            if not listeners:
                raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(f"cannot listen on {host} port {port}: {reason}", option="port") from None
        yield listeners


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches a socket."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


@contextmanager
def terminated() -> Iterator[None]:
    """Make the signals that end a process a clean end while the model is loaded."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: sys.exit(0)) for number in ENDS if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signalled(stop: Callable[[], None]) -> Iterator[list[int]]:
    """Call `stop` when a signal comes, and end the process at the second.

    A handler in Python would wait for the chunk that is being computed, and an exception that it raised could come
    where it is lost. A thread that reads the numbers does neither.

    Yields:
        The numbers of the signals that came.
    """
    numbers: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield numbers
        return

    def listen() -> None:
        while (number := reader.recv(1)) and number[0] in ENDS:
            if numbers:
                os._exit(128 + signal.SIGINT)
            numbers.append(number[0])
            stop()

    reader, writer = socket.socketpair()
    writer.setblocking(False)
    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    before = {number: signal.signal(number, lambda *_: None) for number in ENDS}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield numbers
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        thread.join()
        reader.close()


def serve(app: Any, worker: Worker, listeners: list[socket.socket]) -> None:
    """Serve until a signal comes: HTTP on another thread, the engine on this one.

    Raises:
        KeyboardInterrupt: it was an interrupt.
    """
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
            server.run(sockets=listeners)
        finally:
            worker.stop()

    def stop() -> None:
        server.should_exit = True
        worker.stop()

    thread = threading.Thread(target=run, name="http", daemon=True)
    host, port = listeners[0].getsockname()[:2]
    try:
        with signalled(stop) as numbers:
            stderr.print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}/v1", soft_wrap=True)
            thread.start()
            worker.run()
            server.should_exit = True
            thread.join(2 * GRACE)
    finally:
        server.should_exit = True
        logger.removeHandler(handler)
        logger.propagate = True
    if signal.SIGINT in numbers[:1]:
        raise KeyboardInterrupt
