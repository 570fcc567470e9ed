"""Errors, sorted by what the caller must do.

    FilerError
    ├── TryAgain            throttled, disconnected, owner moved: the same call may succeed later
    │   └── OutcomeUnknown  ... but this attempt may already have been applied
    ├── Fenced              somebody newer owns this: stop serving it
    ├── Refused             POSIX says no; carries the errno the client must see
    ├── Corrupt             a checksum or an invariant of stored bytes failed: keep the bytes
    └── Misconfigured       the operator must change something; carries a hint

Exceptions of libraries are translated once, where the library is called, with ``from exc``.
"""

from __future__ import annotations

import errno
import os


class FilerError(Exception):
    """Root of everything this package raises on purpose."""


class TryAgain(FilerError):
    """Nothing was changed; the same call may succeed later."""


class OutcomeUnknown(TryAgain):
    """The request was sent and its answer lost: it may or may not have been applied."""


class Fenced(FilerError):
    """A newer epoch exists: stop serving, keep what is dirty, report."""


class Refused(FilerError):
    """The operation is not allowed or not possible; *errno* is what POSIX calls it."""

    def __init__(self, errno_: int, what: str = "") -> None:
        self.errno = errno_
        super().__init__(f"{self.name} ({os.strerror(errno_)}){': ' + what if what else ''}")

    @property
    def name(self) -> str:
        """Such as ``ENOENT``."""
        return errno.errorcode.get(self.errno, str(self.errno))


class Corrupt(FilerError):
    """Stored bytes are not what was written: stop using them, do not delete them."""


class Misconfigured(FilerError):
    """The operator's input cannot work; *hint* says what to change."""

    def __init__(self, message: str, hint: str = "") -> None:
        self.hint = hint
        super().__init__(message)
