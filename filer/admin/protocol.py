"""Messages of the admin sockets, and their bytes.

Owns the message types and the codec; owns no socket.  One connection carries one exchange:

    client  →  Request(verb, arguments)
    server  →  Progress(...)*   then exactly one of   Result(value) | Failure(kind, message, …)

Each message is one line of JSON in pure ASCII.  Paths are ``os.fsdecode`` strings: a name that
is not UTF-8 travels as lone surrogates, which ``json`` keeps and msgspec's own encoder refuses.
The client closing its side cancels the request.

What the verbs take and give back: ``filer/admin/reports.py``.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from filer.errors import Corrupt, Fenced, FilerError, Misconfigured, Refused, TryAgain

LINE_BYTES_MAX = 64 << 20
"""Longer lines are refused: a manifest of a million paths is cut into several requests."""

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_MISCONFIGURED = 64  # EX_USAGE of sysexits.h
EXIT_NOT_RUNNING = 69  # EX_UNAVAILABLE


class Request(msgspec.Struct, frozen=True, tag="request"):
    verb: str
    arguments: dict[str, Any] = {}


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """How far a long request is.  The latest replaces all earlier ones; some may be skipped."""

    done: int
    total: int | None = None
    """In the same unit as *done*; ``None`` while unknown."""
    unit: str = "bytes"
    message: str = ""


class Result(msgspec.Struct, frozen=True, tag="result"):
    value: dict[str, Any]


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    kind: str
    """``try-again``, ``fenced``, ``refused``, ``corrupt``, ``misconfigured``, ``bad-request``
    or ``internal``."""
    message: str
    hint: str = ""
    exit_status: int = EXIT_FAILED


Reply = Progress | Result | Failure


class BadMessage(FilerError):
    """The other side does not speak this protocol."""


_KINDS: tuple[tuple[type[FilerError], str, int], ...] = (
    (TryAgain, "try-again", EXIT_FAILED),
    (Fenced, "fenced", EXIT_FAILED),
    (Refused, "refused", EXIT_FAILED),
    (Corrupt, "corrupt", EXIT_FAILED),
    (Misconfigured, "misconfigured", EXIT_MISCONFIGURED),
    (BadMessage, "bad-request", EXIT_FAILED),
)


def failure_of(error: FilerError) -> Failure:
    """What the client is told of one of our errors."""
    hint = getattr(error, "hint", "")
    for cls, kind, exit_status in _KINDS:
        if isinstance(error, cls):
            return Failure(kind, str(error), hint, exit_status)
    # An error another process already put into words (``CallFailed``) keeps them.
    told = getattr(error, "failure", None)
    return told if isinstance(told, Failure) else Failure("failed", str(error), hint)


def encode(message: Request | Reply) -> bytes:
    """One line, with its newline."""
    return json.dumps(msgspec.to_builtins(message), separators=(",", ":")).encode("ascii") + b"\n"


def decode_request(line: bytes) -> Request:
    request: Request = _decode(line, Request)
    return request


def decode_reply(line: bytes) -> Reply:
    reply: Reply = _decode(line, Reply)
    return reply


def _decode(line: bytes, type_: Any) -> Any:
    try:
        return msgspec.convert(json.loads(line), type_)
    except (ValueError, RecursionError) as exc:  # msgspec.ValidationError is a ValueError
        raise BadMessage(f"not a message of the admin protocol: {exc}") from exc


class LineSplitter:
    """Bytes in as they arrive, whole lines out."""

    def __init__(self, line_bytes_max: int = LINE_BYTES_MAX) -> None:
        self._max = line_bytes_max
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that *data* completes.  Raises: BadMessage: a line is too long."""
        self._rest += data
        if b"\n" not in data:
            lines = []
        else:
            *lines, rest = bytes(self._rest).split(b"\n")
            self._rest = bytearray(rest)
        if len(self._rest) > self._max or any(len(line) > self._max for line in lines):
            raise BadMessage(f"a message is longer than {self._max} bytes")
        return lines
