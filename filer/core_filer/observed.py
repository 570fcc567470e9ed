"""Counts what every core filer does, in one place, so that all implementations count alike."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import trio

from filer import metrics
from filer.core_filer.base import ReadResult, WriteResult
from filer.errors import FilerError, Refused

_P = ParamSpec("_P")
_T = TypeVar("_T")

_READ_BYTES = metrics.CORE_BYTES.labels("read")
_WRITTEN_BYTES = metrics.CORE_BYTES.labels("write")


def observed(
    operation: str,
) -> Callable[[Callable[_P, Awaitable[_T]]], Callable[_P, Coroutine[Any, Any, _T]]]:
    """Decorate a method of a core filer: its latency, errors by name, and payload bytes.

    The latency includes every repetition: it is what our caller waits.
    """
    latency = metrics.CORE_LATENCY.labels(operation)

    def decorate(
        method: Callable[_P, Awaitable[_T]]
    ) -> Callable[_P, Coroutine[Any, Any, _T]]:
        @wraps(method)
        async def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            started_s = trio.current_time()
            try:
                result = await method(*args, **kwargs)
            except FilerError as error:
                metrics.CORE_ERRORS.labels(operation, _name(error)).inc()
                raise
            finally:
                latency.observe(trio.current_time() - started_s)
            if isinstance(result, ReadResult):
                _READ_BYTES.inc(len(result.data))
            elif isinstance(result, WriteResult):
                _WRITTEN_BYTES.inc(result.count)
            return result

        return call

    return decorate


def report_reachable(reachable: bool) -> None:
    metrics.CORE_REACHABLE.set(1 if reachable else 0)


def _name(error: FilerError) -> str:
    return error.name if isinstance(error, Refused) else type(error).__name__
