"""The one map from our errors to what a FUSE client sees.

=====================  ==========  ==============================================================
error                  errno       why
=====================  ==========  ==============================================================
Refused                its own     POSIX says no, and says it so
TryAgain,              EAGAIN      NFS servers answer JUKEBOX/DELAY for it, so clients repeat the
OutcomeUnknown                     request; the operation records make that safe
Fenced                 ETIMEDOUT   also JUKEBOX: the client repeats until its address has moved to
                                   the owner.  ESTALE would make it drop handles that are good
                                   there, EIO would fail the application.  Local users can tell it
                                   from EAGAIN: here, waiting does not help
Corrupt                EIO         the bytes are wrong; never deliver them, never hide it
Misconfigured          EIO         found while running: only an operator can help
OSError: no space,     EAGAIN      of *our* disk (core filers' errors arrive as Refused): that is
quota, memory                      back-pressure.  ENOSPC is the core filer's to say
OSError, other         EIO         our disk or a bug
anything else          EIO         a bug
=====================  ==========  ==============================================================
"""

from __future__ import annotations

import errno

from filer.errors import Corrupt, Fenced, FilerError, Refused, TryAgain

_OUR_RESOURCES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE})


def sole_cause(error: BaseException) -> BaseException:
    """What a nursery wrapped, if it is one exception."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def errno_of(error: BaseException) -> int:
    """The errno a client gets for *error*; see the module's table."""
    error = sole_cause(error)
    match error:
        case Refused():
            return error.errno
        case TryAgain():
            return errno.EAGAIN
        case Fenced():
            return errno.ETIMEDOUT
        case MemoryError():
            return errno.EAGAIN
        case OSError() if error.errno in _OUR_RESOURCES:
            return errno.EAGAIN
        case _:
            return errno.EIO


def is_expected(error: BaseException) -> bool:
    """Whether *error* is an answer, not an accident that somebody must look into."""
    error = sole_cause(error)
    return isinstance(error, FilerError) and not isinstance(error, Corrupt)
