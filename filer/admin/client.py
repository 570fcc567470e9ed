"""Asks an admin socket.  Owns one connection for the length of one call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import trio

from filer.admin import unix
from filer.admin.protocol import (
    BadMessage,
    Failure,
    LineSplitter,
    Progress,
    Request,
    Result,
    decode_reply,
    encode,
)
from filer.errors import FilerError, TryAgain

OnProgress = Callable[[Progress], None]

_RECEIVE_BYTES = 1 << 16


class NotRunning(TryAgain):
    """Nobody answers at the socket."""


class CallFailed(FilerError):
    """The other side answered with a ``Failure``."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.message)


async def call(
    socket_path: Path, verb: str, arguments: dict[str, Any] | None = None, *,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Ask and wait; cancelling the call cancels the request on the other side.

    Raises: NotRunning; PermissionError: the socket is not ours to use; CallFailed; BadMessage.
    """
    try:
        stream = await unix.connect(socket_path)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as exc:
        raise NotRunning(f"nothing answers at {socket_path}") from exc
    async with stream:
        try:
            await stream.send_all(encode(Request(verb, arguments or {})))
            splitter = LineSplitter()
            while data := await stream.receive_some(_RECEIVE_BYTES):
                for line in splitter.feed(bytes(data)):
                    match decode_reply(line):
                        case Progress() as progress:
                            if on_progress is not None:
                                on_progress(progress)
                        case Result(value):
                            return value
                        case Failure() as failure:
                            raise CallFailed(failure)
                        case other:
                            raise BadMessage(f"unexpected reply {other!r}")
        except trio.BrokenResourceError as exc:
            raise NotRunning(f"{socket_path} went away during {verb}") from exc
    raise NotRunning(f"{socket_path} closed without answering {verb}")


def call_sync(
    socket_path: Path, verb: str, arguments: dict[str, Any] | None = None, *,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """``call`` for code outside of trio."""
    return trio.run(partial(call, socket_path, verb, arguments, on_progress=on_progress))
