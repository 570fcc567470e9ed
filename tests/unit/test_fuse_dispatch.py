"""Errors become answers, unexpected ones also a report; everything is counted."""

from __future__ import annotations

import errno

import pytest
import structlog
import trio

from filer.errors import Corrupt, Fenced, Misconfigured, OutcomeUnknown, Refused, TryAgain
from filer.metrics import REGISTRY
from filer.vfs.dispatch import guarded
from filer.vfs.errnos import errno_of, is_expected
from filer.vfs.shim import pyfuse3


@guarded
class Failing(pyfuse3.Operations):
    def __init__(self, error: BaseException | None) -> None:
        super().__init__()
        self.error = error

    async def getattr(self, inode, ctx):
        if self.error is not None:
            raise self.error
        return f"attributes of {inode}"

    async def forget(self, inode_list):
        if self.error is not None:
            raise self.error


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize(
    ("error", "number", "expected"),
    [
        (Refused(errno.ENOTEMPTY), errno.ENOTEMPTY, True),
        (TryAgain(), errno.EAGAIN, True),
        (OutcomeUnknown(), errno.EAGAIN, True),
        (Fenced(), errno.ETIMEDOUT, True),
        (Misconfigured("x"), errno.EIO, True),
        (Corrupt(), errno.EIO, False),
        (OSError(errno.ENOSPC, "our disk"), errno.EAGAIN, False),
        (OSError(errno.EROFS, "our disk"), errno.EIO, False),
        (MemoryError(), errno.EAGAIN, False),
        (ZeroDivisionError(), errno.EIO, False),
        (ExceptionGroup("", [Refused(errno.ESTALE)]), errno.ESTALE, True),
        (ExceptionGroup("", [Refused(errno.ESTALE), TryAgain()]), errno.EIO, False),
    ],
    ids=repr,
)
async def test_every_error_has_one_errno_and_only_accidents_are_reported(error, number, expected):
    assert errno_of(error) == number
    assert is_expected(error) is expected

    reported = value("filer_internal_errors_total")
    name = errno.errorcode[number]
    counted = value("filer_client_errors_total", operation="getattr", errno=name)
    with structlog.testing.capture_logs() as logs, pytest.raises(pyfuse3.FUSEError) as answer:
        await Failing(error).getattr(7, None)

    assert answer.value.errno == number
    assert value("filer_internal_errors_total") == reported + (not expected)
    assert value("filer_client_errors_total", operation="getattr", errno=name) == counted + 1
    assert [(log["operation"], log["inode"]) for log in logs] == (
        [] if expected else [("getattr", 7)]
    )


async def test_answers_and_fuse_errors_pass_and_are_counted():
    upcalls = value("filer_upcalls_total", operation="getattr")
    latencies = value("filer_client_operation_seconds_count", operation="getattr")

    assert await Failing(None).getattr(7, None) == "attributes of 7"
    with pytest.raises(pyfuse3.FUSEError) as answer:
        await Failing(pyfuse3.FUSEError(errno.ENOENT)).getattr(7, None)

    assert answer.value.errno == errno.ENOENT
    assert value("filer_upcalls_total", operation="getattr") == upcalls + 2
    assert value("filer_client_operation_seconds_count", operation="getattr") == latencies + 2


async def test_cancellation_passes_without_an_answer():
    class Sleeping(Failing):
        async def getattr(self, inode, ctx):
            await trio.sleep_forever()

    with trio.CancelScope() as scope:
        scope.cancel()
        await guarded(Sleeping)(None).getattr(7, None)
    assert scope.cancelled_caught


async def test_a_failing_forget_is_reported_and_never_raised():
    reported = value("filer_internal_errors_total")
    with structlog.testing.capture_logs() as logs:
        await Failing(ZeroDivisionError()).forget([(7, 1)])
    assert value("filer_internal_errors_total") == reported + 1
    assert logs[0]["operation"] == "forget"


def test_handlers_that_a_class_does_not_have_stay_pyfuse3s():
    assert Failing.open is pyfuse3.Operations.open
    assert Failing.getattr is not pyfuse3.Operations.getattr
