"""Answers the admin protocol on a unix socket.

Owns the socket and one task a connection; what the verbs do is the handlers' business.
The socket has mode 0600 and the peer's credentials are checked besides: root and the user the
server runs as may ask.
"""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import structlog
import trio

from filer.admin import unix
from filer.admin.protocol import (
    BadMessage,
    Failure,
    LineSplitter,
    Progress,
    Reply,
    Request,
    Result,
    decode_request,
    encode,
    failure_of,
)
from filer.errors import FilerError

log = structlog.get_logger()

Report = Callable[[Progress], None]
"""Never blocks; the newest ``Progress`` wins when the client reads slowly."""

Handler = Callable[[dict[str, Any], Report], Awaitable[dict[str, Any]]]
"""Takes the arguments, returns the result's value, raises one of our errors.

It is cancelled when the client goes away; what must survive that is handed to another task.
"""

_REQUEST_WITHIN_S = 10.0
"""A client that connects and says nothing is dropped after this long."""
_RECEIVE_BYTES = 1 << 16


async def serve_admin(
    socket_path: Path,
    handlers: Mapping[str, Handler],
    *,
    allowed_uids: frozenset[int] | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; the socket is removed then.  ``started()`` once it accepts."""
    allowed = frozenset({0, os.geteuid()}) if allowed_uids is None else allowed_uids

    async def connection(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                await _exchange(stream, handlers, allowed)
            except* trio.BrokenResourceError:
                pass  # the client went away while we wrote: there is nobody to tell

    listener = unix.listen(socket_path)
    ours = os.stat(socket_path).st_ino
    task_status.started()
    try:
        await trio.serve_listeners(connection, [listener])
    finally:
        unix.remove(socket_path, ours)


async def _exchange(
    stream: trio.SocketStream, handlers: Mapping[str, Handler], allowed: frozenset[int]
) -> None:
    uid = unix.peer_uid(stream)
    if uid not in allowed:
        log.warning("admin request refused", uid=uid)
        await stream.send_all(encode(Failure(
            "refused", f"user {uid} may not control this node", "run the command as root")))
        return
    try:
        request = await _receive_request(stream)
    except BadMessage as exc:
        await stream.send_all(encode(failure_of(exc)))
        return
    if request is not None:
        await _answer(stream, request, handlers)


async def _receive_request(stream: trio.SocketStream) -> Request | None:
    """``None`` if the client left or stayed silent."""
    splitter = LineSplitter()
    with trio.move_on_after(_REQUEST_WITHIN_S):
        while data := await stream.receive_some(_RECEIVE_BYTES):
            if lines := splitter.feed(bytes(data)):
                return decode_request(lines[0])
    return None


async def _answer(
    stream: trio.SocketStream, request: Request, handlers: Mapping[str, Handler]
) -> None:
    # One place: while the client is slow, a newer report replaces the one that waits.
    latest: list[Progress] = []
    final: Reply | None = None
    news = trio.Event()

    def report(progress: Progress) -> None:
        latest[:] = [progress]
        news.set()

    async def run_handler() -> None:
        nonlocal final
        final = await _run_handler(request, handlers, report)
        news.set()

    async def watch_client(scope: trio.CancelScope) -> None:
        while await stream.receive_some(_RECEIVE_BYTES):
            pass
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_client, nursery.cancel_scope)
        nursery.start_soon(run_handler)
        while final is None:
            await news.wait()
            news = trio.Event()
            while latest:
                await stream.send_all(encode(latest.pop()))
        await stream.send_all(encode(final))
        nursery.cancel_scope.cancel()


async def _run_handler(
    request: Request, handlers: Mapping[str, Handler], report: Report
) -> Reply:
    handler = handlers.get(request.verb)
    if handler is None:
        return Failure(
            "bad-request", f"unknown verb {request.verb!r}",
            f"known: {', '.join(sorted(handlers))}")
    try:
        return Result(await handler(request.arguments, report))
    except FilerError as exc:
        return failure_of(exc)
    except (KeyError, TypeError, ValueError) as exc:
        # Arguments are the client's: it may leave one out.  Logged, as it may be our own bug.
        log.warning("admin request failed", verb=request.verb, exc_info=True)
        return Failure("bad-request", f"{request.verb}: {type(exc).__name__}: {exc}")
    except Exception as exc:
        log.error("admin request failed", verb=request.verb, exc_info=True)
        return Failure(
            "internal", f"{request.verb}: {type(exc).__name__}: {exc}", "see the node's log")


def number(arguments: dict[str, Any], key: str) -> float | None:
    """The optional positive number *key*.  Raises: BadMessage: it is something else."""
    value = arguments.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise BadMessage(f"{key} must be a positive number, not {value!r}")
    return float(value)


def text(arguments: dict[str, Any], key: str) -> str:
    """The required string *key*.  Raises: BadMessage: it is missing or something else."""
    value = arguments.get(key)
    if not isinstance(value, str):
        raise BadMessage(f"{key} must be a string, not {value!r}")
    return value


def texts(arguments: dict[str, Any], key: str) -> list[str]:
    """The required list of strings *key*.  Raises: BadMessage: it is something else."""
    value = arguments.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadMessage(f"{key} must be a list of strings")
    return value
