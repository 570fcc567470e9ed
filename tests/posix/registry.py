"""The registry of POSIX cases: plain functions that take an empty directory.

A case is added by ``@case`` and is named ``module.function``.  It raises ``AssertionError``
when the file system is wrong and ``Skipped`` when the question cannot be asked here.  Nothing
in this package needs more than the standard library, so that it also runs inside a guest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Check = Callable[[Path], None]


class Skipped(Exception):
    """The case cannot be asked on this file system or as this user; says why."""


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    check: Check
    is_slow: bool
    """Left out unless asked for."""


CASES: dict[str, Case] = {}


def case(check: Check) -> Check:
    return _register(check, is_slow=False)


def slow_case(check: Check) -> Check:
    return _register(check, is_slow=True)


def _register(check: Check, *, is_slow: bool) -> Check:
    name = f"{check.__module__.rpartition('.')[2]}.{check.__name__}"
    assert name not in CASES, f"two cases are named {name}"
    CASES[name] = Case(name, check, is_slow)
    return check
