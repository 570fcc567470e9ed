"""What happens around every handler: metrics, and errors turned into answers.

An exception other than FUSEError that reaches pyfuse3 ends the session, hence the mount.  So
every handler of an Operations class is wrapped::

    @guarded
    class Operations(pyfuse3.Operations): ...

Costs about 3 µs a request: label children are looked up once, here.
"""

from __future__ import annotations

import errno
import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog

from filer.metrics import CLIENT_ERRORS, CLIENT_LATENCY, INTERNAL_ERRORS, UPCALLS
from filer.vfs.errnos import errno_of, is_expected, sole_cause
from filer.vfs.shim import pyfuse3

HANDLERS = (
    "lookup", "getattr", "setattr", "readlink", "mknod", "mkdir", "unlink", "rmdir", "symlink",
    "rename", "link", "open", "read", "write", "flush", "release", "fsync", "opendir", "readdir",
    "releasedir", "fsyncdir", "statfs", "setxattr", "getxattr", "listxattr", "removexattr",
    "access", "create",
)
"""All handlers that answer.  ``forget`` is not among them; it has its own wrapper."""

log = structlog.get_logger(__name__)

_Handler = Callable[..., Awaitable[Any]]
_Operations = TypeVar("_Operations", bound=type[pyfuse3.Operations])


def guarded(operations: _Operations) -> _Operations:
    """Class decorator: wrap every handler that the class defines or inherits from ours.

    Handlers that only pyfuse3 defines (they answer ENOSYS, once each) stay as they are.
    """
    for name in HANDLERS:
        handler = getattr(operations, name)
        if handler is not getattr(pyfuse3.Operations, name):
            setattr(operations, name, _answering(name, handler))
    forget = operations.forget
    if forget is not pyfuse3.Operations.forget:
        setattr(operations, "forget", _unanswered("forget", forget))  # noqa: B010
    return operations


def _answering(name: str, handler: _Handler) -> _Handler:
    count = UPCALLS.labels(name).inc
    observe = CLIENT_LATENCY.labels(name).observe
    clock = time.perf_counter

    @functools.wraps(handler)
    async def dispatch(*args: Any) -> Any:
        count()
        start_s = clock()
        try:
            return await handler(*args)
        except pyfuse3.FUSEError as error:
            _count_error(name, error.errno)
            raise
        except Exception as error:
            number = errno_of(error)
            _count_error(name, number)
            if not is_expected(error):
                _report(name, args, error)
            raise pyfuse3.FUSEError(number) from error
        finally:
            observe(clock() - start_s)

    return dispatch


def _unanswered(name: str, handler: _Handler) -> _Handler:
    count = UPCALLS.labels(name).inc

    @functools.wraps(handler)
    async def dispatch(*args: Any) -> None:
        count()
        try:
            await handler(*args)
        except Exception as error:
            _report(name, args, error)

    return dispatch


def _count_error(name: str, number: int) -> None:
    CLIENT_ERRORS.labels(name, errno.errorcode.get(number, "other")).inc()


def _report(name: str, args: tuple[Any, ...], error: Exception) -> None:
    INTERNAL_ERRORS.inc()
    log.error(
        "handler_failed", operation=name, inode=args[1] if len(args) > 1 else None,
        error=repr(sole_cause(error)), exc_info=error,
    )
