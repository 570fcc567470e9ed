"""Structured logs of every process of a node: one format, to standard error.

Owns the structlog set-up.  The supervisor configures from its settings and passes the choice on
in the environment, so that children configure alike before they have read anything.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping

import structlog

_FORMAT, _LEVEL = "FILER_LOG_FORMAT", "FILER_LOG_LEVEL"
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO,
           "warning": logging.WARNING, "error": logging.ERROR}


def configure(log_format: str = "console", log_level: str = "info", **bound: object) -> None:
    """Log as *log_format* (``console``, ``json``); *bound* goes with every line."""
    level = _LEVELS[log_level]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if log_format == "json":
        render: list[structlog.typing.Processor] = [
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(default=str),
        ]
    else:
        render = [structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)]
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**bound)
    # Libraries that use the standard module; their warnings are worth a plain line.
    logging.basicConfig(level=max(level, logging.WARNING), stream=sys.stderr, force=True)


def configure_child(
    environment: Mapping[str, str] = os.environ, **bound: object
) -> None:
    """Log as the supervisor that started this process does."""
    log_format = environment.get(_FORMAT, "console")
    log_level = environment.get(_LEVEL, "info")
    configure(log_format, log_level if log_level in _LEVELS else "info", **bound)


def child_environment(log_format: str, log_level: str) -> dict[str, str]:
    """What ``configure_child`` reads."""
    return {_FORMAT: log_format, _LEVEL: log_level}
